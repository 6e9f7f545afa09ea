"""Exercises of chapter 02, the change of the weights and the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_edu import lowrank
from lora_edu.lowrank import Array
from lora_edu.practice.exercise import Case, Exercise, Mistake, Property, arrays

# E2.1 cut_change


def cut_change(W0: Array, W1: Array, k: int) -> Array:
    """W0 plus the best rank-k approximation of the change W1 - W0."""
    U, s, Vt = lowrank.truncated_svd(W1 - W0, k)
    return W0 + U * s @ Vt


def _pairs() -> list[Case]:
    rng = np.random.default_rng(0)
    cases = [Case((np.eye(2), np.array([[1.0, 2.0], [0.0, 4.0]]), 1))]
    for shape, k in (((5, 8), 2), ((9, 4), 3), ((7, 6), 1), ((6, 6), 6)):
        cases.append(Case((rng.standard_normal(shape), rng.standard_normal(shape), k)))
    return cases


def _change_tail(W0: Array, W1: Array, k: int) -> float:
    return lowrank.tail_norm(np.linalg.svd(W1 - W0, compute_uv=False), k)


def _cut_weights(W0: Any, W1: Any, k: int) -> Any:
    U, s, Vt = lowrank.truncated_svd(W1, k)
    return U * s @ Vt


def _base_plus_cut_weights(W0: Any, W1: Any, k: int) -> Any:
    return W0 + _cut_weights(W0, W1, k)


def _change_alone(W0: Any, W1: Any, k: int) -> Any:
    return cut_change(W0, W1, k) - W0


def _cut_base(W0: Any, W1: Any, k: int) -> Any:
    return _cut_weights(W0, W0, k) + (W1 - W0)


def _tail_kept(W0: Any, W1: Any, k: int) -> Any:
    return W0 + (W1 - W0) - _change_alone(W0, W1, k)


def _values_lost(W0: Any, W1: Any, k: int) -> Any:
    U, _, Vt = lowrank.truncated_svd(W1 - W0, k)
    return W0 + U @ Vt


CUT = Exercise(
    number="E2.1",
    chapter="02",
    minutes=10,
    level="mid",
    importance=5,
    task="Keep rank k of what fine-tuning changed.",
    returns="one array of the shape of W0",
    reference=cut_change,
    parse=arrays(1),
    cases=_pairs,
    properties=(
        Property("SHAPE", "The result should have the shape of W0.", lambda got, W0, W1, k: got[0].shape == W0.shape),
        Property(
            "RANK",
            "What you add to W0 has a rank above k.",
            lambda got, W0, W1, k: np.linalg.matrix_rank(got[0] - W0, tol=1e-4 * np.linalg.norm(W1 - W0)) <= k,
        ),
        Property(
            "BEST",
            "It is further from W1 than it has to be at this rank.",
            lambda got, W0, W1, k: np.isclose(
                np.linalg.norm(W1 - got[0]), _change_tail(W0, W1, k), rtol=1e-5, atol=1e-5
            ),
        ),
    ),
    mistakes=(
        Mistake("WEIGHTS", "You cut W1 itself; cut the change W1 - W0, and keep W0 whole.", _cut_weights),
        Mistake("WEIGHTS_ADDED", "You add a cut of W1 to W0: the base is in it twice.", _base_plus_cut_weights),
        Mistake("CHANGE_ALONE", "That is the cut change alone; the model needs W0 under it.", _change_alone),
        Mistake("BASE", "You cut W0 and kept the whole change; it is the other way round.", _cut_base),
        Mistake("TAIL_KEPT", "You kept what should be dropped, the smallest triplets of the change.", _tail_kept),
        Mistake(
            "VALUES_LOST", "The singular values are lost: U[:, :k] @ Vt[:k] has only the directions.", _values_lost
        ),
    ),
    hints=(
        "Which matrix is to have rank k: the result, or what is added to W0?",
        "lowrank.truncated_svd(W1 - W0, k) gives the k largest triplets of the change.",
        "U * s @ Vt is their sum; add it to W0.",
    ),
)


# E2.2 entropy_rank


def entropy_rank(s: Array) -> float:
    """exp(-sum_i p_i log p_i) with p = s / sum s: as many equal singular values would be as spread out as these."""
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _spectra() -> list[Case]:
    return [
        Case((np.array([2.0, 2.0]),)),
        Case((np.array([5.0, 0.0, 0.0]),)),
        Case((np.array([7.0, 7.0, 7.0, 0.0]),)),
        Case((np.array([0.0, 5.0, 0.0, 5.0]),)),
        Case((np.array([1e-6, 1.0, 1.0]),)),
        Case((np.array([4.0, 2.0, 1.0]),)),
        Case((np.array([2.0, 0.0, 1.0]),)),
        Case((np.array([8.0, 4.0, 2.0]),)),
        Case((1 / np.arange(1, 51),)),
    ]


def _flat(got: Any, s: Array) -> bool:
    """A flat spectrum of n values has rank n."""
    return np.ptp(s[s > 0]) > 0 or bool(np.isclose(got[0], np.count_nonzero(s)))


def _between(got: Any, s: Array) -> bool:
    return 1 - 1e-9 <= got[0] <= np.count_nonzero(s) + 1e-9


def _by_hand(s: Array) -> float:
    """prod p_i^-p_i, the same number without a logarithm."""
    return float(np.prod([(s.sum() / value) ** (value / s.sum()) for value in s if value > 0]))


def _squared(s: Any) -> Any:
    return entropy_rank(s**2)


def _entropy_itself(s: Any) -> Any:
    return np.log(entropy_rank(s))


def _bits(s: Any) -> Any:
    return np.exp(np.log2(entropy_rank(s)))


def _zeros_kept(s: Any) -> Any:
    with np.errstate(all="ignore"):
        p = s / s.sum()
        return np.exp(-(p * np.log(p)).sum())


def _by_the_largest(s: Any) -> Any:
    p = s[s > 0] / s.max()
    return np.exp(-(p * np.log(p)).sum())


def _counted(s: Any) -> Any:
    return np.count_nonzero(s)


ENTROPY = Exercise(
    number="E2.2",
    chapter="02",
    minutes=10,
    level="screen",
    importance=3,
    task="The entropy rank of a spectrum.",
    returns="one number",
    reference=entropy_rank,
    parse=arrays(1),
    cases=_spectra,
    properties=(
        Property("SHAPE", "Return one number.", lambda got, s: got[0].shape == ()),
        Property("FLAT", "n equal singular values, and zeros, should give n.", _flat),
        Property("RANGE", "The result should lie between 1 and the number of values that are not zero.", _between),
        Property(
            "VALUE",
            "The number differs from exp of the entropy of s / sum s.",
            lambda got, s: np.isclose(got[0], _by_hand(s)),
        ),
    ),
    mistakes=(
        Mistake(
            "SQUARED",
            "That is the entropy of the energy, of the squares; here the values themselves are shared out.",
            _squared,
        ),
        Mistake("NO_EXP", "That is the entropy; its exponential reads as a rank.", _entropy_itself),
        Mistake("BITS", "The entropy is in bits and the exponential has base e; use one base for both.", _bits),
        Mistake(
            "ZEROS",
            "A singular value of 0 gives 0 log 0, which is NaN in NumPy and 0 in the formula. Leave zeros out.",
            _zeros_kept,
        ),
        Mistake(
            "BY_LARGEST",
            "Divide by the sum, so that the shares add up to 1, not by the largest value.",
            _by_the_largest,
        ),
        Mistake("PLAIN_RANK", "That counts the values that are not zero, however small they are.", _counted),
    ),
    hints=(
        "Shares first: p = s / s.sum().",
        "The entropy is -sum p log p; a share of zero adds nothing and must be left out.",
        "np.exp of it is a number between 1 and the rank.",
    ),
)


# C15 subspace_overlap


def subspace_overlap(A1: Array, A2: Array, i: int, j: int) -> float:
    """phi = |V1_i^T V2_j|_F^2 / min(i, j), with V_k the top k right singular vectors: 0 orthogonal, 1 contained.

    A1 is (r1, n) and A2 (r2, n). Source: Hu et al. 2021, equation 4.
    """
    V1, V2 = lowrank.truncated_svd(A1, i)[2], lowrank.truncated_svd(A2, j)[2]
    return float(((V1 @ V2.T) ** 2).sum() / min(i, j))


def _subspaces() -> list[Case]:
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((4, 9)), rng.standard_normal((6, 9))
    Q = np.linalg.qr(rng.standard_normal((4, 4))).Q
    cases = [Case((np.diag([2.0, 1.0]), np.array([[0.0, 3.0], [1.0, 0.0]]), 1, 1))]
    cases += [Case((A, A, 3, 3)), Case((A, Q @ A, 4, 4)), Case((A, B, 2, 5)), Case((B, A, 5, 2)), Case((A, A, 2, 4))]
    return cases


def _phi(A1: Array, A2: Array, i: int, j: int) -> float:
    """By projections: the trace of the product of the two projectors."""
    P = [v[:, -k:] @ v[:, -k:].T for v, k in ((np.linalg.eigh(A.T @ A)[1], k) for A, k in ((A1, i), (A2, j)))]
    return float(np.trace(P[0] @ P[1])) / min(i, j)


def _same_space(got: Any, A1: Array, A2: Array, i: int, j: int) -> bool:
    same = A1.shape == A2.shape and i == j and np.allclose(A1.T @ A1, A2.T @ A2)
    return not same or bool(np.isclose(got[0], 1))


def _cosine(A1: Any, A2: Any, i: int, j: int) -> Any:
    a, b = A1[: min(len(A1), len(A2))].ravel(), A2[: min(len(A1), len(A2))].ravel()
    return abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)


def _rows(A1: Any, A2: Any, i: int, j: int) -> Any:
    V1, V2 = (M[:k] / np.linalg.norm(M[:k], axis=1, keepdims=True) for M, k in ((A1, i), (A2, j)))
    return ((V1 @ V2.T) ** 2).sum() / min(i, j)


def _left_vectors(A1: Any, A2: Any, i: int, j: int) -> Any:
    n = min(len(A1), len(A2))
    U1, U2 = np.linalg.svd(A1)[0][:n, :i], np.linalg.svd(A2)[0][:n, :j]
    return ((U1.T @ U2) ** 2).sum() / min(i, j)


def _by_the_larger(A1: Any, A2: Any, i: int, j: int) -> Any:
    return subspace_overlap(A1, A2, i, j) * min(i, j) / max(i, j)


def _not_squared(A1: Any, A2: Any, i: int, j: int) -> Any:
    return np.sqrt(subspace_overlap(A1, A2, i, j) * min(i, j)) / min(i, j)


def _all_directions(A1: Any, A2: Any, i: int, j: int) -> Any:
    V1, V2 = np.linalg.svd(A1, full_matrices=False)[2], np.linalg.svd(A2, full_matrices=False)[2]
    return ((V1 @ V2.T) ** 2).sum() / min(i, j)


C15 = Exercise(
    number="C15",
    chapter="02",
    minutes=15,
    level="senior",
    importance=4,
    task="How much two subspaces overlap: the paper's phi.",
    returns="one number",
    reference=subspace_overlap,
    parse=arrays(1),
    cases=_subspaces,
    properties=(
        Property("SHAPE", "Return one number.", lambda got, *args: got[0].shape == ()),
        Property(
            "SAME_SPACE",
            "Rotating the rows of A leaves its subspace as it is: the overlap with itself should be 1.",
            _same_space,
        ),
        Property("RANGE", "The overlap should lie between 0 and 1.", lambda got, *args: -1e-9 <= got[0] <= 1 + 1e-9),
        Property(
            "VALUE",
            "The number differs from |V1_i^T V2_j|_F^2 / min(i, j).",
            lambda got, *args: np.isclose(got[0], _phi(*args)),
        ),
    ),
    mistakes=(
        Mistake(
            "COSINE",
            "A cosine of the flattened entries: rotating A leaves the subspace but changes your number.",
            _cosine,
        ),
        Mistake(
            "NOT_ORTHONORMAL",
            "Your rows have length 1 but are not orthogonal to each other; the singular vectors are.",
            _rows,
        ),
        Mistake(
            "LEFT",
            "You compare left singular vectors; both matrices share the input side, the right ones.",
            _left_vectors,
        ),
        Mistake(
            "MAX_NORM",
            "You divide by max(i, j): a line inside a plane should count as contained, with overlap 1.",
            _by_the_larger,
        ),
        Mistake("NOT_SQUARED", "The Frobenius norm is squared in phi.", _not_squared),
        Mistake(
            "ALL", "You use all directions; only the top i of A1 and the top j of A2 are asked for.", _all_directions
        ),
    ),
    hints=(
        "An orthonormal basis of the top i directions of A1, as rows: lowrank.truncated_svd(A1, i)[2].",
        "V1 @ V2.T (i, j) holds the cosines between the two bases.",
        "The sum of their squares is at most min(i, j).",
    ),
)
