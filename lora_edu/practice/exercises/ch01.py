"""Exercises of chapter 01, low-rank approximation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_edu import lowrank
from lora_edu.practice.exercise import Case, Exercise, Mistake, Property, arrays, module

Array = lowrank.Array


def _matrices() -> list[tuple[Array, int]]:
    """Matrices and ranks, smallest first: square, tall, wide, full rank kept, and one of rank 1 cut at 2."""
    rng = np.random.default_rng(0)
    return [
        (np.array([[4.0, 0.0], [3.0, -5.0]]), 1),
        (rng.standard_normal((5, 3)), 2),
        (rng.standard_normal((3, 5)), 2),
        (rng.standard_normal((4, 4)), 4),
        (np.outer([1.0, 2.0, 2.0, 4.0], [3.0, 0.0, 4.0]), 2),
    ]


def _matrix_cases() -> list[Case]:
    return [Case(pair) for pair in _matrices()]


def _is_best(X: Array, M: Array, r: int) -> bool:
    """Eckart-Young: |M - X| must be the tail of M's singular values."""
    tail = lowrank.tail_norm(np.linalg.svd(M, compute_uv=False), r)
    return bool(np.isclose(np.linalg.norm(M - X), tail, rtol=1e-6, atol=1e-9 * np.linalg.norm(M)))


# C1 truncated_svd


def _v_taken_for_vt(M: Array, r: int) -> Any:
    U, s, V = np.linalg.svd(M, full_matrices=False)
    return U[:, :r], s[:r], V[:, :r].T


def _smallest_kept(M: Array, r: int) -> Any:
    values, V = np.linalg.eigh(M.T @ M)
    s = np.sqrt(np.maximum(values[:r], 1e-12))
    return M @ V[:, :r] / s, s, V[:, :r].T


def _not_cut(M: Array, r: int) -> Any:
    return np.linalg.svd(M, full_matrices=False)


def _eigenvalues(M: Array, r: int) -> Any:
    U, s, Vt = np.linalg.svd(M, full_matrices=False)
    return U[:, :r], s[:r] ** 2, Vt[:r]


def _scale_inside_u(M: Array, r: int) -> Any:
    U, s, Vt = np.linalg.svd(M, full_matrices=False)
    return U[:, :r] * s[:r], s[:r], Vt[:r]


def _divides_by_zero(M: Array, r: int) -> Any:
    values, V = np.linalg.eigh(M.T @ M)
    s = np.sqrt(np.where(values < 1e-12 * values.max(), 0.0, values))[::-1][:r]
    V = V[:, ::-1][:, :r]
    with np.errstate(all="ignore"):
        return M @ V / s, s, V.T


C1 = Exercise(
    number="C1",
    chapter="01",
    minutes=10,
    level="screen",
    importance=5,
    task="Cut the SVD of M to its r largest singular triplets.",
    returns="three arrays, U (m, r), s (r,) and Vt (r, n)",
    reference=lowrank.truncated_svd,
    parse=arrays(3),
    cases=_matrix_cases,
    properties=(
        Property(
            "SHAPE",
            "The shapes should be U (m, r), s (r,) and Vt (r, n): each of the three is cut to r.",
            lambda got, M, r: [g.shape for g in got] == [(len(M), r), (r,), (r, M.shape[1])],
        ),
        Property(
            "ORDER",
            "Singular values are never negative and come largest first.",
            lambda got, M, r: bool((got[1] >= 0).all() and (np.diff(got[1]) <= 0).all()),
        ),
        Property(
            "ORTHO",
            "The columns of U and the rows of Vt should be orthonormal, also when M has a lower rank than r.",
            lambda got, M, r: (
                np.allclose(got[0].T @ got[0], np.eye(r), atol=1e-6)
                and np.allclose(got[2] @ got[2].T, np.eye(r), atol=1e-6)
            ),
        ),
        Property(
            "ECKART_YOUNG",
            "U diag(s) Vt is further from M than a matrix of rank r has to be.",
            lambda got, M, r: _is_best(got[0] * got[1] @ got[2], M, r),
        ),
    ),
    mistakes=(
        Mistake(
            "V_IS_VT",
            "numpy returns V already transposed: its rows, not its columns, are the right singular vectors.",
            _v_taken_for_vt,
        ),
        Mistake(
            "SMALLEST_KEPT",
            "You kept the smallest directions: eigh sorts in ascending order.",
            _smallest_kept,
        ),
        Mistake("NOT_CUT", "You return the whole decomposition: nothing has been cut to r yet.", _not_cut),
        Mistake(
            "EIGENVALUES",
            "Those are the eigenvalues of M.T @ M; the singular values are their square roots.",
            _eigenvalues,
        ),
        Mistake(
            "SCALE_TWICE",
            "U carries the singular values too, so the product counts them twice.",
            _scale_inside_u,
        ),
        Mistake(
            "DIVIDES_BY_ZERO",
            "When M has a lower rank than r, dividing by its zero singular values gives no vectors. "
            "Let the SVD itself supply U.",
            _divides_by_zero,
        ),
    ),
    hints=(
        "np.linalg.svd(M, full_matrices=False) gives all min(m, n) triplets, largest first.",
        "A triplet is a column of U, an entry of s, and a row of what numpy calls Vh.",
        "Three slices: the first r columns, the first r entries, the first r rows.",
    ),
)


# C2 balanced_factors


def _scale_on_both(M: Array, r: int) -> Any:
    U, s, Vt = lowrank.truncated_svd(M, r)
    return U * s, s[:, None] * Vt


def _scale_on_b(M: Array, r: int) -> Any:
    U, s, Vt = lowrank.truncated_svd(M, r)
    return U * s, Vt


def _scale_on_a(M: Array, r: int) -> Any:
    U, s, Vt = lowrank.truncated_svd(M, r)
    return U, s[:, None] * Vt


def _no_scale(M: Array, r: int) -> Any:
    U, _, Vt = lowrank.truncated_svd(M, r)
    return U, Vt


def _a_first(M: Array, r: int) -> Any:
    return lowrank.balanced_factors(M, r)[::-1]


_ONE_SIDE = "The product is right, but one factor carries all the scale; the gradients of the two will be uneven."

C2 = Exercise(
    number="C2",
    chapter="01",
    minutes=8,
    level="mid",
    importance=4,
    task="Write the best rank-r approximation of M as two factors that share its scale evenly.",
    returns="two arrays, B (m, r) and A (r, n)",
    reference=lowrank.balanced_factors,
    parse=arrays(2),
    cases=_matrix_cases,
    properties=(
        Property(
            "SHAPE",
            "The shapes should be B (m, r) and A (r, n), in this order.",
            lambda got, M, r: [g.shape for g in got] == [(len(M), r), (r, M.shape[1])],
        ),
        Property(
            "ECKART_YOUNG",
            "B @ A is further from M than a matrix of rank r has to be.",
            lambda got, M, r: _is_best(got[0] @ got[1], M, r),
        ),
        Property(
            "BALANCED",
            "The product is right, but B.T @ B and A @ A.T differ: the scale is not shared evenly.",
            lambda got, M, r: np.allclose(got[0].T @ got[0], got[1] @ got[1].T, atol=1e-6 * np.linalg.norm(M)),
        ),
    ),
    mistakes=(
        Mistake(
            "SCALE_TWICE",
            "The singular values now stand in the product twice, that is squared; split them into two square roots.",
            _scale_on_both,
        ),
        Mistake("ONE_SIDE", _ONE_SIDE, _scale_on_b),
        Mistake("ONE_SIDE", _ONE_SIDE, _scale_on_a),
        Mistake("NO_SCALE", "U and Vt alone have lost every singular value: the product's are all 1.", _no_scale),
        Mistake("SWAPPED", "The two factors are returned the wrong way round: B (m, r) comes first.", _a_first),
    ),
    hints=(
        "Start from U, s, Vt of the truncated SVD: U diag(s) Vt has one s to hand out between two factors.",
        "Both factors should get the same amount: s = sqrt(s) * sqrt(s).",
        "Scale the columns of U by one square root and the rows of Vt by the other; broadcasting does both.",
    ),
)


# C14 effective_rank


def _with_spectrum(s: Sequence[float], m: int, n: int, seed: int) -> Array:
    """An (m, n) matrix with the given singular values."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((m, len(s)))).Q
    V = np.linalg.qr(rng.standard_normal((n, len(s)))).Q
    return U * np.array(s) @ V.T


def _spectrum_cases() -> list[Case]:
    return [
        Case((np.diag([3.0, 1.0]), 0.85)),
        Case((_with_spectrum([10, 5, 2, 1], 6, 4, 0), 0.9)),
        Case((_with_spectrum([10, 5, 2, 1], 6, 4, 0), 0.99)),
        Case((1e-5 * _with_spectrum([10, 5, 2, 1], 4, 6, 1), 0.9)),
        Case((1e5 * _with_spectrum([10, 5, 2, 1], 4, 6, 1), 0.7)),
        Case((_with_spectrum([3, 2, 2], 8, 7, 2), 0.999)),
        Case((_with_spectrum([1, 1, 1, 1, 1], 5, 5, 3), 0.5)),
    ]


def _share(M: Array, k: int) -> float:
    s = np.linalg.svd(M, compute_uv=False)
    return float(lowrank.energy(s)[k - 1]) if k else 0.0


def _not_squared(M: Array, energy: float) -> Any:
    s = np.linalg.svd(M, compute_uv=False)
    return int(np.argmax(np.cumsum(s) >= energy * s.sum())) + 1


def _off_by_one(M: Array, energy: float) -> Any:
    squares = np.linalg.svd(M, compute_uv=False) ** 2
    return int(np.argmax(np.cumsum(squares) >= energy * squares.sum()))


def _absolute(M: Array, energy: float) -> Any:
    return int((np.linalg.svd(M, compute_uv=False) > 1 - energy).sum())


def _relative_to_first(M: Array, energy: float) -> Any:
    s = np.linalg.svd(M, compute_uv=False)
    return int((s > (1 - energy) * s[0]).sum())


def _plain_rank(M: Array, energy: float) -> Any:
    return int(np.linalg.matrix_rank(M))


C14 = Exercise(
    number="C14",
    chapter="01",
    minutes=10,
    level="mid",
    importance=3,
    task="Count how many singular values it takes to keep a share of the energy.",
    returns="one whole number",
    reference=lowrank.effective_rank,
    parse=arrays(1),
    cases=_spectrum_cases,
    properties=(
        Property(
            "COUNT",
            "The result should be one whole number between 1 and min(m, n): a count of singular values.",
            lambda got, M, energy: got[0].shape == () and got[0] % 1 == 0 and 1 <= got[0] <= min(M.shape),
        ),
        Property(
            "ENOUGH",
            "That many singular values keep less than the share asked for.",
            lambda got, M, energy: _share(M, int(got[0])) >= energy - 1e-9,
        ),
        Property(
            "SMALLEST",
            "Fewer singular values would already keep the share asked for.",
            lambda got, M, energy: _share(M, int(got[0]) - 1) < energy - 1e-9,
        ),
    ),
    mistakes=(
        Mistake(
            "SQUARED",
            "Energy is the sum of the squared singular values; you summed them unsquared.",
            _not_squared,
        ),
        Mistake(
            "OFF_BY_ONE",
            "You return the position of the last value needed; positions start at 0, counts at 1.",
            _off_by_one,
        ),
        Mistake(
            "SCALE_FREE",
            "A fixed threshold on the values changes its answer when M is multiplied by a constant; a share does not.",
            _absolute,
        ),
        Mistake(
            "RELATIVE_TO_FIRST",
            "Comparing each value with the largest is another measure; here the kept squares together are compared with all.",
            _relative_to_first,
        ),
        Mistake(
            "PLAIN_RANK",
            "That is the rank, which counts every value above rounding and ignores the share.",
            _plain_rank,
        ),
    ),
    hints=(
        "The energy |M|_F**2 is the sum of the squared singular values: which share do the first k keep?",
        "np.cumsum of the squares, divided by their sum, is that share for k = 1, 2, ...",
        "np.argmax on a boolean array finds the first True; mind what its position counts.",
    ),
)


# C3 peft_compression: torch enters here, and only inside the functions.


def peft_compression(model: Any, target_layer: str, rank: int) -> Any:
    """Replace the nn.Linear named `target_layer` by two whose product is its best rank-`rank` approximation.

    The model is changed in place and returned. Raises ValueError, before anything is changed, when the two
    layers would not store fewer numbers than the one.
    """
    import torch
    from torch import nn

    layer = model.get_submodule(target_layer)
    d_out, d_in = layer.weight.shape
    if rank * (d_in + d_out) >= d_in * d_out:
        raise ValueError(f"rank {rank} saves nothing on a {d_out} x {d_in} layer.")
    B, A = lowrank.balanced_factors(layer.weight.detach().numpy(), rank)
    down, up = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=layer.bias is not None)
    with torch.no_grad():
        down.weight.copy_(torch.from_numpy(A))
        up.weight.copy_(torch.from_numpy(B))
        if layer.bias is not None:
            up.bias.copy_(layer.bias)
    model.set_submodule(target_layer, nn.Sequential(down, up))
    return model


def _models() -> list[Case]:
    import torch
    from torch import nn

    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        nested = nn.Sequential()
        nested.add_module("body", nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 16, bias=False)))
        nested.add_module("head", nn.Linear(16, 10))
    guard = "At this rank the two layers store no fewer numbers than the one: refuse with a ValueError."
    return [
        Case((small, "0", 2)),
        Case((nested, "body.2", 3)),
        Case((nested, "head", 4)),
        Case((small, "0", 4), refuses=guard),
    ]


def _map(layer: Any, d_in: int) -> tuple[Array, Array] | None:
    """The weight (out, in) and bias of the affine map that a module computes; None when it cannot take the input."""
    import torch

    try:
        with torch.no_grad():
            b = layer(torch.zeros(1, d_in))
            return (layer(torch.eye(d_in)) - b).T.double().numpy(), b[0].double().numpy()
    except RuntimeError:
        return None


def _compressed(got: Any, model: Any, target: str) -> tuple[Array, Array] | None:
    return _map(got.get_submodule(target), model.get_submodule(target).in_features)


def _observe_model(got: Any, model: Any, target: str, rank: int) -> tuple[Any, ...]:
    return tuple(p.detach().double().numpy() for p in got.parameters())


def _same_task(got: Any, model: Any, target: str, rank: int) -> bool:
    return [n for n, _ in got.named_children()] == [n for n, _ in model.named_children()]


def _replaced(got: Any, model: Any, target: str, rank: int) -> bool:
    new, old = got.get_submodule(target), model.get_submodule(target)
    return type(new) is not type(old) or not np.array_equal(new.weight.detach(), old.weight.detach())


def _bias_kept(got: Any, model: Any, target: str, rank: int) -> bool:
    found, bias = _compressed(got, model, target), model.get_submodule(target).bias
    return found is not None and np.allclose(found[1], 0 if bias is None else bias.detach(), atol=1e-5)


def _best_rank(got: Any, model: Any, target: str, rank: int) -> bool:
    found, W = _compressed(got, model, target), model.get_submodule(target).weight.detach().double().numpy()
    tail = lowrank.tail_norm(np.linalg.svd(W, compute_uv=False), rank)
    return found is not None and bool(np.isclose(np.linalg.norm(W - found[0]), tail, rtol=1e-3))


def _smaller(got: Any, model: Any, target: str, rank: int) -> bool:
    old = model.get_submodule(target)
    limit = rank * (old.in_features + old.out_features) + (0 if old.bias is None else old.out_features)
    return sum(p.numel() for p in got.get_submodule(target).parameters()) <= limit


def _others_kept(got: Any, model: Any, target: str, rank: int) -> bool:
    def others(m: Any) -> dict[str, Any]:
        return {k: v for k, v in m.state_dict().items() if not k.startswith(f"{target}.")}

    now, before = others(got), others(model)
    return now.keys() == before.keys() and all(np.array_equal(now[k], before[k]) for k in before)


def _guarded(layer: Any, rank: int) -> None:
    d_out, d_in = layer.weight.shape
    if rank * (d_in + d_out) >= d_in * d_out:
        raise ValueError("saves nothing")


def _two_layers(B: Array, A: Array, bias: Any) -> Any:
    import torch
    from torch import nn

    down, up = nn.Linear(A.shape[1], len(A), bias=False), nn.Linear(len(A), len(B), bias=bias is not None)
    down.weight.data, up.weight.data = torch.tensor(A), torch.tensor(B)
    if bias is not None:
        up.bias.data = bias.detach().clone()
    return nn.Sequential(down, up)


def _mean_of_weights(model: Any, target_layer: str, rank: int) -> Any:
    layer = model.get_submodule(target_layer)
    _guarded(layer, rank)
    layer.weight.data = layer.weight.data.mean(dim=(-1, -2), keepdim=True)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.mean(dim=-1, keepdim=True)
    return model


def _full_size(model: Any, target_layer: str, rank: int) -> Any:
    import torch

    layer = model.get_submodule(target_layer)
    _guarded(layer, rank)
    B, A = lowrank.balanced_factors(layer.weight.detach().numpy(), rank)
    layer.weight.data = torch.tensor(B @ A)
    return model


def _bias_lost(model: Any, target_layer: str, rank: int) -> Any:
    layer = model.get_submodule(target_layer)
    _guarded(layer, rank)
    B, A = lowrank.balanced_factors(layer.weight.detach().numpy(), rank)
    model.set_submodule(target_layer, _two_layers(B, A, None))
    return model


def _first_columns(model: Any, target_layer: str, rank: int) -> Any:
    layer = model.get_submodule(target_layer)
    _guarded(layer, rank)
    W = layer.weight.detach().numpy()
    B = W[:, :rank]
    A = np.linalg.lstsq(B, W, rcond=None)[0]
    model.set_submodule(target_layer, _two_layers(B.copy(), A.astype(W.dtype), layer.bias))
    return model


def _only_the_layer(model: Any, target_layer: str, rank: int) -> Any:
    return peft_compression(model, target_layer, rank).get_submodule(target_layer)


def _never_put_back(model: Any, target_layer: str, rank: int) -> Any:
    layer = model.get_submodule(target_layer)
    _guarded(layer, rank)
    _two_layers(*lowrank.balanced_factors(layer.weight.detach().numpy(), rank), layer.bias)
    return model


def _every_layer(model: Any, target_layer: str, rank: int) -> Any:
    from torch import nn

    _guarded(model.get_submodule(target_layer), rank)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            B, A = lowrank.balanced_factors(layer.weight.detach().numpy(), rank)
            model.set_submodule(name, _two_layers(B, A, layer.bias))
    return model


def _no_guard(model: Any, target_layer: str, rank: int) -> Any:
    layer = model.get_submodule(target_layer)
    B, A = lowrank.balanced_factors(layer.weight.detach().numpy(), rank)
    model.set_submodule(target_layer, _two_layers(B, A, layer.bias))
    return model


C3 = Exercise(
    number="C3",
    chapter="01",
    minutes=20,
    level="mid",
    importance=4,
    task="Replace one nn.Linear by two that store less and compute its best rank-r approximation.",
    returns="the model, an nn.Module",
    reference=peft_compression,
    parse=module,
    observe=_observe_model,
    changes_arguments=True,
    needs="torch",
    cases=_models,
    properties=(
        Property("RETURN", "Return the model in which the layer was replaced, not a part of it.", _same_task),
        Property("NOT_REPLACED", "The layer in the returned model is still the old one.", _replaced),
        Property(
            "SERVES",
            "What stands in the layer's place cannot take the layer's input: the map must keep its sizes.",
            lambda got, model, target, rank: _compressed(got, model, target) is not None,
        ),
        Property(
            "BIAS",
            "The bias should come through unchanged (and none should appear where there was none).",
            _bias_kept,
        ),
        Property("BEST_RANK", "The two layers together are further from W than rank r has to be.", _best_rank),
        Property("SMALLER", "The layer's place holds more numbers than r (d_in + d_out) and the bias.", _smaller),
        Property("OTHERS_TOUCHED", "Only the named layer should change; another one did.", _others_kept),
    ),
    mistakes=(
        Mistake(
            "MEAN",
            "A 1x1 weight cannot serve this layer; compression must keep the map, not its average.",
            _mean_of_weights,
        ),
        Mistake(
            "FULL_SIZE",
            "The rank fell, the number of parameters did not: B @ A put back is as large as W. Keep the two factors apart.",
            _full_size,
        ),
        Mistake("BIAS_LOST", "The bias is lost; give it to the second of the two layers.", _bias_lost),
        Mistake(
            "COLUMNS",
            "You built the map from some of W's own columns; the best directions are mixtures of all of them.",
            _first_columns,
        ),
        Mistake(
            "PART_RETURNED",
            "You return the two new layers; the caller wants the model that contains them.",
            _only_the_layer,
        ),
        Mistake("NEVER_PUT_BACK", "The two layers are built but never put into the model.", _never_put_back),
        Mistake("EVERY_LAYER", "You replaced every Linear; only target_layer was asked for.", _every_layer),
        Mistake(
            "NO_GUARD",
            "Above the break-even rank two layers store more than one: refuse with a ValueError before changing anything.",
            _no_guard,
        ),
    ),
    hints=(
        "model.get_submodule(target_layer) finds the layer; model.set_submodule(target_layer, new) replaces it (torch 2.5 or newer).",
        "lowrank.balanced_factors(W, rank) gives B and A with B @ A close to W: which of the two meets the input first?",
        "nn.Sequential of a Linear d_in -> rank without bias (weight A) and a Linear rank -> d_out with the old bias (weight B). "
        "Compare rank (d_in + d_out) with d_in d_out before you change anything.",
    ),
    after="This is compression, not PEFT: the layer is smaller and only approximately the same, and nothing was adapted to a task.",
)
