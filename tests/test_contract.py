"""The notebook contract: what a machine can decide about order, presence, alternative text and outputs."""

from __future__ import annotations

import ast
import base64
import inspect
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lora_edu.course import NOTEBOOKS, ROOT, chapters
from lora_edu.practice import bank, check
from lora_edu.practice.exercises import load
from tools import refresh

EXERCISES = load()

# Cells whose output is stored but not compared, with the reason that the cell itself states.
EXCUSED = {
    "03_the_lora_layer.ipynb": [
        "trained for 120 steps: on another CPU one of 497 test pictures may be decided differently",
    ]
    * 3,
    "02_the_change_survives_the_cut.ipynb": [
        "samples from a model trained here: one rounding can change a letter and all that follow"
    ],
    "04_training_and_what_it_saves.ipynb": [
        "samples from models trained here: one rounding can change a letter and all that follow",
        "prints times, which are the machine's own",
    ],
    "01_low_rank_approximation.ipynb": ["prints times, which are the machine's own"],
    "06_the_peft_family.ipynb": ["prints times, which are the machine's own"],
}
# Chapters that are still growing, and the number of exercises that they have so far; the others have two to seven.
GROWING = {"07": 0}

VERBS = ("write", "state", "derive", "debug", "compute", "show", "refute", "explain")
MACHINE = re.compile(r"/(?:home|root|tmp|work|Users|private|opt)/|[A-Z]:\\|site-packages|0x[0-9a-f]{6,}")


class Notebook:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = json.loads(path.read_text(encoding="utf-8"))
        self.cells: list[dict[str, Any]] = self.raw["cells"]
        self.chapter = path.name.split("_")[0]
        for cell in self.cells:
            cell["text"] = "".join(cell["source"])

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [cell for cell in self.cells if cell["cell_type"] == kind]

    @property
    def code(self) -> list[dict[str, Any]]:
        return self.of("code")

    @property
    def prose(self) -> str:
        return "\n\n".join(cell["text"] for cell in self.of("markdown"))

    @property
    def headings(self) -> list[str]:
        return re.findall(r"^#{1,6} (.+)$", self.prose, re.MULTILINE)

    def position(self, needle: str) -> int:
        """The index of the first cell that contains `needle`."""
        found = [i for i, cell in enumerate(self.cells) if needle in cell["text"]]
        assert found, f"{self.path.name} has no cell with {needle!r}"
        return found[0]


def tags(cell: dict[str, Any]) -> list[str]:
    return list(cell["metadata"].get("tags", []))


def stub_of(cell: dict[str, Any]) -> ast.FunctionDef | ast.ClassDef:
    return next(n for n in ast.parse(cell["text"]).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))


def outputs(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return list(cell["outputs"])


@pytest.fixture(params=chapters(), ids=lambda p: p.stem)
def notebook(request: pytest.FixtureRequest) -> Notebook:
    return Notebook(request.param)


# An appendix keeps what applies: it has no goals, exercises or questions.
of_chapters = pytest.mark.parametrize(
    "notebook", [p for p in chapters() if p.parent == NOTEBOOKS], indirect=True, ids=lambda p: p.stem
)


def test_it_opens_with_claim_time_level_and_needs(notebook: Notebook) -> None:
    opening = notebook.cells[0]["text"]
    assert opening.startswith(f"# {notebook.chapter} ")
    assert re.search(r"^\*\*This chapter proves .+\*\*$", opening, re.MULTILINE)
    for word in ("Time: ", " minutes", "Level: ", "Needed: ", "Skip it if"):
        assert word in opening, word


def test_the_setup_is_one_cell_with_at_most_six_imports_seeds_and_one_thread(notebook: Notebook) -> None:
    setup = notebook.code[0]["text"]
    assert len([n for n in ast.parse(setup).body if isinstance(n, (ast.Import, ast.ImportFrom))]) <= 6
    assert "SEEDS = (0, 1, 2" in setup
    if any("exercise" in tags(cell) for cell in notebook.code):
        assert "from lora_edu.practice import check, hint, predict, reveal, solution" in setup
    everything = "\n".join(cell["text"] for cell in notebook.code)
    assert ("torch" in everything) == ("torch.set_num_threads(1)" in setup)
    assert ("figures." in everything) <= ("figures.style()" in setup)


@of_chapters
def test_the_parts_come_in_order(notebook: Notebook) -> None:
    first_prediction = min(
        i
        for i, c in enumerate(notebook.cells)
        if c["cell_type"] == "code" and "predict(" in c["text"] and "import" not in c["text"]
    )
    order = [
        first_prediction,
        notebook.position("## Goals"),
        notebook.position("## Controls"),
        notebook.position("## Questions and answers"),
        notebook.position("## Recap"),
    ]
    if notebook.chapter >= "02":
        order.insert(1, notebook.position("## Warm-up"))
        warm_up = notebook.cells[notebook.position("## Warm-up")]["text"]
        assert len(re.findall(r"^\d\. .*<details><summary>Answer</summary>", warm_up, re.MULTILINE)) >= 3
    assert order == sorted(order)
    controls = notebook.cells[order[-3]]["text"]
    assert re.search(r"\*\*[^*]+\?\*\*", controls), "a control is a question and the cell that answers it"
    assert not re.search(r"\b[A-Z]{8,}\b", "".join(c["text"] for c in notebook.cells if c["cell_type"] == "markdown"))


@of_chapters
def test_goals_begin_with_a_verb_and_link_to_their_section(notebook: Notebook) -> None:
    goals = re.findall(
        r"^\d+\. (\w+) .+\[.+\]\(#(.+)\)[;.]$",
        notebook.cells[notebook.position("## Goals")]["text"],
        re.MULTILINE,
    )
    assert 4 <= len(goals) <= 7
    anchors = {heading.replace(" ", "-") for heading in notebook.headings}
    for verb, anchor in goals:
        assert verb in VERBS and anchor in anchors, (verb, anchor)


def test_predictions_are_open_and_revealed_later(notebook: Notebook) -> None:
    made, shown = {}, {}
    for number, cell in enumerate(notebook.code):
        for key in re.findall(r'^predict\("(.+?)", \.\.\.\)', cell["text"], re.MULTILINE):
            made[key] = number
        for key in re.findall(r'^reveal\("(.+?)"', cell["text"], re.MULTILINE):
            shown[key] = number
    assert made and made.keys() == shown.keys()
    assert all(key.startswith(f"{notebook.chapter}-") and made[key] < shown[key] for key in made)
    assert sum(cell["text"].count("predict(") for cell in notebook.code) == len(made)


@of_chapters
def test_exercises_stand_under_their_heading_with_stub_and_check(notebook: Notebook) -> None:
    found = []
    for number, cell in enumerate(notebook.cells):
        if "exercise" not in tags(cell):
            continue
        stub = stub_of(cell)
        task = EXERCISES[stub.name]
        functions = (
            [n for n in stub.body if isinstance(n, ast.FunctionDef)] if isinstance(stub, ast.ClassDef) else [stub]
        )
        arguments = [a.arg for a in functions[0].args.args if a.arg != "self"]
        assert arguments == list(inspect.signature(task.reference).parameters)
        assert ast.get_docstring(stub) and all(ast.unparse(f.body[-1]) == "..." for f in functions)
        assert cell["text"].rstrip().endswith(f'check("{stub.name}", {stub.name})')
        above = notebook.cells[number - 1]["text"]
        assert above.startswith(task.heading), f"the heading should be: {task.heading}"
        assert f'hint("{stub.name}")' in above and f'solution("{stub.name}")' in above
        assert "".join(outputs(cell)[0]["data"]["text/plain"]) == f"{stub.name}: not attempted yet."
        found.append(stub.name)
    assert found == sorted(found, key=found.index) and set(found) == {
        e.name for e in EXERCISES.values() if e.chapter == notebook.chapter
    }
    assert len(found) == GROWING[notebook.chapter] if notebook.chapter in GROWING else 2 <= len(found) <= 7


@of_chapters
def test_filled_with_the_references_all_checks_pass(
    notebook: Notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EDU_HOME", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    space: dict[str, Any] = {}
    exec(notebook.code[0]["text"], space)
    for cell in notebook.code:
        if "exercise" in tags(cell):
            exec(cell["text"], space)
            name = stub_of(cell).name
            assert space["check"] is check and check(name, space[name]).passed is None
            space[name] = EXERCISES[name].reference
            assert eval(cell["text"].rstrip().splitlines()[-1], space).passed is True


@pytest.fixture(autouse=True)
def _default_dtype() -> Any:
    """A chapter may compute in float64; the other tests may not notice."""
    yield
    try:
        import torch
    except ImportError:
        return
    torch.set_default_dtype(torch.float32)


@of_chapters
def test_the_questions_are_the_banks(notebook: Notebook) -> None:
    identities = [
        cell["metadata"]["lora_edu"]["question"]
        for cell in notebook.cells
        if "question" in cell["metadata"].get("lora_edu", {})
    ]
    assert len(identities) >= 6 and sorted(identities) == sorted(q["id"] for q in bank.of_chapter(notebook.chapter))
    for number, identity in enumerate(identities, 1):
        cell = next(c for c in notebook.cells if c["metadata"].get("lora_edu", {}).get("question") == identity)
        question = bank.load()[identity]
        assert cell["text"] == bank.render(question, number).rstrip("\n"), (
            f"{identity} differs from the bank: make notebooks"
        )
        assert question.get("measured") in notebook.headings or ("measured" not in question and "check" in question)


def test_every_figure_has_alternative_text(notebook: Notebook) -> None:
    for cell in notebook.code:
        pictures = [o for o in outputs(cell) if "image/png" in o.get("data", {})]
        shows = sum(map(cell["text"].count, ("figures.show(", "_slider(", "_calculator(", "_explorer(")))
        assert len(pictures) == shows, "pictures are shown by figures.show or a widget, and by nothing else"
        for picture in pictures:
            alt = picture["metadata"].get("image/png", {}).get("alt", "")
            assert len(alt.split()) >= 8 and "".join(picture["data"]["text/plain"]) in (
                f"Figure: {alt}",
                f"Widget: {alt}",
            )
            assert base64.b64decode("".join(picture["data"]["image/png"]))[:4] == b"\x89PNG"


def test_the_recap_has_table_limits_and_references(notebook: Notebook) -> None:
    recap = notebook.cells[notebook.position("## Recap")]["text"]
    assert "| --- |" in recap and "**What this toy does not show.**" in recap and "**References.**" in recap
    assert len(re.findall(r"^[1-5]\. .+", recap, re.MULTILINE)) == 5


def test_outputs_are_complete_comparable_and_say_nothing_of_the_machine(notebook: Notebook) -> None:
    assert [cell["execution_count"] for cell in notebook.code] == list(range(1, len(notebook.code) + 1))
    for cell in notebook.code:
        for output in outputs(cell):
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            text = json.dumps({**output, "data": {k: v for k, v in output.get("data", {}).items() if k != "image/png"}})
            assert not MACHINE.search(text), text
    assert not MACHINE.search(notebook.prose)
    assert notebook.path.stat().st_size < 1_500_000


def test_the_excused_cells_are_those_on_the_list(notebook: Notebook) -> None:
    excused = [cell["metadata"]["lora_edu"]["excused"] for cell in notebook.code if "nbval-ignore-output" in tags(cell)]
    assert excused == EXCUSED.get(notebook.path.name, [])
    everything = "\n".join(cell["text"] for cell in notebook.code)
    assert not re.search(r"NBVAL_|%%|raises-exception|nbval-skip", everything + str([tags(c) for c in notebook.cells]))


def test_it_is_stored_as_the_refresh_writes_it(notebook: Notebook) -> None:
    assert [cell["id"] for cell in notebook.cells] == [f"cell-{i:03d}" for i in range(len(notebook.cells))]
    assert notebook.raw["metadata"].keys() == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert cell["metadata"].keys() <= {"tags", "lora_edu"} and cell["text"].strip()
    stored = nbformat.read(notebook.path, as_version=4)
    for number, cell in enumerate(stored.cells):
        if refresh.is_excused(cell):  # nothing else would notice that its output is older than its code
            assert cell.metadata["lora_edu"]["code"] == refresh.code_so_far(stored, number)


def test_links_lead_somewhere(notebook: Notebook) -> None:
    anchors = {heading.replace(" ", "-") for heading in notebook.headings}
    for target in re.findall(r"\]\(([^)\s]+)\)", notebook.prose):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (notebook.path.parent / target.split("#")[0]).exists(), target


def test_the_readme_shows_the_figure_of_the_chapter() -> None:
    covers = []
    for path in chapters():
        for cell in Notebook(path).code:
            if cell["metadata"].get("lora_edu", {}).get("cover"):
                covers += [
                    base64.b64decode("".join(o["data"]["image/png"])) for o in outputs(cell) if "image/png" in o["data"]
                ]
    assert len(covers) == 1 and (ROOT / "docs" / "cover.png").read_bytes() == covers[0]
    assert "docs/cover.png" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_list_of_excuses_names_existing_notebooks() -> None:
    assert all((NOTEBOOKS / name).exists() for name in EXCUSED)
