"""Properties of lora_edu.lowrank on matrices that hypothesis draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_edu import lowrank

settings.register_profile("course", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("course")


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Tall, wide, square, rank-deficient, zero, and badly scaled matrices."""
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rank = draw(st.integers(0, min(m, n)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return 10.0 ** draw(st.integers(-6, 6)) * rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    M = draw(matrices())
    return M, draw(st.integers(1, min(M.shape)))


def size(M: np.ndarray) -> float:
    return float(np.linalg.norm(M)) or 1.0


@given(cuts())
def test_truncated_svd_is_orthonormal_ordered_and_as_near_as_the_tail(cut: tuple[np.ndarray, int]) -> None:
    M, r = cut
    U, s, Vt = lowrank.truncated_svd(M, r)
    assert U.shape == (len(M), r) and s.shape == (r,) and Vt.shape == (r, M.shape[1])
    np.testing.assert_allclose(U.T @ U, np.eye(r), atol=1e-12)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(r), atol=1e-12)
    assert (s >= 0).all() and (np.diff(s) <= 0).all()
    values = np.linalg.svd(M, compute_uv=False)
    assert abs(np.linalg.norm(M - U * s @ Vt) - np.sqrt((values[r:] ** 2).sum())) <= 1e-12 * size(M)


@given(cuts(), st.integers(0, 2**32 - 1))
def test_no_subspace_beats_the_tail(cut: tuple[np.ndarray, int], seed: int) -> None:
    M, r = cut
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(M), r))).Q
    tail = lowrank.tail_norm(np.linalg.svd(M, compute_uv=False), r)
    assert np.linalg.norm(M - Q @ (Q.T @ M)) >= tail - 1e-12 * size(M)


@given(cuts())
def test_balanced_factors_multiply_to_the_truncation_and_share_its_scale(cut: tuple[np.ndarray, int]) -> None:
    M, r = cut
    B, A = lowrank.balanced_factors(M, r)
    U, s, Vt = lowrank.truncated_svd(M, r)
    np.testing.assert_allclose(B @ A, U * s @ Vt, atol=1e-12 * size(M))
    np.testing.assert_allclose(B.T @ B, np.diag(s), atol=1e-12 * size(M))
    np.testing.assert_allclose(A @ A.T, np.diag(s), atol=1e-12 * size(M))


@given(cuts(), st.integers(0, 3))
def test_randomized_svd_of_a_small_matrix_is_the_truncation(cut: tuple[np.ndarray, int], iterations: int) -> None:
    # Oversampling covers all of these matrices, so that nothing is left to chance.
    M, r = cut
    U, s, Vt = lowrank.randomized_svd(M, r, power_iterations=iterations)
    best = lowrank.truncated_svd(M, r)
    np.testing.assert_allclose(U.T @ U, np.eye(r), atol=1e-10)
    np.testing.assert_allclose(s, best[1], atol=1e-10 * size(M))
    assert np.linalg.norm(M - U * s @ Vt) <= np.linalg.norm(M - best[0] * best[1] @ best[2]) + 1e-10 * size(M)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", [1 / np.arange(1, 301), np.exp(-np.arange(300) / 30), 10.0 ** -np.arange(300)])
def test_randomized_svd_comes_within_two_percent_of_the_optimum(seed: int, spectrum: np.ndarray) -> None:
    rng = np.random.default_rng(seed)
    P, Q = (np.linalg.qr(rng.standard_normal((d, 300))).Q for d in (400, 300))
    M = P * spectrum @ Q.T
    found = lowrank.randomized_svd(M, 20, seed=seed)
    error = np.linalg.norm(M - found[0] * found[1] @ found[2])
    assert error <= 1.02 * lowrank.tail_norm(spectrum, 20) + 1e-13


def test_randomized_svd_keeps_single_precision_and_repeats() -> None:
    M = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    first, second = lowrank.randomized_svd(M, 5, seed=3), lowrank.randomized_svd(M, 5, seed=3)
    assert all(a.dtype == np.float32 and np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@given(matrices())
def test_energy_counts_up_to_one_and_matches_the_relative_error(M: np.ndarray) -> None:
    s = np.linalg.svd(M, compute_uv=False)
    kept = lowrank.energy(s)
    assert kept[-1] == pytest.approx(1) and (np.diff(kept) >= 0).all()
    if s[0] > 0:
        errors = [lowrank.tail_norm(s, k) / np.linalg.norm(M) for k in range(1, len(s) + 1)]
        np.testing.assert_allclose(np.sqrt(np.maximum(1 - kept, 0)), errors, atol=1e-7)


@given(matrices(), st.floats(0.05, 0.999), st.sampled_from([1e-3, 7.0, 1e5]))
def test_effective_rank_is_enough_smallest_and_scale_free(M: np.ndarray, share: float, scale: float) -> None:
    k = lowrank.effective_rank(M, share)
    s2 = np.linalg.svd(M, compute_uv=False) ** 2
    if not s2.any():
        assert k == 0
        return
    assert s2[:k].sum() >= (share - 1e-9) * s2.sum() and s2[: k - 1].sum() < (share + 1e-9) * s2.sum()
    assert lowrank.effective_rank(scale * M, share) in (k, lowrank.effective_rank(M, share * (1 - 1e-9)))


@pytest.mark.parametrize(("m", "n", "rank"), [(8, 8, 3), (12, 5, 2), (5, 12, 5)])
def test_effective_rank_at_full_energy_is_the_rank(m: int, n: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    assert lowrank.effective_rank(rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n)), 1.0) == rank
    assert lowrank.effective_rank(np.zeros((m, n))) == 0


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_break_even_rank_is_the_last_that_saves(m: int, n: int) -> None:
    r = lowrank.break_even_rank(m, n)
    assert r * (m + n) < m * n <= (r + 1) * (m + n)


def test_noise_edge_and_hard_threshold() -> None:
    assert lowrank.noise_edge(256, 256, 1.0) == 32
    assert lowrank.hard_threshold(100, 100, 2.0) == pytest.approx(2 * 10 * 4 / np.sqrt(3))
    assert lowrank.hard_threshold(40, 90, 1.0) == lowrank.hard_threshold(90, 40, 1.0) > lowrank.noise_edge(40, 90, 1.0)
    for seed in range(3):
        noise = np.random.default_rng(seed).standard_normal((200, 500))
        assert np.linalg.norm(noise, 2) == pytest.approx(lowrank.noise_edge(200, 500, 1.0), rel=0.03)


def test_inputs_are_left_alone() -> None:
    M = np.random.default_rng(0).standard_normal((6, 4))
    before = M.copy()
    (
        lowrank.truncated_svd(M, 2),
        lowrank.balanced_factors(M, 2),
        lowrank.randomized_svd(M, 2),
        lowrank.effective_rank(M),
    )
    assert np.array_equal(M, before)


M = np.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: lowrank.truncated_svd(np.full((2, 2), np.nan), 1), ValueError, "NaN or infinity"),
        (lambda: lowrank.truncated_svd(np.array([[np.inf]]), 1), ValueError, "NaN or infinity"),
        (lambda: lowrank.truncated_svd(np.ones(3), 1), ValueError, r"shape \(3,\)"),
        (lambda: lowrank.truncated_svd(np.ones((0, 3)), 1), ValueError, "at least one entry"),
        (lambda: lowrank.truncated_svd(1j * M, 1), ValueError, "real numbers"),
        (lambda: lowrank.truncated_svd(M, 0), ValueError, "rank 1 to 3; got r = 0"),
        (lambda: lowrank.truncated_svd(M, 4), ValueError, "rank 1 to 3; got r = 4"),
        (lambda: lowrank.balanced_factors(M, 1.5), TypeError, "must be an integer; got 1.5"),
        (lambda: lowrank.randomized_svd(M, 1, oversample=-1), ValueError, "oversample must not be negative"),
        (
            lambda: lowrank.randomized_svd(M, 1, power_iterations=-1),
            ValueError,
            "power_iterations must not be negative",
        ),
        (lambda: lowrank.energy([1.0, 2.0]), ValueError, "in falling order"),
        (lambda: lowrank.tail_norm([2.0, 1.0], 3), ValueError, "between 0 and 2"),
        (lambda: lowrank.effective_rank(M, 90), ValueError, "0 < energy <= 1; got 90"),
        (lambda: lowrank.break_even_rank(0, 3), ValueError, r"got \(0, 3\)"),
        (lambda: lowrank.noise_edge(3, 3, -1.0), ValueError, "sigma >= 0"),
        (lambda: lowrank.hard_threshold(3, 3, float("nan")), ValueError, "sigma >= 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as refusal:
        call()  # type: ignore[operator]
    assert "\n" not in str(refusal.value)
