"""Chapter 04: what full fine-tuning, LoRA and the head alone give at many learning rates, and what they forget."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from lora_edu.config import LoRAConfig
from lora_edu.inject import add_lora, lora_layers
from lora_edu.lab import chapter02, corpus
from lora_edu.lab.chapter02 import Cut, matrices
from lora_edu.lab.model import GPT, TARGETS, bits_per_character, load_base
from lora_edu.lab.runs import Config, Numbers, experiment
from lora_edu.lab.training import Recipe, Run, train

SEEDS = (0, 1, 2)
RANKS = (1, 2, 4, 8, 16, 32, 64)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
RATES = {
    "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
    "head": (3e-3, 1e-2, 3e-2, 1e-1),
}


def prepare(method: str, r: int = 8, seed: int = 0) -> GPT:
    """The base model with what the method trains: "full" everything, "head" the last layer, "lora" rank r on TARGETS.

    LoRA has alpha = 2 r; the seed draws its A. Raises ValueError for another method.
    """
    if method not in RATES:
        raise ValueError(f"the method is one of {', '.join(RATES)}; got {method!r}.")
    model = load_base()
    if method == "head":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    if method == "lora":
        torch.manual_seed(seed)
        add_lora(model, LoRAConfig(TARGETS, r=r, lora_alpha=2 * r))
    return model


def fine_tune(config: Config) -> tuple[GPT, Run]:
    """The base model trained on Python code as a configuration says, and the run."""
    model = prepare(config["method"], config["r"], config["seed"])
    text = corpus.load("code")
    recipe = Recipe(steps=config["steps"], rate=config["rate"], seed=config["seed"])
    return model, train(model, text.train, recipe, text.validation)


def change(model: GPT) -> dict[str, torch.Tensor]:
    """What training has changed in each of the 24 projections: s B A under LoRA, W1 - W0 otherwise."""
    if layers := lora_layers(model):
        return {f"{path}.weight": layer.delta().detach() for path, layer in layers.items()}
    before = matrices(load_base())
    return {name: W.detach() - before[name].detach() for name, W in matrices(model).items()}


def quality(model: GPT, run: Run) -> Numbers:
    """Bits per character on code (validation and test) and on the manual (test), which the base model knows."""
    return {
        "validation": run.validation[-1][1],
        "code": bits_per_character(model, corpus.load("code").test),
        "manual": bits_per_character(model, corpus.load("manual").test),
    }


def measure(model: GPT, run: Run) -> Numbers:
    """`quality`, and how far the projections moved.

    change_norm is the mean over the 24 projections of |dW|_F / |W0|_F, change_top of the largest singular values.
    """
    before = matrices(load_base())
    moved = change(model)
    norms = [(moved[n].norm() / W.norm()).item() for n, W in before.items()]
    tops = [(torch.linalg.matrix_norm(moved[n], 2) / torch.linalg.matrix_norm(W, 2)).item() for n, W in before.items()]
    return {
        **quality(model, run),
        "change_norm": sum(norms) / len(norms),
        "change_top": sum(tops) / len(tops),
    }


def grid(**settings: Any) -> list[dict[str, Any]]:
    """Every combination of the settings; a setting is one value or a tuple of them."""
    values = [value if isinstance(value, tuple) else (value,) for value in settings.values()]
    return [dict(zip(settings, chosen, strict=True)) for chosen in product(*values)]


@experiment(
    [config for m, rates in RATES.items() for config in grid(method=m, r=8, steps=150, rate=rates, seed=SEEDS)]
    + grid(method="full", r=8, steps=(50, 300), rate=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), seed=SEEDS)
    + grid(method="lora", r=8, steps=(50, 300), rate=(1e-3, 3e-3, 1e-2, 3e-2), seed=SEEDS)
)
def methods(config: Config) -> Numbers:
    """Three methods at their learning rates, 150 steps; full fine-tuning and LoRA at 50 and 300 steps too."""
    return measure(*fine_tune(config))


@experiment(
    [
        config
        for r, rates in {
            1: (1e-2, 3e-2, 1e-1),
            2: (1e-2, 3e-2, 1e-1),
            4: (3e-3, 1e-2, 3e-2, 1e-1),
            16: (1e-3, 3e-3, 1e-2, 3e-2),
            32: (1e-3, 3e-3, 1e-2, 3e-2),
            64: (1e-3, 3e-3, 1e-2),
        }.items()
        for config in grid(method="lora", r=r, steps=150, rate=rates, seed=SEEDS)
    ]
)
def ranks(config: Config) -> Numbers:
    """LoRA at the ranks other than 8, which is in `methods`; small ranks want larger rates."""
    return measure(*fine_tune(config))


@experiment(grid(task="code", steps=150, rate=(3e-4, 1e-3, 3e-3, 1e-2), seed=SEEDS))
def cuts(config: Config) -> Numbers:
    """Full fine-tuning of the 24 projections that LoRA adapts; then the change of each cut to rank k: `code_k`."""
    model, run = chapter02.fine_tune(config)
    before = {name: W.detach().clone() for name, W in matrices(load_base()).items()}
    cut = {name: Cut(dW.double().numpy()) for name, dW in change(model).items()}
    numbers = measure(model, run)
    for k in RANKS:
        with torch.no_grad():
            for name, W in matrices(model).items():
                W.copy_(before[name] + torch.from_numpy(cut[name].rank(k)))
        numbers[f"code_{k}"] = bits_per_character(model, corpus.load("code").test)
    return numbers


@experiment(
    grid(method="full", r=8, steps=150, rate=(1e-3, 3e-3), seed=SEEDS)
    + grid(method="lora", r=8, steps=150, rate=1e-2, seed=SEEDS)
)
def scaled(config: Config) -> Numbers:
    """W0 + s dW for every trained tensor, on code and on the manual: `code_s` and `manual_s`."""
    model, _ = fine_tune(config)
    numbers: Numbers = {}
    for s in SCALES:
        between = rescale(model, s)
        numbers |= {f"{t}_{s:g}": bits_per_character(between, corpus.load(t).test) for t in ("code", "manual")}
    return numbers


@torch.no_grad()
def rescale(model: GPT, s: float) -> GPT:
    """A new model with W0 + s (W1 - W0) for every tensor that the fine-tuned `model` has changed; s B A under LoRA."""
    scaled = load_base()
    if lora_layers(model):
        for name, dW in change(model).items():
            scaled.get_parameter(name).add_(dW, alpha=s)
    else:
        for W, W1 in zip(scaled.parameters(), model.parameters(), strict=True):
            W.lerp_(W1, s)
    return scaled
