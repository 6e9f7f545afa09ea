"""Exercises of chapter 03, the LoRA layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_edu.lowrank import Array
from lora_edu.practice.exercise import Case, Exercise, Mistake, Property, arrays

# C5 lora_forward


def lora_forward(x: Array, W: Array, A: Array, B: Array, alpha: float, b: Array | None = None) -> Array:
    """y = x W^T + b + (alpha / r) (x A^T) B^T, for x (..., in), W (out, in), A (r, in), B (out, r), b (out,)."""
    y = x @ W.T + alpha / len(A) * (x @ A.T @ B.T)
    return y if b is None else y + b


def _cases() -> list[Case]:
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
    cases=_cases,
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
            "You wrote the update into W itself: the caller's frozen weight has changed.",
            _in_place,
        ),
    ),
    hints=(
        "Two paths are added: the frozen one, x W^T, and the update's, which goes down to r numbers and up again.",
        "Row vectors meet the transposes: z = x @ A.T has r numbers a token, and z @ B.T has out.",
        "r is the length of the bottleneck, len(A); only the second path is scaled, by alpha / r. Add b when there is one.",
    ),
)
