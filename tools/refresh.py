"""Regenerate every stored output: python tools/refresh.py [notebook ...]

The only writer of stored notebooks. A second run changes no byte, except in cells that are excused from
comparison (tag `nbval-ignore-output`), and those keep their stored output while the code up to them is unchanged.
An appendix whose library is not installed is left as it is, with a line that says so.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from lora_edu.course import NOTEBOOKS, ROOT, chapters
from lora_edu.practice import bank

COVER = ROOT / "docs" / "cover.png"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"


def fill_questions(notebook: NotebookNode) -> None:
    """Write the bank's text into the cells that name a question, numbered in order."""
    number = 0
    for cell in notebook.cells:
        if identity := cell.metadata.get("lora_edu", {}).get("question"):
            number += 1
            cell.source = bank.render(bank.load()[identity], number).rstrip("\n")


def execute(notebook: NotebookNode, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ["LORA_EDU_HOME"] = home  # no predictions, no progress: every reader starts there
        client = NotebookClient(
            notebook,
            timeout=120,
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()


def is_excused(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and "nbval-ignore-output" in cell.metadata.get("tags", [])


def code_so_far(notebook: NotebookNode, number: int) -> str:
    """A hash of the code that made this cell's output: all cells up to it."""
    code = [cell.source for cell in notebook.cells[: number + 1] if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:12]


def tidy(notebook: NotebookNode, before: NotebookNode) -> None:
    """Drop what differs from run to run or from editor to editor."""
    kept = {
        cell.metadata["lora_edu"]["code"]: cell.outputs
        for cell in before.cells
        if is_excused(cell) and cell.outputs and "code" in cell.metadata["lora_edu"]
    }
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in ("tags", "lora_edu") if key in cell.metadata})
        if cell.cell_type != "code":
            continue
        if is_excused(cell):
            cell.metadata["lora_edu"]["code"] = code = code_so_far(notebook, number)
            cell.outputs = kept.get(code, cell.outputs)
        for output in cell.outputs:
            # A static page shows the widget's picture; the widget itself needs a running kernel.
            output.get("data", {}).pop(WIDGET, None)


def write_cover(notebook: NotebookNode) -> None:
    """Store the figure of the cell marked as cover where the README shows it."""
    for cell in notebook.cells:
        if cell.metadata.get("lora_edu", {}).get("cover"):
            pictures = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
            COVER.parent.mkdir(exist_ok=True)
            COVER.write_bytes(base64.b64decode(pictures[0]))


def missing(path: Path) -> list[str]:
    """What an appendix needs and is not installed: libraries, or the weights of appendix A. The chapters need neither."""
    if path.parent.name != "appendix":
        return []
    setup = next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    tree = ast.parse(setup)
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    absent = [name for name in names if find_spec(name.split(".")[0]) is None]
    if not absent and "import minilm" in setup:
        from lora_edu.lab import minilm

        try:
            minilm.files()
        except RuntimeError:
            absent.append(minilm.NAME)
    return absent


def refresh(path: Path) -> bool:
    """Regenerate one notebook; return whether its file changed."""
    text: Any = path.read_text(encoding="utf-8")
    before = nbformat.reads(text, as_version=4)
    notebook = nbformat.reads(text, as_version=4)
    fill_questions(notebook)
    execute(notebook, path.parent)
    tidy(notebook, before)
    nbformat.validate(notebook)
    write_cover(notebook)
    written = nbformat.writes(notebook) + "\n"
    path.write_text(written, encoding="utf-8")
    return bool(written != text)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONHASHSEED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for path in [Path(name).resolve() for name in sys.argv[1:]] or chapters():
        if absent := missing(path):
            said = f"skipped, {', '.join(absent)} is not installed"
        else:
            said = "changed" if refresh(path) else "unchanged"
        print(f"{path.relative_to(NOTEBOOKS)}: {said}", flush=True)


if __name__ == "__main__":
    main()
