"""The learner's copy: made once, cleared, never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_edu import course
from lora_edu.__main__ import main


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    notebooks, work = tmp_path / "notebooks", tmp_path / "work"
    notebooks.mkdir()
    for name, text in (("01_one", "x = 1"), ("02_two", "y = 2")):
        write(notebooks / f"{name}.ipynb", text)
    monkeypatch.setattr(course, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(course, "chapters", lambda folder=notebooks: sorted(folder.rglob("*.ipynb")))
    monkeypatch.setenv("LORA_EDU_HOME", str(work))
    return notebooks, work


def write(path: Path, text: str) -> None:
    output = {"output_type": "stream", "name": "stdout", "text": ["the result"]}
    cell = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "source": [text],
        "outputs": [output],
        "execution_count": 1,
    }
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def cell(path: Path) -> dict:
    return json.loads(path.read_text())["cells"][0]


def test_the_copy_shows_no_result(folders: tuple[Path, Path]) -> None:
    assert course.prepare() == []
    copied = cell(folders[1] / "01_one.ipynb")
    assert copied["source"] == ["x = 1"] and copied["outputs"] == [] and copied["execution_count"] is None


def test_the_learners_work_is_never_overwritten(folders: tuple[Path, Path]) -> None:
    course.prepare()
    mine = folders[1] / "01_one.ipynb"
    (folders[1] / "02_two.ipynb").write_text("not even a notebook any more")
    edited = mine.read_text().replace("x = 1", "x = my answer")
    mine.write_text(edited)
    write(folders[0] / "01_one.ipynb", "x = 1  # the course has moved on")
    said = course.prepare()
    assert mine.read_text() == edited and (folders[1] / "02_two.ipynb").read_text() == "not even a notebook any more"
    assert any("01_one.ipynb has a newer version; yours is kept" in line for line in said)


def test_a_new_output_is_no_new_version(folders: tuple[Path, Path]) -> None:
    course.prepare()
    source = folders[0] / "01_one.ipynb"
    source.write_text(source.read_text().replace("the result", "another result"))
    assert course.prepare() == []


def test_fresh_keeps_the_old_copy_each_time(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    course.prepare()
    mine = folders[1] / "01_one.ipynb"
    for number in (1, 2):
        mine.write_text(mine.read_text().replace("x = 1", f"x = answer {number}"))
        assert main(["fresh", "01"]) == 0
        assert cell(folders[1] / f"01_one.kept-{number}.ipynb")["source"] == [f"x = answer {number}"]
        assert cell(mine)["source"] == ["x = 1"]
    assert "kept as 01_one.kept-2.ipynb" in capsys.readouterr().out


def test_an_appendix_is_copied_and_renewed_in_its_folder(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = folders[0] / "appendix" / "A_more.ipynb"
    source.parent.mkdir()
    write(source, "z = 3")
    course.prepare()
    assert cell(folders[1] / "appendix" / "A_more.ipynb")["source"] == ["z = 3"]
    write(source, "z = 4")
    (said,) = course.prepare()
    assert said.endswith("fresh A") and main(["fresh", "A"]) == 0
    assert cell(folders[1] / "appendix" / "A_more.ipynb")["source"] == ["z = 4"]
    assert cell(folders[1] / "appendix" / "A_more.kept-1.ipynb")["source"] == ["z = 3"]
    (folders[1] / "appendix" / "A_more.ipynb").unlink()
    assert main(["fresh", "A"]) == 0 and "A_more.ipynb is ready in appendix/." in capsys.readouterr().out


@pytest.mark.parametrize("chapter", ["", "7", "0", "nothing"])
def test_a_chapter_that_is_none_is_named_with_those_that_are(chapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fresh", chapter]) == 1
    assert "The chapters: 01_one.ipynb, 02_two.ipynb" in capsys.readouterr().err


def test_outside_a_clone_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(course, "NOTEBOOKS", tmp_path / "nowhere")
    assert main(["lab"]) == 1
    assert "from a clone of the repository" in capsys.readouterr().err
