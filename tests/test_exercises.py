"""The checks are tested by the solutions they must reject: each known mistake, and every way a function can misbehave."""

from __future__ import annotations

import inspect
import re
import signal
import sys
import time
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_edu import lowrank
from lora_edu.practice import check, exercise, hint, progress, solution
from lora_edu.practice.exercise import Exercise, Mistake, judge
from lora_edu.practice.exercises import load

EXERCISES = load()


def _case(task: Exercise, *rest: Any) -> Any:
    missing = task.needs and find_spec(task.needs) is None
    marks = [pytest.mark.skip(reason=f"{task.needs} is not installed")] if missing else []
    return pytest.param(task, *rest, marks=marks, id="-".join([task.name, *(m.function.__name__ for m in rest)]))


TASKS = [_case(e) for e in EXERCISES.values()]
MISTAKES = [_case(e, m) for e in EXERCISES.values() for m in e.mistakes]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_EDU_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("task", TASKS)
def test_the_reference_passes(task: Exercise) -> None:
    report, _ = judge(task, task.reference)
    assert report.passed is True, report


@pytest.mark.parametrize(("task", "mistake"), MISTAKES)
def test_each_mistake_is_rejected_with_its_own_sentence(task: Exercise, mistake: Mistake) -> None:
    report, smallest = judge(task, mistake.function)
    assert report.passed is False and report.code == mistake.code and mistake.sentence in report.text
    assert smallest
    assert len(report.text.splitlines()) <= 4
    # The properties alone reject it too: recognition names the mistake, it does not find it.
    assert judge(task, mistake.function, mistakes=())[0].passed is False


@pytest.mark.parametrize(("task", "mistake"), MISTAKES)
def test_each_mistake_is_numerically_wrong(task: Exercise, mistake: Mistake) -> None:
    wrong, right = (exercise._behaviour(task, f) for f in (mistake.function, task.reference))
    assert not exercise._same(wrong, right)


@pytest.mark.parametrize(("task", "mistake"), MISTAKES)
def test_no_verdict_shows_the_answer(task: Exercise, mistake: Mistake) -> None:
    report, smallest = judge(task, mistake.function)
    shown = " ".join(f"{report.text} {smallest}".split())
    body = [line.strip() for line in inspect.getsource(task.reference).splitlines()[1:]]
    assert not [line for line in body if len(line) > 15 and line in shown]
    for case in task.cases():
        if case.refuses or task.changes_arguments or isinstance(task.reference, type):
            continue
        for part in task.parse(task.reference(*case.args)):
            if part.size > 1:
                assert np.array2string(part, precision=3, separator=", ") not in shown


def test_every_exercise_is_complete() -> None:
    for task in EXERCISES.values():
        assert len(task.mistakes) >= 4 and len(task.properties) >= 2 and len(task.hints) == 3, task.name
        assert len({m.function for m in task.mistakes}) == len(task.mistakes)
        assert task.level in ("screen", "mid", "senior") and 1 <= task.importance <= 5 and task.minutes > 0


# A learner's function may do anything. `good` is right, so that only the misbehaviour is judged.


def good(M: Any, r: int) -> Any:
    return lowrank.truncated_svd(M, r)


def raises(M: Any, r: int) -> Any:
    raise KeyError("no such thing")


def returns_none(M: Any, r: int) -> Any:
    lowrank.truncated_svd(M, r)


def wrong_shape(M: Any, r: int) -> Any:
    U, s, Vt = good(M, r)
    return U.T, s, Vt.T


def wrong_type(M: Any, r: int) -> Any:
    return "U, s, Vt"


def wrong_parts(M: Any, r: int) -> Any:
    return [np.array(["a"]), None, {}]


def one_array(M: Any, r: int) -> Any:
    return np.ones((3, 3))


def complex_numbers(M: Any, r: int) -> Any:
    return tuple(part + 0j for part in good(M, r))


def nan(M: Any, r: int) -> Any:
    U, s, Vt = good(M, r)
    return U * np.nan, s, Vt


def mutates(M: Any, r: int) -> Any:
    found = good(M, r)
    M *= 0
    return found


def endless(M: Any, r: int) -> Any:
    while True:
        pass


def endless_and_stubborn(M: Any, r: int) -> Any:
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass


def exits(M: Any, r: int) -> Any:
    sys.exit(3)


def recurses(M: Any, r: int) -> Any:
    return recurses(M, r)


def too_few_arguments(M: Any) -> Any:
    return M


def generator(M: Any, r: int) -> Any:
    yield from good(M, r)


class Hostile:
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


def hostile(M: Any, r: int) -> Any:
    return Hostile(), Hostile(), Hostile()


@pytest.mark.parametrize(
    ("function", "code", "says"),
    [
        (raises, "RAISED", "KeyError: 'no such thing'"),
        (returns_none, "NONE", "return statement"),
        (wrong_shape, "SHAPE", "(m, r)"),
        (wrong_type, "TYPE", "three arrays"),
        (wrong_parts, "TYPE", "three arrays"),
        (one_array, "TYPE", "one array of shape (3, 3)"),
        (complex_numbers, "TYPE", "three arrays"),
        (nan, "NAN", "NaN"),
        (mutates, "MUTATES", "changes its input"),
        (exits, "RAISED", "SystemExit"),
        (recurses, "RAISED", "RecursionError"),
        (too_few_arguments, "RAISED", "TypeError"),
        (hostile, "TYPE", "three arrays"),
        (5, "NOT_CALLABLE", "int"),
        (None, "NOT_CALLABLE", "NoneType"),
    ],
)
def test_misbehaviour_gets_a_sentence(function: Any, code: str, says: str) -> None:
    report = check("truncated_svd", function)
    assert report.passed is False and report.code == code and says in report.text
    assert 1 <= len(repr(report).splitlines()) <= 4


def test_a_generator_that_yields_the_parts_is_accepted() -> None:
    assert check("truncated_svd", generator).passed is True


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timer signal")
@pytest.mark.parametrize("function", [endless, endless_and_stubborn])
def test_a_function_that_never_returns_is_stopped(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercise, "SECONDS", 0.3)
    handler, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    report = check("truncated_svd", function)
    assert report.code == "TIMEOUT" and time.monotonic() - start < 3
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_printing_is_kept_out_and_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    def talks(M: Any, r: int) -> Any:
        print("debugging")
        print("more", file=sys.stderr)
        return good(M, r)

    report = check("truncated_svd", talks)
    assert report.passed is True and "keep quiet" in report.text
    assert capsys.readouterr() == ("", "")


def test_the_interrupt_of_the_person_gets_through() -> None:
    def stopped(M: Any, r: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check("truncated_svd", stopped)


def test_stubs_are_not_attempts() -> None:
    def dots(M: Any, r: int) -> Any: ...

    def documented(M: Any, r: int) -> Any:
        """Not yet."""
        ...

    def refusing(M: Any, r: int) -> Any:
        raise NotImplementedError

    class Methods:
        def __init__(self) -> None: ...

        def merge(self) -> None:
            """Not yet."""
            ...

    for stub in (dots, documented, refusing, Methods):
        report = check("truncated_svd", stub)
        assert report.passed is None and repr(report) == "truncated_svd: not attempted yet."
    assert not progress.path().exists()


def test_hints_come_one_at_a_time_and_failures_unlock_more(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = (check("truncated_svd", raises).text for _ in range(3))
    assert "hint(" not in first and 'hint("truncated_svd")' in second and "smallest input that fails: M = [[" in third
    for shown in (1, 2, 3, 3):
        hint("truncated_svd")
        assert capsys.readouterr().out.count("Hint ") == shown


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_prints_the_reference(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    solution(name)
    printed = capsys.readouterr().out
    assert printed.startswith("# lora_edu/") and re.search(rf"^(def|class) {name}\b", printed, re.MULTILINE)


def test_a_missing_library_is_named() -> None:
    report, _ = judge(replace(EXERCISES["truncated_svd"], needs="no_such_library"), good)
    assert report.passed is None and "needs no_such_library" in report.text


def test_unknown_names_get_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'truncated_svd'?" in check("truncated_sdv", good).text
    assert check(None, good).passed is None  # type: ignore[arg-type]
    hint("truncated_sdv"), solution("nothing like it")
    assert capsys.readouterr().out.count("there is no exercise") == 2


def test_a_check_leaves_warnings_settings_alone() -> None:
    before = list(warnings.filters)
    check("truncated_svd", nan)
    assert warnings.filters == before
