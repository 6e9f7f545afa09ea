"""Full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_edu.peft_methods.base import Method


class Full(Method):
    """W' = W + dW with dW (out, in) free: every parameter trains. What the others are compared with.

    It starts as the base, exactly. To be removable it keeps a copy of the whole base.
    """

    mergeable = True
    why = "it trains the base's own weights, so there is nothing to put in."

    def selects(self, model: nn.Module) -> Iterable[str]:
        return [name for name, p in model.named_parameters() if p.is_floating_point()]
