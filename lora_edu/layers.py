"""Layers that put a trainable low-rank update beside a frozen base layer.

Attributes carry peft's names (`base_layer`, `lora_A`, `lora_B`, `lora_dropout`, `scaling`), so that what is
learned here is what one types at work.
"""

from __future__ import annotations

import math
from operator import index

import torch
from torch import Tensor, nn

from lora_edu.functional import accumulate, delta, lora_linear


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x), with W and b frozen and only A and B trainable.

    Shapes: x (..., in), W (out, in), A = lora_A.weight (r, in), B = lora_B.weight (out, r).
    Trainable parameters: r (in + out).

    At the start A is uniform in +-1 / sqrt(in) and B is zero, so the layer computes exactly what `base_layer`
    does. Dropout acts on the input of A, in training only, and never on the frozen path.

    Raises TypeError for a base layer that is not `nn.Linear` or a rank that is not an integer, ValueError for
    r < 1 or a dropout outside [0, 1); the base layer is untouched then.

    Source: Hu et al. 2021, section 4.1; the start is that of loralib and peft (Kaiming uniform with a = sqrt 5),
    where the paper says Gaussian.
    """

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> None:
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"LoRALinear wraps an nn.Linear; got {type(base_layer).__name__}.")
        try:
            index(r)
        except TypeError:
            raise TypeError(f"the rank r must be an integer; got {r!r}.") from None
        if r < 1:
            raise ValueError(f"the rank r must be at least 1; got {r}.")
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha must be finite; got {lora_alpha}.")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is a probability: 0 <= lora_dropout < 1; got {lora_dropout}.")
        super().__init__()
        W = base_layer.weight
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False, device=W.device, dtype=W.dtype)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False, device=W.device, dtype=W.dtype)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self._unmerged: Tensor | None = None
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base_layer.training)

    @property
    def merged(self) -> bool:
        """Whether the update is inside W at present."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        if isinstance(self.lora_dropout, nn.Identity):
            return lora_linear(
                x,
                self.base_layer.weight,
                self.lora_A.weight,
                self.lora_B.weight,
                self.scaling,
                self.base_layer.bias,
            )
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(self.lora_dropout(x)))

    def delta(self) -> Tensor:
        """(alpha / r) B A, of shape (out, in)."""
        return delta(self.lora_A.weight, self.lora_B.weight, self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + (alpha / r) B A. The size of W does not change; the two extra products per call are gone.

        Keeps the old W, so that `unmerge` restores it bit for bit. Raises RuntimeError when merged already and
        ValueError when the result is not finite; W is untouched then.
        """
        if self.merged:
            raise RuntimeError("this layer is merged already; merging again would add the update twice.")
        merged = accumulate(self.base_layer.weight, self.delta())
        self._unmerged = self.base_layer.weight.detach().clone()
        self.base_layer.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the W from before `merge` back, bit for bit. Raises RuntimeError when not merged."""
        if self._unmerged is None:
            raise RuntimeError("this layer is not merged; there is nothing to take out.")
        self.base_layer.weight.copy_(self._unmerged)
        self._unmerged = None

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, merged={self.merged}"
