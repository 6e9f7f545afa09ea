"""The laboratory's training loop: whatever requires a gradient learns to predict the next character of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora_edu.lab import corpus
from lora_edu.lab.model import bits_per_character, last_start, windows_at
from lora_edu.lab.progress import track


@dataclass(frozen=True)
class Recipe:
    """How to train: `steps` batches of `batch` random windows of 64 characters.

    The learning rate rises linearly to `rate` over the share `warmup` of the steps and falls to 0 along a cosine.
    `clip` bounds the norm of the gradient. `seed` decides the batches and nothing else: what a model starts from is
    the caller's, `torch.manual_seed` before an adapter is made.
    """

    steps: int = 300
    rate: float = 1e-3
    batch: int = 16
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1; got {self.steps} and {self.batch}.")
        if not self.rate > 0 or not 0 <= self.warmup <= 1:
            raise ValueError(f"rate must be above 0 and warmup a share; got {self.rate} and {self.warmup}.")

    def scale(self, step: int) -> float:
        """The learning rate of a step, from 0 on, as a share of `rate`."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising))) / 2


@dataclass(frozen=True)
class Run:
    """What a training gave, all in bits per character.

    losses       of each step's batch, before the step
    validation   (steps done, bits per character) along the way; the last pair is of the trained model
    """

    recipe: Recipe
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Choice:
    """One run for every learning rate tried, and the run whose model was best on the validation text."""

    best: Run
    runs: tuple[Run, ...]


def adamw(model: nn.Module, recipe: Recipe) -> Optimizer:
    """AdamW over the parameters that require a gradient; weight decay on matrices alone."""
    training = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in training if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in training if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=recipe.rate, fused=True)


def descend(
    model: nn.Module,
    recipe: Recipe,
    loss: Callable[[torch.Generator], torch.Tensor],
    optimizer: Callable[[nn.Module, Recipe], Optimizer] = adamw,
) -> Iterator[tuple[int, float]]:
    """Train whatever of `model` requires a gradient, in place; after each step yield its number, from 1, and the loss.

    `loss` draws a batch from the generator, which `recipe.seed` has set, and returns the loss before the step.
    """
    batches = torch.Generator().manual_seed(recipe.seed)
    descent = optimizer(model, recipe)
    schedule = LambdaLR(descent, recipe.scale)
    for step in track(range(1, recipe.steps + 1), recipe.steps):
        value = loss(batches)
        descent.zero_grad()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_((p for group in descent.param_groups for p in group["params"]), recipe.clip)
        descent.step()
        schedule.step()
        yield step, value.item()


def train(
    model: nn.Module,
    text: str,
    recipe: Recipe,
    validation: str = "",
    every: int = 0,
    optimizer: Callable[[nn.Module, Recipe], Optimizer] = adamw,
) -> Run:
    """Train `model` in place on `text` and return the run.

    Exactly the parameters with `requires_grad` change. `validation` is measured after every `every` steps (0: never)
    and at the end. The model, any that maps ids (n, t) to logits (n, t, V), is given back in the mode in which it came.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train.")
    starts = last_start(text) + 1
    if validation:
        last_start(validation)
    ids = torch.as_tensor(corpus.encode(text))
    losses, measured, mode = [], [], model.training

    def loss(batches: torch.Generator) -> torch.Tensor:
        batch = windows_at(ids, torch.randint(starts, (recipe.batch,), generator=batches))
        return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    model.train()
    try:
        for step, value in descend(model, recipe, loss, optimizer):
            losses.append(value / math.log(2))
            if validation and (step == recipe.steps or (every and step % every == 0)):
                measured.append((step, bits_per_character(model, validation)))
    finally:
        model.train(mode)
    return Run(recipe, tuple(losses), tuple(measured))


def choose_rate(
    fresh: Callable[[], nn.Module],
    rates: Sequence[float],
    text: str,
    validation: str,
    recipe: Recipe,
    optimizer: Callable[[nn.Module, Recipe], Optimizer] = adamw,
) -> Choice:
    """Train `fresh()` once for every learning rate and choose by the validation text; no test text is involved.

    A rate that diverges loses. When the best is the first or the last of `rates`, a better one may lie beyond.
    """
    if not rates or not validation:
        raise ValueError("choose_rate wants at least one learning rate, and a validation text to choose by.")
    runs = tuple(train(fresh(), text, replace(recipe, rate=rate), validation, optimizer=optimizer) for rate in rates)
    return Choice(min(runs, key=lambda run: _or_infinity(run.validation[-1][1])), runs)


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf
