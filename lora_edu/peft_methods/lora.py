"""LoRA, rsLoRA, DoRA and LoRA+, all of them `lora_edu.add_lora` with one thing changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from lora_edu.config import LoRAConfig, finite_alpha
from lora_edu.inject import add_lora, lora_parameters, merge_lora, remove_lora
from lora_edu.lab.model import TARGETS
from lora_edu.peft_methods.base import Method, refuse_second


class LoRA(Method):
    """dW = s B A, s = alpha / r: see `lora_edu.LoRALinear`. It starts as the base, exactly.

    `lora_alpha` is 2 r unless given; more fields of `LoRAConfig` may follow. Parameters: `lora_edu.cost.lora_parameters`.
    """

    mergeable = True
    why = "dW = s B A is a matrix of the shape of W."
    variant: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, targets: str | Sequence[str] = TARGETS, r: int = 8, lora_alpha: float | None = None, **fields: Any
    ) -> None:
        self.config = LoRAConfig(targets, r, 2 * r if lora_alpha is None else lora_alpha, **{**self.variant, **fields})

    def apply(self, model: nn.Module) -> nn.Module:
        refuse_second(model)
        return add_lora(model, self.config)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in lora_parameters(model).items() if p.requires_grad}

    def merge(self, model: nn.Module) -> nn.Module:
        """As `lora_edu.merge_lora`: the layers stay, so that `lora_edu.unmerge_lora` can take the update out."""
        return merge_lora(model)

    def remove(self, model: nn.Module) -> nn.Module:
        return remove_lora(model)


class RsLoRA(LoRA):
    """LoRA with s = alpha / sqrt(r), under which the update does not shrink as r grows. Kalajdzievski 2023."""

    variant: ClassVar[dict[str, Any]] = {"use_rslora": True}


class DoRA(LoRA):
    """W' = m (W + s B A) / |W + s B A|, row by row, m (out,) trained. It starts as the base up to rounding.

    Parameters: `lora_edu.cost.dora_parameters`. Source: Liu et al. 2024, arXiv 2402.09353.
    """

    why = "W' is a matrix of the shape of W."
    variant: ClassVar[dict[str, Any]] = {"use_dora": True}


def loraplus_groups(model: nn.Module, lr: float, ratio: float = 16) -> list[dict[str, Any]]:
    """Groups for an optimizer: B, and every vector, at ratio lr; A, and what else trains, at lr. No weight decay.

    As peft's create_loraplus_optimizer, but that a LoRA on an embedding is no exception here: peft gives it 1e-6.
    Raises RuntimeError for a model without LoRA, ValueError for lr <= 0 or a ratio below 1.

    Source: Hayou, Ghosh and Yu 2024, arXiv 2402.12354.
    """
    if finite_alpha("lr", lr) < 0 or finite_alpha("ratio", ratio) < 1:
        raise ValueError(f"lr must be above 0 and ratio at least 1; got {lr} and {ratio}.")
    training = {name: p for name, p in lora_parameters(model).items() if p.requires_grad}
    fast = [name for name, p in training.items() if "lora_B" in name or p.dim() == 1]
    slow = [name for name in training if name not in fast]
    return [
        {"params": [training[name] for name in names], "lr": rate, "weight_decay": 0.0}
        for names, rate in ((slow, lr), (fast, lr * ratio))
    ]
