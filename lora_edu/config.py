"""What to adapt, and how: the field names, defaults and meanings are peft's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index

BIAS = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRAConfig:
    """The configuration of a LoRA, validated when it is made.

    target_modules    a list of names, each matching a module of that name or whose path ends in ".name"; or one
                      string, a regular expression for the whole path; or "all-linear"
    r, lora_alpha     rank and alpha; the scale is alpha / r, with use_rslora alpha / sqrt(r)
    lora_dropout      probability, on the input of A
    bias              "none", "all" or "lora_only": which biases train with the adapter
    use_dora          also train the length of every row of W (Linear only)
    modules_to_save   modules trained whole and saved with the adapter, such as a new head (names as above)
    exclude_modules   modules never adapted (a list or a regular expression, as above)
    rank_pattern, alpha_pattern
                      {pattern: value} for layers that differ; a pattern is a regular expression that the path
                      must end in, and the first that matches counts

    Raises TypeError or ValueError, naming the field, for values that cannot be meant.

    Source: Hu et al. 2021 (LoRA); Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA); Liu et al. 2024, arXiv
    2402.09353 (DoRA); the fields are those of peft.LoraConfig.
    """

    target_modules: str | Sequence[str]
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: Sequence[str] = ()
    exclude_modules: str | Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ValueError("target_modules is empty: name the modules to adapt, or say 'all-linear'.")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "modules_to_save":
                _regex(name, value)
            elif isinstance(value, str) or not all(isinstance(entry, str) for entry in value):
                raise TypeError(f"{name} must be a list of names; got {value!r}.")
        for pattern, rank in {"r": self.r, **self.rank_pattern}.items():
            _rank(pattern if pattern == "r" else f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                raise ValueError(f"{pattern} must be a finite number; got {alpha!r}.")
        for name in (*self.rank_pattern, *self.alpha_pattern):
            _regex("a pattern", name)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is a probability: 0 <= lora_dropout < 1; got {self.lora_dropout}.")
        if self.bias not in BIAS:
            raise ValueError(f"bias is one of {', '.join(BIAS)}; got {self.bias!r}.")

    def rank(self, path: str) -> int:
        """The rank of the layer at `path`."""
        return next((v for k, v in self.rank_pattern.items() if ends_in(k, path)), self.r)

    def alpha(self, path: str) -> float:
        """The alpha of the layer at `path`."""
        return next((v for k, v in self.alpha_pattern.items() if ends_in(k, path)), self.lora_alpha)


def ends_in(pattern: str, path: str) -> bool:
    """Whether `path`, or what follows one of its dots, matches the pattern to the end (peft's rule for patterns)."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def named(names: str | Sequence[str], path: str) -> bool:
    """Whether `path` is meant: by a regular expression for all of it, or by a list of names or endings."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _regex(field_name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field_name}: {pattern!r} is not a regular expression: {error}.") from None


def _rank(field_name: str, rank: int) -> None:
    try:
        whole = index(rank)
    except TypeError:
        raise TypeError(f"{field_name} must be an integer; got {rank!r}.") from None
    if whole < 1:
        raise ValueError(f"{field_name} must be at least 1; got {rank}.")
