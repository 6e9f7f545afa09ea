"""python -m tests.benchmarks.gpu: a step of the layer against peft's on a CUDA device, in time and in peak of memory.

Printed, and stored in results_gpu.md. Each round runs both sides, in alternating order, and gives one ratio; the table
shows the median of the ratios. A whole model on a GPU is in lora_edu/lab/at_scale.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
from torch import nn

from lora_edu.lab.at_scale import milliseconds
from tests.benchmarks.__main__ import pair, step

RESULTS = Path(__file__).with_name("results_gpu.md")


def rounds_of(sides: dict[str, Callable[[], object]], rounds: int = 21) -> dict[str, list[float]]:
    """The time of every side in every round; a round runs each side once, in alternating order."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 3):
        for name in list(sides) if turn % 2 else reversed(sides):
            found[name].append(milliseconds(sides[name]))
    return {name: times[3:] for name, times in found.items()}  # the first rounds warm up


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def peak(once: Callable[[], object]) -> int:
    """Bytes allocated at the highest point of `once`, above what was there before it."""
    once()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def layer_rows() -> Iterator[str]:
    d = 4096
    for dtype in (torch.float32, torch.bfloat16):
        like = {"device": "cuda", "dtype": dtype}
        for tokens in (512, 4096):
            for r in (8, 64):
                x, g = torch.randn(tokens, d, requires_grad=True, **like), torch.randn(tokens, d, **like)
                frozen = step(nn.Linear(d, d, **like).requires_grad_(False), x, g)
                for dora in (False, True):
                    ours, theirs = (step(layer, x, g) for layer in pair(d, r, dora, **like))
                    spent = rounds_of({"ours": ours, "peft": theirs})
                    name, what = "DoRA" if dora else "LoRA", f"d {d}, {tokens} tokens, r {r}, {str(dtype)[6:]}"
                    yield f"{name} step, {what} | peft | {ratio(spent['ours'], spent['peft']):.2f} | "
                    x.grad = None
                    above = peak(frozen)
                    yield f"peak of it | frozen layer | {peak(ours) / above:.2f} | peft {peak(theirs) / above:.2f}"


def main() -> None:
    torch.manual_seed(0)
    versions = f"torch {torch.__version__.partition('+')[0]}, peft {peft.__version__}"
    lines = [f"{torch.cuda.get_device_name()}, {versions}.", ""]
    lines += ["| what | against | ratio | |", "| --- | --- | --- | --- |"]
    print("\n".join(lines), flush=True)
    for row in layer_rows():
        lines.append(f"| {row} |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
