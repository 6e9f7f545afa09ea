"""The laboratory: text that every Python carries, the base model, its training, and stored runs.

Importing it is free: each module is imported when it is first used, and the corpora work without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = ("at_scale", "chapter02", "chapter04", "chapter05", "chapter06", "corpus", "model", "runs", "training")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"lora_edu.lab.{name}")
    raise AttributeError(f"lora_edu.lab has no {name!r}; it has {', '.join(_MODULES)}.")
