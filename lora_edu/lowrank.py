"""Low-rank approximation in NumPy.

Throughout, `M` is a real matrix of shape (m, n) with singular value decomposition

    M = U diag(s) Vt,      s[0] >= s[1] >= ... >= 0,

and its truncation to rank r is M_r = U[:, :r] diag(s[:r]) Vt[:r].

Bad input raises `ValueError` (wrong shape, rank out of range, NaN or infinity) or `TypeError`
(a rank that is not an integer) with one sentence, before anything is computed.
"""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def truncated_svd(M: ArrayLike, r: int) -> tuple[Array, Array, Array]:
    """The best rank-r approximation of `M`, as U (m, r), s (r,), Vt (r, n).

    Among all matrices X of rank at most r, X = U diag(s) Vt minimises |M - X| in the Frobenius norm,
    where the minimum is `tail_norm(all singular values, r)`, and in the spectral norm, where it is s[r].

    Source: Eckart and Young 1936 (Frobenius); Mirsky 1960 (every unitarily invariant norm).
    """
    M = _matrix(M)
    r = _rank(r, M.shape)
    U, s, Vt = np.linalg.svd(M, full_matrices=False)
    return U[:, :r], s[:r], Vt[:r]


def balanced_factors(M: ArrayLike, r: int) -> tuple[Array, Array]:
    """The best rank-r approximation of `M` as two factors: B (m, r) and A (r, n) with B @ A = M_r.

    B = U_r diag(sqrt(s_r)) and A = diag(sqrt(s_r)) Vt_r, so B.T @ B = A @ A.T = diag(s_r): each factor
    carries the same scale. Together they store r (m + n) numbers.
    """
    U, s, Vt = truncated_svd(M, r)
    root = np.sqrt(s)
    return U * root, root[:, None] * Vt


def randomized_svd(
    M: ArrayLike, r: int, oversample: int = 10, power_iterations: int = 2, seed: int = 0
) -> tuple[Array, Array, Array]:
    """An almost best rank-r approximation from a few products with `M`: U (m, r), s (r,), Vt (r, n).

    A random (n, r + oversample) matrix is pushed through M, and through M.T and M again
    `power_iterations` times; the result's orthonormal basis Q (m, r + oversample) spans nearly the top
    left singular directions, and the small matrix Q.T @ M (r + oversample, n) is decomposed exactly.
    Each power iteration raises the singular values' ratios to the next odd power, which suppresses the
    tail: 0 iterations is cheap and poor on a slowly decaying spectrum.

    Cost: about 4 mn (r + oversample) (power_iterations + 1) FLOPs, against O(mn min(m, n)) for all of it.

    Source: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1.
    """
    M = _matrix(M)
    r = _rank(r, M.shape)
    width = min(r + _count(oversample, "oversample"), *M.shape)
    steps = _count(power_iterations, "power_iterations")
    # Sketches lie on their side, (width, ...): BLAS is a quarter faster on wide matrices than on tall ones.
    sketch = np.random.default_rng(seed).standard_normal((M.shape[1], width), dtype=M.dtype.type).T @ M.T
    for _ in range(steps):
        # Orthonormal in every iteration: the rows would otherwise all turn to the top direction.
        sketch = np.linalg.qr((sketch @ M).T).Q.T @ M.T
    Q = np.linalg.qr(sketch.T).Q
    # (Q.T @ M).T = P R with R small, so that the SVD is one of a (width, width) matrix.
    P, R = np.linalg.qr((Q.T @ M).T)
    U, s, Vt = np.linalg.svd(R.T)
    return Q @ U[:, :r], s[:r], Vt[:r] @ P.T


def tail_norm(s: ArrayLike, r: int) -> float:
    """sqrt(sum of s[i]**2 for i >= r): the Frobenius error of the rank-r truncation, from all singular values."""
    s = _singular_values(s)
    if not 0 <= index(r) <= len(s):
        raise ValueError(f"r must lie between 0 and {len(s)}, the number of singular values; got {r}.")
    return float(np.linalg.norm(s[index(r) :]))


def energy(s: ArrayLike) -> Array:
    """Share of the energy |M|_F**2 kept at each rank: energy(s)[k - 1] = sum(s[:k]**2) / sum(s**2).

    The relative Frobenius error at rank k is sqrt(1 - energy(s)[k - 1]). A zero matrix has nothing to lose:
    its energy is 1 at every rank.
    """
    s = _singular_values(s)
    kept = np.cumsum(s**2)
    return kept / kept[-1] if kept[-1] > 0 else np.ones_like(kept)


def effective_rank(M: ArrayLike, energy: float = 0.9) -> int:
    """The smallest k whose rank-k truncation keeps at least the share `energy` (0 < energy <= 1) of |M|_F**2.

    Scale-free: effective_rank(c M) = effective_rank(M) for every c != 0. At energy = 1 it is the numerical
    rank; the zero matrix has effective rank 0. (Other quantities go by the same name, for example the
    exponential of the entropy of s, Roy and Vetterli 2007: say which you mean.)
    """
    M = _matrix(M)
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share: 0 < energy <= 1; got {energy}.")
    squares = np.linalg.svd(M, compute_uv=False) ** 2
    total = squares.sum()
    # What each k loses, summed from the small end, where rounding would otherwise hide it.
    lost = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    rounding = (max(M.shape) * np.finfo(squares.dtype).eps) ** 2
    return int(np.argmax(lost <= (1 - energy + rounding) * total))


def break_even_rank(m: int, n: int) -> int:
    """The largest rank at which two factors store fewer numbers than the (m, n) matrix: r (m + n) < mn.

    For a square matrix that is just below m / 2, not m.
    """
    if m < 1 or n < 1:
        raise ValueError(f"a matrix has at least one row and one column; got ({m}, {n}).")
    return (index(m) * index(n) - 1) // (index(m) + index(n))


def noise_edge(m: int, n: int, sigma: float) -> float:
    """The largest singular value to expect of pure noise: sigma (sqrt(m) + sqrt(n)).

    `sigma` is the standard deviation of independent zero-mean entries. A singular value well above the edge
    is structure; one below it cannot be told from noise by its size.

    Source: the edge of the Marchenko-Pastur law (Marchenko and Pastur 1967).
    """
    if m < 1 or n < 1 or not sigma >= 0:
        raise ValueError(f"the noise edge needs m, n >= 1 and sigma >= 0; got ({m}, {n}) and {sigma}.")
    return float(sigma * (np.sqrt(m) + np.sqrt(n)))


def hard_threshold(m: int, n: int, sigma: float) -> float:
    """Where to cut the singular values of an (m, n) signal plus noise of standard deviation `sigma`.

    Keeping exactly the values above the threshold has, asymptotically, the smallest mean squared error of all
    cuts when the signal's rank is low. It lies above `noise_edge`, because a direction just above the edge
    still carries more noise than signal. For a square matrix it is 4 / sqrt(3) sqrt(n) sigma.

    Source: Gavish and Donoho 2014 (arXiv 1305.5870), known noise level.
    """
    noise_edge(m, n, sigma)  # the same conditions on the arguments
    b = min(m, n) / max(m, n)
    factor = 2 * (b + 1) + 8 * b / (b + 1 + np.sqrt(b**2 + 14 * b + 1))
    return float(np.sqrt(factor * max(m, n)) * sigma)


def _matrix(M: ArrayLike) -> Array:
    M = np.asarray(M)
    if M.ndim != 2 or M.size == 0:
        raise ValueError(f"M must be a matrix with at least one entry; got an array of shape {M.shape}.")
    if M.dtype.kind not in "fiub":
        raise ValueError(f"M must hold real numbers; got dtype {M.dtype}.")
    if M.dtype not in (np.float32, np.float64):
        M = M.astype(np.float64)
    # The sum tells at once in almost all cases; only an overflow makes the second look necessary.
    with np.errstate(over="ignore"):
        finite = np.isfinite(M.sum()) or np.isfinite(M).all()
    if not finite:
        raise ValueError("M holds NaN or infinity: it has no singular value decomposition.")
    return M


def _rank(r: int, shape: tuple[int, ...]) -> int:
    try:
        rank = index(r)
    except TypeError:
        raise TypeError(f"the rank r must be an integer; got {r!r}.") from None
    if not 1 <= rank <= min(shape):
        raise ValueError(f"a {shape} matrix has truncations of rank 1 to {min(shape)}; got r = {r}.")
    return rank


def _count(value: int, name: str) -> int:
    if index(value) < 0:
        raise ValueError(f"{name} must not be negative; got {value}.")
    return index(value)


def _singular_values(s: ArrayLike) -> Array:
    s = np.asarray(s, dtype=float)
    if s.ndim != 1 or s.size == 0 or not np.isfinite(s).all() or (s < 0).any() or (np.diff(s) > 0).any():
        raise ValueError("s must be a one-dimensional array of singular values: finite, >= 0, in falling order.")
    return s
