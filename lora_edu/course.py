"""The learner's copy of the course: made once, never overwritten, opened in JupyterLab."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"


class CourseError(Exception):
    """Something that the person at the keyboard can put right; the message says how."""


def work() -> Path:
    """The learner's folder: LORA_EDU_HOME when it is set, otherwise `work/` in the clone."""
    return Path(os.environ.get("LORA_EDU_HOME") or ROOT / "work").resolve()


def chapters(folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks below a folder, in the order of the course."""
    return sorted(p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def prepare() -> list[str]:
    """Copy the chapters that the learner's folder does not have yet, outputs cleared; return what there is to say about it."""
    if not NOTEBOOKS.is_dir():
        raise CourseError(
            "The notebooks are not here: run this from a clone of the repository, installed with `pip install -e .`."
        )
    said = []
    for source in chapters():
        copy = work() / source.relative_to(NOTEBOOKS)
        if not copy.exists():
            _copy(source, copy)
        elif _origin(copy) != _digest(source):
            said.append(
                f"{copy.name} has a newer version; yours is kept. For a new copy beside it: python -m lora_edu fresh {copy.name.split('_')[0]}"
            )
    return said


def fresh(chapter: str) -> str:
    """Give a new copy of one chapter, named by its number or file name; the old one is kept under another name."""
    found = [p for p in chapters() if chapter and p.name.startswith(chapter)]
    if len(found) != 1:
        have = ", ".join(p.name for p in chapters())
        raise CourseError(f"{chapter!r} does not name one chapter. The chapters: {have}.")
    copy = work() / found[0].relative_to(NOTEBOOKS)
    if not copy.exists():
        _copy(found[0], copy)
        return f"{copy.name} is ready in {copy.parent.name}/."
    number = 1
    while (kept := copy.with_name(f"{copy.stem}.kept-{number}.ipynb")).exists():
        number += 1
    copy.rename(kept)
    _copy(found[0], copy)
    return f"{copy.name} is fresh; your old one is kept as {kept.name}."


def lab(arguments: list[str]) -> int:
    """Open the learner's folder in JupyterLab and wait for it; extra arguments are JupyterLab's own."""
    for line in prepare():
        print(line)
    # The settings keep JupyterLab from asking for news: the course makes no request that leaves the machine.
    command = [
        *(sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={work()}"),
        f"--LabApp.app_settings_dir={Path(__file__).parent / 'lab_settings'}",
        "--LabApp.news_url=None",
        *arguments,
    ]
    # One thread: on small matrices more threads wait for each other longer than they compute.
    defaults = {"OMP_NUM_THREADS": "1", "LORA_EDU_PROGRESS": "1"}  # and bars for what takes longer than ten seconds
    environment = {**defaults, **os.environ, "LORA_EDU_HOME": str(work())}
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    except KeyboardInterrupt:
        return 0


def _copy(source: Path, target: Path) -> None:
    notebook = json.loads(source.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    notebook["metadata"]["lora_edu"] = {"origin": _digest(source)}
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    part.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, target)


def _origin(copy: Path) -> Any:
    try:
        return json.loads(copy.read_text(encoding="utf-8"))["metadata"]["lora_edu"]["origin"]
    except (ValueError, KeyError, OSError, TypeError):
        return None


def _digest(source: Path) -> str:
    """What the learner would see change: the cells' sources, not the stored outputs."""
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    text = json.dumps([[cell["cell_type"], "".join(cell["source"])] for cell in cells])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
