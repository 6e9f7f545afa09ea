"""lora_edu: the one implementation of everything that the notebooks build by hand.

Importing it is free: each name below is imported when it is first used, so that `lora_edu.lowrank` and
`lora_edu.practice` work where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    **dict.fromkeys(["LoRAConfig"], "config"),
    **dict.fromkeys(["lora_linear"], "functional"),
    **dict.fromkeys(["LoRALinear", "LoRAEmbedding", "LoRAConv2d"], "layers"),
    **dict.fromkeys(["add_lora", "remove_lora", "merge_lora", "unmerge_lora", "disabled"], "inject"),
    **dict.fromkeys(["lora_parameters", "parameter_report"], "inject"),
    **dict.fromkeys(["save_adapter", "load_adapter", "combine"], "adapters"),
}
_MODULES = (
    *("adapters", "config", "cost", "course", "figures", "functional", "inject", "lab", "layers"),
    *("lowrank", "peft_methods", "practice", "widgets"),
)

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"lora_edu.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"lora_edu.{name}")
    raise AttributeError(f"lora_edu has no {name!r}; it has {', '.join(sorted(__all__))}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
