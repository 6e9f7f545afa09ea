"""AdaLoRA: one budget of ranks, given to the layers where the loss feels it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_edu.config import finite_alpha
from lora_edu.functional import accumulate
from lora_edu.lab.model import TARGETS
from lora_edu.peft_methods.allocation import Budget, Triplets
from lora_edu.peft_methods.base import Method, Wrapped, linears


class AdaLoRALinear(Wrapped, Triplets):
    """y = W x + b + s P (lambda * (Q x)): Q = lora_A (r, in), lambda = lora_E (r,), P = lora_B (out, r).

    s = lora_alpha / (r + 1e-5), as in peft, and stays when triplets go. P and Q start normal (0.02), lambda as zeros.
    """

    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer)
        self.scaling, self.score = lora_alpha / (r + 1e-5), {}
        self.lora_A = nn.Parameter(self.new(r, base_layer.in_features).normal_(std=0.02))
        self.lora_B = nn.Parameter(self.new(base_layer.out_features, r).normal_(std=0.02))
        self.lora_E = nn.Parameter(self.new(r))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=self.lora_E.device))

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.base_layer(x), self.lora_E * linear(x.to(self.lora_A.dtype), self.lora_A)
        return (y + self.scaling * linear(z, self.lora_B)).to(y.dtype)

    def folded(self) -> dict[str, Tensor]:
        update = self.scaling * (self.lora_B * self.lora_E) @ self.lora_A
        return {"weight": accumulate(self.base_layer.weight, update)}


class AdaLoRA(Method):
    """dW = s P diag(lambda) Q, and a budget that decides how many of the lambda may differ from 0, and where.

    After every optimizer step, before zero_grad, call `allocate(model, step)`. P and Q are to be near orthonormal: add
    a multiple of `orthogonality(model)` to the loss. peft 0.21 adds half of it where its model has a task_type, and
    without one adds nothing. `fields` are those of `Budget`.
    Parameters: init_r (in + out + 1) a layer, also of what is out. It starts as the base, exactly.

    Source: Zhang et al. 2023, arXiv 2303.10512, in peft's version.
    """

    mergeable = True
    why = "dW is a matrix of the shape of W, as in LoRA."

    def __init__(
        self, total_step: int, targets: str | Sequence[str] = TARGETS, lora_alpha: float = 24, **fields: Any
    ) -> None:
        self.targets, self.lora_alpha = targets, finite_alpha("lora_alpha", lora_alpha)
        self.budget = Budget(total_step, **fields)

    def wraps(self, model: nn.Module) -> dict[str, Wrapped]:
        layers = linears(model, self.targets, "AdaLoRA")
        return {path: AdaLoRALinear(layer, self.budget.init_r, self.lora_alpha) for path, layer in layers.items()}

    def allocate(self, model: nn.Module, step: int) -> None:
        """Set the lambda of what the budget of this step leaves out to 0. See `Budget.allocate`."""
        self.budget.allocate(list(self._layers(model).values()), step)

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """How many triplets each layer has, by path."""
        return {path: int(layer.kept.sum()) for path, layer in self._layers(model).items()}

    def orthogonality(self, model: nn.Module) -> Tensor:
        """The mean over all P and Q of |P^T P - 1|_F and |Q Q^T - 1|_F.  ()"""
        factors = [M for layer in self._layers(model).values() for M in (layer.lora_A, layer.lora_B.t())]
        return torch.stack([(M @ M.t() - torch.eye(len(M)).to(M)).norm() for M in factors]).mean()

    def _layers(self, model: nn.Module) -> dict[str, AdaLoRALinear]:
        self._state(model)
        return {path: layer for path, layer in model.named_modules() if isinstance(layer, AdaLoRALinear)}
