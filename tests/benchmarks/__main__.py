"""python -m tests.benchmarks [svd import linear dora memory]: speed against the reference implementations.

Printed, and stored in results.md when all are run. One process, one thread, processor time. Each round runs both
sides, in alternating order, and gives one ratio; the table shows the median of the ratios, below 1 when ours is
faster. Never asserted: machines are noisy.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", KINETO_LOG_LEVEL="99")

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from sklearn.utils.extmath import randomized_svd as sklearns
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lora_edu import LoRALinear, lowrank

RESULTS = Path(__file__).with_name("results.md")
Row = tuple[str, str, float, str]


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 11, at_least: float = 0.05) -> float:
    """Median over rounds of time(ours) / time(theirs); each side runs as often as fills `at_least` seconds."""
    start = time.process_time()
    theirs(), ours()
    repeats = 1 + int(2 * at_least / (time.process_time() - start))
    found = []
    for turn in range(rounds + 1):
        spent = {}
        for side in (ours, theirs) if turn % 2 else (theirs, ours):
            start = time.process_time()
            for _ in range(repeats):
                side()
            spent[side] = time.process_time() - start
        found.append(spent[ours] / spent[theirs])
    return statistics.median(found[1:])  # the first round warms up


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


def pair(d: int, r: int, dora: bool = False, **like: Any) -> tuple[nn.Module, nn.Module]:
    """Our layer and peft's on one shared square base of width d, with the same factors, in the dtype of the base."""
    base = nn.Linear(d, d, **like)
    ours = LoRALinear(base, r, 2 * r, use_dora=dora).to(base.weight.dtype)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], use_dora=dora)
    theirs = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    nn.init.normal_(ours.lora_B.weight, std=0.02)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A.weight)
        theirs.lora_B["default"].weight.copy_(ours.lora_B.weight)
    return ours, theirs


def step(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, the gradient of x included, no optimizer."""

    def once() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(g)

    return once


def step_rows(dora: bool) -> list[Row]:
    rows = []
    for d in (768, 2048):
        for tokens in (64, 512, 2048):
            for r in (4, 8, 64):
                x, g = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
                ours, theirs = pair(d, r, dora)
                torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
                what = f"{'DoRA' if dora else 'LoRA'} step, d {d}, {tokens} tokens, r {r}"
                rows.append((what, "peft", ratio(step(ours, x, g), step(theirs, x, g)), ""))
                gc.collect()
    return rows


def peak(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> float:
    """Bytes allocated at the highest point of one step, above what was there before it."""
    once = step(layer, x, g)
    once()
    x.grad = None
    layer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        once()
    changes = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())])
    return float(held.max())


def memory_rows() -> list[Row]:
    rows = []
    for d, tokens, r in ((768, 512, 8), (768, 2048, 8), (768, 2048, 64), (2048, 512, 8), (2048, 2048, 64)):
        x, g = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
        frozen = peak(nn.Linear(d, d).requires_grad_(False), x, g)
        ours, theirs = (peak(layer, x, g) for layer in pair(d, r))
        rows.append(
            (
                f"peak of a LoRA step, d {d}, {tokens} tokens, r {r}",
                "frozen layer",
                ours / frozen,
                f"peft {theirs / frozen:.2f}",
            )
        )
    return rows


PARTS: dict[str, Callable[[], list[Row]]] = {
    "svd": svd_rows,
    "import": lambda: [import_row()],
    "linear": lambda: step_rows(False),
    "dora": lambda: step_rows(True),
    "memory": memory_rows,
}


def main(names: list[str]) -> None:
    if unknown := set(names) - PARTS.keys():
        sys.exit(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [f"torch {torch.__version__.partition('+')[0]}, peft {peft.__version__}, one thread.", ""]
    lines += ["| what | against | ratio (median) | |", "| --- | --- | --- | --- |"]
    print("\n".join(lines), flush=True)
    for name in names or PARTS:
        found = [f"| {what} | {against} | {value:.2f} | {note} |" for what, against, value, note in PARTS[name]()]
        print("\n".join(found), flush=True)
        lines += found
    if not names:
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
