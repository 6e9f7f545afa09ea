"""What to adapt, and how: the field names, defaults and meanings are peft's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
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

    Raises TypeError or ValueError, naming the field, for values that cannot be meant. None stands for "nothing named".

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
        for name, nothing in (
            ("modules_to_save", ()),
            ("exclude_modules", ()),
            ("rank_pattern", {}),
            ("alpha_pattern", {}),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, nothing)
        if not self.target_modules:
            raise ValueError("target_modules is empty: name the modules to adapt, or say 'all-linear'.")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "modules_to_save":
                _regex(name, value)
            elif isinstance(value, str) or not all(isinstance(entry, str) for entry in value):
                raise TypeError(f"{name} must be a list of names; got {value!r}.")
        for name in (*self.rank_pattern, *self.alpha_pattern):
            _regex("a pattern", name)
        # Python's own numbers from here on: NumPy's cannot be written to the adapter's file.
        plain = {
            "r": whole_rank("r", self.r),
            "lora_alpha": finite_alpha("lora_alpha", self.lora_alpha),
            "lora_dropout": probability("lora_dropout", self.lora_dropout),
            "rank_pattern": {k: whole_rank(f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items()},
            "alpha_pattern": {k: finite_alpha(f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()},
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
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


def whole_rank(name: str, rank: int) -> int:
    """`rank` as an int. Raises TypeError when it is no integer, ValueError when it is below 1."""
    try:
        whole = index(rank)
    except TypeError:
        whole = None
    if whole is None or isinstance(rank, bool):
        raise TypeError(f"{name} must be an integer; got {rank!r}.")
    if whole < 1:
        raise ValueError(f"{name} must be at least 1; got {rank}.")
    return whole


def finite_alpha(name: str, alpha: float) -> float:
    """`alpha` as a number of Python's. Raises TypeError when it is no real number, ValueError when it is not finite or 0."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"{name} must be a number; got {alpha!r}.")
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"{name} must be finite and not 0, which would switch the update off; got {alpha!r}.")
    return int(alpha) if isinstance(alpha, Integral) else float(alpha)


def probability(name: str, p: float) -> float:
    """`p` as a float. Raises TypeError when it is no real number, ValueError outside 0 <= p < 1."""
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{name} must be a number; got {p!r}.")
    if not 0 <= p < 1:
        raise ValueError(f"{name} is a probability: 0 <= {name} < 1; got {p}.")
    return float(p)
