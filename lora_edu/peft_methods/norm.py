"""LayerNorm tuning."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_edu.peft_methods.base import Method


class Norm(Method):
    """y = g' (x - mean) / std + b' with g', b' (d,) of every norm free, the normalisation itself untouched.

    Norms are modules whose class is called ...LayerNorm or ...RMSNorm; the latter has no mean and no b.
    Parameters: `lora_edu.cost.norm_parameters`. It starts as the base, exactly. Raises ValueError for a model without.

    Source: Zhao et al. 2023, arXiv 2312.11420; peft's LN tuning.
    """

    mergeable = True
    why = "it trains the norms' own gains and biases, so there is nothing to put in."

    def selects(self, model: nn.Module) -> Iterable[str]:
        norms = [p for p, m in model.named_modules() if type(m).__name__.endswith(("LayerNorm", "RMSNorm"))]
        names = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in norms]
        if not names:
            raise ValueError("this model has no LayerNorm or RMSNorm with parameters to train.")
        return names
