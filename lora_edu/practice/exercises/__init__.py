"""The exercises, one file a chapter: signature, reference, cases, properties, hints and known mistakes side by side."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from lora_edu.practice.exercise import Exercise


@cache
def load() -> dict[str, Exercise]:
    """All exercises by name, in the order of the chapters; those of a chapter that needs torch, where there is torch."""
    found: dict[str, Exercise] = {}
    for chapter in _chapters():
        for exercise in _of(chapter):
            if exercise.name in found:
                raise ValueError(f"two exercises are named {exercise.name!r}.")
            found[exercise.name] = exercise
    return found


def find(name: str) -> Exercise | None:
    """The exercise of that name. Later chapters than its own are not imported: chapter 01 does not wait for torch."""
    return next((e for chapter in _chapters() for e in _of(chapter) if e.name == name), None)


def _chapters() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


@cache
def _of(chapter: str) -> list[Exercise]:
    try:
        module = import_module(f"{__name__}.{chapter}")
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        return []
    return [value for value in vars(module).values() if isinstance(value, Exercise)]
