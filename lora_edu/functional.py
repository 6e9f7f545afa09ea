"""The formulas of LoRA as functions of tensors.

Shapes, everywhere: x (..., in), W (out, in), A (r, in), B (out, r), b (out,); s is the scale, alpha / r.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def lora_linear(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, b: Tensor | None = None) -> Tensor:
    """y = x W^T + b + s (x A^T) B^T, of shape (..., out).

    The bottleneck z = x A^T has r numbers per token; the (out, in) matrix B A is never formed.

    Source: Hu et al. 2021, equation 3, with the scale of section 4.1.
    """
    return linear(x, W, b) + s * linear(linear(x, A), B)


def delta(A: Tensor, B: Tensor, s: float) -> Tensor:
    """s B A, of shape (out, in): what merging adds to W. Its rank is at most r."""
    return s * (B @ A)


def accumulate(W: Tensor, update: Tensor) -> Tensor:
    """W + update, summed in float32 at least and rounded once, to the dtype of W.

    In bfloat16 the sum itself would round a small update away. Raises ValueError when the result is not finite.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    total = (W.to(wide) + update.to(wide)).to(W.dtype)
    if not torch.isfinite(total).all():
        raise ValueError("merging would put NaN or infinity into the weight; nothing was changed.")
    return total
