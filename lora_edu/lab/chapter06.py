"""Chapter 06: every method on one task, each at several learning rates."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_edu import cost
from lora_edu.inject import parameter_report
from lora_edu.lab import chapter04, chapter05, corpus
from lora_edu.lab.chapter04 import SEEDS, grid
from lora_edu.lab.chapter05 import BASIC
from lora_edu.lab.model import GPT, TARGETS, load_base, shape
from lora_edu.lab.runs import Config, Numbers, Tuned, experiment, load, tuned
from lora_edu.lab.training import Recipe, Run, adamw, train
from lora_edu.peft_methods import METHODS, AdaLoRA, Method, VeRA

STEPS = 150
ORTHOGONAL = 0.1  # weight of AdaLoRA's second term of the loss; its gradient is added after the clipping
# The name of each method's size; 0 where it has none.
SIZE = {"lora": "r", "dora": "r", "bottleneck": "r", "prompt": "tokens", "prefix": "tokens"}
RATES = {
    ("norm", 0): (3e-2, 1e-1, 3e-1),
    ("bitfit", 0): (3e-2, 1e-1, 3e-1),
    ("ia3", 0): (1e-1, 3e-1, 1.0),
    ("prompt", 10): (1e-1, 3e-1, 1.0),
    ("prompt", 64): (3e-2, 1e-1, 3e-1),
    ("prefix", 9): (1e-1, 3e-1, 1.0),
    ("prefix", 64): (1e-1, 3e-1, 1.0),
    ("bottleneck", 4): (1e-2, 3e-2, 1e-1),
    ("bottleneck", 35): (3e-3, 1e-2, 3e-2, 1e-1),
    ("vera", 192): (3e-2, 1e-1, 3e-1, 1.0),
    ("dora", 8): (3e-3, 1e-2, 3e-2),
    ("adalora", 8): (1e-2, 3e-2, 1e-1),
}


def method(config: Config) -> Method:
    """The method of a configuration, with its size. AdaLoRA starts with 12 triplets a map and keeps 8 on average."""
    if config["method"] == "adalora":
        return AdaLoRA(
            config["steps"], init_r=12, target_r=config["size"], tinit=config["steps"] // 5, tfinal=config["steps"] // 3
        )
    if config["method"] == "vera":
        return VeRA(r=config["size"], seed=config["seed"])
    size: dict[str, Any] = {SIZE[config["method"]]: config["size"]} if config["size"] else {}
    return METHODS[config["method"]](**size)


def fine_tune(config: Config) -> tuple[GPT, Run, Method]:
    """The base model trained on Python code with a method, the run, and the method."""
    model, chosen = load_base(), method(config)
    torch.manual_seed(config["seed"])
    chosen.apply(model)
    text = corpus.load("code")
    recipe = Recipe(steps=config["steps"], rate=config["rate"], seed=config["seed"])

    def allocating(model: nn.Module, recipe: Recipe) -> Optimizer:
        optimizer, step = adamw(model, recipe), iter(range(recipe.steps))
        if isinstance(chosen, AdaLoRA):
            weight = config.get("orthogonal", ORTHOGONAL)
            optimizer.register_step_pre_hook(lambda *_: torch.autograd.backward(weight * chosen.orthogonality(model)))
            optimizer.register_step_post_hook(lambda *_: chosen.allocate(model, next(step)))
        return optimizer

    return model, train(model, text.train, recipe, text.validation, optimizer=allocating), chosen


@experiment(
    [
        config
        for (name, size), rates in RATES.items()
        for config in grid(method=name, size=size, steps=STEPS, rate=rates, seed=SEEDS)
    ]
)
def methods(config: Config) -> Numbers:
    """Every method that chapter 04 does not have; full fine-tuning, LoRA and the head are in `chapter04.methods`.

    `trained` counts what trains; AdaLoRA's rows add the mean rank left on each kind of map, rank_q_proj to rank_down_proj.
    """
    model, run, chosen = fine_tune(config)
    numbers: Numbers = {"trained": parameter_report(model).trainable, **chapter04.quality(model, run)}
    if isinstance(chosen, AdaLoRA):
        ranks = chosen.ranks(model)
        for name in TARGETS:
            numbers[f"rank_{name}"] = mean(rank for path, rank in ranks.items() if path.endswith(name))
    return numbers


@experiment(
    grid(
        **{**BASIC, "r": 1, "alpha": 2, "on": ("mlp", "down"), "steps": STEPS},
        rate=(1e-2, 3e-2, 1e-1, 3e-1),
        seed=SEEDS,
    )
)
def few(config: Config) -> Numbers:
    """LoRA with fewer numbers than rank 1 on all maps has: on the two maps of the MLP, and on its last alone."""
    return chapter05.measure(config)


@experiment(grid(method="adalora", size=8, steps=STEPS, orthogonal=0.0, rate=(1e-2, 3e-2, 1e-1), seed=SEEDS))
def orthogonality(config: Config) -> Numbers:
    """AdaLoRA without the term that drives P and Q towards orthogonal."""
    return methods(config)


@experiment(grid(method="full", r=8, steps=STEPS, rate=(6e-4, 1.7e-3), seed=SEEDS))
def frontier(config: Config) -> Numbers:
    """Full fine-tuning between the rates of `chapter04.methods`."""
    return chapter04.measure(*chapter04.fine_tune(config))


def family() -> dict[tuple[str, int | str], Tuned]:
    """Every method at 150 steps, at its best rate: `methods`, `few`, and full fine-tuning, LoRA and the head of chapter 04.

    The key is (method, size); the size of `few` is "1 on mlp" or "1 on down".
    """
    rows = []
    counts = {"full": cost.parameters(shape()), "head": shape().hidden * shape().vocab}
    for row in load("chapter04.methods") + load("chapter04.ranks"):
        if row["steps"] == STEPS:
            size = row["r"] if row["method"] == "lora" else 0
            trained = cost.lora_parameters(shape(), size) if size else counts[row["method"]]
            rows.append({**row, "size": size, "trained": trained})
    for row in load("chapter06.few"):
        trained = cost.lora_parameters(shape(), row["r"], chapter05.ON[row["on"]])
        rows.append({**row, "method": "lora", "size": f"1 on {row['on']}", "trained": trained})
    return tuned(rows + load("chapter06.methods"), "method", "size")
