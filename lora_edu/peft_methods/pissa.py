"""PiSSA: a LoRA that starts with the principal part of W."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_edu.adapters import combine
from lora_edu.config import LoRAConfig
from lora_edu.functional import accumulate
from lora_edu.inject import _state, add_lora, lora_layers, remove_lora
from lora_edu.lab.model import TARGETS
from lora_edu.layers import LoRALayer
from lora_edu.lowrank import balanced_factors
from lora_edu.peft_methods.base import linears, refuse_second, refuse_shared
from lora_edu.peft_methods.lora import LoRA


class PiSSA(LoRA):
    """LoRA that starts with s B A = W_r, the best rank-r part of W, and keeps W_res = W - W_r as its frozen base.

    From W_r = U diag(S) V^T: B = U sqrt(S / s), A = sqrt(S / s) V^T. It starts as the base up to rounding. W is
    remembered, so that `remove` and `lora_edu.disabled` give it bit for bit; that costs a copy of the adapted weights.

    A file with A and B alone is for W_res: on W it would add W_r a second time. `convert` makes a LoRA for W of it.
    Saved without, the file holds W_res too, the size of the adapted weights; peft opens it, `load_adapter` refuses it.
    Raises ValueError for r > min(out, in), lora_alpha < 0, and a weight that another module shares.

    Source: Meng, Wang and Zhang 2024, arXiv 2404.02948.
    """

    def __init__(self, targets: str | Sequence[str] = TARGETS, r: int = 8, lora_alpha: float | None = None) -> None:
        super().__init__(targets, r, lora_alpha)
        if self.config.lora_alpha < 0:
            raise ValueError(f"PiSSA divides by the root of lora_alpha, which must be above 0; got {lora_alpha}.")

    def apply(self, model: nn.Module) -> nn.Module:
        refuse_second(model)
        layers = linears(model, self.config.target_modules, "PiSSA")
        refuse_shared(model, [f"{path}.weight" for path in layers], "the residual would change both")
        r, s = self.config.r, self.config.lora_alpha / self.config.r
        starts = {path: principal(layer.weight, r, s) for path, layer in layers.items()}
        super().apply(model)
        state, loras = _state(model)
        with torch.no_grad():
            for path, lora in loras.items():
                state.originals[f"{path}.base_layer.weight"] = lora.weight.clone()
                _put(lora, starts[path])
                lora.weight.copy_(accumulate(lora.weight, -lora.delta()))
        return model

    def convert(self, model: nn.Module) -> nn.Module:
        """Make it a LoRA of rank 2 r on W, as which it can be saved: s B A - s B_0 A_0 = [s B, -s B_0] [A; A_0].

        Raises RuntimeError when the model has no PiSSA.
        """
        state, loras = _state(model)
        if any(f"{path}.base_layer.weight" not in state.originals for path in loras):
            raise RuntimeError("this model has a LoRA that is no PiSSA; it needs no conversion.")
        factors = {}
        for path, lora in loras.items():
            start = principal(state.originals[f"{path}.base_layer.weight"], lora.r, lora.scaling)
            factors[path] = combine([_pair(lora), start], [lora.scaling, -lora.scaling])
        remove_lora(model)
        rank = 2 * self.config.r
        add_lora(model, LoRAConfig("|".join(map(re.escape, factors)), rank, rank))
        for path, lora in lora_layers(model).items():
            _put(lora, factors[path])
        return model


def principal(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s B A = W_r, both with the same singular values."""
    B, A = balanced_factors(W.detach().double().cpu().numpy(), r)
    return torch.from_numpy(A / s**0.5).to(W.device), torch.from_numpy(B / s**0.5).to(W.device)


def _pair(lora: LoRALayer) -> tuple[Tensor, Tensor]:
    return lora.lora_A.weight.detach(), lora.lora_B.weight.detach()  # type: ignore[union-attr, operator]


def _put(lora: LoRALayer, pair: tuple[Tensor, Tensor]) -> None:
    for factor, value in zip(_pair(lora), pair, strict=True):
        factor.copy_(value)
