"""BitFit: the biases."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_edu.peft_methods.base import Method


class BitFit(Method):
    """y = W x + b' with W frozen: every bias trains, those of the norms too.

    The bias of the keys has no effect: it adds the same to the score of every key, which softmax does not see. (With
    rotary positions, which turn each key by its place, it has one.)
    Parameters: `lora_edu.cost.bitfit_parameters`. It starts as the base, exactly. Raises ValueError for a model without
    biases, such as one of the Llama family.

    Source: Ben Zaken, Ravfogel and Goldberg 2021, arXiv 2106.10199.
    """

    mergeable = True
    why = "it trains the base's own biases, so there is nothing to put in."

    def selects(self, model: nn.Module) -> Iterable[str]:
        names = [name for name, _ in model.named_parameters() if "bias" in name.rpartition(".")[2]]
        if not names:
            raise ValueError("this model has no biases, so BitFit has nothing to train.")
        return names
