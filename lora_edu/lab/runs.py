"""Stored runs: experiments that take too long for a cell are computed once, and every row can be computed again live.

An experiment is a function of a configuration that returns numbers. Its configurations, in order, are its grid:

    @experiment([{"rate": 1e-3, "seed": seed} for seed in range(3)])
    def truncation(config: Config) -> Numbers: ...

In lora_edu/lab/chapter02.py this is "chapter02.truncation". `python -m lora_edu.lab run chapter02.truncation`
computes what is missing, `load("chapter02.truncation")` returns it, and `truncation(config)` computes one row.
`run chapter05 --jobs 2` computes all of a chapter's, two rows at a time.

The data lie in runs/NAME.jsonl: one line for each configuration, with the hash of the base model that made it. What
an experiment depends on belongs into its configuration: a change of the code alone is not noticed.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import inf, isfinite
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import fmean, stdev
from threading import Thread
from time import monotonic
from typing import Any

from lora_edu.lab import corpus
from lora_edu.lab.progress import bar

FOLDER = Path(__file__).parent / "runs"
Config = Mapping[str, Any]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Experiment:
    """A function and its grid; calling it computes one row."""

    name: str
    function: Callable[[Config], Numbers]
    grid: tuple[Config, ...]

    def __call__(self, config: Config) -> Numbers:
        return self.function(config)

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.jsonl"

    @property
    def command(self) -> str:
        return f"python -m lora_edu.lab run {self.name}"


def experiment(grid: Sequence[Config]) -> Callable[[Callable[[Config], Numbers]], Experiment]:
    """Make a function of a chapter's module an experiment with this grid, under the name "module.function"."""
    if len({_key(config) for config in grid}) < len(grid):
        raise ValueError("a grid holds each configuration once.")

    def make(function: Callable[[Config], Numbers]) -> Experiment:
        return Experiment(f"{function.__module__.rpartition('.')[2]}.{function.__name__}", function, tuple(grid))

    return make


def names() -> list[str]:
    """The names of all experiments."""
    found = [value for name in _chapters() for value in vars(import_module(f"lora_edu.lab.{name}")).values()]
    return sorted({value.name for value in found if isinstance(value, Experiment)})


def find(name: str) -> Experiment:
    """The experiment of that name: "module.function"."""
    module, _, function = name.partition(".")
    found = getattr(import_module(f"lora_edu.lab.{module}"), function, None) if module in _chapters() else None
    if not isinstance(found, Experiment):
        raise ValueError(f"there is no experiment {name!r}; there are {', '.join(names())}.")
    return found


def load(name: str) -> list[dict[str, Any]]:
    """The rows of a finished experiment, configuration and numbers in one dict each, in the grid's order.

    Raises ValueError, with what differs and the command that renews the data, when rows are missing or were made with
    another base model or another grid.
    """
    wanted = find(name)
    rows = _read(wanted)
    base, have = _base(), {_key(row["config"]) for row in rows}
    known = set(map(_key, wanted.grid))
    renew = f"renew the stored runs: {wanted.command}"
    if old := next((row["base"] for row in rows if row["base"] != base), None):
        raise ValueError(f"{name} was computed with the base model {old} and the base model is {base}; {renew}")
    if gone := next((row["config"] for row in rows if _key(row["config"]) not in known), None):
        raise ValueError(f"{name}: the grid has changed and holds {json.dumps(gone)} no longer; {renew}")
    if missing := [config for config in wanted.grid if _key(config) not in have]:
        raise ValueError(
            f"{name}: {len(missing)} of {len(wanted.grid)} configurations are not computed, "
            f"the first is {json.dumps(missing[0])}; {renew}"
        )
    numbers = {_key(row["config"]): row["numbers"] for row in rows}
    return [{**config, **numbers[_key(config)]} for config in wanted.grid]


def of_chapter(name: str) -> list[Experiment]:
    """The experiment of that name, or all of the chapter of that name."""
    return [find(known) for known in names() if known.partition(".")[0] == name] or [find(name)]


def run(wanted: Experiment, jobs: int = 1) -> None:
    """Compute the rows that are missing, `jobs` at a time. Each is stored at once: a stopped run keeps what it finished.

    Rows of another base model or of a configuration that left the grid are dropped. In the end the rows stand in the
    grid's order, so that a finished file is the same however often it was interrupted.
    """
    base = _base()
    _refuse_another_corpus()
    rows = {_key(row["config"]): row for row in _read(wanted, cut=True) if row["base"] == base}
    _write(wanted, rows)  # what still counts, in whole lines
    missing = [config for config in wanted.grid if _key(config) not in rows]
    start = monotonic()
    with _computed(wanted, missing, jobs) as results:
        for done, config in enumerate(missing):
            print(f"{bar(done, len(missing), monotonic() - start)} {json.dumps(config)}", file=sys.stderr, flush=True)
            numbers = {key: float(f"{value:.6g}") for key, value in next(results).items()}
            if shared := sorted(numbers.keys() & config.keys()):
                raise ValueError(f"{wanted.name} returns {shared[0]!r}, which is the name of a setting.")
            rows[_key(config)] = {"base": base, "config": config, "numbers": numbers}
            with wanted.path.open("a", encoding="utf-8") as file:
                file.write(_line(rows[_key(config)]))
    _write(wanted, rows)


@contextmanager
def _computed(wanted: Experiment, configs: Sequence[Config], jobs: int) -> Iterator[Iterator[Numbers]]:
    """The numbers of each configuration, in order; with several jobs, each in a process of its own."""
    if jobs == 1:
        yield map(wanted, configs)
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_leave_with_parent)
    try:
        yield pool.map(partial(_row, wanted.function.__module__, wanted.function.__name__), configs)
    finally:
        pool.shutdown(cancel_futures=True)


def _row(module: str, name: str, config: Config) -> Numbers:
    wanted: Experiment = getattr(import_module(module), name)  # its function hides behind it and cannot be pickled
    return wanted(config)


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever."""

    def leave() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    Thread(target=leave, daemon=True).start()


@dataclass(frozen=True)
class Tuned:
    """A setting at the learning rate that is best for it on the validation text, with its rows, one for each seed.

    `sweep` has the rows of every rate tried. `edge` says that the best is the first or the last of them: a better one
    may lie beyond.
    """

    rate: float
    rows: list[dict[str, Any]]
    sweep: dict[float, list[dict[str, Any]]]

    @property
    def edge(self) -> bool:
        return self.rate in (min(self.sweep), max(self.sweep))

    def mean(self, number: str) -> float:
        """Over the seeds."""
        return fmean(row[number] for row in self.rows)

    def spread(self, number: str) -> float:
        """The sample standard deviation over the seeds."""
        return stdev(row[number] for row in self.rows)


def tuned(rows: Sequence[Mapping[str, Any]], *by: str) -> dict[Any, Tuned]:
    """For every value of the settings `by` (a tuple where there are several) its best learning rate, by validation.

    What decides is the mean over the seeds. A rate at which a seed diverged loses.
    """
    sweeps: dict[Any, dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        key = row[by[0]] if len(by) == 1 else tuple(row[name] for name in by)
        sweeps.setdefault(key, {}).setdefault(row["rate"], []).append(dict(row))
    return {
        key: Tuned(rate := min(sweep, key=lambda rate: _loss(sweep[rate])), sweep[rate], dict(sorted(sweep.items())))
        for key, sweep in sweeps.items()
    }


def _loss(rows: Sequence[Mapping[str, Any]]) -> float:
    loss = fmean(row["validation"] for row in rows)
    return loss if isfinite(loss) else inf


def _chapters() -> list[str]:
    return [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name.startswith("chapter")]


def _read(wanted: Experiment, cut: bool = False) -> list[dict[str, Any]]:
    """The stored rows. With `cut`, a last line that was cut short by a kill is left out."""
    text = wanted.path.read_text(encoding="utf-8") if wanted.path.exists() else ""
    lines = text.splitlines()
    if cut and not text.endswith("\n"):
        lines = lines[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise ValueError(f"{wanted.path.name} is damaged; delete it and compute it again: {wanted.command}") from None


def _write(wanted: Experiment, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the rows whose configuration is in the grid, in its order; a crash leaves the old file whole."""
    part = wanted.path.with_suffix(".part")
    part.parent.mkdir(exist_ok=True)
    ordered = [rows[_key(config)] for config in wanted.grid if _key(config) in rows]
    part.write_text("".join(map(_line, ordered)), encoding="utf-8")
    os.replace(part, wanted.path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _key(config: Config) -> str:
    return json.dumps(config, sort_keys=True)


def _base() -> str:
    from lora_edu.lab.model import provenance

    return provenance()["sha256"][:16]


def _refuse_another_corpus() -> None:
    from lora_edu.lab.model import provenance

    for name, expected in provenance()["corpora"].items():
        if corpus.load(name).sha256 != expected:
            raise ValueError(f"{corpus.load(name).report()} Stored runs are computed on the whole text.")
