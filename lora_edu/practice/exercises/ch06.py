"""Exercises of chapter 06, one task and many methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_edu.lab.runs import tuned
from lora_edu.lowrank import Array
from lora_edu.practice.exercise import Case, Exercise, Mistake, Property, arrays

# E6.1 ia3_merge


def ia3_merge(
    Wk: Array, bk: Array, Wv: Array, bv: Array, Wd: Array, lk: Array, lv: Array, ld: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Wk, bk, Wv, bv, Wd with the factors of (IA)^3 inside.

    k = lk * (Wk x + bk) and v = lv * (Wv x + bv), with lk and lv (out,); y = Wd (ld * h) + bd, with ld (in,).
    """
    return lk[:, None] * Wk, lk * bk, lv[:, None] * Wv, lv * bv, Wd * ld


def _factor_cases() -> list[Case]:
    rng = np.random.default_rng(0)

    def block(width: int, keys: int, inner: int) -> Case:
        shapes = (keys, width), (keys,), (keys, width), (keys,), (width, inner), (keys,), (keys,), (inner,)
        return Case(tuple(rng.standard_normal(shape) for shape in shapes))

    small = (
        [[1, 2], [3, 4]], [5, 6], [[2, 0], [1, 3]], [1, -1], [[1, 3], [2, 5]], [2, 3], [0.5, 0], [4, -1],
    )  # fmt: skip
    # A square one first: there a factor along the wrong axis raises nothing.
    return [
        Case(tuple(np.array(part, dtype=float) for part in small)),
        block(6, 3, 10),
        block(4, 7, 9),
        block(4, 4, 4),
    ]


def _scales_outputs(place: int) -> Any:
    """Whether the merged map at that place among the arguments gives the outputs of the map times its factors."""

    def holds(got: Any, *args: Any) -> bool:
        W, b, factors = args[place], args[place + 1], args[5 + place // 2]
        x = np.random.default_rng(1).standard_normal((9, W.shape[1]))
        return np.allclose(x @ got[place].T + got[place + 1], factors * (x @ W.T + b))

    return holds


def _scales_inputs(got: Any, *args: Any) -> bool:
    W, factors = args[4], args[7]
    h = np.random.default_rng(1).standard_normal((9, W.shape[1]))
    return np.allclose(h @ got[4].T, (factors * h) @ W.T)


def _biases_unscaled(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return lk[:, None] * Wk, bk, lv[:, None] * Wv, bv, Wd * ld


def _rows_of_down(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return lk[:, None] * Wk, lk * bk, lv[:, None] * Wv, lv * bv, ld[:, None] * Wd


def _rows_of_down_too(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return Wk * lk[:, None], lk * bk, Wv * lv[:, None], lv * bv, Wd * ld[:, None]


def _columns_of_both(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return lk * Wk, lk * bk, lv * Wv, lv * bv, ld * Wd


def _columns_of_both_too(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return Wk * lk, bk * lk, Wv * lv, bv * lv, Wd * ld


def _down_forgotten(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return lk[:, None] * Wk, lk * bk, lv[:, None] * Wv, lv * bv, Wd


def _added(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return Wk + lk[:, None], bk + lk, Wv + lv[:, None], bv + lv, Wd + ld


def _one_more(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return ia3_merge(Wk, bk, Wv, bv, Wd, 1 + lk, 1 + lv, 1 + ld)


def _exchanged(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return ia3_merge(Wk, bk, Wv, bv, Wd, lv, lk, ld)


def _change_alone(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    return ia3_merge(Wk, bk, Wv, bv, Wd, lk - 1, lv - 1, ld - 1)


def _in_place(Wk: Any, bk: Any, Wv: Any, bv: Any, Wd: Any, lk: Any, lv: Any, ld: Any) -> Any:
    Wk *= lk[:, None]
    bk *= lk
    Wv *= lv[:, None]
    bv *= lv
    Wd *= ld
    return Wk, bk, Wv, bv, Wd


_DOWN_ROWS = "You scale the rows of Wd, its outputs; ld belongs to its inputs, one factor a column."
_COLUMNS = "You scale the columns of Wk and Wv, their inputs; lk and lv belong to the outputs, one factor a row."

MERGE = Exercise(
    number="E6.1",
    chapter="06",
    minutes=10,
    level="mid",
    importance=3,
    task="Put the factors of (IA)^3 into the weights.",
    returns="five arrays, Wk, bk, Wv, bv and Wd",
    reference=ia3_merge,
    parse=arrays(5),
    cases=_factor_cases,
    properties=(
        Property(
            "SHAPES",
            "Each array should have the shape of the one it replaces, in the order Wk, bk, Wv, bv, Wd.",
            lambda got, *args: [part.shape for part in got] == [part.shape for part in args[:5]],
        ),
        Property(
            "MERGED_K",
            "The merged key map gives other keys than lk * (Wk x + bk).",
            _scales_outputs(0),
        ),
        Property(
            "MERGED_V",
            "The merged value map gives other values than lv * (Wv x + bv).",
            _scales_outputs(2),
        ),
        Property("MERGED_DOWN", "The merged down map gives another output than Wd (ld * h).", _scales_inputs),
    ),
    mistakes=(
        Mistake(
            "NO_BIAS",
            "The biases are unscaled: lk multiplies all of Wk x + bk, and lv likewise.",
            _biases_unscaled,
        ),
        Mistake("DOWN_ROWS", _DOWN_ROWS, _rows_of_down),
        Mistake("DOWN_ROWS", _DOWN_ROWS, _rows_of_down_too),
        Mistake("COLUMNS", _COLUMNS, _columns_of_both),
        Mistake("COLUMNS", _COLUMNS, _columns_of_both_too),
        Mistake("NO_DOWN", "Wd is as it was; the inner features have factors too, ld.", _down_forgotten),
        Mistake("ADDED", "You add the factors; (IA)^3 multiplies, and a factor of 1 changes nothing.", _added),
        Mistake(
            "ONE_MORE", "You multiply by 1 + l; l is the factor itself, which starts at 1 and not at 0.", _one_more
        ),
        Mistake(
            "CHANGE",
            "That is what merging adds to the weights; asked for are the weights with it.",
            _change_alone,
        ),
        Mistake("EXCHANGED", "lk and lv are exchanged: lk is for the keys.", _exchanged),
        Mistake(
            "MUTATES",
            "The arrays that were passed in have changed: a second call, or another adapter, starts from the wrong base.",
            _in_place,
        ),
    ),
    hints=(
        "Output i of a map comes from row i of W and from b[i]; input j meets column j.",
        "lk and lv multiply outputs: rows, and biases. ld multiplies inputs: columns.",
        "lk[:, None] * Wk scales rows; Wd * ld scales columns.",
    ),
    after="The change, (diag(l) - 1) W, has one number an output and in general full rank: few numbers need not mean low rank.",
)


# E6.2 fair_comparison

Rows = Sequence[Mapping[str, Any]]


def fair_comparison(rows: Rows) -> dict[str, tuple[float, float, float]]:
    """{method: (rate, mean, spread)}, for rows with method, rate, seed, validation and test; lower is better.

    rate      where the mean of validation over the seeds is lowest; not one at which a seed's is NaN or infinite
    mean      of test over the seeds, at that rate
    spread    the sample standard deviation of the same numbers
    """
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        runs: dict[float, list[tuple[float, float]]] = {}
        for row in rows:
            if row["method"] == method:
                runs.setdefault(row["rate"], []).append((row["validation"], row["test"]))
        validation = {rate: np.mean([v for v, _ in pairs]) for rate, pairs in runs.items()}
        rate = min((rate for rate in runs if np.isfinite(validation[rate])), key=validation.__getitem__)
        test = [t for _, t in runs[rate]]
        found[method] = rate, float(np.mean(test)), float(np.std(test, ddof=1))
    return found


class _Rows(list[dict[str, Any]]):
    """Rows that describe themselves in a line."""

    def __repr__(self) -> str:
        methods = dict.fromkeys(row["method"] for row in self)
        lost = dict.fromkeys(f"{r['method']} at {r['rate']:g}" for r in self if not np.isfinite(r["validation"]))
        return f"{len(self)} rows of {', '.join(methods)}{', not finite ' * bool(lost)}{', '.join(lost)}"


def _rows(**methods: dict[float, list[tuple[float, float]]]) -> Case:
    """Rows of every method, rate and seed from pairs (validation, test); the rows of a rate are not neighbours."""
    rows: list[dict[str, Any]] = [
        {"method": method, "rate": rate, "seed": seed, "validation": validation, "test": test}
        for method, sweep in methods.items()
        for rate, pairs in sweep.items()
        for seed, (validation, test) in enumerate(pairs)
    ]
    return Case((_Rows(sorted(rows, key=lambda row: row["seed"])),))


def _comparisons() -> list[Case]:
    nan, inf = float("nan"), float("inf")
    # In each: validation and test disagree on the rate, and so do the mean and the best seed.
    lora = {
        1e-3: [(2.30, 2.50), (2.36, 2.44), (2.33, 2.47)],
        1e-2: [(2.20, 2.42), (2.10, 2.35), (2.15, 2.31)],
        3e-2: [(2.30, 2.20), (2.05, 2.14), (2.40, 2.29)],
    }
    full = {
        1e-3: [(1.90, 2.20), (2.00, 2.11), (2.10, 2.16)],
        1e-2: [(2.10, 2.05), (1.80, 2.12), (2.70, 2.00)],
        3e-2: [(3.00, 3.10), (3.20, 3.00), (3.50, 3.30)],
    }
    ia3 = {
        3e-3: [(nan, nan), (2.10, 2.00), (2.00, 2.05)],
        1e-2: [(2.50, 2.60), (2.40, 2.70), (2.45, 2.50)],
        1e-1: [(2.35, 2.90), (2.80, 2.40), (2.60, 2.20)],
        1.0: [(1.50, 1.60), (inf, inf), (1.40, 1.70)],
    }
    # Seeds in another number at each rate: sums do not compare.
    head = {
        3e-4: [(nan, nan), (2.90, 2.95), (2.80, 2.70)],
        1e-3: [(2.60, 2.60), (2.70, 2.80)],
        1e-2: [(2.50, 2.75), (2.55, 2.85), (2.58, 2.95), (2.62, 2.65)],
        3e-2: [(2.40, 2.60), (2.75, 2.50), (nan, nan)],
    }
    return [
        _rows(lora=lora),
        _rows(lora=lora, full=full),
        _rows(ia3=ia3, lora=lora),
        _rows(head=head, full=full, ia3=ia3),
    ]


def _table(result: Any) -> tuple[Array, Array]:
    """The methods, sorted, and a row (rate, mean, spread) for each."""
    if not isinstance(result, dict) or not all(isinstance(name, str) and len(result[name]) == 3 for name in result):
        raise TypeError
    names = sorted(result)
    return np.array(names), np.array([[float(value) for value in result[name]] for name in names])


def _matches(got: Any, rows: Rows, column: int, want: Any) -> bool:
    best = tuned(rows, "method")
    return np.allclose(got[1][:, column], [want(best[name]) for name in got[0]], rtol=1e-6, atol=0)


def _pairs(rows: Rows) -> dict[str, dict[float, Array]]:
    """(seeds, 2) of validation and test, for every method and rate."""
    return {
        method: {
            rate: np.array([[row["validation"], row["test"]] for row in seeds]) for rate, seeds in best.sweep.items()
        }
        for method, best in tuned(rows, "method").items()
    }


def _compared(rows: Any, loss: Any = None, report: Any = None) -> Any:
    """The comparison with parts to go wrong: the loss that decides on a rate, and what is reported of its runs."""

    def mean_validation(runs: Array) -> float:
        return float(runs[:, 0].mean())

    def test(runs: Array) -> tuple[float, float]:
        return float(runs[:, 1].mean()), float(runs[:, 1].std(ddof=1))

    found = {}
    for method, sweep in _pairs(rows).items():
        losses = {rate: (loss or mean_validation)(runs) for rate, runs in sweep.items()}
        rate = min(losses, key=lambda rate: losses[rate] if np.isfinite(losses[rate]) else np.inf)
        found[method] = (rate, *(report or test)(sweep[rate]))
    return found


def _by_test(rows: Any) -> Any:
    return _compared(rows, lambda runs: runs[:, 1].mean())


def _by_best_seed(rows: Any) -> Any:
    return _compared(rows, lambda runs: runs[:, 0].min())


def _by_best_finite_seed(rows: Any) -> Any:
    return _compared(rows, lambda runs: np.nanmin(runs[:, 0]))


def _survivors(rows: Any) -> Any:
    return fair_comparison([row for row in rows if np.isfinite(row["validation"])])


def _nans_skipped(rows: Any) -> Any:
    return _compared(rows, lambda runs: np.nanmean(runs[:, 0]))


def _highest(rows: Any) -> Any:
    return _compared(rows, lambda runs: -runs[:, 0].mean())


def _summed(rows: Any) -> Any:
    return _compared(rows, lambda runs: runs[:, 0].sum())


def _nan_wins(rows: Any) -> Any:
    found = {}
    for method, sweep in _pairs(rows).items():
        rates = list(sweep)
        rate = rates[np.argmin([sweep[rate][:, 0].mean() for rate in rates])]
        found[method] = rate, sweep[rate][:, 1].mean(), sweep[rate][:, 1].std(ddof=1)
    return found


def _first_nan_wins(rows: Any) -> Any:
    found = {}
    for method, sweep in _pairs(rows).items():
        rate = min(sweep, key=lambda rate: sweep[rate][:, 0].mean())
        found[method] = rate, sweep[rate][:, 1].mean(), sweep[rate][:, 1].std(ddof=1)
    return found


def _one_rate(rows: Any) -> Any:
    sweeps = _pairs(rows)
    shared = [rate for rate in next(iter(sweeps.values())) if all(rate in sweep for sweep in sweeps.values())]
    means = {rate: np.mean([sweep[rate][:, 0].mean() for sweep in sweeps.values()]) for rate in shared}
    rate = min(means, key=lambda rate: means[rate] if np.isfinite(means[rate]) else np.inf)
    return {m: (rate, sweep[rate][:, 1].mean(), sweep[rate][:, 1].std(ddof=1)) for m, sweep in sweeps.items()}


def _validation_reported(rows: Any) -> Any:
    return _compared(rows, report=lambda runs: (runs[:, 0].mean(), runs[:, 0].std(ddof=1)))


def _best_seed_reported(rows: Any) -> Any:
    return _compared(rows, report=lambda runs: (runs[:, 1].min(), runs[:, 1].std(ddof=1)))


def _seed_of_best_validation(rows: Any) -> Any:
    return _compared(rows, report=lambda runs: (runs[runs[:, 0].argmin(), 1], runs[:, 1].std(ddof=1)))


def _population(rows: Any) -> Any:
    return _compared(rows, report=lambda runs: (runs[:, 1].mean(), runs[:, 1].std()))


def _standard_error(rows: Any) -> Any:
    return _compared(rows, report=lambda runs: (runs[:, 1].mean(), runs[:, 1].std(ddof=1) / np.sqrt(len(runs))))


def _variance(rows: Any) -> Any:
    return _compared(rows, report=lambda runs: (runs[:, 1].mean(), runs[:, 1].var(ddof=1)))


def _range(rows: Any) -> Any:
    return _compared(rows, report=lambda runs: (runs[:, 1].mean(), np.ptp(runs[:, 1])))


def _over_all_rates(rows: Any) -> Any:
    found, sweeps = fair_comparison(rows), _pairs(rows)
    for method, sweep in sweeps.items():
        test = np.concatenate([runs[:, 1] for runs in sweep.values() if np.isfinite(runs).all()])
        found[method] = found[method][0], test.mean(), test.std(ddof=1)
    return found


def _winner_alone(rows: Any) -> Any:
    return dict([min(fair_comparison(rows).items(), key=lambda item: item[1][1])])


_SURVIVORS = "You average over the seeds that survived; a rate at which a seed diverges is not a rate to report."
_BEST_SEED = "You let the best single seed choose the rate: that rewards luck. Compare the means over the seeds."
_NAN_WINS = (
    "A mean that is NaN wins: np.argmin takes it for the smallest, and min keeps it when it comes first. Leave it out."
)
_LUCKY = "You report one seed, the best, which only gets better the more seeds are tried. Report the mean."

FAIR = Exercise(
    number="E6.2",
    chapter="06",
    minutes=15,
    level="mid",
    importance=5,
    task="Compare methods, each at its own learning rate, chosen without the test text.",
    returns="a dict with three numbers, rate, mean and spread, for every method",
    reference=fair_comparison,
    parse=_table,
    observe=lambda got, rows: (" ".join(got[0]), got[1]),
    cases=_comparisons,
    properties=(
        Property(
            "METHODS",
            "The keys should be the methods that occur in the rows, all of them.",
            lambda got, rows: set(got[0]) == {row["method"] for row in rows},
        ),
        Property(
            "CHOSEN",
            "A method's rate is another one than that with its lowest mean validation, over seeds that are all finite.",
            lambda got, rows: _matches(got, rows, 0, lambda best: best.rate),
        ),
        Property(
            "REPORTED",
            "The rate is right; the mean is another number than the mean of test over its seeds.",
            lambda got, rows: _matches(got, rows, 1, lambda best: best.mean("test")),
        ),
        Property(
            "SPREAD",
            "The spread is another number than the sample standard deviation of test over the seeds at that rate.",
            lambda got, rows: _matches(got, rows, 2, lambda best: best.spread("test")),
        ),
    ),
    mistakes=(
        Mistake(
            "BY_TEST",
            "You choose the rate on test: the number you report is then too good, as it was picked for being low.",
            _by_test,
        ),
        Mistake(
            "ONE_RATE",
            "You give all methods one rate; it suits some and not others, and the comparison measures that.",
            _one_rate,
        ),
        Mistake("BEST_SEED", _BEST_SEED, _by_best_seed),
        Mistake("BEST_SEED", _BEST_SEED, _by_best_finite_seed),
        Mistake("NAN_WINS", _NAN_WINS, _nan_wins),
        Mistake("NAN_WINS", _NAN_WINS, _first_nan_wins),
        Mistake("SURVIVORS", _SURVIVORS, _survivors),
        Mistake("SURVIVORS", _SURVIVORS, _nans_skipped),
        Mistake("HIGHEST", "You take the highest validation; these are bits per character, lower is better.", _highest),
        Mistake("SUMMED", "You compare sums; a rate with more seeds has a larger one. Compare means.", _summed),
        Mistake(
            "VALIDATION",
            "You report validation, which has chosen the rate and looks too good for it; test has chosen nothing.",
            _validation_reported,
        ),
        Mistake("LUCKY_SEED", _LUCKY, _best_seed_reported),
        Mistake("LUCKY_SEED", _LUCKY, _seed_of_best_validation),
        Mistake(
            "ALL_RATES",
            "You average over all rates; a method is used at its best one, and that one is compared.",
            _over_all_rates,
        ),
        Mistake(
            "POPULATION",
            "You divide by n: of a few seeds that is too small. The sample deviation divides by n - 1 (ddof=1).",
            _population,
        ),
        Mistake(
            "STANDARD_ERROR",
            "That is the standard error, the spread over sqrt(n), of the mean; asked for is the spread of the seeds.",
            _standard_error,
        ),
        Mistake("VARIANCE", "That is the variance; the deviation, its root, has the unit of the mean.", _variance),
        Mistake("WINNER", "You return the winner alone; a comparison shows every method.", _winner_alone),
        Mistake("RANGE", "That is the range, which grows with the number of seeds.", _range),
    ),
    hints=(
        "Group first: for every method and every rate the list of its seeds' rows.",
        "Leave out a rate whose mean validation np.isfinite refuses; of the others take the lowest.",
        "Of the rows at that rate np.mean of test, and np.std(..., ddof=1). Do this for each method by itself.",
    ),
    after="The cost of fairness: rates times seeds runs for every method.",
)
