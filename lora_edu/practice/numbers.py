"""The numbers of the bank's compute questions: printed ones without a generator, new ones with one.

Each function returns the fields that the question's text names. Answers are computed, never typed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_edu import cost, lowrank

Rng = np.random.Generator | None


def break_even(rng: Rng) -> dict[str, Any]:
    m, n = (4096, 11008) if rng is None else (int(x) for x in 64 * rng.integers(8, 256, 2))
    return {
        "m": m,
        "n": n,
        "r": lowrank.break_even_rank(m, n),
        "bound": m * n / (m + n),
        "smaller": min(m, n),
    }


def truncation_errors(rng: Rng) -> dict[str, Any]:
    s = np.array([10, 5, 2, 1]) if rng is None else np.sort(rng.choice(np.arange(1, 20), 4, replace=False))[::-1]
    kept = lowrank.energy(s)
    return {
        "s": ", ".join(map(str, s)),
        "spectrum": s,
        "relative": lowrank.tail_norm(s, 2) / lowrank.tail_norm(s, 0),
        "kept": kept[1],
        "spectral": s[2],
        "k99": int(np.argmax(kept >= 0.99)) + 1,
        "sum_share": s[:2].sum() / s.sum(),
    }


def lora_count(rng: Rng) -> dict[str, Any]:
    d_in, d_out, r = (
        (4096, 4096, 16) if rng is None else (int(x) for x in (*(64 * rng.integers(8, 200, 2)), rng.integers(1, 65)))
    )
    count = r * (d_in + d_out)
    return {
        "d_in": d_in,
        "d_out": d_out,
        "r": r,
        "count": count,
        "dense": d_in * d_out,
        "share": count / (d_in * d_out),
    }


def projections(rng: Rng) -> dict[str, Any]:
    layers, d, r = (
        (128, 4096, 8)
        if rng is None
        else (int(x) for x in (4 * rng.integers(4, 40), 64 * rng.integers(8, 128), 2 ** rng.integers(0, 7)))
    )
    base, trained = layers * d * d, layers * 2 * r * d
    return {
        "layers": layers,
        "d": d,
        "r": r,
        "base": base,
        "trained": trained,
        "during": base + trained,
        "share": trained / (base + trained),
    }


def training_memory(rng: Rng) -> dict[str, Any]:
    billions, millions = (7, 40) if rng is None else (int(rng.integers(1, 80)), 10 * int(rng.integers(1, 40)))
    recipes = {"bf16": "full, bf16", "moments": "full, bf16, fp32 Adam", "mixed": "full, mixed"}
    lora = cost.training_memory("LoRA, bf16 base", billions * 1e9, millions * 1e6)
    return {
        "billions": billions,
        "millions": millions,
        **{name: cost.training_memory(recipe, billions * 1e9).total / 1e9 for name, recipe in recipes.items()},
        "lora": lora.total / 1e9,
        "frozen": 2 * billions,
    }
