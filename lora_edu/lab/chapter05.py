"""Chapter 05: what the knobs of LoRA and its variants change, each at several learning rates."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lora_edu.lab import corpus
from lora_edu.lab.chapter04 import SEEDS, grid, quality
from lora_edu.lab.model import GPT, TARGETS, load_base
from lora_edu.lab.runs import Config, Numbers, experiment
from lora_edu.lab.training import Recipe, Run, train
from lora_edu.peft_methods import LoRA, PiSSA, RsLoRA, loraplus_groups

ON = {
    "q, v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("up_proj", "down_proj"),
    "down": ("down_proj",),
    "all": TARGETS,
}
KINDS = {"lora": LoRA, "rslora": RsLoRA, "pissa": PiSSA}
BASIC = {"kind": "lora", "r": 8, "alpha": 16, "on": "all", "optimizer": "adamw", "ratio": 1, "steps": 80}


def fine_tune(config: Config) -> tuple[GPT, Run]:
    """The base model with an adapter, trained on Python code as a configuration says, and the run.

    kind, r, alpha, on   the variant, a key of KINDS, its rank and alpha, and where it sits, a key of ON
    optimizer            "adamw", or "sgd" without momentum and without clipping
    ratio                LoRA+: the learning rate of B over that of A
    """
    model = load_base()
    torch.manual_seed(config["seed"])
    KINDS[config["kind"]](ON[config["on"]], r=config["r"], lora_alpha=config["alpha"]).apply(model)
    text, plain = corpus.load("code"), config["optimizer"] == "sgd"
    recipe = Recipe(config["steps"], config["rate"], clip=math.inf if plain else 1.0, seed=config["seed"])

    def optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
        groups = loraplus_groups(model, recipe.rate, config["ratio"])
        return SGD(groups) if plain else AdamW(groups, fused=True)

    return model, train(model, text.train, recipe, text.validation, optimizer=optimizer)


def measure(config: Config) -> Numbers:
    """`chapter04.quality` of one run."""
    return quality(*fine_tune(config))


@experiment(
    grid(**{**BASIC, "alpha": (1, 4, 16, 64, 256)}, rate=(1e-3, 3e-3, 1e-2, 3e-2), seed=SEEDS)
    + grid(**{**BASIC, "alpha": (1, 4)}, rate=1e-1, seed=SEEDS)
    + grid(**{**BASIC, "alpha": 16}, rate=(5.5e-3, 1.7e-2), seed=SEEDS)  # half steps beside the best
    + grid(**{**BASIC, "alpha": 64}, rate=5.5e-3, seed=SEEDS)
    + grid(**{**BASIC, "alpha": 256}, rate=1.7e-3, seed=SEEDS)
)
def alphas(config: Config) -> Numbers:
    """Alpha against the learning rate of AdamW, at rank 8."""
    return measure(config)


@experiment(
    [
        config
        for alpha, rates in {4: (0.4, 1.2, 4.0), 16: (0.075, 0.25, 0.75), 64: (0.0156, 0.047, 0.156, 0.47)}.items()
        for config in grid(**{**BASIC, "alpha": alpha, "optimizer": "sgd"}, rate=rates, seed=SEEDS)
    ]
)
def sgd(config: Config) -> Numbers:
    """Alpha against the learning rate of SGD, at rank 8."""
    return measure(config)


@experiment(
    grid(**{**BASIC, "r": (4, 16, 64)}, rate=(3e-3, 1e-2, 3e-2), seed=SEEDS)
    + grid(**{**BASIC, "kind": "rslora", "r": (4, 16, 64)}, rate=(1e-3, 3e-3, 1e-2), seed=SEEDS)
    + grid(**{**BASIC, "r": (16, 64)}, rate=(5.5e-3, 1.7e-2), seed=SEEDS)
    + grid(**{**BASIC, "r": 4}, rate=1.7e-2, seed=SEEDS)
    + grid(**{**BASIC, "kind": "rslora", "r": 4}, rate=1.7e-2, seed=SEEDS)
    + grid(**{**BASIC, "kind": "rslora", "r": 16}, rate=(5.5e-3, 1.7e-2), seed=SEEDS)
    + grid(**{**BASIC, "kind": "rslora", "r": 64}, rate=(1.7e-3, 5.5e-3), seed=SEEDS)
)
def scalings(config: Config) -> Numbers:
    """alpha / r against alpha / sqrt(r), with alpha = 16 at every rank."""
    return measure(config)


@experiment(
    grid(**{**BASIC, "ratio": 16}, rate=(3e-4, 1e-3, 1.7e-3, 3e-3, 1e-2), seed=SEEDS)
    + grid(**{**BASIC, "kind": "pissa", "alpha": 8}, rate=(1e-3, 3e-3, 5.5e-3, 1e-2, 1.7e-2, 3e-2), seed=SEEDS)
)
def variants(config: Config) -> Numbers:
    """LoRA+ and PiSSA at rank 8; plain LoRA is in `alphas`, DoRA, VeRA and AdaLoRA in `chapter06.methods`."""
    return measure(config)


@experiment(
    [
        config
        for on, r in (("q, v", 36), ("attention", 18), ("mlp", 14), ("q, v", 8))
        for config in grid(
            **{**BASIC, "on": on, "r": r, "alpha": 2 * r, "steps": 150}, rate=(3e-3, 1e-2, 3e-2), seed=SEEDS
        )
    ]
)
def targets(config: Config) -> Numbers:
    """Where the adapters sit, at about the 73,728 numbers of rank 8 on all maps; and q and v at rank 8.

    Rank 8 on all maps, of the same steps and alpha, is in `chapter04.methods`.
    """
    return measure(config)


@experiment(
    [
        config
        for alpha, rates in {4: (1e-2, 3e-2), 16: (1e-2, 3e-2), 64: (3e-3, 1e-2)}.items()
        for config in grid(
            **{**BASIC, "r": (2, 8, 32), "alpha": alpha, "on": ("q, v", "mlp", "all"), "steps": 40},
            rate=rates,
            seed=SEEDS,
        )
    ]
)
def explorer(config: Config) -> Numbers:
    """Rank, alpha and targets together, in short runs."""
    return measure(config)
