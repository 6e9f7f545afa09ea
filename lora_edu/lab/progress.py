"""How far a long loop is: a line on stderr where somebody watches, and nothing anywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


def watched() -> bool:
    """Whether stderr is a terminal; LORA_EDU_PROGRESS=1 says so for a live notebook, =0 denies it.

    A notebook that is executed to be stored or compared has neither: no output contains a progress bar.
    """
    return os.environ.get("LORA_EDU_PROGRESS", str(int(sys.stderr.isatty()))) == "1"


def bar(done: int, total: int, seconds: float) -> str:
    """What is done after so many seconds, and what is left."""
    left = f", {seconds * (total - done) / done:.0f} s left" if done else ""
    return f"[{'#' * (30 * done // total):<30}] {done} of {total}{left}"


def track(items: Iterable[T], total: int) -> Iterator[T]:
    """The items of a loop. Once it is clear that all of it takes over ten seconds, a line says what is done and left."""
    show, start, drawn = watched(), monotonic(), 0.0
    try:
        for done, item in enumerate(items):
            now = monotonic()
            if show and done and (now - start) * total / done > 10 and now - drawn > 0.5:
                drawn = now
                print(f"\r{bar(done, total, now - start):<79}", end="", file=sys.stderr, flush=True)
            yield item
    finally:
        if drawn:
            print(f"\r{'':79}\r", end="", file=sys.stderr, flush=True)
