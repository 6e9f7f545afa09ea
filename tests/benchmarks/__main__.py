"""python -m tests.benchmarks: speed against the reference implementations, printed and stored in results.md.

One process, one thread, processor time. Each round runs both sides, in alternating order, and gives one ratio;
the table shows the median of the ratios, below 1 when ours is faster. Never asserted: machines are noisy.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.utils.extmath import randomized_svd as sklearns

from lora_edu import lowrank

RESULTS = Path(__file__).with_name("results.md")
Row = tuple[str, str, float, str]


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 11) -> float:
    """Median over rounds of time(ours) / time(theirs); the first round warms up and does not count."""
    found = []
    for turn in range(rounds + 1):
        spent = {}
        for side in (ours, theirs) if turn % 2 else (theirs, ours):
            start = time.process_time()
            side()
            spent[side] = time.process_time() - start
        found.append(spent[ours] / spent[theirs])
    return statistics.median(found[1:])


def svd_rows() -> list[Row]:
    rows = []
    for name, spectrum in [("1/i", 1 / np.arange(1, 2001)), ("exp(-i/100)", np.exp(-np.arange(2000) / 100))]:
        P, Q = (np.linalg.qr(np.random.default_rng(seed).standard_normal((2000, 2000))).Q for seed in (0, 1))
        M = P * spectrum @ Q.T
        tail = lowrank.tail_norm(spectrum, 50)

        def above(U: np.ndarray, s: np.ndarray, Vt: np.ndarray, M: np.ndarray = M, tail: float = tail) -> float:
            return float(np.linalg.norm(M - U * s @ Vt)) / tail

        for steps in (2, 3):

            def ours(M: np.ndarray = M, steps: int = steps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
                return lowrank.randomized_svd(M, 50, power_iterations=steps)

            def theirs(M: np.ndarray = M, steps: int = steps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
                return sklearns(M, 50, n_iter=steps, random_state=0)

            note = f"error {above(*ours()):.4f} and {above(*theirs()):.4f} times the optimum"
            what = f"randomised SVD, 2000 x 2000, rank 50, spectrum {name}, {steps} power iterations"
            rows.append((what, "scikit-learn", ratio(ours, theirs), note))
    return rows


def import_row() -> Row:
    def importing(statement: str) -> float:
        code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    core = "from lora_edu import LoRALinear, lora_linear"
    found = [importing(core) / importing("import torch") for _ in range(7)]
    return "import of the LoRA core", "import torch", statistics.median(found), ""


def main() -> None:
    lines = ["| what | against | ratio (median) | |", "| --- | --- | --- | --- |"]
    for what, against, value, note in [*svd_rows(), import_row()]:
        lines.append(f"| {what} | {against} | {value:.2f} | {note} |")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
