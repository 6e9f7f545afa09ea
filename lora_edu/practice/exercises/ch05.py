"""Exercises of chapter 05, the knobs of LoRA and its variants."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_edu import add_lora, cost
from lora_edu.config import LoRAConfig
from lora_edu.functional import dora_linear, dora_norm
from lora_edu.lowrank import Array, balanced_factors, tail_norm, truncated_svd
from lora_edu.peft_methods import loraplus_groups
from lora_edu.practice.exercise import Case, Exercise, Mistake, Property, arrays
from lora_edu.practice.exercises.ch04 import Maps, lora_param_count

# C19 dora_forward


def dora_forward(x: Array, W0: Array, A: Array, B: Array, m: Array, s: float) -> Array:
    """y = x W'^T with W' = m (W0 + s B A) / |W0 + s B A|, row by row.

    x (..., in), W0 (out, in), A (r, in), B (out, r); m (out,) holds the length of every row of W'.
    """
    V = W0 + s * (B @ A)
    factor = m / np.linalg.norm(V, axis=1)
    return x @ (factor[:, None] * V).T


def _dora_cases() -> list[Case]:
    rng = np.random.default_rng(0)

    def draw(*shapes: tuple[int, ...]) -> list[Array]:
        return [rng.standard_normal(shape) for shape in shapes]

    def start(parts: list[Array], s: float) -> Case:
        x, W0, A = parts
        return Case((x, W0, A, np.zeros((len(W0), len(A))), np.linalg.norm(W0, axis=1), s))

    W, A, B = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[1.0, 1.0]]), np.array([[1.0], [2.0]])
    # Square ones first: there m and the norms also multiply along the wrong axis, in silence.
    return [
        start([np.eye(2), W, A], 3.0),
        Case((np.eye(2), W, A, B, np.array([10.0, 1.0]), 0.5)),
        start(draw((2, 3, 4), (6, 4), (2, 4)), 2.0),
        Case((np.eye(5), *draw((3, 5), (2, 5), (3, 2)), rng.uniform(0.5, 3, 3), 1.5)),
        Case((*draw((9, 4), (6, 4), (2, 4), (6, 2)), rng.uniform(0.5, 3, 6), 4.0)),
        Case((*draw((7, 4), (4, 4), (4, 4), (4, 4)), rng.uniform(0.5, 3, 4), 0.25)),
        Case((*draw((5,), (3, 5), (2, 5), (3, 2)), rng.uniform(0.5, 3, 3), 3.0)),
    ]


def _w_of(y: Array, x: Array) -> Array | None:
    """W' itself, where x is enough to read it off."""
    if x.ndim != 2 or np.linalg.matrix_rank(x) < x.shape[1]:
        return None
    return np.linalg.lstsq(x, y, rcond=None)[0].T


def _unit_rows(W: Array) -> Array:
    return W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-12)


def _starts_as_base(got: Any, x: Array, W0: Array, A: Array, B: Array, m: Array, s: float) -> bool:
    start = not B.any() and np.allclose(m, np.linalg.norm(W0, axis=1))
    return not start or bool(np.allclose(got[0], x @ W0.T))


def _rows_of_length_m(got: Any, x: Array, W0: Array, A: Array, B: Array, m: Array, s: float) -> bool:
    W = _w_of(got[0], x)
    return W is None or bool(np.allclose(np.linalg.norm(W, axis=1), m))


def _rows_of_the_sum(got: Any, x: Array, W0: Array, A: Array, B: Array, m: Array, s: float) -> bool:
    W = _w_of(got[0], x)
    return W is None or bool(np.allclose(_unit_rows(W), _unit_rows(W0 + s * (B @ A))))


def _as_the_module(got: Any, *args: Any) -> bool:
    x, W0, A, B, m = (torch.from_numpy(part) for part in args[:5])
    s = args[5]
    return np.allclose(got[0], dora_linear(x, W0, A, B, s, m / dora_norm(W0, A, B, s)).numpy())


def _normed(V: Any, m: Any, axis: int | None = 1) -> Any:
    return m[:, None] * V / np.linalg.norm(V, axis=axis, keepdims=True)


def _column_norms(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ _normed(W0 + s * B @ A, m, axis=0).T


def _one_norm(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ _normed(W0 + s * B @ A, m, axis=None).T


def _not_normed(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ (m[:, None] * (W0 + s * B @ A)).T


def _norm_of_w0(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ (m[:, None] * (W0 + s * B @ A) / np.linalg.norm(W0, axis=1, keepdims=True)).T


def _update_outside(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ (_normed(W0, m) + s * B @ A).T


def _squared_norm(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    V = W0 + s * B @ A
    return x @ (m[:, None] * V / (V**2).sum(1, keepdims=True)).T


def _dora_unscaled(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ _normed(W0 + B @ A, m).T


def _m_added(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ (m[:, None] + _unit_rows(W0 + s * B @ A)).T


def _m_forgotten(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ _unit_rows(W0 + s * B @ A).T


def _plain_lora(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ (W0 + s * B @ A).T


def _outputs_normed(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    y = x @ (W0 + s * B @ A).T
    return m * y / np.linalg.norm(y, axis=-1, keepdims=True)


def _m_along_inputs(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    return x @ (m * _unit_rows(W0 + s * B @ A)).T


def _both_along_inputs(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    V = W0 + s * B @ A
    return x @ (m * V / np.linalg.norm(V, axis=1)).T


def _w0_changed(x: Any, W0: Any, A: Any, B: Any, m: Any, s: float) -> Any:
    W0 += s * B @ A
    return x @ _normed(W0, m).T


_BROADCAST = (
    "NumPy lays a vector (out,) along the last axis of W', the inputs; for the rows write m[:, None]. Where out = in "
    "nothing complains."
)

C19 = Exercise(
    number="C19",
    chapter="05",
    minutes=15,
    level="senior",
    importance=4,
    task="The forward pass of DoRA in NumPy.",
    returns="one array y (..., out)",
    reference=dora_forward,
    parse=arrays(1),
    cases=_dora_cases,
    properties=(
        Property(
            "SHAPE",
            "y should have the shape of x with its last axis, in, replaced by out.",
            lambda got, x, W0, *rest: got[0].shape == (*x.shape[:-1], len(W0)),
        ),
        Property(
            "NOOP_AT_INIT",
            "With B = 0, and m the lengths of W0's rows, y should be x W0^T.",
            _starts_as_base,
        ),
        Property(
            "ROW_NORM",
            "Row i of W' should have the length m[i], whatever A and B are.",
            _rows_of_length_m,
        ),
        Property(
            "DIRECTION",
            "The rows of W' should point where those of W0 + s B A do.",
            _rows_of_the_sum,
        ),
        Property(
            "VALUE",
            "The numbers differ from x W'^T.",
            _as_the_module,
        ),
    ),
    mistakes=(
        Mistake(
            "COLUMN_NORM",
            "You divide by the length of each column, an input; m has one number for each output, a row.",
            _column_norms,
        ),
        Mistake(
            "ONE_NORM", "You divide by the norm of the whole matrix; every row is divided by its own length.", _one_norm
        ),
        Mistake(
            "NO_NORM",
            "Nothing is divided: m multiplies the old length of each row, where it should replace it.",
            _not_normed,
        ),
        Mistake(
            "NORM_OF_W0",
            "You divide by the lengths of W0's rows. Those of W0 + s B A differ as soon as B moves.",
            _norm_of_w0,
        ),
        Mistake(
            "UPDATE_OUTSIDE",
            "You give W0 the length m and add s B A after it; the sum is what gets the length m.",
            _update_outside,
        ),
        Mistake("SQUARED", "You divide by the squared length; the root is missing.", _squared_norm),
        Mistake(
            "NO_SCALE",
            "s is missing; the norm does not make up for it, since s decides how far the update turns a row.",
            _dora_unscaled,
        ),
        Mistake("M_ADDED", "You add m to the unit rows; a length multiplies its direction.", _m_added),
        Mistake("NO_M", "Every row has length 1: m is missing.", _m_forgotten),
        Mistake("LORA", "That is LoRA: the lengths of the rows change with B, and m does not enter.", _plain_lora),
        Mistake("OUTPUTS", "You normalise the outputs; DoRA normalises the weights, once for all x.", _outputs_normed),
        Mistake("BROADCAST", _BROADCAST, _m_along_inputs),
        Mistake("BROADCAST", _BROADCAST, _both_along_inputs),
        Mistake(
            "MUTATES",
            "One of the arrays that were passed in has changed, W0 for example: W0 is frozen. Make a new array.",
            _w0_changed,
        ),
    ),
    hints=(
        "Form V = W0 + s B A first, (out, in). W' has V's directions and the lengths m.",
        "np.linalg.norm(V, axis=1) is the length of every row, (out,).",
        "Each row of V is multiplied by its own m / length: give that vector a second axis, [:, None].",
    ),
    after="The paper writes its norm over columns of W; peft, as here, has one length an output.",
)


# C23 loraplus_groups


def _lora_cases() -> list[Case]:
    """Models with a LoRA, every parameter filled with its own number, by which it is known in a copy too."""

    def model(config: LoRAConfig, *frozen: str, **layers: nn.Module) -> nn.Module:
        made = nn.Sequential()
        for name, layer in layers.items():
            made.add_module(name, layer)
        add_lora(made, config)
        for number, (name, p) in enumerate(made.named_parameters()):
            p.data.fill_(number)
            p.requires_grad_(p.requires_grad and not name.endswith(frozen))
        return made

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 6))

    head = nn.Linear(6, 2, bias=False)
    return [
        Case((model(LoRAConfig(["q_proj"], r=1), q_proj=nn.Linear(3, 2)), 1e-2, 4)),
        Case((model(LoRAConfig(["0", "2"], r=2), Base=block(), Block=block()), 1e-3, 16)),
        Case((model(LoRAConfig("all-linear", r=2, modules_to_save=["head"]), first=block(), head=head), 2e-3, 8)),
        Case((model(LoRAConfig(["2"], r=2), "lora_A.weight", first=block(), second=block()), 5e-4, 2)),
        Case((model(LoRAConfig(["0"], r=3), first=block()), 3e-3, 1)),
    ]


def _listed(result: Any) -> tuple[Array, Array]:
    """What stands in the groups: the numbers of the parameters, sorted, and the rate of each."""
    pairs = []
    for group in result:
        params = group["params"]
        for entry in [params] if isinstance(params, Tensor) else params:
            p = entry[1] if isinstance(entry, tuple) else entry  # torch also takes pairs with the name
            if not isinstance(p, nn.Parameter):
                raise TypeError
            pairs.append((p.flatten()[0].item(), float(group["lr"])))
    pairs.sort()
    return np.array([number for number, _ in pairs]), np.array([rate for _, rate in pairs])


def _each_once(got: Any, model: nn.Module, lr: float, ratio: float) -> bool:
    return list(got[0]) == [number for number, p in enumerate(model.parameters()) if p.requires_grad]


def _rates(where: Any, factor: Any) -> Any:
    """Whether the rate is lr times the factor, asked only of parameters with such a name."""

    def holds(got: Any, model: nn.Module, lr: float, ratio: float) -> bool:
        names = [name for name, _ in model.named_parameters()]
        asked = [rate for number, rate in zip(*got, strict=True) if where(names[int(number)])]
        return bool(np.allclose(asked, lr * factor(ratio), rtol=1e-6, atol=0))

    return holds


def _two(slow: list[Any], fast: list[Any], lr: float, higher: float) -> list[dict[str, Any]]:
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": higher}]


def _sorted(model: nn.Module, is_b: Any = lambda name: "lora_B" in name) -> tuple[list[Any], list[Any]]:
    """What trains, in two lists: the rest, and B."""
    training = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for name, p in training if not is_b(name)], [p for name, p in training if is_b(name)]


def _ratio_on_a(model: Any, lr: float, ratio: float = 16) -> Any:
    slow, fast = _sorted(model)
    return _two(slow, fast, lr * ratio, lr)


def _frozen_too(model: Any, lr: float, ratio: float = 16) -> Any:
    named = list(model.named_parameters())
    return _two([p for n, p in named if "lora_B" not in n], [p for n, p in named if "lora_B" in n], lr, lr * ratio)


def _by_name(model: Any, lr: float, ratio: float = 16) -> Any:
    named = list(model.named_parameters())
    return _two([p for n, p in named if "lora_A" in n], [p for n, p in named if "lora_B" in n], lr, lr * ratio)


def _rest_left_out(model: Any, lr: float, ratio: float = 16) -> Any:
    training = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return _two([p for n, p in training if "lora_A" in n], [p for n, p in training if "lora_B" in n], lr, lr * ratio)


def _one_group(model: Any, lr: float, ratio: float = 16) -> Any:
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


def _all_fast(model: Any, lr: float, ratio: float = 16) -> Any:
    return _one_group(model, lr * ratio)


def _divided(model: Any, lr: float, ratio: float = 16) -> Any:
    return _two(*_sorted(model), lr, lr / ratio)


def _a_slower(model: Any, lr: float, ratio: float = 16) -> Any:
    return _two(*_sorted(model), lr / ratio, lr)


def _added(model: Any, lr: float, ratio: float = 16) -> Any:
    return _two(*_sorted(model), lr, lr + ratio)


def _ratio_as_rate(model: Any, lr: float, ratio: float = 16) -> Any:
    return _two(*_sorted(model), lr, ratio)


def _listed_twice(model: Any, lr: float, ratio: float = 16) -> Any:
    slow, fast = _sorted(model)
    return _two(slow + fast, fast, lr, lr * ratio)


def _letter(model: Any, lr: float, ratio: float = 16) -> Any:
    return _two(*_sorted(model, lambda name: "B" in name), lr, lr * ratio)


def _all_but_a(model: Any, lr: float, ratio: float = 16) -> Any:
    return _two(*_sorted(model, lambda name: "lora_A" not in name), lr, lr * ratio)


C23 = Exercise(
    number="C23",
    chapter="05",
    minutes=10,
    level="mid",
    importance=3,
    task="LoRA+: two learning rates for one optimizer.",
    returns='a list of dicts, each with "params", a list of the model\'s own parameters, and "lr"',
    reference=loraplus_groups,
    parse=_listed,
    cases=_lora_cases,
    properties=(
        Property(
            "ALL_ONCE",
            "Every parameter that trains should be listed, once, and none that is frozen.",
            _each_once,
        ),
        Property("B_FASTER", "The rate of a B is wrong.", _rates(lambda name: "lora_B" in name, lambda ratio: ratio)),
        Property("A_BASE_LR", "The rate of an A is wrong.", _rates(lambda name: "lora_A" in name, lambda ratio: 1)),
        Property(
            "REST",
            "The rate of what trains beside A and B, a new head for example, is wrong.",
            _rates(lambda name: "lora_" not in name, lambda ratio: 1),
        ),
    ),
    mistakes=(
        Mistake(
            "REVERSED",
            "Reversed: A has the larger rate; in LoRA+ B has it.",
            _ratio_on_a,
        ),
        Mistake(
            "FROZEN",
            "You list frozen parameters too, the whole base model; requires_grad says what trains.",
            _frozen_too,
        ),
        Mistake(
            "BY_NAME",
            "You go by the names of A and B alone: a head can train too, and an A can be frozen. Ask requires_grad first.",
            _by_name,
        ),
        Mistake(
            "REST_LEFT_OUT",
            "What trains beside A and B, a new head for example, is in no group: it would stay as it is.",
            _rest_left_out,
        ),
        Mistake("ONE_RATE", "Everything has the rate lr: that is plain LoRA.", _one_group),
        Mistake("ALL_FAST", "Everything has B's rate: that is plain LoRA at a larger rate.", _all_fast),
        Mistake("DIVIDED", "You divide B's rate by ratio: B becomes the slower one.", _divided),
        Mistake(
            "A_SLOWER",
            "The quotient is right, and both are ratio times too small: lr is the rate of A.",
            _a_slower,
        ),
        Mistake("ADDED", "You add ratio to the rate; it multiplies.", _added),
        Mistake("RATIO_AS_RATE", "You take ratio for B's rate; it is the quotient of the two rates.", _ratio_as_rate),
        Mistake(
            "TWICE",
            "B is in both groups; torch refuses such a list. Take it out of the slow one.",
            _listed_twice,
        ),
        Mistake(
            "LETTER",
            'You look for the letter "B" in the path, which a block\'s name can have too; look for "lora_B".',
            _letter,
        ),
        Mistake("ALL_BUT_A", "All but A is fast, a new head too; only B gets the larger rate.", _all_but_a),
    ),
    hints=(
        "model.named_parameters() gives paths such as first.lora_B.weight with their parameters; keep what requires_grad.",
        'Sort these into two lists, by "lora_B" in the path.',
        'One dict a list, {"params": [...], "lr": ...}; torch.optim.AdamW(groups) takes the list of dicts.',
    ),
    after="The number of trained parameters is LoRA's: only the steps differ.",
)


# E5.2 pissa_split


def pissa_split(W: Array, r: int, alpha: float) -> tuple[Array, Array, Array]:
    """W_res (out, in), A (r, in) and B (out, r) with W_res + s B A = W, s = alpha / r.

    s B A is the best rank-r part of W (out, in), and A and B share its singular values evenly: B^T B = A A^T.
    """
    B, A = balanced_factors(W, r)
    root = np.sqrt(alpha / r)
    return W - B @ A, A / root, B / root


def _split_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    shapes = (((5, 3), 2, 1.0), ((3, 5), 2, 6.0), ((4, 4), 4, 8.0), ((6, 6), 3, 3.0), ((7, 9), 1, 0.5))
    return [Case((np.array([[4.0, 0.0], [3.0, -5.0]]), 1, 2.0))] + [
        Case((rng.standard_normal(shape), r, alpha)) for shape, r, alpha in shapes
    ]


def _whatever_the_signs(got: Any, *args: Any) -> tuple[Any, ...]:
    """W_res, B A and the sizes of the factors: the signs of singular vectors are free."""
    W_res, A, B = got
    fit = A.ndim == B.ndim == 2 and len(A) == B.shape[1]
    return (W_res, B @ A, np.linalg.norm(A), np.linalg.norm(B)) if fit else got


def _is_principal(got: Any, W: Array, r: int, alpha: float) -> bool:
    tail = tail_norm(np.linalg.svd(W, compute_uv=False), r)
    return bool(np.isclose(np.linalg.norm(got[0]), tail, rtol=1e-6, atol=1e-9 * np.linalg.norm(W)))


def _is_balanced(got: Any, W: Array, *rest: Any) -> bool:
    _, A, B = got
    return np.allclose(B.T @ B, A @ A.T, atol=1e-6 * np.linalg.norm(W))


def _split_unscaled(W: Any, r: int, alpha: float) -> Any:
    B, A = balanced_factors(W, r)
    return W - B @ A, A, B


def _residual_takes_the_rest(W: Any, r: int, alpha: float) -> Any:
    B, A = balanced_factors(W, r)
    return W - alpha / r * B @ A, A, B


def _nothing_subtracted(W: Any, r: int, alpha: float) -> Any:
    return W, *pissa_split(W, r, alpha)[1:]


def _smallest(W: Any, r: int, alpha: float) -> Any:
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    s, root = alpha / r, np.sqrt(S[-r:] * r / alpha)
    A, B = root[:, None] * Vt[-r:], U[:, -r:] * root
    return W - s * B @ A, A, B


def _all_on_b(W: Any, r: int, alpha: float) -> Any:
    U, S, Vt = truncated_svd(W, r)
    return W - U * S @ Vt, Vt, U * S * r / alpha


def _all_on_a(W: Any, r: int, alpha: float) -> Any:
    U, S, Vt = truncated_svd(W, r)
    return W - U * S @ Vt, S[:, None] * Vt * r / alpha, U


def _s_on_one(W: Any, r: int, alpha: float) -> Any:
    B, A = balanced_factors(W, r)
    return W - B @ A, A, B * r / alpha


def _values_twice(W: Any, r: int, alpha: float) -> Any:
    U, S, Vt = truncated_svd(W, r)
    root = np.sqrt(alpha / r)
    return W - U * S @ Vt, S[:, None] * Vt / root, U * S / root


def _no_values(W: Any, r: int, alpha: float) -> Any:
    U, S, Vt = truncated_svd(W, r)
    root = np.sqrt(alpha / r)
    return W - U * S @ Vt, Vt / root, U / root


def _no_root(W: Any, r: int, alpha: float) -> Any:
    B, A = balanced_factors(W, r)
    return W - B @ A, A * r / alpha, B * r / alpha


def _by_alpha(W: Any, r: int, alpha: float) -> Any:
    B, A = balanced_factors(W, r)
    return W - B @ A, A / np.sqrt(alpha), B / np.sqrt(alpha)


def _v_for_vt(W: Any, r: int, alpha: float) -> Any:
    U, S, V = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:r] * r / alpha)
    A, B = root[:, None] * V[:, :r].T, U[:, :r] * root
    return W - alpha / r * B @ A, A, B


def _swapped(W: Any, r: int, alpha: float) -> Any:
    W_res, A, B = pissa_split(W, r, alpha)
    return W_res, B, A


def _lora_start(W: Any, r: int, alpha: float) -> Any:
    return W, np.random.randn(r, W.shape[1]) / np.sqrt(W.shape[1]), np.zeros((len(W), r))


_ONE_SIDE = "The product is right, but one factor carries all the singular values; give each their square roots."

PISSA = Exercise(
    number="E5.2",
    chapter="05",
    minutes=15,
    level="mid",
    importance=3,
    task="PiSSA's start: a residual that is frozen, and factors that hold the principal part of W.",
    returns="three arrays, W_res (out, in), A (r, in) and B (out, r)",
    reference=pissa_split,
    parse=arrays(3),
    observe=_whatever_the_signs,
    cases=_split_cases,
    properties=(
        Property(
            "SHAPES",
            "The shapes should be W_res (out, in), A (r, in) and B (out, r), in this order.",
            lambda got, W, r, alpha: [g.shape for g in got] == [W.shape, (r, W.shape[1]), (len(W), r)],
        ),
        Property(
            "START",
            "W_res + s B A should be W: at the start the layer computes what it did before.",
            lambda got, W, r, alpha: np.allclose(got[0] + alpha / r * got[2] @ got[1], W),
        ),
        Property(
            "PRINCIPAL",
            "The layer starts as W, but W_res is larger than it has to be: s B A is not the best rank-r part of W.",
            _is_principal,
        ),
        Property(
            "BALANCED",
            "s B A is right, but B^T B and A A^T differ: the scale is not shared evenly.",
            _is_balanced,
        ),
    ),
    mistakes=(
        Mistake(
            "NO_SCALE",
            "B A is the principal part, and the layer adds s B A: the start is off by a factor in that part.",
            _split_unscaled,
        ),
        Mistake(
            "REST_IN_RESIDUAL",
            "The start is W, because W_res takes up what s does to the principal part. Scale the factors instead.",
            _residual_takes_the_rest,
        ),
        Mistake(
            "NOT_SUBTRACTED",
            "W_res is W itself: the principal part is there twice. Take it out of the frozen weight.",
            _nothing_subtracted,
        ),
        Mistake(
            "SMALLEST",
            "A and B hold the smallest directions of W; PiSSA trains the largest and freezes the rest.",
            _smallest,
        ),
        Mistake("ONE_SIDE", _ONE_SIDE, _all_on_b),
        Mistake("ONE_SIDE", _ONE_SIDE, _all_on_a),
        Mistake(
            "S_ON_ONE",
            "The product is right, but 1/s is all on one factor; give each 1/sqrt(s).",
            _s_on_one,
        ),
        Mistake("VALUES_TWICE", "Both factors carry S, so the product has its square; split sqrt(S).", _values_twice),
        Mistake("NO_VALUES", "The singular values are lost: the product has ones in their place.", _no_values),
        Mistake(
            "NO_ROOT",
            "You divide both factors by s, and the product by its square; divide each by sqrt(s).",
            _no_root,
        ),
        Mistake("ALPHA_ONLY", "You divide by alpha; the scale s is alpha divided by the rank.", _by_alpha),
        Mistake(
            "V_IS_VT",
            "numpy returns V already transposed: its rows, not its columns, are the right singular vectors.",
            _v_for_vt,
        ),
        Mistake("SWAPPED", "A and B are returned in each other's place.", _swapped),
        Mistake(
            "LORA_START",
            "That is LoRA's start, B = 0 on all of W. In PiSSA A and B hold a part of W from the start.",
            _lora_start,
        ),
    ),
    hints=(
        "lora_edu.lowrank.balanced_factors(W, r), of chapter 01, gives B and A whose product is the best rank-r part of W.",
        "The layer adds s B A, so B A has to be 1/s of that part: each factor gets an equal share of 1/s.",
        "W_res is W less that part, which is s B A with the scaled factors.",
    ),
    after="W_res is not W: a file with A and B alone is for W_res.",
)


# E5.1 rank_for_budget


def rank_for_budget(maps: Maps, layers: int, targets: list[str], budget: int) -> int:
    """The largest r of which a LoRA on the targets of every layer has at most `budget` numbers; 0 if none has.

    maps[name] is (out, in), A is (r, in), B is (out, r). The count is chapter 04's exercise.
    """
    return budget // lora_param_count(maps, layers, 1, targets)  # rank r has r times as many


def _budget_cases() -> list[Case]:
    one = {"up_proj": (7, 4)}
    block = cost.Shape(hidden=6, intermediate=15, layers=3, vocab=1, heads=4, kv_heads=2, head_dim=2).maps
    llama, mistral = cost.SHAPES["Llama-2-7B"], cost.SHAPES["Mistral-7B"]
    qv, every = list(cost.GROUPS["q,v"]), list(cost.GROUPS["all-linear"])
    return [
        Case((one, 1, ["up_proj"], 32)),  # 2.9 ranks
        Case((one, 1, ["up_proj"], 33)),  # 3, exactly
        Case((one, 1, ["up_proj"], 10)),
        Case((one, 2, ["up_proj"], 70)),
        Case((block, 3, ["q_proj", "v_proj"], 200)),
        Case((block, 3, ["k_proj", "down_proj"], 260)),
        Case((llama.maps, llama.layers, qv, 4_194_304)),
        Case((llama.maps, llama.layers, every, 4_194_304)),
        Case((llama.maps, llama.layers, every, 2_000_000)),
        Case((mistral.maps, mistral.layers, every, 41_943_039)),
    ]


def _fits(got: Any, maps: Maps, layers: int, targets: list[str], budget: int) -> bool:
    return lora_param_count(maps, layers, int(got[0]), targets) <= budget


def _next_does_not(got: Any, maps: Maps, layers: int, targets: list[str], budget: int) -> bool:
    return lora_param_count(maps, layers, int(got[0]) + 1, targets) > budget


def _rounded(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return round(budget / lora_param_count(maps, layers, 1, targets))


def _rounded_up(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return -(-budget // lora_param_count(maps, layers, 1, targets))


def _quotient(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return budget / lora_param_count(maps, layers, 1, targets)


def _at_least_one(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return max(1, rank_for_budget(maps, layers, targets, budget))


def _below_the_budget(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return rank_for_budget(maps, layers, targets, budget - 1)


def _one_layer(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return rank_for_budget(maps, 1, targets, budget)


def _dense(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return budget // (layers * sum(maps[name][0] * maps[name][1] for name in targets))


def _a_alone(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return budget // (layers * sum(maps[name][1] for name in targets))


def _b_alone(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return budget // (layers * sum(maps[name][0] for name in targets))


def _inputs_twice(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return budget // (2 * layers * sum(maps[name][1] for name in targets))


def _every_map(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return rank_for_budget(maps, layers, list(maps), budget)


def _equal_shares(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    return min(budget // len(targets) // (layers * sum(maps[name])) for name in targets)


def _power_of_two(maps: Any, layers: int, targets: Any, budget: int) -> Any:
    r = rank_for_budget(maps, layers, targets, budget)
    return 2 ** (r.bit_length() - 1) if r else 0


_ONE_FACTOR = "You count one of the two factors; A and B both train."

BUDGET = Exercise(
    number="E5.1",
    chapter="05",
    minutes=8,
    level="screen",
    importance=4,
    task="The largest rank that a budget of trained numbers allows.",
    returns="one whole number",
    reference=rank_for_budget,
    parse=arrays(1),
    cases=_budget_cases,
    properties=(
        Property(
            "WHOLE",
            "A rank is one whole number, 0 or more.",
            lambda got, *args: bool(got[0].shape == () and got[0] % 1 == 0 and got[0] >= 0),
        ),
        Property("FITS", "A LoRA of that rank has more numbers than the budget.", _fits),
        Property("LARGEST", "A larger rank would still fit into the budget.", _next_does_not),
    ),
    mistakes=(
        Mistake("ROUNDED", "You round to the nearest rank; where that is up, it is over the budget.", _rounded),
        Mistake("ROUNDED_UP", "You round up, and are over the budget; only whole ranks that fit count.", _rounded_up),
        Mistake("QUOTIENT", "You return the quotient; there is no part of a rank. Round it down.", _quotient),
        Mistake(
            "AT_LEAST_ONE",
            "You return 1 where not even rank 1 fits; the budget is then too small for these targets, and 0 says so.",
            _at_least_one,
        ),
        Mistake("BELOW", "A LoRA that uses the budget up to the last number still fits.", _below_the_budget),
        Mistake("LAYERS", "You count one layer; each layer has an A and a B of its own.", _one_layer),
        Mistake("DENSE", "You count out x in, the weights of W; A and B have r (out + in).", _dense),
        Mistake("ONE_FACTOR", _ONE_FACTOR, _a_alone),
        Mistake("ONE_FACTOR", _ONE_FACTOR, _b_alone),
        Mistake("SQUARE", "You take every map for square, 2 r in; B has the other side, out.", _inputs_twice),
        Mistake("EVERY_MAP", "You count every map of the block; only those in targets get a LoRA.", _every_map),
        Mistake(
            "EQUAL_SHARES",
            "You split the budget evenly over the maps and let the widest decide; with one rank for all, their costs are added.",
            _equal_shares,
        ),
        Mistake("POWER_OF_TWO", "A rank need not be a power of two.", _power_of_two),
    ),
    hints=(
        "How many numbers does rank 1 cost on one map, and then on all the targets of all layers?",
        "Rank r costs r times as much.",
        "budget // cost rounds down, and gives 0 where not even rank 1 fits.",
    ),
)
