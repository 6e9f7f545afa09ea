"""Exercises of chapter 03, the LoRA layer."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_edu.layers import LoRALinear
from lora_edu.lowrank import Array
from lora_edu.practice.exercise import Case, Exercise, Mistake, Property, arrays, traced

# C5 lora_forward


def lora_forward(x: Array, W: Array, A: Array, B: Array, alpha: float, b: Array | None = None) -> Array:
    """y = x W^T + b + (alpha / r) (x A^T) B^T, for x (..., in), W (out, in), A (r, in), B (out, r), b (out,)."""
    y = x @ W.T + alpha / len(A) * (x @ A.T @ B.T)
    return y if b is None else y + b


def _forward_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    x, W, A, B = (
        np.array([[1.0, 2.0]]),
        np.array([[1.0, 0.0], [0.0, 1.0]]),
        np.array([[1.0, 1.0]]),
        np.array([[1.0], [2.0]]),
    )

    def draw(*shapes: tuple[int, ...]) -> list[Array]:
        return [rng.standard_normal(shape) for shape in shapes]

    # in = out and r = in at the end: there A @ B and transposed factors multiply too, and still are wrong.
    return [
        Case((x, W, A, B, 3.0)),
        Case((*draw((4, 5), (3, 5), (2, 5), (3, 2)), 6.0)),
        Case((*draw((5,), (3, 5), (2, 5), (3, 2)), 1.0)),
        Case((*draw((2, 3, 4), (6, 4), (2, 4), (6, 2)), 1.0, rng.standard_normal(6))),
        Case((*draw((7, 4), (4, 4), (4, 4), (4, 4)), 8.0, rng.standard_normal(4))),
    ]


def _expected(x: Array, W: Array, A: Array, B: Array, alpha: float, b: Array | None = None) -> Array:
    """The definition, token by token and entry by entry: slow, and written without a matrix product."""
    r = len(A)
    y = np.zeros((*x.shape[:-1], len(W)))
    for token in np.ndindex(x.shape[:-1]):
        z = [sum(A[k, i] * x[(*token, i)] for i in range(x.shape[-1])) for k in range(r)]
        for o in range(len(W)):
            frozen = sum(W[o, i] * x[(*token, i)] for i in range(x.shape[-1]))
            update = sum(B[o, k] * z[k] for k in range(r))
            y[(*token, o)] = frozen + alpha / r * update + (0 if b is None else b[o])
    return y


def _unscaled(x: Any, W: Any, A: Any, B: Any, alpha: float, b: Any = None) -> Any:
    return x @ W.T + x @ A.T @ B.T + (0 if b is None else b)


def _alpha_only(x: Any, W: Any, A: Any, B: Any, alpha: float, b: Any = None) -> Any:
    return x @ W.T + alpha * (x @ A.T @ B.T) + (0 if b is None else b)


def _sum_scaled(x: Any, W: Any, A: Any, B: Any, alpha: float, b: Any = None) -> Any:
    return alpha / len(A) * (x @ W.T + x @ A.T @ B.T) + (0 if b is None else b)


def _sqrt_scaled(x: Any, W: Any, A: Any, B: Any, alpha: float, b: Any = None) -> Any:
    return x @ W.T + alpha / np.sqrt(len(A)) * (x @ A.T @ B.T) + (0 if b is None else b)


def _r_is_out(x: Any, W: Any, A: Any, B: Any, alpha: float, b: Any = None) -> Any:
    return x @ W.T + alpha / len(B) * (x @ A.T @ B.T) + (0 if b is None else b)


def _a_times_b(x: Any, W: Any, A: Any, B: Any, alpha: float, b: Any = None) -> Any:
    return x @ (W + alpha / len(A) * (A @ B)).T + (0 if b is None else b)


def _no_bias(x: Any, W: Any, A: Any, B: Any, alpha: float, b: Any = None) -> Any:
    return x @ W.T + alpha / len(A) * (x @ A.T @ B.T)


def _no_base(x: Any, W: Any, A: Any, B: Any, alpha: float, b: Any = None) -> Any:
    return alpha / len(A) * (x @ A.T @ B.T) + (0 if b is None else b)


def _in_place(x: Any, W: Any, A: Any, B: Any, alpha: float, b: Any = None) -> Any:
    W += alpha / len(A) * (B @ A)
    return x @ W.T + (0 if b is None else b)


C5 = Exercise(
    number="C5",
    chapter="03",
    minutes=10,
    level="screen",
    importance=5,
    task="The forward pass of a LoRA layer in NumPy.",
    returns="one array y (..., out)",
    reference=lora_forward,
    parse=arrays(1),
    cases=_forward_cases,
    properties=(
        Property(
            "SHAPE",
            "y should have the shape of x with its last axis, in, replaced by out.",
            lambda got, x, W, *rest: got[0].shape == (*x.shape[:-1], len(W)),
        ),
        Property(
            "VALUE",
            "The numbers differ from x W^T + b + (alpha / r) (x A^T) B^T.",
            lambda got, *args: np.allclose(got[0], _expected(*args)),
        ),
    ),
    mistakes=(
        Mistake("NO_SCALE", "The update is not scaled: it should count alpha / r times.", _unscaled),
        Mistake("ALPHA_ONLY", "You scale by alpha; the scale is alpha divided by the rank.", _alpha_only),
        Mistake(
            "SUM_SCALED",
            "You scale the whole sum: the frozen path W x counts once, whatever alpha is.",
            _sum_scaled,
        ),
        Mistake("SQRT", "alpha / sqrt(r) is rsLoRA's scale; LoRA's own is alpha / r.", _sqrt_scaled),
        Mistake("R_IS_OUT", "You divide by the number of outputs; r is the number of rows of A.", _r_is_out),
        Mistake("A_TIMES_B", "A @ B only multiplies when in = out; the update of W is B @ A.", _a_times_b),
        Mistake("NO_BIAS", "The bias b is lost.", _no_bias),
        Mistake("NO_BASE", "The frozen path is missing: LoRA adds to W x, it does not replace it.", _no_base),
        Mistake(
            "MUTATES",
            "One of the arrays that were passed in has changed, W for example: the caller still needs them as they were.",
            _in_place,
        ),
    ),
    hints=(
        "Two paths are added: the frozen one, x W^T, and the update's, which goes down to r numbers and up again.",
        "Row vectors meet the transposes: z = x @ A.T has r numbers a token, and z @ B.T has out.",
        "r is the length of the bottleneck, len(A); only the second path is scaled, by alpha / r. Add b when there is one.",
    ),
)


# C13 lora_backward


def lora_backward(x: Array, g: Array, W: Array, A: Array, B: Array, s: float) -> tuple[Array, Array, Array]:
    """dx, dA, dB of a loss L for y = x W^T + s (x A^T) B^T, from g = dL/dy (n, out) and x (n, in)."""
    dz = s * (g @ B)
    return g @ W + dz @ A, dz.T @ x, s * (g.T @ (x @ A.T))


def _backward_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    small = [np.array(m, dtype=float) for m in ([[1, 2]], [[3]], [[1, -1]], [[2, 1]], [[2]])]
    # In the last case in = out = r: there every transposed factor multiplies too, and still is wrong.
    sizes = [(5, 4, 3, 2, 1.5), (1, 6, 5, 1, 4.0), (4, 3, 3, 3, 0.5)]
    return [Case((*small, 3.0))] + [
        Case((*(rng.standard_normal(z) for z in ((n, i), (n, o), (o, i), (r, i), (o, r))), s))
        for n, i, o, r, s in sizes
    ]


def _derivatives(x: Array, g: Array, W: Array, A: Array, B: Array, s: float) -> tuple[Array, Array, Array]:
    """Entry by entry: the loss sum(g * y) is linear in each of x, A and B, so a step of 1 gives its exact slope."""

    def loss(x: Array, A: Array, B: Array) -> float:
        return float((g * (x @ W.T + s * (x @ A.T @ B.T))).sum())

    found = []
    for which, M in enumerate((x, A, B)):
        slope = np.zeros_like(M)
        for place in np.ndindex(M.shape):
            moved = [x, A, B]
            moved[which] = M.copy()
            moved[which][place] += 1
            slope[place] = loss(*moved) - loss(x, A, B)
        found.append(slope)
    return found[0], found[1], found[2]


def _close_to_slope(which: int) -> Any:
    return lambda got, *args: np.allclose(got[which], _derivatives(*args)[which])


def _not_only_size(which: int) -> Any:
    """False when the gradient is a multiple of the right one other than 1."""

    def holds(got: Any, *args: Any) -> bool:
        right = _derivatives(*args)[which]
        factor = (got[which] * right).sum() / max((right**2).sum(), 1e-12)
        return bool(np.isclose(factor, 1)) or not np.allclose(got[which], factor * right) or not got[which].any()

    return holds


def _dx_through_lora(x: Any, g: Any, W: Any, A: Any, B: Any, s: float) -> Any:
    return s * (g @ B) @ A, s * (g @ B).T @ x, s * g.T @ (x @ A.T)


def _dx_through_base(x: Any, g: Any, W: Any, A: Any, B: Any, s: float) -> Any:
    return g @ W, s * (g @ B).T @ x, s * g.T @ (x @ A.T)


def _gradients_unscaled(x: Any, g: Any, W: Any, A: Any, B: Any, s: float) -> Any:
    return g @ W + s * (g @ B) @ A, (g @ B).T @ x, g.T @ (x @ A.T)


def _scaled_twice(x: Any, g: Any, W: Any, A: Any, B: Any, s: float) -> Any:
    return g @ W + s * (g @ B) @ A, s * s * (g @ B).T @ x, s * s * g.T @ (x @ A.T)


def _batch_mean(x: Any, g: Any, W: Any, A: Any, B: Any, s: float) -> Any:
    n = len(x)
    return g @ W + s * (g @ B) @ A, s * (g @ B).T @ x / n, s * g.T @ (x @ A.T) / n


def _factors_swapped(x: Any, g: Any, W: Any, A: Any, B: Any, s: float) -> Any:
    return g @ W + s * (g @ B) @ A, s * g.T @ (x @ A.T), s * (g @ B).T @ x


C13 = Exercise(
    number="C13",
    chapter="03",
    minutes=15,
    level="mid",
    importance=5,
    task="The three gradients of a LoRA layer, by hand.",
    returns="three arrays dx (n, in), dA (r, in), dB (out, r)",
    reference=lora_backward,
    parse=arrays(3),
    cases=_backward_cases,
    properties=(
        Property(
            "SHAPE",
            "Each gradient has the shape of what it belongs to: dx that of x, dA that of A, dB that of B.",
            lambda got, x, g, W, A, B, s: [m.shape for m in got] == [x.shape, A.shape, B.shape],
        ),
        Property(
            "DB_SIZE",
            "dB points the right way and has the wrong size. Where does s enter, and how often?",
            _not_only_size(2),
        ),
        Property("DB", "dB is not the slope of the loss in B.", _close_to_slope(2)),
        Property(
            "DA_SIZE",
            "dA points the right way and has the wrong size. Where does s enter, and how often?",
            _not_only_size(1),
        ),
        Property("DA", "dA is not the slope of the loss in A.", _close_to_slope(1)),
        Property("DX", "dx is not the slope of the loss in x: how many paths lead from x to y?", _close_to_slope(0)),
    ),
    mistakes=(
        Mistake(
            "DX_LORA_ONLY",
            "dx runs through the adapter only. Frozen stops the update of W, not the signal through it.",
            _dx_through_lora,
        ),
        Mistake("DX_BASE_ONLY", "dx runs through W only; the adapter is a second path from x to y.", _dx_through_base),
        Mistake("NO_SCALE", "dA and dB lack the scale: y contains s times the product.", _gradients_unscaled),
        Mistake("SCALED_TWICE", "The scale enters dA and dB twice; y contains it once.", _scaled_twice),
        Mistake(
            "BATCH_MEAN",
            "You divide by the batch size. The loss has done that, if it wants it: g carries it already.",
            _batch_mean,
        ),
        Mistake("SWAPPED", "dA and dB are returned in each other's place.", _factors_swapped),
    ),
    hints=(
        "Name the bottleneck: z = x A^T (n, r), y = x W^T + s z B^T. Go backwards one product at a time.",
        "For Y = X M^T with dL/dY = G: dL/dX = G M and dL/dM = G^T X. Use it for M = B, then for M = A.",
        "dz = s g B, so dA = dz^T x and dB = s g^T z. x feeds both W and A: dx is the sum of two terms.",
    ),
)


# C6 LoRAWithDropout


class LoRAWithDropout(nn.Module):
    """y = base(x) + (alpha / r) B A dropout(x), with A (r, in) and B (out, r) trainable and the base frozen."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float) -> None:
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, r))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # uniform in +-1/sqrt(in)
        self.dropout, self.s = nn.Dropout(dropout), alpha / r

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        z = self.dropout(x.to(self.A.dtype)) @ self.A.T
        return (y + self.s * (z @ self.B.T)).to(y.dtype)


def _use_with_dropout(learner: Any, d_in: int, d_out: int, r: int, alpha: float, dropout: float) -> Any:
    """Everything that the check looks at, from one life of the learner's module."""
    base = nn.Linear(d_in, d_out)
    layer = learner(copy.deepcopy(base), r, alpha, dropout)
    if not isinstance(layer, nn.Module):
        return layer
    A, B = (m if torch.is_tensor(m := getattr(layer, name, None)) else torch.zeros(0) for name in "AB")
    seen = SimpleNamespace(shapes=(tuple(A.shape), tuple(B.shape)), booleans=[], numbers=[])
    seen.trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    if seen.shapes != ((r, d_in), (d_out, r)):
        return seen
    x = torch.randn(400, d_in, requires_grad=True)
    y = base(x).detach()
    seen.spread = (A.detach().std() * (3 * d_in) ** 0.5).item()
    seen.start = torch.allclose(layer.eval()(x), y, atol=1e-5)
    seen.clean = torch.allclose(layer.train()(x), y, atol=1e-5)  # B is zero: nothing but the frozen path
    with torch.no_grad():
        nn.init.normal_(A), nn.init.normal_(B)
    layer.eval()(x).square().mean().backward()
    seen.learns = A.grad is not None and B.grad is not None and bool(A.grad.any() and B.grad.any())
    through = (x @ (base.weight + alpha / r * (B @ A).to(base.weight)).T + base.bias).square().mean()
    seen.passes = x.grad is not None and torch.allclose(
        x.grad, torch.autograd.grad(through, x)[0], rtol=1e-3, atol=1e-5
    )
    with torch.no_grad():
        seen.axes = torch.allclose(layer(x.view(20, 20, -1)), layer(x).view(20, 20, -1), rtol=1e-3, atol=1e-4)
        expected = (alpha / r * (x.to(A) @ A.T @ B.T)).to(y)
        seen.repeats = torch.equal(layer(x), layer(x))
        seen.value = torch.allclose(layer(x) - y, expected, rtol=1e-3, atol=1e-4)
        layer.train()
        seen.active = not torch.equal(layer(x), layer(x))
        seen.whole = ((layer(x) - y).abs() < 1e-6).double().mean().item() < 0.05
        mean = torch.stack([layer(x) - y for _ in range(60)]).mean(0)
        seen.size = ((mean * expected).sum() / expected.square().sum()).item()
        one_hot = torch.eye(d_in).repeat(100, 1)  # a dropped entry leaves nothing of such a row's update
        seen.share = ((layer(one_hot) - base(one_hot)).abs() < 1e-6).all(1).double().mean().item()
        narrow = nn.Linear(d_in, d_out).bfloat16()
        half, xh = learner(copy.deepcopy(narrow), r, alpha, dropout).eval(), x.detach().bfloat16()
        try:
            seen.half = half(xh).dtype == torch.bfloat16
            seen.wide = half.A.dtype == half.B.dtype == A.dtype
            nn.init.normal_(half.A), nn.init.normal_(half.B)
            exact = narrow(xh).double() + alpha / r * xh.double() @ half.A.double().T @ half.B.double().T
            # Rounded once: no farther from the exact sum than half a step of bfloat16.
            seen.once = ((half(xh).double() - exact).abs() > 1.01 * 2**-8 * exact.abs()).double().mean().item() < 0.02
        except RuntimeError:  # dtypes that do not go together
            seen.half = seen.wide = seen.once = False
    seen.booleans = [seen.start, seen.clean, seen.learns, seen.passes, seen.repeats, seen.value, seen.active]
    seen.booleans += [seen.whole, seen.half, seen.wide, seen.once, seen.axes]
    seen.numbers = [round(math.log2(seen.spread + 1e-9)), abs(seen.size - 1) < 0.05, abs(seen.share - dropout) < 0.04]
    return seen


def _output_dropped(self: Any, x: Tensor) -> Tensor:
    y = self.base(x)
    return (y + self.dropout(self.s * (x.to(self.A.dtype) @ self.A.T @ self.B.T))).to(y.dtype)


def _bottleneck_dropped(self: Any, x: Tensor) -> Tensor:
    y = self.base(x)
    return (y + self.s * (self.dropout(x.to(self.A.dtype) @ self.A.T) @ self.B.T)).to(y.dtype)


def _both_paths_dropped(self: Any, x: Tensor) -> Tensor:
    x = self.dropout(x)
    y = self.base(x)
    return (y + self.s * (x.to(self.A.dtype) @ self.A.T @ self.B.T)).to(y.dtype)


def _never_dropped(self: Any, x: Tensor) -> Tensor:
    y = self.base(x)
    return (y + self.s * (x.to(self.A.dtype) @ self.A.T @ self.B.T)).to(y.dtype)


def _always_dropped(self: Any, x: Tensor) -> Tensor:
    y = self.base(x)
    return (y + self.s * (F.dropout(x.to(self.A.dtype), self.dropout.p) @ self.A.T @ self.B.T)).to(y.dtype)


def _not_rescaled(self: Any, x: Tensor) -> Tensor:
    y, z = self.base(x), x.to(self.A.dtype)
    if self.training:
        z = z * (torch.rand(z.shape) > self.dropout.p)
    return (y + self.s * (z @ self.A.T @ self.B.T)).to(y.dtype)


def _precision_leaks(self: Any, x: Tensor) -> Tensor:
    return self.base(x) + self.s * (self.dropout(x.to(self.A.dtype)) @ self.A.T @ self.B.T)


def _with_forward(forward: Any) -> Any:
    return type("LoRAWithDropout", (LoRAWithDropout,), {"forward": forward})


class _WideStart(LoRAWithDropout):
    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float) -> None:
        super().__init__(base, r, alpha, dropout)
        nn.init.normal_(self.A)


class _TransposedStart(LoRAWithDropout):
    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float) -> None:
        super().__init__(base, r, alpha, dropout)
        self.A.data = nn.init.kaiming_uniform_(self.A.data.T.contiguous(), a=5**0.5).T.contiguous()


class _HalfFactors(LoRAWithDropout):
    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float) -> None:
        super().__init__(base, r, alpha, dropout)
        self.to(base.weight.dtype)


def _update_in_half(self: Any, x: Tensor) -> Tensor:
    return self.base(x) + self.s * (self.dropout(x) @ self.A.T.to(x.dtype) @ self.B.T.to(x.dtype))


class _KeepingProbability(LoRAWithDropout):
    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float) -> None:
        super().__init__(base, r, alpha, 1 - dropout)


def _base_without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.base(x)
    return (y + self.s * (self.dropout(x.to(self.A.dtype)) @ self.A.T @ self.B.T)).to(y.dtype)


def _detached(self: Any, x: Tensor) -> Tensor:
    y = self.base(x)
    return (y + self.s * (self.dropout(x.to(self.A.dtype)) @ self.A.data.T @ self.B.data.T)).to(y.dtype)


C6 = Exercise(
    number="C6",
    chapter="03",
    minutes=15,
    level="mid",
    importance=4,
    task="A LoRA module with dropout in its place.",
    returns="an nn.Module with A (r, in) and B (out, r)",
    reference=LoRAWithDropout,
    call=_use_with_dropout,
    parse=traced,
    observe=lambda seen, *args: (
        np.array([*seen.shapes[0], *seen.shapes[1], seen.trainable]),
        np.array(seen.booleans),
        np.array(seen.numbers),
    ),
    cases=lambda: [Case((12, 7, 1, 3.0, 0.5)), Case((40, 30, 4, 2.0, 0.25))],
    properties=(
        Property(
            "SHAPES",
            "The module should have a Parameter A of shape (r, in) and one B of shape (out, r).",
            lambda seen, d_in, d_out, r, *rest: seen.shapes == ((r, d_in), (d_out, r)),
        ),
        Property(
            "ONLY_AB_TRAIN",
            "Exactly A and B should require a gradient.",
            lambda seen, d_in, d_out, r, *rest: seen.trainable == r * (d_in + d_out),
        ),
        Property("NOOP", "At the start the module should compute what its base does.", lambda seen, *a: seen.start),
        Property(
            "DROP_HITS_BASE",
            "With B = 0, in training, the output should be the base's: the frozen path must see the clean input.",
            lambda seen, *a: seen.clean,
        ),
        Property(
            "INIT_FAN_IN",
            "A should start uniform in +-1/sqrt(in), whatever r is: kaiming_uniform_(A, a=5**0.5).",
            lambda seen, *a: 0.6 < seen.spread < 1.5,
        ),
        Property("EVAL_DETERMINISTIC", "In eval mode two calls should agree.", lambda seen, *a: seen.repeats),
        Property("EVAL_VALUE", "In eval mode y should be base(x) + (alpha / r) B A x.", lambda seen, *a: seen.value),
        Property("AXES", "x may have any number of leading axes.", lambda seen, *a: seen.axes),
        Property(
            "LEARNS", "A and B get no gradient: something cuts them off from the output.", lambda seen, *a: seen.learns
        ),
        Property(
            "SIGNAL",
            "The gradient of x is not g W + (alpha / r) g B A: frozen stops the update of W, not the signal through it.",
            lambda seen, *a: seen.passes,
        ),
        Property("DROP_ACTIVE", "In training two calls should differ.", lambda seen, *a: seen.active),
        Property(
            "DROP_ON_OUTPUT",
            "Whole entries of the update vanish in training; dropout belongs on the input of A.",
            lambda seen, *a: seen.whole,
        ),
        Property(
            "DROP_SCALE",
            "Averaged over many calls the update should be the one of eval mode.",
            lambda seen, *a: abs(seen.size - 1) < 0.05,
        ),
        Property(
            "DROP_SHARE",
            "The share of the entries of x that are dropped is not `dropout`.",
            lambda seen, d_in, d_out, r, alpha, dropout: abs(seen.share - dropout) < 0.04,
        ),
        Property(
            "DTYPE",
            "A bfloat16 base with a bfloat16 x should give a bfloat16 output, without an error.",
            lambda seen, *a: seen.half,
        ),
        Property(
            "WIDE",
            "Over a bfloat16 base A and B should have torch's default dtype, not the base's.",
            lambda seen, *a: seen.wide,
        ),
        Property(
            "ROUNDED_ONCE",
            "Over a bfloat16 base the update and the sum should be computed in A's dtype, and the sum rounded once.",
            lambda seen, *a: seen.once,
        ),
    ),
    mistakes=(
        Mistake(
            "DROP_ON_OUTPUT",
            "You drop the outputs of BAx: whole output units of the update vanish. Drop the input of A.",
            _with_forward(_output_dropped),
        ),
        Mistake(
            "DROP_ON_BOTTLENECK",
            "You drop the bottleneck: with r = 1 the whole update of a token vanishes. Drop the input of A.",
            _with_forward(_bottleneck_dropped),
        ),
        Mistake(
            "DROP_HITS_BASE",
            "One dropout stands before both paths; the frozen path must see the clean input.",
            _with_forward(_both_paths_dropped),
        ),
        Mistake("DROP_ACTIVE", "The dropout is made but never used.", _with_forward(_never_dropped)),
        Mistake(
            "EVAL_DETERMINISTIC",
            "The dropout also acts in eval mode: nn.Dropout knows the mode, F.dropout has to be told.",
            _with_forward(_always_dropped),
        ),
        Mistake(
            "DROP_SCALE",
            "What survives is not scaled up by 1/(1 - p), so the update is smaller in training than in eval mode.",
            _with_forward(_not_rescaled),
        ),
        Mistake(
            "DTYPE",
            "With a bfloat16 base the output is wider than bfloat16; cast the sum back to the base output's dtype.",
            _with_forward(_precision_leaks),
        ),
        Mistake(
            "HALF_FACTORS",
            "A and B take the base's bfloat16: small steps of training are rounded away. Leave them in torch's default dtype.",
            _HalfFactors,
        ),
        Mistake(
            "ROUNDED_ONCE",
            "Over a bfloat16 base you compute the update in bfloat16. Compute and add in A's dtype, and round the sum.",
            _with_forward(_update_in_half),
        ),
        Mistake(
            "WIDE_START",
            "A starts with deviation 1: the bottleneck grows with the width. It should be uniform in +-1/sqrt(in).",
            _WideStart,
        ),
        Mistake(
            "TRANSPOSED_START",
            "A starts with the bound 1/sqrt(r): the initialiser took r for the fan-in. Its bound is 1/sqrt(in).",
            _TransposedStart,
        ),
        Mistake(
            "SIGNAL",
            "The base runs without a gradient: frozen stops the update of W, not the signal through it to earlier layers.",
            _with_forward(_base_without_gradient),
        ),
        Mistake(
            "LEARNS", "A.data and B.data are cut off from autograd: A and B get no gradient.", _with_forward(_detached)
        ),
        Mistake(
            "DROP_SHARE",
            "`dropout` is the share that is dropped, as in nn.Dropout, not the share that is kept.",
            _KeepingProbability,
        ),
    ),
    hints=(
        "Three lines of __init__ freeze the base and make A and B; nn.Dropout is a module and follows train() and eval().",
        "Only the input of A is dropped: y = base(x) + s * (dropout(x) @ A.T @ B.T).",
        "kaiming_uniform_(A, a=5**0.5) is uniform in +-1/sqrt(in). Where dtypes differ, compute in A's and cast the sum to y's.",
    ),
)


# C7 inject_lora


def inject_lora(model: nn.Module, targets: list[str], r: int, alpha: float) -> nn.Module:
    """Wrap every nn.Linear whose own name is in `targets` in a LoRALinear, and let nothing else train.

    Raises ValueError, before anything is changed, when a target matches nothing or the model has a LoRA already.
    """
    names = {path: path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("this model has a LoRA already.")
    if missing := set(targets) - set(names.values()):
        raise ValueError(f"no layer is named {', '.join(sorted(missing))}.")
    model.requires_grad_(False)
    for path, name in names.items():
        if name in targets:
            model.set_submodule(path, LoRALinear(model.get_submodule(path), r, alpha))  # type: ignore[arg-type]
    return model


def _block() -> nn.Module:
    """A model with near names: q_proj, and seq_proj that ends in the same letters."""
    model = nn.Sequential()
    for name in ("first", "second"):
        block = nn.Sequential()
        block.add_module("q_proj", nn.Linear(6, 6))
        block.add_module("seq_proj", nn.Linear(6, 5))
        block.add_module("up_proj", nn.Linear(5, 6))
        model.add_module(name, block)
    model.add_module("head", nn.Linear(6, 4))
    return model


def _injection_cases() -> list[Case]:
    adapted = inject_lora(_block(), ["q_proj"], 2, 4)
    return [
        Case((nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), ["1"], 1, 2.0)),
        Case((_block(), ["q_proj"], 2, 6.0)),
        Case((_block(), ["q_proj", "up_proj"], 3, 3.0)),
        Case((_block(), ["q_proj", "k_proj"], 2, 2.0)),
        Case((_block(), ["q_proj", "first"], 2, 2.0)),
        Case((adapted, ["q_proj"], 2, 4.0)),
        Case((copy.deepcopy(adapted), ["up_proj"], 2, 4.0)),
    ]


def _inject(learner: Any, model: nn.Module, targets: list[str], r: int, alpha: float) -> Any:
    before, x = copy.deepcopy(model), torch.randn(5, next(model.parameters()).shape[1])
    names = [path for path, m in before.named_modules() if isinstance(m, nn.Linear)]
    try:
        got = learner(model, targets, r, alpha)
        refused = False
    except Exception as error:
        if not isinstance(error, ValueError) and not _must_refuse(SimpleNamespace(names=names), targets):
            raise
        got, refused = model, isinstance(error, ValueError)
    if not isinstance(got, nn.Module):
        return got
    layers = {path: m for path, m in got.named_modules() if isinstance(m, LoRALinear)}
    return SimpleNamespace(
        refused=refused,
        paths=sorted(layers),
        scales={m.scaling for m in layers.values()},
        ranks={m.r for m in layers.values()},
        in_place=got is model,
        trainable=sorted(name for name, p in got.named_parameters() if p.requires_grad),
        trained_before=sorted(name for name, p in before.named_parameters() if p.requires_grad),
        same_start=torch.allclose(got(x), before(x)),
        names=names,
    )


def _named(seen: Any, targets: list[str]) -> list[str]:
    return sorted(path for path in seen.names if path.rpartition(".")[2] in targets)


def _adapted(seen: Any) -> bool:
    return any(name.endswith("lora_A") for name in seen.names)


def _must_refuse(seen: Any, targets: list[str]) -> bool:
    return _adapted(seen) or len(targets) != len({path.rpartition(".")[2] for path in _named(seen, targets)})


def _unless_refused(holds: Any) -> Any:
    return lambda seen, model, targets, r, alpha: _must_refuse(seen, targets) or holds(seen, targets, r, alpha)


def _wrap_where(model: nn.Module, hit: Any, r: int, alpha: float) -> nn.Module:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and hit(path):
            model.set_submodule(path, LoRALinear(module, r, alpha))
    return model


def _guard(model: nn.Module, targets: list[str]) -> None:
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError
    if set(targets) - {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, nn.Linear)}:
        raise ValueError


def _substring(model: Any, targets: Any, r: int, alpha: float) -> Any:
    _guard(model, targets)
    return _wrap_where(model.requires_grad_(False), lambda path: any(t in path for t in targets), r, alpha)


def _rest_trains(model: Any, targets: Any, r: int, alpha: float) -> Any:
    _guard(model, targets)
    return _wrap_where(model, lambda path: path.rpartition(".")[2] in targets, r, alpha)


def _adapters_frozen(model: Any, targets: Any, r: int, alpha: float) -> Any:
    return _rest_trains(model, targets, r, alpha).requires_grad_(False)


def _first_only(model: Any, targets: Any, r: int, alpha: float) -> Any:
    _guard(model, targets)
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in targets:
            model.set_submodule(path, LoRALinear(module, r, alpha))
            break
    return model


def _silent(model: Any, targets: Any, r: int, alpha: float) -> Any:
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError
    return _wrap_where(model.requires_grad_(False), lambda path: path.rpartition(".")[2] in targets, r, alpha)


def _twice(model: Any, targets: Any, r: int, alpha: float) -> Any:
    if set(targets) - {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, nn.Linear)}:
        raise ValueError
    return _wrap_where(model.requires_grad_(False), lambda path: path.rpartition(".")[2] in targets, r, alpha)


def _frozen_before_refusing(model: Any, targets: Any, r: int, alpha: float) -> Any:
    model.requires_grad_(False)
    _guard(model, targets)
    return _wrap_where(model, lambda path: path.rpartition(".")[2] in targets, r, alpha)


def _copied(model: Any, targets: Any, r: int, alpha: float) -> Any:
    return inject_lora(copy.deepcopy(model), targets, r, alpha)


C7 = Exercise(
    number="C7",
    chapter="03",
    minutes=20,
    level="mid",
    importance=5,
    task="Put LoRALinear into a model by the layers' names.",
    returns="the model, an nn.Module",
    reference=inject_lora,
    call=_inject,
    parse=traced,
    observe=lambda seen, *args: (
        " ".join([*seen.paths, *seen.trainable]),
        np.array([seen.refused, seen.same_start, seen.in_place, *sorted(seen.scales), *sorted(seen.ranks)]),
    ),
    changes_arguments=True,
    cases=_injection_cases,
    properties=(
        Property(
            "COUNT",
            "Exactly the nn.Linear layers whose own name, after the last dot, is a target should be LoRALinear now.",
            _unless_refused(lambda seen, targets, r, alpha: seen.paths == _named(seen, targets)),
        ),
        Property(
            "SCALE",
            "The wrapped layers should scale by alpha / r.",
            _unless_refused(lambda s, t, r, a: s.scales == {a / r}),
        ),
        Property(
            "RANK", "The wrapped layers should have rank r.", _unless_refused(lambda seen, t, r, a: seen.ranks == {r})
        ),
        Property(
            "STILL_TRAINABLE",
            "No A and B train: who froze them?",
            _unless_refused(lambda seen, *a: any("lora_" in name for name in seen.trainable)),
        ),
        Property(
            "FROZEN_REST",
            "Something else than A and B still trains: freeze the whole model first.",
            _unless_refused(lambda seen, *a: all("lora_" in name for name in seen.trainable)),
        ),
        Property("NOOP", "At the start the outputs should not change.", lambda seen, *a: bool(seen.same_start)),
        Property(
            "IN_PLACE",
            "Change the model that was passed in, and return it: a copy of a large model is a second one in memory.",
            lambda seen, *a: seen.in_place,
        ),
        Property(
            "NO_REFUSAL",
            "A target that names no nn.Linear, also where it names a container, should raise ValueError and nothing else.",
            lambda seen, model, targets, r, alpha: seen.refused or not _must_refuse(seen, targets) or _adapted(seen),
        ),
        Property(
            "NO_REFUSAL_TWICE",
            "A model that has a LoRA already should raise ValueError, and nothing else.",
            lambda seen, model, targets, r, alpha: seen.refused or not _must_refuse(seen, targets),
        ),
        Property(
            "REFUSED",
            "It refuses targets that all name an nn.Linear of a model without LoRA.",
            lambda seen, model, targets, r, alpha: not seen.refused or _must_refuse(seen, targets),
        ),
        Property(
            "CHANGED_BEFORE_REFUSING",
            "It refuses, but something was frozen or wrapped before it did: check first, change then.",
            lambda seen, model, targets, r, alpha: not seen.refused or seen.trainable == seen.trained_before,
        ),
    ),
    mistakes=(
        Mistake(
            "SUBSTRING",
            "A target that is only part of a name is a hit with you: q_proj must not find seq_proj.",
            _substring,
        ),
        Mistake("FROZEN_REST", "The layers without LoRA still train; freeze the whole model first.", _rest_trains),
        Mistake("STILL_TRAINABLE", "You freeze after wrapping, and so A and B too.", _adapters_frozen),
        Mistake(
            "IN_PLACE",
            "You return a changed copy. Change the model that was passed in: a copy of a large model is a second one in memory.",
            _copied,
        ),
        Mistake("FIRST_ONLY", "Only the first layer with the name is wrapped; every block has one.", _first_only),
        Mistake(
            "SILENT_NO_MATCH",
            "A misspelt target passes in silence, and a layer is not trained: refuse with a ValueError.",
            _silent,
        ),
        Mistake(
            "DOUBLE_WRAP",
            "Called a second time it freezes the A and B of the first: refuse a model that has a LoRA.",
            _twice,
        ),
        Mistake(
            "CHANGED_BEFORE_REFUSING",
            "It freezes the model and then refuses: the caller's model is left frozen. Check first, change then.",
            _frozen_before_refusing,
        ),
    ),
    hints=(
        'model.named_modules() gives paths such as "first.q_proj"; path.rpartition(".")[2] is the layer\'s own name.',
        "Collect the paths first, refuse if a target found none or a LoRALinear is there, then freeze, then wrap.",
        "model.set_submodule(path, LoRALinear(model.get_submodule(path), r, alpha)); its A and B train although the rest is frozen.",
    ),
)


# C8 count_parameters


def count_parameters(model: nn.Module) -> tuple[int, int, float]:
    """Total parameters, trainable ones, and the trainable share of the total in per cent; shared ones count once."""
    parameters = list(model.parameters())  # yields each parameter once, also where two modules share it
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return total, trainable, 100 * trainable / total


def _counting_cases() -> list[Case]:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.emb.weight

    plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    plain[0].requires_grad_(False)
    normed = nn.Sequential(nn.Linear(8, 5).requires_grad_(False), nn.BatchNorm1d(5))
    tied = Tied()
    return [
        Case((plain,)),
        Case((normed,)),
        Case((nn.Sequential(tied, LoRALinear(nn.Linear(9, 7), 2, 4)),)),
    ]


def _counted(model: nn.Module) -> tuple[float, float, float]:
    """By identity, through every module's own table of parameters."""
    own = {id(p): p for m in model.modules() for p in m._parameters.values() if p is not None}
    total, trainable = (sum(p.nelement() for p in own.values() if p.requires_grad or every) for every in (True, False))
    return total, trainable, 100 * trainable / total


def _from_state_dict(model: nn.Module) -> Any:
    total = sum(v.numel() for v in model.state_dict().values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total, trainable, 100 * trainable / total


def _shared_twice(model: nn.Module) -> Any:
    every = [p for _, p in model.named_parameters(remove_duplicate=False)]
    total, trainable = sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad)
    return total, trainable, 100 * trainable / total


def _percent_of_frozen(model: nn.Module) -> Any:
    total, trainable, _ = count_parameters(model)
    return total, trainable, 100 * trainable / (total - trainable)


def _share(model: nn.Module) -> Any:
    total, trainable, percent = count_parameters(model)
    return total, trainable, percent / 100


def _swapped(model: nn.Module) -> Any:
    total, trainable, percent = count_parameters(model)
    return trainable, total, percent


def _tensors(model: nn.Module) -> Any:
    every = list(model.parameters())
    trainable = sum(p.requires_grad for p in every)
    return len(every), trainable, 100 * trainable / len(every)


def _frozen_left_out(model: nn.Module) -> Any:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, trainable, 100.0


C8 = Exercise(
    number="C8",
    chapter="03",
    minutes=10,
    level="screen",
    importance=4,
    task="Count a model's parameters.",
    returns="three numbers: total, trainable, per cent",
    reference=count_parameters,
    parse=arrays(3),
    cases=_counting_cases,
    properties=(
        Property(
            "TOTAL",
            "The total is wrong: every parameter's numbers, each parameter once, no buffers.",
            lambda got, model: got[0] == _counted(model)[0],
        ),
        Property(
            "TRAINABLE",
            "The trainable count is wrong: what has requires_grad, each parameter once.",
            lambda got, model: got[1] == _counted(model)[1],
        ),
        Property(
            "PCT",
            "The percentage is 100 times trainable divided by total, not rounded.",
            lambda got, model: np.isclose(got[2], _counted(model)[2]),
        ),
    ),
    mistakes=(
        Mistake(
            "STATE_DICT",
            "A state_dict lists a tied weight twice, and buffers, which are no parameters.",
            _from_state_dict,
        ),
        Mistake("TIED", "A weight that two modules share is one parameter; you counted it twice.", _shared_twice),
        Mistake("PCT_OF_FROZEN", "You divide by the frozen parameters; divide by the total.", _percent_of_frozen),
        Mistake("SHARE", "Per cent were asked for: 100 times the share.", _share),
        Mistake("SWAPPED", "The order is total, trainable, per cent.", _swapped),
        Mistake("TENSORS", "You count tensors; a tensor holds p.numel() numbers.", _tensors),
        Mistake("FROZEN_LEFT_OUT", "Frozen parameters are parameters: they belong in the total.", _frozen_left_out),
    ),
    hints=(
        "model.parameters() yields every parameter once, also a shared one; p.numel() is how many numbers it holds.",
        "p.requires_grad says whether it trains.",
        "The share is of the total, frozen ones included.",
    ),
)


# C10 MergeableLoRA


class MergeableLoRA:
    """y = x W^T + s x A^T B^T without a bias; merge() puts s B A into W, unmerge() puts the old W back."""

    def __init__(self, W: Tensor, A: Tensor, B: Tensor, s: float) -> None:
        self.W, self.A, self.B, self.s = W, A, B, s
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.W.T
        return y if self.kept is not None else y + self.s * (x @ self.A.T @ self.B.T)

    def merge(self) -> None:
        if self.kept is not None:
            raise RuntimeError("merged already.")
        update = self.s * (self.B @ self.A)
        self.kept, self.W = self.W, (self.W.to(update.dtype) + update).to(self.W.dtype)

    def unmerge(self) -> None:
        if self.kept is None:
            raise RuntimeError("not merged.")
        self.W, self.kept = self.kept, None


def _merging_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) - 0.5

    half = (1 + draw(8, 8)).bfloat16(), draw(2, 8), draw(8, 2)
    return [
        Case((draw(3, 2), draw(1, 2), draw(3, 1), 3.0)),
        Case((draw(5, 7), draw(2, 7), draw(5, 2), 0.5)),
        Case((*half, 1.0)),
    ]


@torch.no_grad()
def _live(learner: Any, W: Tensor, A: Tensor, B: Tensor, s: float) -> Any:
    """A life of the learner's object: unmerge, call, merge, call, merge again, unmerge, call."""

    def begin() -> Any:
        return learner(W.clone(), A.clone(), B.clone(), s)

    def refuses(method: Any) -> bool:
        try:
            method()
        except Exception as error:
            return isinstance(error, RuntimeError)
        return False

    layer = begin()
    if not all(callable(getattr(layer, name, None)) for name in ("merge", "unmerge", "__call__")):
        return layer
    x, same_dtype = torch.randn(6, W.shape[1], dtype=A.dtype), W.dtype == A.dtype
    seen = SimpleNamespace(before=layer(x) if same_dtype else x, guards=refuses(layer.unmerge))
    mine = W.clone()
    layer = learner(mine, A.clone(), B.clone(), s)
    layer.merge()
    seen.W, seen.merged = layer.W.clone(), layer(x) if same_dtype else x
    seen.refused = refuses(layer.merge)
    seen.W_again = layer.W.clone()
    if not seen.refused:  # go on from where one merge would have left it
        layer = begin()
        layer.merge()
    layer.unmerge()
    seen.back, seen.after = layer.W.clone(), layer(x) if same_dtype else x
    layer.merge()
    seen.W_later, seen.callers = layer.W.clone(), torch.equal(mine, W)
    wide = x.double() @ (W.double() + s * B.double() @ A.double()).T
    seen.expected = wide if same_dtype else x
    seen.sum = (W.to(A.dtype) + s * (B @ A)).to(W.dtype)
    return seen


def _near(a: Tensor, b: Tensor) -> bool:
    rtol = 1e-2 if a.dtype == torch.bfloat16 else 1e-4
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=rtol, atol=1e-5))


class _Merging(MergeableLoRA):
    """The reference with parts to go wrong."""

    def add(self, update: Tensor) -> None:
        self.kept, self.W = self.W, (self.W.to(update.dtype) + update).to(self.W.dtype)

    def merge(self) -> None:
        if self.kept is not None:
            raise RuntimeError
        self.add(self.s * (self.B @ self.A))


class _MergesUnscaled(_Merging):
    def merge(self) -> None:
        if self.kept is not None:
            raise RuntimeError
        self.add(self.B @ self.A)


class _MergesTwice(_Merging):
    def merge(self) -> None:
        old = self.W if self.kept is None else self.kept
        self.add(self.s * (self.B @ self.A))
        self.kept = old


class _StillAdds(_Merging):
    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.W.T + self.s * (x @ self.A.T @ self.B.T)


class _Subtracts(_Merging):
    def unmerge(self) -> None:
        if self.kept is None:
            raise RuntimeError
        self.W, self.kept = self.W - (self.s * (self.B @ self.A)).to(self.W.dtype), None


class _UnmergesNothing(_Merging):
    def unmerge(self) -> None:
        if self.kept is not None:
            self.W, self.kept = self.kept, None


class _KeepsAnAlias(_Merging):
    def add(self, update: Tensor) -> None:
        self.kept = self.W
        self.W.copy_((self.W.to(update.dtype) + update).to(self.W.dtype))


class _Widens(_Merging):
    def add(self, update: Tensor) -> None:
        self.kept, self.W = self.W, self.W + update


C10 = Exercise(
    number="C10",
    chapter="03",
    minutes=15,
    level="mid",
    importance=5,
    task="A layer that merges and unmerges.",
    returns="an object with merge, unmerge, __call__ and W",
    reference=MergeableLoRA,
    call=_live,
    parse=traced,
    observe=lambda seen, *args: (
        *(t.double().numpy() for t in (seen.before, seen.merged, seen.W, seen.W_again, seen.back, seen.after)),
        np.array([seen.refused, seen.guards, seen.W.dtype == args[0].dtype]),
        seen.W_later.double().numpy(),
    ),
    cases=_merging_cases,
    properties=(
        Property(
            "UNMERGED_OUT",
            "Before merging y should be x W^T + s x A^T B^T.",
            lambda seen, *a: _near(seen.before, seen.expected),
        ),
        Property("DTYPE", "The merged W should have the dtype of W.", lambda seen, W, *a: seen.W.dtype == W.dtype),
        Property(
            "MERGED_W",
            "The merged W should be W + s B A.",
            lambda seen, *a: _near(seen.W, seen.sum),
        ),
        Property(
            "MERGED_OUT",
            "Merged, the outputs should be the same as before merging.",
            lambda seen, *a: _near(seen.merged, seen.expected),
        ),
        Property(
            "TWICE",
            "A second merge() should raise RuntimeError, and W should stay as it is.",
            lambda seen, *a: seen.refused and torch.equal(seen.W, seen.W_again),
        ),
        Property(
            "ROUNDTRIP",
            "After unmerge() W should be the old one, bit for bit. Subtracting rounds, and an alias of W changes with it.",
            lambda seen, W, *a: torch.equal(seen.back, W),
        ),
        Property(
            "LATER",
            "After unmerge() it should be possible to merge again.",
            lambda seen, *a: _near(seen.W_later, seen.sum),
        ),
        Property(
            "UNMERGE_GUARD",
            "unmerge() of what is not merged should raise RuntimeError.",
            lambda seen, *a: seen.guards,
        ),
        Property(
            "AFTER",
            "After unmerge() the outputs should be those from before.",
            lambda seen, *a: _near(seen.after, seen.expected),
        ),
    ),
    mistakes=(
        Mistake("NO_SCALE", "You merge BA without its scale.", _MergesUnscaled),
        Mistake(
            "TWICE", "A second merge adds the update again: merge must know that it already happened.", _MergesTwice
        ),
        Mistake("STILL_ADDS", "Merged, the call still adds the update: it counts twice.", _StillAdds),
        Mistake(
            "SUBTRACTS",
            "Subtracting what was added does not bring the old bits back: the sum was rounded. Keep the old W.",
            _Subtracts,
        ),
        Mistake(
            "ALIAS",
            "What you keep is the same tensor that you then change in place; keep a copy.",
            _KeepsAnAlias,
        ),
        Mistake(
            "UNMERGE_GUARD",
            "unmerge() of what is not merged passes in silence: the caller believes it is in another state than it is.",
            _UnmergesNothing,
        ),
        Mistake("DTYPE", "The merged W has become wider than it was: cast the sum back.", _Widens),
    ),
    hints=(
        "The object needs one more attribute: the old W while it is merged, None while it is not.",
        "merge(): refuse if something is kept; keep W; the new W is a new tensor, W + s * B @ A.",
        "Where W is bfloat16 and A, B are float32: (W.to(A.dtype) + s * B @ A).to(W.dtype).",
    ),
)


# C4 lora_adaptation


def lora_adaptation(model: nn.Module, target_layer: str, r: int = 8, alpha: float = 16) -> nn.Module:
    """Let the nn.Linear named `target_layer` learn by a LoRA of rank r, and nothing else. Returns the model."""
    model.requires_grad_(False)
    layer = model.get_submodule(target_layer)
    model.set_submodule(target_layer, LoRALinear(layer, r, alpha))  # type: ignore[arg-type]
    return model


def _adaptation_cases() -> list[Case]:
    nested = nn.Sequential()
    nested.add_module("body", nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 16, bias=False)))
    nested.add_module("head", nn.Linear(16, 9))
    return [
        Case((nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), "0", 2, 6.0)),
        Case((nested, "body.2", 3, 1.5)),
        Case((copy.deepcopy(nested), "head", 4, 16.0)),
    ]


def _adapt(learner: Any, model: nn.Module, target: str, r: int, alpha: float) -> Any:
    """Adapt, look at the start, try the scale with random A and B, then train sixty steps."""
    base = copy.deepcopy(model)
    old = base.get_submodule(target)
    d_out, d_in = old.weight.shape  # type: ignore[misc]
    got = learner(model, target, r, alpha)
    if not isinstance(got, nn.Module):
        return got
    x = torch.randn(64, next(base.parameters()).shape[1])
    training = [p for p in got.parameters() if p.requires_grad]
    seen = SimpleNamespace(
        children=[n for n, _ in got.named_children()] == [n for n, _ in base.named_children()],
        shapes=sorted(tuple(p.shape) for p in training),
        start=torch.allclose(got(x), base(x), atol=1e-5) if len(got(x).shape) == 2 else False,
        scale=float("nan"),
        frozen=True,
        learns=False,
        passes=False,
        in_place=got is model,
        axes=torch.allclose(got(x.view(8, 8, -1)), got(x).view(8, 8, -1), atol=1e-5),
    )
    A = next((p if p.shape == (r, d_in) else p.T for p in training if sorted(p.shape) == sorted((r, d_in))), None)
    B = next((p if p.shape == (d_out, r) else p.T for p in training if sorted(p.shape) == sorted((d_out, r))), None)
    if not seen.children or A is None or B is None or len(training) != 2:
        return seen
    layer, probe, start = got.get_submodule(target), torch.randn(64, d_in), [p.detach().clone() for p in training]
    kept = {name: p.detach().clone() for name, p in got.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for p in training:
            p.normal_()
        update, product = layer(probe) - old(probe), (probe.to(A) @ A.T @ B.T).to(probe)
        seen.scale = ((update * product).sum() / product.square().sum()).item()
        seen.exact = torch.allclose(update, seen.scale * product, rtol=1e-3, atol=1e-3)
        for p, value in zip(training, start, strict=True):
            p.copy_(value)
    probe.requires_grad_()
    through, straight = layer(probe).square().sum(), old(probe).square().sum()  # equal at the start
    slopes = torch.autograd.grad(through, probe, allow_unused=True)[0], torch.autograd.grad(straight, probe)[0]
    seen.passes = slopes[0] is not None and torch.allclose(*slopes, rtol=1e-3, atol=1e-4)
    goal = base(x).detach() + 0.5 * torch.randn(64, base(x).shape[1])
    losses = []
    for _ in range(60):  # steps of one size, so that the scale of the layer does not matter
        loss = (got(x) - goal).square().mean()
        for p, slope in zip(training, torch.autograd.grad(loss, training), strict=True):
            p.data -= 0.01 * slope.sign()
        losses.append(loss.item())
    seen.learns = losses[-1] < 0.98 * losses[0]
    seen.frozen = all(torch.equal(p, kept[name]) for name, p in got.named_parameters() if name in kept)
    return seen


class _Added(nn.Module):
    """base(x) + s x A^T B^T, with parts to go wrong."""

    def __init__(self, base: Any, r: int, s: float, start_A: float = 0.1, start_B: float = 0.0) -> None:
        super().__init__()
        self.base, self.s = base, s
        self.A = nn.Parameter(start_A * torch.randn(r, base.in_features))
        self.B = nn.Parameter(start_B * torch.randn(base.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.s * (x @ self.A.T @ self.B.T)


def _put(model: Any, target: str, new: Any) -> Any:
    model.requires_grad_(False)
    model.set_submodule(target, new(model.get_submodule(target)))
    return model


def _svd_of_w(model: Any, target_layer: str, r: int = 8, alpha: float = 16) -> Any:
    def split(layer: Any) -> Any:
        U, s, Vt = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        down, up = nn.Linear(layer.in_features, r, bias=False), nn.Linear(r, layer.out_features, bias=False)
        down.weight.data, up.weight.data = s[:r, None] * Vt[:r], U[:, :r].clone()
        return nn.Sequential(down, up)

    return _put(model, target_layer, split)


def _others_train(model: Any, target_layer: str, r: int = 8, alpha: float = 16) -> Any:
    model.set_submodule(target_layer, LoRALinear(model.get_submodule(target_layer), r, alpha))
    return model


def _base_trains(model: Any, target_layer: str, r: int = 8, alpha: float = 16) -> Any:
    model = lora_adaptation(model, target_layer, r, alpha)
    model.get_submodule(target_layer).base_layer.requires_grad_(True)
    return model


def _adapted_unscaled(model: Any, target_layer: str, r: int = 8, alpha: float = 16) -> Any:
    return _put(model, target_layer, lambda layer: _Added(layer, r, 1.0))


def _adapted_by_alpha(model: Any, target_layer: str, r: int = 8, alpha: float = 16) -> Any:
    return _put(model, target_layer, lambda layer: _Added(layer, r, alpha))


def _both_zero(model: Any, target_layer: str, r: int = 8, alpha: float = 16) -> Any:
    return _put(model, target_layer, lambda layer: _Added(layer, r, alpha / r, start_A=0.0))


def _both_random(model: Any, target_layer: str, r: int = 8, alpha: float = 16) -> Any:
    return _put(model, target_layer, lambda layer: _Added(layer, r, alpha / r, start_B=1.0))


class _Cut(_Added):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.base(x)
        return y + self.s * (x @ self.A.T @ self.B.T)


def _base_without_signal(model: Any, target_layer: str, r: int = 8, alpha: float = 16) -> Any:
    return _put(model, target_layer, lambda layer: _Cut(layer, r, alpha / r))


def _only_the_layer(model: Any, target_layer: str, r: int = 8, alpha: float = 16) -> Any:
    return lora_adaptation(model, target_layer, r, alpha).get_submodule(target_layer)


C4 = Exercise(
    number="C4",
    chapter="03",
    minutes=20,
    level="mid",
    importance=5,
    task="The source's question 7, done right.",
    returns="the model, an nn.Module",
    reference=lora_adaptation,
    call=_adapt,
    parse=traced,
    observe=lambda seen, *args: (
        " ".join(map(str, seen.shapes)),
        np.array([seen.children, seen.start, seen.frozen, seen.learns, seen.passes, seen.in_place, seen.axes]),
        np.array(0.0 if np.isnan(seen.scale) else seen.scale),
    ),
    changes_arguments=True,
    cases=_adaptation_cases,
    properties=(
        Property(
            "RETURN",
            "Return the model in which the layer was adapted, not a part of it.",
            lambda seen, *a: seen.children,
        ),
        Property(
            "NOOP_AT_INIT",
            "At the start the model should compute exactly what it did before.",
            lambda seen, *a: bool(seen.start),
        ),
        Property(
            "ONLY_AB_TRAIN",
            "Over the whole model exactly r (in + out) numbers should train.",
            lambda seen, model, target, r, alpha: (
                sum(int(np.prod(shape)) for shape in seen.shapes) == r * sum(model.get_submodule(target).weight.shape)
            ),
        ),
        Property(
            "SHAPES",
            "Two matrices should train: A (r, in) and B (out, r).",
            lambda seen, *a: len(seen.shapes) == 2 and not np.isnan(seen.scale),
        ),
        Property(
            "SCALE_ALPHA_OVER_R",
            "With A and B at random the layer should add (alpha / r) B A x.",
            lambda seen, model, target, r, alpha: seen.exact and np.isclose(seen.scale, alpha / r, rtol=1e-3),
        ),
        Property("AXES", "x may have any number of leading axes.", lambda seen, *a: seen.axes),
        Property(
            "SIGNAL",
            "The gradient of x lacks the part through W: frozen stops the update of W, not the signal through it.",
            lambda seen, *a: seen.passes,
        ),
        Property("IN_PLACE", "Change the model that was passed in, and return it.", lambda seen, *a: seen.in_place),
        Property("BASE_FROZEN", "Training changed a frozen number.", lambda seen, *a: seen.frozen),
        Property("LEARNS", "Sixty steps of training did not lower the loss.", lambda seen, *a: seen.learns),
    ),
    mistakes=(
        Mistake(
            "SVD_OF_W",
            "You split W itself and so changed the pretrained map; LoRA must start as exactly the base model, with W kept.",
            _svd_of_w,
        ),
        Mistake("OTHERS_TRAIN", "The other layers train as well; freeze the whole model first.", _others_train),
        Mistake("BASE_TRAINS", "The base layer's own W and b still train beside A and B.", _base_trains),
        Mistake("NO_SCALE", "The update is not scaled: it should count alpha / r times.", _adapted_unscaled),
        Mistake("ALPHA_ONLY", "You scale by alpha; the scale is alpha divided by the rank.", _adapted_by_alpha),
        Mistake(
            "BOTH_ZERO",
            "A and B both start at zero: each gradient is multiplied by the other factor, so nothing ever moves.",
            _both_zero,
        ),
        Mistake(
            "SIGNAL",
            "The base layer runs under no_grad: frozen stops the update of W, not the signal through it to earlier layers.",
            _base_without_signal,
        ),
        Mistake(
            "BOTH_RANDOM",
            "A and B both start at random, so the model is no longer the base; one must be zero.",
            _both_random,
        ),
        Mistake(
            "PART_RETURNED",
            "You return the adapted layer; the caller wants the model that contains it.",
            _only_the_layer,
        ),
    ),
    hints=(
        "Freeze the whole model first: model.requires_grad_(False). What is new trains.",
        "model.get_submodule(target_layer) finds the layer; model.set_submodule(target_layer, new) puts another in its place.",
        "The new layer is this chapter's: HandLoRA, or LoRALinear(layer, r, alpha).",
    ),
    after="Nothing was compressed: the model holds r (in + out) numbers more than before.",
)
