"""lora_edu: the one implementation of everything that the notebooks build by hand.

Importing it is free: each name below is imported when it is first used, so that `lora_edu.lowrank` and
`lora_edu.practice` work where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "LoRALinear": "layers",
    "lora_linear": "functional",
}
_MODULES = ("figures", "functional", "layers", "lowrank", "practice", "widgets")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"lora_edu.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"lora_edu.{name}")
    raise AttributeError(f"lora_edu has no {name!r}; it has {', '.join(sorted(__all__))}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
