"""Practice: exercises with diagnosing checks, predictions, and the question bank.

In a notebook: `check`, `hint`, `solution`, `predict`, `reveal`.
"""

from __future__ import annotations

import inspect
import textwrap
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from lora_edu.practice import progress
from lora_edu.practice.exercise import Exercise, Report, judge
from lora_edu.practice.exercises import find, load
from lora_edu.practice.predictions import predict, reveal

__all__ = ["check", "hint", "predict", "reveal", "solution"]


def check(name: str, learner_object: Any) -> Report:
    """Judge a learner's function: passed, not yet (with the recognised mistake), or not attempted.

    Never raises for what a learner writes. From the second failure on it offers a hint, from the third the
    smallest input that fails.
    """
    exercise = _find(name)
    if exercise is None:
        return Report(str(name), None, "UNKNOWN", _unknown(name))
    report, smallest = judge(exercise, learner_object)
    if report.passed is None:
        return report
    failures = _record(exercise, report)
    text = report.text
    if failures == 2:
        text += f'\nhint("{name}") gives a first step.'
    elif failures > 2:
        text += f'\nThe smallest input that fails: {smallest or "any"}.\nhint("{name}") gives the next step.'
    return Report(report.name, report.passed, report.code, text)


def hint(name: str) -> None:
    """Print the next of three hints; after the third, all of them again."""
    exercise = _find(name)
    if exercise is None:
        print(_unknown(name))
        return
    shown = 0

    def step(state: progress.State) -> None:
        nonlocal shown
        entry = state["exercises"].setdefault(exercise.name, {})
        shown = entry["hints"] = min(int(entry.get("hints", 0)) + 1, 3)

    progress.update(step)
    for number, text in enumerate(exercise.hints[: shown or 3], 1):
        print(f"Hint {number} of 3: {text}")


def solution(name: str) -> None:
    """Print a solution: where the course's module has the function, the module's own code."""
    exercise = _find(name)
    if exercise is None:
        print(_unknown(name))
        return
    home = exercise.reference.__module__
    print(f"# {home.replace('.', '/')}.py\n{textwrap.dedent(inspect.getsource(exercise.reference))}", end="")


def _find(name: Any) -> Exercise | None:
    return find(name) if isinstance(name, str) else None


def _unknown(name: Any) -> str:
    near = get_close_matches(str(name), load(), n=1)
    torch = "" if find_spec("torch") else " Exercises from chapter 03 on need torch, which is not installed."
    return f"there is no exercise {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".") + torch


def _record(exercise: Exercise, report: Report) -> int:
    """Store the verdict and return how often the exercise has failed so far."""
    failures = 0

    def store(state: progress.State) -> None:
        nonlocal failures
        entry = state["exercises"].setdefault(exercise.name, {})
        failures = entry["failures"] = int(entry.get("failures", 0)) + (not report.passed)
        entry["passed"] = bool(entry.get("passed")) or bool(report.passed)

    progress.update(store)
    return 0 if report.passed else failures
