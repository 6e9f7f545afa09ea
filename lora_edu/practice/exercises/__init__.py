"""The exercises, one file a chapter: signature, reference, cases, properties, hints and known mistakes side by side."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from lora_edu.practice.exercise import Exercise


@cache
def load() -> dict[str, Exercise]:
    """All exercises by name, in the order of the chapters."""
    found: dict[str, Exercise] = {}
    for module in sorted(m.name for m in iter_modules(__path__)):
        for value in vars(import_module(f"{__name__}.{module}")).values():
            if isinstance(value, Exercise):
                if value.name in found:
                    raise ValueError(f"two exercises are named {value.name!r}.")
                found[value.name] = value
    return found
