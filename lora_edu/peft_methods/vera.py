"""VeRA: one random pair for all layers, two vectors for each."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_edu.config import finite_alpha, whole_rank
from lora_edu.functional import accumulate
from lora_edu.lab.model import TARGETS
from lora_edu.peft_methods.base import Method, Wrapped, linears


class VeRALinear(Wrapped):
    """y = W x + b + b' * (B (d' * (A x))), with A (r, in), B (out, r) frozen and only d' (r,), b' (out,) trained.

    d' = vera_lambda_d starts as `d_initial`, b' = vera_lambda_b as zeros.
    """

    base_layer: nn.Linear
    A: Tensor
    B: Tensor

    def __init__(self, base_layer: nn.Linear, A: Tensor, B: Tensor, d_initial: float) -> None:
        super().__init__(base_layer)
        self.vera_lambda_d = nn.Parameter(self.new(len(A)) + d_initial)
        self.vera_lambda_b = nn.Parameter(self.new(len(B)))
        self.register_buffer("A", A.to(self.vera_lambda_d), persistent=False)  # a seed draws them again
        self.register_buffer("B", B.to(self.vera_lambda_d), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.base_layer(x), self.vera_lambda_d * linear(x.to(self.A.dtype), self.A)
        return (y + self.vera_lambda_b * linear(z, self.B)).to(y.dtype)

    def folded(self) -> dict[str, Tensor]:
        update = (self.vera_lambda_b[:, None] * self.B) @ (self.vera_lambda_d[:, None] * self.A)
        return {"weight": accumulate(self.base_layer.weight, update)}


class VeRA(Method):
    """dW = diag(b') B diag(d') A, where one random pair, of the largest sizes, is cut to the size of every layer.

    Parameters: `lora_edu.cost.vera_parameters`, out + r a layer. A and B are drawn from `seed` as peft draws them, Kaiming
    uniform with gain sqrt 2, and are memory, not parameters. It starts as the base, exactly.

    Source: Kopiczko, Blankevoort and Asano 2023, arXiv 2310.11454.
    """

    mergeable = True
    why = "dW is a matrix of the shape of W, as in LoRA."

    def __init__(
        self, targets: str | Sequence[str] = TARGETS, r: int = 64, d_initial: float = 0.1, seed: int = 0
    ) -> None:
        self.targets, self.r, self.seed = targets, whole_rank("the rank r", r), index(seed)
        self.d_initial = finite_alpha("d_initial", d_initial)

    def wraps(self, model: nn.Module) -> dict[str, Wrapped]:
        layers = linears(model, self.targets, "VeRA")
        A = torch.empty(self.r, max(layer.in_features for layer in layers.values()))
        B = torch.empty(max(layer.out_features for layer in layers.values()), self.r)
        generator = torch.Generator().manual_seed(self.seed)
        for M in (A, B):
            nn.init.kaiming_uniform_(M, generator=generator)
        return {
            path: VeRALinear(layer, A[:, : layer.in_features], B[: layer.out_features], self.d_initial)
            for path, layer in layers.items()
        }
