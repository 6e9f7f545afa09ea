"""The learner's file: written whole or not at all, damaged ones kept, two writers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_edu.practice import check, predict, progress, reveal


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_EDU_HOME", str(tmp_path))
    return tmp_path


def test_without_a_guess_nothing_is_said_or_written(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict("key", ...)
    reveal("key", 3.0)
    assert capsys.readouterr() == ("", "") and not list(home.iterdir())


@pytest.mark.parametrize(
    ("guess", "value", "verdict"),
    [
        (90, 91.5, "Well predicted."),
        (12, 91.5, "A surprise."),
        ("More ", "more", "Well predicted."),
        ("fewer", "more", "A surprise."),
        (0, 0, "Well predicted."),
    ],
)
def test_a_guess_is_stored_silently_and_compared_later(
    guess: object, value: object, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    predict("key", guess)
    assert capsys.readouterr().out == ""
    reveal("key", value)  # type: ignore[arg-type]
    assert verdict in capsys.readouterr().out
    assert progress.read()["predictions"]["key"] == {
        "guess": guess,
        "value": value,
        "right": verdict == "Well predicted.",
    }


def test_a_guess_can_change_before_the_result_but_not_after(capsys: pytest.CaptureFixture[str]) -> None:
    predict("key", 1), predict("key", 2), reveal("key", 5)
    predict("key", 5)
    assert "your guess of 2 stands" in capsys.readouterr().out
    assert progress.read()["predictions"]["key"]["guess"] == 2


@pytest.mark.parametrize("guess", [True, None, [1], float("nan"), float("inf")])
def test_what_is_no_prediction_is_not_stored(guess: object, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict("key", guess)
    assert "was not stored" in capsys.readouterr().out and not list(home.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"",
        b"[]",
        b'{"predictions": {}}',
        b'{"predictions": {"a": 1}, "exercises": {}}',
        b"\xff\xfe\x00",
        b"null",
    ],
)
def test_a_damaged_file_is_set_aside_whole_and_named(
    damage: bytes, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.path().write_bytes(damage)
    (home / "progress.damaged-1.json").write_text("an older one")
    predict("key", 7)
    assert "kept as progress.damaged-2.json" in capsys.readouterr().out
    assert (home / "progress.damaged-2.json").read_bytes() == damage
    assert (home / "progress.damaged-1.json").read_text() == "an older one"
    assert progress.read()["predictions"] == {"key": {"guess": 7}}


def test_a_crash_while_writing_leaves_the_old_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict("key", 1)
    before = progress.path().read_bytes()

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    predict("key", 2)
    assert progress.path().read_bytes() == before


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_record(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("LORA_EDU_HOME", str(home / "file"))
    predict("key", 1)
    report = check("truncated_svd", lambda M, r: M)
    assert report.passed is False and "could not be stored" in capsys.readouterr().out


def test_two_notebooks_may_write_at_once(home: Path) -> None:
    code = "import sys; from lora_edu.practice import predict\nfor i in range(40): predict(f'{sys.argv[1]}-{i}', i)"
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(json.loads(progress.path().read_text())["predictions"]) == 80
