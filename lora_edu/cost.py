"""What fine-tuning costs, in parameters, bytes and FLOPs: the formulas, the same things measured, and published counts.

Units: bytes, with 1 GB = 1e9 and 1 GiB = 2**30; FLOPs, a multiply-add being 2. Letters: a linear map W is (m, n), out
by in; M is the number of weights in linear maps, n_L that of the parameters of a LoRA.

The formulas need nothing but Python; torch is imported by the measuring functions only.
Bad input raises `ValueError` or `TypeError` with one sentence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from operator import index
from pathlib import Path
from time import thread_time
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakSet

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

# ---------------------------------------------------------------------------------------------------- parameters

GROUPS = {
    "q,v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        try:
            index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer; got {value!r}.") from None
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer that its costs depend on.

    hidden, intermediate    width between the blocks, and inside the MLP
    layers, vocab, heads    numbers of blocks, of tokens, of attention heads
    kv_heads                heads of keys and values, where several queries share one (0: as many as heads)
    head_dim                width of a head (0: hidden / heads)
    tied                    embedding and head are one matrix
    gated                   the MLP has three maps, gate, up and down; otherwise up and down
    biases                  every map of a block and every norm has a bias
    positions               rows of a learned table of positions
    """

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    tied: bool = False
    gated: bool = True
    biases: bool = False
    positions: int = 0

    def __post_init__(self) -> None:
        _at_least(1, hidden=self.hidden, intermediate=self.intermediate, layers=self.layers)
        _at_least(1, vocab=self.vocab, heads=self.heads)
        _at_least(0, kv_heads=self.kv_heads, head_dim=self.head_dim, positions=self.positions)
        if not self.head_dim and self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is no multiple of heads {self.heads}; say head_dim.")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}.")

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear map of a block, in the order of the forward pass.

        With grouped queries k_proj and v_proj are not square: they have kv_heads heads.
        """
        d, ff, width = self.hidden, self.intermediate, self.head_dim or self.hidden // self.heads
        q, kv = self.heads * width, (self.kv_heads or self.heads) * width
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        gate = {"gate_proj": (ff, d)} if self.gated else {}
        return {**attention, **gate, "up_proj": (ff, d), "down_proj": (d, ff)}


def _gpt(hidden: int, layers: int, heads: int) -> Shape:
    return Shape(hidden, 4 * hidden, layers, 50257, heads, tied=True, gated=False, biases=True, positions=1024)


# From the models' config.json; GPT-3: Brown et al. 2020, table 2.1.
SHAPES = {
    "GPT-2 medium": _gpt(1024, 24, 16),
    "GPT-3 175B": Shape(12288, 49152, 96, 50257, 96, tied=True, gated=False, biases=True, positions=2048),
    "Llama-2-7B": Shape(4096, 11008, 32, 32000, 32),
    "Llama-2-13B": Shape(5120, 13824, 40, 32000, 40),
    "Llama-2-70B": Shape(8192, 28672, 80, 32000, 64, kv_heads=8),
    "Mistral-7B": Shape(4096, 14336, 32, 32000, 32, kv_heads=8),
    "Llama-3.1-8B": Shape(4096, 14336, 32, 128256, 32, kv_heads=8),
    "Llama-3.2-3B": Shape(3072, 8192, 28, 128256, 24, kv_heads=8, tied=True),
}


def parameters(shape: Shape) -> int:
    """All parameters: embeddings, the blocks' maps and two norms each, the last norm, the head.

    With a LoRA there are `lora_parameters` more, and after merging as many as before: never fewer.
    Measured by `lora_edu.parameter_report`.
    """
    tables = shape.vocab * (1 if shape.tied else 2) + shape.positions
    return tables * shape.hidden + linear_weights(shape) + norm_parameters(shape) + _map_biases(shape)


def linear_weights(shape: Shape) -> int:
    """The weights of the blocks' linear maps, layers x sum of m n: M without the head."""
    return shape.layers * sum(m * n for m, n in shape.maps.values())


def lora_parameters(shape: Shape, r: int, targets: str | Sequence[str] = "all-linear") -> int:
    """n_L: the sum of r (m + n) over the adapted maps, because A is (r, n) and B is (m, r).

    `targets` is "q,v", "attention", "mlp", "all-linear", or a list of names of `shape.maps` and "lm_head".
    For a square map it is 2 r / d of the map's weights; above r = m n / (m + n) it is more than the map has.

    Source: Hu et al. 2021, section 5.1, where every map is (d, d) and the sum is 2 L d r.
    """
    _at_least(1, r=r)
    return sum(copies * r * (m + n) for m, n, copies in _targets(shape, targets))


def lora_fa_parameters(shape: Shape, r: int, targets: str | Sequence[str] = "all-linear") -> int:
    """The sum of r m: a LoRA with A frozen, so that only B trains. Zhang et al. 2023, arXiv 2308.03303."""
    _at_least(1, r=r)
    return sum(copies * r * m for m, _, copies in _targets(shape, targets))


def dora_parameters(shape: Shape, r: int, targets: str | Sequence[str] = "all-linear") -> int:
    """The sum of r (m + n) + m: a LoRA and the length of every row of W. Liu et al. 2024, in peft's version."""
    return lora_parameters(shape, r, targets) + sum(copies * m for m, _, copies in _targets(shape, targets))


def vera_parameters(shape: Shape, r: int, targets: str | Sequence[str] = "all-linear") -> int:
    """The sum of m + r: two vectors a map; A and B are random, frozen and shared. Kopiczko et al. 2023."""
    _at_least(1, r=r)
    return sum(copies * (m + r) for m, _, copies in _targets(shape, targets))


def ia3_parameters(shape: Shape) -> int:
    """layers x (width of keys + width of values + intermediate): a factor for each feature. Liu et al. 2022."""
    return shape.layers * (shape.maps["k_proj"][0] + shape.maps["v_proj"][0] + shape.intermediate)


def adapter_parameters(shape: Shape, r: int) -> int:
    """2 layers (2 d r + r + d): after attention and after the MLP, d -> r -> d with biases. Houlsby et al. 2019."""
    _at_least(1, r=r)
    return 2 * shape.layers * (2 * shape.hidden * r + r + shape.hidden)


def prefix_parameters(shape: Shape, tokens: int) -> int:
    """tokens x layers x 2 x width of keys: learned keys and values in every block. Li and Liang 2021."""
    _at_least(1, tokens=tokens)
    return tokens * shape.layers * 2 * shape.maps["k_proj"][0]


def prompt_parameters(shape: Shape, tokens: int) -> int:
    """tokens x hidden: learned embeddings before the text. Lester et al. 2021."""
    _at_least(1, tokens=tokens)
    return tokens * shape.hidden


def norm_parameters(shape: Shape) -> int:
    """(2 layers + 1) hidden, twice that where norms have biases."""
    return (2 * shape.layers + 1) * shape.hidden * (2 if shape.biases else 1)


def bitfit_parameters(shape: Shape) -> int:
    """All biases; 0 in the Llama family, which has none. Ben Zaken et al. 2021."""
    return _map_biases(shape) + (2 * shape.layers + 1) * shape.hidden * shape.biases


def _map_biases(shape: Shape) -> int:
    return shape.layers * sum(m for m, _ in shape.maps.values()) * shape.biases


def _names(shape: Shape, targets: str | Sequence[str]) -> list[str]:
    """The names that `targets` means, in the order of the forward pass."""
    have = [*shape.maps, "lm_head"]
    if isinstance(targets, str) and targets not in GROUPS:
        raise ValueError(f"targets is one of {', '.join(GROUPS)}, or a list of names; got {targets!r}.")
    wanted = [name for name in GROUPS[targets] if name in have] if isinstance(targets, str) else list(targets)
    if unknown := [name for name in wanted if name not in have]:
        raise ValueError(f"there is no map {unknown[0]!r}; there are {', '.join(have)}.")
    if not wanted:
        raise ValueError("targets is empty: name the maps to adapt, or say 'all-linear'.")
    return [name for name in have if name in wanted]


def _targets(shape: Shape, targets: str | Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """(out, in, how often) of each adapted map."""
    for name in _names(shape, targets):
        yield (shape.vocab, shape.hidden, 1) if name == "lm_head" else (*shape.maps[name], shape.layers)


# --------------------------------------------------------------------------------------------------------- bytes


def bits_per_weight(block: int = 64, double: bool = False, second: int = 256, bits: int = 4) -> float:
    """Bits that blockwise quantisation stores per weight: its own, and its share of the constants.

    Each block of `block` weights has one fp32 constant: bits + 32 / block.
    With double quantisation the constants are 8 bits, and `second` of them share one fp32:
    bits + 8 / block + 32 / (block second).

    Source: Dettmers et al. 2023, section 3.
    """
    _at_least(1, block=block, second=second, bits=bits)
    return bits + (8 / block + 32 / (block * second) if double else 32 / block)


class Recipe(NamedTuple):
    """Bytes per parameter while training with Adam.

    weight, gradient, optimizer    of a trained parameter; the optimizer's are the two moments and, in mixed precision,
                                   the fp32 copy of the weight
    frozen                         of a frozen parameter; None where everything trains
    linear                         of a frozen weight of the blocks' maps, where it is stored otherwise (in 4 bits)
    """

    weight: float
    gradient: float
    optimizer: float
    frozen: float | None = None
    linear: float | None = None


RECIPES = {
    "full, fp32": Recipe(4, 4, 8),
    "full, mixed": Recipe(2, 2, 12),
    "full, mixed, fp32 gradients": Recipe(2, 4, 12),
    "full, bf16, fp32 Adam": Recipe(2, 2, 8),
    "full, bf16": Recipe(2, 2, 4),
    "LoRA, fp32 base": Recipe(4, 4, 8, frozen=4),
    "LoRA, bf16 base": Recipe(4, 4, 8, frozen=2),
    "LoRA, bf16": Recipe(2, 2, 4, frozen=2),
    "QLoRA, NF4": Recipe(4, 4, 8, frozen=2, linear=bits_per_weight() / 8),
    "QLoRA, NF4, double": Recipe(4, 4, 8, frozen=2, linear=bits_per_weight(double=True) / 8),
}


class Memory(NamedTuple):
    """Bytes of what stays from step to step. Activations come on top: see `saved_by_linear` and `saved_bytes`."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


def training_memory(recipe: str, base: float, adapter: float = 0, linear: float = 0) -> Memory:
    """Bytes of weights, gradients and optimizer, for a model of `base` parameters.

    Full fine-tuning: (weight + gradient + optimizer) base, 16 bytes a parameter in fp32 and in mixed precision.
    LoRA: frozen x base + (weight + gradient + optimizer) x adapter. What falls away is the gradients and the optimizer
    of the base, 12 to 14 bytes a parameter; its weights stay.
    QLoRA: the same with `linear` weights, those of the blocks' maps, in 4 bits.

    Source: the counts per parameter are those of Rajbhandari et al. 2020 (ZeRO), section 3.1.
    """
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}; there are: {'; '.join(RECIPES)}.")
    if not (0 < base < inf and 0 <= adapter < inf and 0 <= linear <= base):
        raise ValueError(f"base > 0, adapter >= 0 and 0 <= linear <= base; got {base}, {adapter} and {linear}.")
    per = RECIPES[recipe]
    if (per.frozen is None) == (adapter > 0):
        wanted = "trains the model itself: leave adapter at 0" if adapter else "trains an adapter: say its parameters"
        raise ValueError(f"{recipe!r} {wanted}.")
    if (per.linear is None) == (linear > 0):
        wanted = "keeps nothing in 4 bits: leave linear at 0" if linear else "keeps weights in 4 bits: say linear"
        raise ValueError(f"{recipe!r} {wanted}.")
    if per.frozen is None:
        return Memory(per.weight * base, per.gradient * base, per.optimizer * base)
    frozen = per.frozen * (base - linear) + (per.linear or 0) * linear
    return Memory(frozen + per.weight * adapter, per.gradient * adapter, per.optimizer * adapter)


def adapter_bytes(trained: int, itemsize: int = 4) -> int:
    """The tensors of an adapter's file: itemsize x trained. peft saves fp32 (4), also over a bf16 base.

    The file is larger by its header, which lists names and shapes: see `file_bytes`.
    """
    _at_least(1, trained=trained, itemsize=itemsize)
    return itemsize * trained


def saved_by_linear(tokens: int, n: int, r: int = 0, trains: bool = False) -> int:
    """fp32 bytes that a map with `n` inputs keeps for the backward pass of `tokens` tokens, parameters not counted.

    dW = g x^T needs x: 4 tokens n bytes. A frozen map needs only W for dx: nothing.
    With a LoRA dA = dz x^T needs x again, and dB = g z^T needs z: 4 tokens (n + r). So adapting every map saves nothing
    here; freezing a map without a LoRA does.
    """
    _at_least(1, tokens=tokens, n=n)
    _at_least(0, r=r)
    return 4 * tokens * (n * (trains or r > 0) + r)


# --------------------------------------------------------------------------------------------------------- FLOPs


class Flops(NamedTuple):
    """FLOPs of a training step; per token in the formulas. The optimizer's own are left out."""

    forward: int
    input_gradient: int
    weight_gradient: int

    @property
    def total(self) -> int:
        return sum(self)


def linear_flops(m: int, n: int, r: int = 0, *, trains: bool = False, dx: bool = True) -> Flops:
    """FLOPs per token of y = W x with W (m, n), forward and backward: one matrix product a line.

        y = W x       2 m n
        dx = W^T g    2 m n    where something below is trained (dx)
        dW = g x^T    2 m n    where W is trained (trains)
    With a LoRA of rank r in addition
        z = A x       2 r n
        B z           2 r m
        dz = B^T g    2 r m
        A^T dz        2 r n    where something below is trained
        dB = g z^T    2 r m
        dA = dz x^T   2 r n

    Full 6 m n; frozen 4 m n; LoRA 4 m n + 6 r (m + n). All that a LoRA leaves out is dW.
    """
    _at_least(1, m=m, n=n)
    _at_least(0, r=r)
    if trains and r:
        raise ValueError("a map trains or carries a LoRA, not both.")
    W, A, B = 2 * m * n, 2 * r * n, 2 * r * m
    return Flops(W + A + B, (W + A) * dx + B, W * trains + A + B)


def training_flops(
    shape: Shape,
    r: int = 0,
    targets: str | Sequence[str] = "all-linear",
    *,
    top: int | None = None,
    context: float = 0,
    checkpointing: bool = False,
) -> Flops:
    """FLOPs per token of a training step: full fine-tuning where r is 0, otherwise a LoRA on `targets`.

    top              only the last `top` blocks are trained or adapted; full fine-tuning trains the head too, and the
                     embedding with all blocks. The gradient stops below: the blocks there cost their forward pass.
    context          positions that a token attends to on average; 0 leaves the scores out. Their products Q K^T and P V
                     cost 2 context q each (q the width of all heads), their gradients twice as much, trained or not.
                     Masked attention written out has context = T, causal kernels T / 2.
    checkpointing    the blocks' activations are not kept: one forward pass more for each that has a backward pass
                     (torch may leave out a block's last product: set_checkpoint_early_stop)

    Exact for attention written out; a fused kernel forms Q K^T once more in its backward pass. What is not a product
    of matrices (norms, activations, softmax, biases) is left out.
    """
    _at_least(0, r=r)
    top = shape.layers if top is None else top
    _at_least(0, top=top)
    if top > shape.layers or context < 0:
        raise ValueError(f"top is at most {shape.layers} and context at least 0; got {top} and {context}.")
    adapted, full = _names(shape, targets) if r else [], not r
    if r and not top and "lm_head" not in adapted:
        raise ValueError("with top = 0 no block carries the LoRA; say top, or target 'lm_head'.")
    maps = shape.maps
    product = round(2 * context * maps["q_proj"][0])
    below = False  # whether anything so far is trained: then dx is needed
    steps: list[Flops] = []
    for block in range(shape.layers):
        live, first = block >= shape.layers - top, len(steps)
        below = below or (full and live)  # the block's norm comes before its maps, and the embedding before all
        for stage in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            names = [name for name in stage if name in maps]
            rank = {name: r if live and name in adapted else 0 for name in names}
            for name in names:
                steps.append(linear_flops(*maps[name], rank[name], trains=full and live, dx=below))
            if "q_proj" in stage:  # dQ and dK want the gradient at the scores, dP
                q, k, v = (below or rank[name] > 0 for name in stage)
                steps.append(Flops(2 * product, product * (q + k + (q or k) + v), 0))
            below = below or any(rank.values())
        if checkpointing and below:
            steps.append(Flops(sum(step.forward for step in steps[first:]), 0, 0))
    head = r if "lm_head" in adapted else 0
    steps.append(linear_flops(shape.vocab, shape.hidden, head, trains=full, dx=below))
    return Flops(*(sum(part) for part in zip(*steps, strict=True)))


def flops_ratio(shape: Shape, r: int, targets: str | Sequence[str] = "all-linear") -> float:
    """FLOPs of a LoRA step over those of full fine-tuning, to first order: (4 M + 6 n_L) / 6 M = 2/3 + n_L / M.

    M counts the head too. It holds for any targets: a frozen map costs 4 a weight with or without a LoRA. Exactly it is
    a little less, because the maps up to the first LoRA need no dx, and nearer to 1 with attention scores or
    checkpointing: see `training_flops`.
    """
    return 2 / 3 + lora_parameters(shape, r, targets) / (linear_weights(shape) + shape.vocab * shape.hidden)


# ------------------------------------------------------------------------------------------------------ measured


def measured_flops(step: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and fused attention that `step` runs, backward passes included."""
    from torch.ops import aten
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    known = counter.flop_registry
    # What the counter does not know counts as nothing, and of these it knows only the relatives.
    known[aten.addmm_] = known[aten.addmm]
    known[aten.baddbmm_] = known[aten.baddbmm]
    attention, on_cpu = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"
    for suffix in ("", "_backward"):
        known[getattr(aten, on_cpu + suffix)] = known[getattr(aten, attention + suffix)]
    with counter:
        step()
    return int(counter.get_total_flops())


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that the graph of `forward()` keeps for the backward pass: each storage once, those of `model` not at all.

    `forward` returns the loss, before any backward pass.
    """
    from torch.autograd.graph import saved_tensors_hooks

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # without its graph, which would keep itself alive

    alive: WeakSet[Saved] = WeakSet()  # forgets what the graph lets go

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = forward()
    if not getattr(loss, "requires_grad", False):
        raise ValueError("forward must return a loss that has a gradient; without one nothing is kept.")
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {s.data_ptr(): s.nbytes() for s in (saved.tensor.untyped_storage() for saved in alive)}
    return sum(size for address, size in kept.items() if address not in own)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, shared ones once."""
    return sum(p.nbytes for p in model.parameters())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that are there, after a backward pass."""
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state after its first step; Adam: 8 a parameter, and a step count of 4 a tensor."""
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if hasattr(value, "nbytes")
    )


def least_seconds(calls: Mapping[str, Callable[[], object]], rounds: int = 6) -> dict[str, float]:
    """Processor seconds of each call, on one thread: the least of `rounds`, after one that warms up.

    The calls take turns, so that a slow moment of the machine meets all of them.
    """
    _at_least(1, rounds=rounds)
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = thread_time()
            call()
            spent[name].append(thread_time() - start)
    return {name: min(times[1:]) for name, times in spent.items()}


class FileBytes(NamedTuple):
    """Bytes of a safetensors file: its header, and the tensors."""

    header: int
    payload: int


def file_bytes(path: str | os.PathLike[str]) -> FileBytes:
    """Header and payload of a safetensors file. The header is its length in 8 bytes, then names and shapes in JSON.

    Raises FileNotFoundError, and ValueError for anything else than a safetensors file.
    """
    path = Path(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        try:
            entries = json.loads(file.read(min(length, size)))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0) == size
        except (ValueError, AttributeError, LookupError, TypeError):
            whole = False
    if not whole:
        raise ValueError(f"{path} is no safetensors file, or it is cut short.")
    return FileBytes(8 + length, size - 8 - length)


# ----------------------------------------------------------------------------------------------------- published

_UNITS = {
    **{"": 1, "x": 1, "bit": 1, "%": 1e-2, "M": 1e6, "B": 1e9},
    **{"MB": 1e6, "GB": 1e9, "TB": 1e12, "GiB": 2**30},
}


@dataclass(frozen=True)
class Published:
    """A published number and the same computed here. `reason` says why they differ, and is empty where they agree."""

    source: str
    what: str
    printed: str
    computed: float
    reason: str = ""

    @property
    def rounded(self) -> str:
        """The computed number, written as the published one is: its unit, its digits."""
        match = re.fullmatch(r"[\d,]+(?:\.(\d+))?( ?)([A-Za-z%]*)", self.printed)
        if match is None or match[3] not in _UNITS:
            raise ValueError(f"{self.printed!r} is no number with a unit of {', '.join(filter(None, _UNITS))}.")
        return f"{self.computed / _UNITS[match[3]]:,.{len(match[1] or '')}f}{match[2]}{match[3]}"

    @property
    def agrees(self) -> bool:
        """Whether the computed number rounds to the published one."""
        return self.rounded == self.printed


def _published() -> Iterator[Published]:
    """The rows of `PUBLISHED`, by source: what it prints, and the same computed here."""
    source = ""

    def row(what: str, printed: str, computed: float, reason: str = "") -> Published:
        return Published(source, what, printed, computed, reason)

    lora, gpt3, llama3b = lora_parameters, SHAPES["GPT-3 175B"], SHAPES["Llama-3.2-3B"]
    llama7, llama13, llama70 = (SHAPES[f"Llama-2-{size}"] for size in ("7B", "13B", "70B"))
    q_v, q_k_v_o, cut = "q,v", "attention", "The last digit is cut off, not rounded."

    source = "LoRA paper, table 15"
    r4 = lora(gpt3, 4, q_v)
    yield row("GPT-3, q and v, r = 1", "4.7M", lora(gpt3, 1, q_v))
    yield row("GPT-3, v, r = 2", "4.7M", lora(gpt3, 2, ["v_proj"]))
    yield row("GPT-3, q and v, r = 4", "18.8M", r4, cut)
    yield row("GPT-3, q, k, v and o, r = 2", "18.8M", lora(gpt3, 2, q_k_v_o), cut)
    yield row("GPT-3, q and v, r = 8", "37.7M", lora(gpt3, 8, q_v))
    yield row("GPT-3, q, k, v and o, r = 4", "37.7M", lora(gpt3, 4, q_k_v_o))
    both = lora(gpt3, 64, q_v) + prompt_parameters(gpt3, 12)
    yield row("GPT-3, q and v, r = 64, and 12 prompt tokens", "302.1M", both)
    yield row("GPT-3, 264 prompt tokens", "3.2M", prompt_parameters(gpt3, 264))
    why = "The paper's own formula, L d (l_p + l_i), gives less; it does not say what else is counted."
    yield row("GPT-3, 16 tokens in every layer", "20.2M", 16 * gpt3.layers * gpt3.hidden, why)
    yield row("GPT-3, adapters, r = 1", "7.1M", adapter_parameters(gpt3, 1))
    yield row("GPT-3, adapters, r = 8", "40.1M", adapter_parameters(gpt3, 8))
    source = "LoRA paper, table 4"
    why = "The maps and norms of GPT-3 have fewer biases; the paper does not list what it trains."
    yield row("GPT-3, all biases", "14.2M", bitfit_parameters(gpt3), why)
    why = "GPT-3's published sizes with a tied head give less; the paper does not say what else is counted."
    yield row("GPT-3, all parameters", "175,255.8M", parameters(gpt3), why)
    source = "LoRA paper, appendix D.4"
    yield row("GPT-3, q, k, v and o, r = 2", "37.7M", lora(gpt3, 2, q_k_v_o), "A slip: table 15 has 37.7M for r = 4.")
    source = "LoRA paper, table 5"
    yield row("GPT-3, one matrix, r = 8", "18M", lora(gpt3, 8, ["q_proj"]), cut)
    source = "LoRA paper, abstract"
    yield row("GPT-3, full over LoRA r = 4", "10,000x", 175255.8e6 / r4, "Rounded to a power of ten.")
    yield row("GPT-3, training memory, 1.2 TB over 350 GB", "3x", 1.2e12 / 350e9)
    source = "LoRA paper, section 2"
    yield row("GPT-3, LoRA r = 4 over full", "0.01 %", r4 / 175255.8e6)
    source = "LoRA paper, section 4.2"
    yield row("175 billion weights in fp16", "350 GB", 2 * 175e9)
    yield row("GPT-3, file of LoRA r = 4 in fp16", "35 MB", adapter_bytes(r4, 2), "Rounded, to 350 GB / 10,000.")
    yield row("100 whole models", "35 TB", 100 * 350e9)
    yield row("one model and 100 adapters of 35 MB", "354 GB", 350e9 + 100 * 35e6)
    why = f"What is counted is not said; it is {1.2e12 / 175e9:.1f} bytes a parameter, mixed precision takes 16."
    yield row("GPT-3, training memory, full", "1.2 TB", training_memory("full, mixed", 175e9).total, why)
    yield row("GPT-3, training memory, LoRA", "350 GB", training_memory("LoRA, bf16 base", 175e9, r4).total)
    why = f"From 32.5 to 43.1 tokens a second; the time for a token falls by {100 - 100 * 32.5 / 43.1:.0f} %."
    yield row("GPT-3, speed-up of training", "25 %", 43.1 / 32.5 - 1, why)
    source = "LoRA paper, table 2"
    base, large, xxl = _gpt(768, 12, 12), _gpt(1024, 24, 16), _gpt(1536, 48, 24)  # alike as far as q and v go
    yield row("RoBERTa-base, q and v, r = 8", "0.3M", lora(base, 8, q_v))
    yield row("RoBERTa-large, q and v, r = 8", "0.8M", lora(large, 8, q_v))
    why = "Table 10 says r = 8; the released scripts say 16, which gives the printed number."
    yield row("DeBERTa-XXL, q and v, r = 8", "4.7M", lora(xxl, 8, q_v), why)
    yield row("DeBERTa-XXL, q and v, r = 16", "4.7M", lora(xxl, 16, q_v))
    source = "LoRA paper, table 3"
    medium = lora(SHAPES["GPT-2 medium"], 4, q_v)
    why = "The paper's own formula, 2 L d r, gives more; 0.35M is also the number of the prefix method beside it."
    yield row("GPT-2 medium, q and v, r = 4", "0.35M", medium, why)
    source = "loralib README"
    yield row("RoBERTa-base, q and v, r = 8", "0.8M", lora(base, 8, q_v), "That is RoBERTa-large.")
    why = f"{adapter_bytes(medium):,} bytes are {adapter_bytes(medium) / 2**20} MiB."
    yield row("GPT-2 medium, file of LoRA r = 4 in fp32", "1.5 MB", adapter_bytes(medium), why)

    source = "VeRA paper, table 4, as quoted"
    yield row("Llama-7B, LoRA r = 64, all linear", "159.9M", lora(llama7, 64))
    yield row("Llama-13B, LoRA r = 64, all linear", "250.3M", lora(llama13, 64))
    # r = 1024 is the only power of two that gives both.
    yield row("Llama-7B, VeRA r = 1024, all linear", "1.6M", vera_parameters(llama7, 1024))
    yield row("Llama-13B, VeRA r = 1024, all linear", "2.4M", vera_parameters(llama13, 1024))

    source = "peft benchmark, Llama-3.2-3B"
    r32, vera = lora(llama3b, 32, q_v), vera_parameters(llama3b, 256, q_v)
    yield row("all parameters", "3,212,749,824", parameters(llama3b))
    yield row("all parameters, with LoRA r = 32", "3,221,924,864", parameters(llama3b) + r32)
    yield row("LoRA r = 32, q and v", "9,175,040", r32)
    yield row("LoRA r = 64, q and v", "18,350,080", lora(llama3b, 64, q_v))
    yield row("LoRA r = 10, MLP", "9,461,760", lora(llama3b, 10, "mlp"))
    yield row("DoRA r = 32, q and v", "9,289,728", dora_parameters(llama3b, 32, q_v))
    yield row("LoRA-FA r = 32, q and v", "3,670,016", lora_fa_parameters(llama3b, 32, q_v))
    yield row("VeRA r = 256, q and v", "129,024", vera)
    yield row("(IA)3", "286,720", ia3_parameters(llama3b))
    yield row("prefix, 200 tokens", "11,468,800", prefix_parameters(llama3b, 200))
    yield row("prompt, 200 tokens", "614,400", prompt_parameters(llama3b, 200))
    yield row("norms", "175,104", norm_parameters(llama3b))
    yield row("file of the model in bf16", "6.43 GB", 2 * parameters(llama3b))
    why = f"The other {36_715_216 - adapter_bytes(r32):,} bytes are the header: 112 names and shapes."
    yield row("bytes in the file of LoRA r = 32", "36,715,216", adapter_bytes(r32), why)
    yield row("file of VeRA r = 256, A and B included", "6.8 MB", adapter_bytes(vera + 2 * 256 * llama3b.hidden))

    source = "QLoRA paper"
    single, double = bits_per_weight(), bits_per_weight(double=True)
    yield row("bits of the constants per weight, double", "0.127 bit", double - 4)
    yield row("saved by double quantisation", "0.373 bit", single - double)
    yield row("saved by double quantisation, 65B", "3 GB", (single - double) / 8 * 65e9)
    yield row("65B, full, 12 bytes a parameter", "780 GB", training_memory("full, bf16, fp32 Adam", 65e9).total)
    source = "Biderman et al. 2024, appendix H"
    yield row("7B, full", "112 GB", training_memory("full, fp32", 7e9).total)
    yield row("7B, LoRA of 1 %, bf16 base", "15.12 GB", training_memory("LoRA, bf16 base", 7e9, 7e7).total)
    yield row("7B, LoRA of 1 %, fp32 base", "29.12 GB", training_memory("LoRA, fp32 base", 7e9, 7e7).total)
    source, memory = "GaLore paper, section 1", training_memory("full, bf16", 7e9)
    yield row("7B in bf16, weights", "14 GB", memory.weights)
    yield row("7B in bf16, gradients and Adam", "42 GB", memory.gradients + memory.optimizer)
    source, memory = "peft documentation", training_memory("full, bf16", 1e9)
    yield row("1B in fp16, weights", "1.863 GiB", memory.weights)
    yield row("1B in fp16, gradients and Adam", "5.59 GiB", memory.gradients + memory.optimizer)
    source, llama8 = "LoRA Without Regret, 2025", SHAPES["Llama-3.1-8B"]
    # The head is adapted too, which the text does not say: without it the numbers do not come out.
    for group, r, printed in (("mlp", 256, "0.49B"), (q_k_v_o, 256, "0.25B"), ("all-linear", 256, "0.70B")):
        count = lora(llama8, r, group) + lora(llama8, r, ["lm_head"])
        yield row(f"Llama-3.1-8B, {group} and head, r = {r}", printed, count)
    count = lora(llama8, 128, "mlp") + lora(llama8, 128, ["lm_head"])
    yield row("Llama-3.1-8B, mlp and head, r = 128", "0.24B", count)

    source = "seen in public question banks"
    for recipe, printed in (("full, bf16", "56 GB"), ("full, bf16, fp32 Adam", "84 GB"), ("full, mixed", "112 GB")):
        yield row(f"7B, {recipe}", printed, training_memory(recipe, 7e9).total)
    why = "No bytes per parameter are given, and no recipe has so many."
    yield row("7B, full", "160 GB", training_memory("full, mixed", 7e9).total, why)
    why = "Four cards of 32 GB: the weights alone do not fit, with or without LoRA."
    yield row("65B in fp16, said to fit in", "128 GB", 2 * 65e9, why)
    memory = training_memory("LoRA, bf16 base", parameters(llama70), lora(llama70, 16))
    why = f"The frozen weights stay: {2 * parameters(llama70) / 1e9:.0f} GB in bf16."
    yield row("Llama-2-70B, training memory, LoRA r = 16", "10 GB", memory.total, why)
    r16, total = lora(llama7, 16, q_v), parameters(llama7)
    yield row("Llama-2-7B, q and v, r = 16, share", "1 %", r16 / total, f"It is {100 * r16 / total:.3f} %.")
    yield row("Llama-2-7B, q and v, r = 16", "4M", r16, f"{lora(llama7, 8, q_v):,} is r = 8.")
    why = f"{lora(llama7, 16, q_k_v_o):,} is q, k, v and o of Llama-2-7B."
    yield row("Mistral-7B, all linear, r = 16", "16.8M", lora(SHAPES["Mistral-7B"], 16), why)
    glm = 28 * 8 * (4096 + 3 * 4096)
    why = f"The file in fp32 has {adapter_bytes(glm) / 1e6:.1f} MB: bytes taken for parameters."
    yield row("ChatGLM-6B, fused q, k and v, r = 8", "15M", glm, why)
    why = f"The factors inside the MLP are {llama7.intermediate:,}, not {llama7.hidden:,}."
    yield row("Llama-2-7B, (IA)3", "393,216", ia3_parameters(llama7), why)


PUBLISHED = tuple(_published())
