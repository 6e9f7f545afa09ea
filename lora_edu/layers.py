"""Layers that put a trainable low-rank update beside a frozen base layer.

Attributes carry peft's names (`base_layer`, `lora_A`, `lora_B`, `lora_dropout`, `scaling`, ...), so that what is
learned here is what one types at work, and an adapter file needs nothing but a prefix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from lora_edu.config import finite_alpha, probability, whole_rank
from lora_edu.functional import accumulate, autocast, cast_to, delta, dora_linear, dora_norm, lora_linear


class LoRALayer(nn.Module):
    """What the three layers share: the frozen base, the scale, merging, and being switched off.

    scaling = alpha / r, with use_rslora alpha / sqrt(r). `enabled` is False while the adapter is switched off.
    The base keeps its train or eval mode, and so does this layer.

    Raises TypeError for a base of another kind or a rank that is not an integer, ValueError for r < 1, an alpha
    that is not finite, a dropout outside [0, 1), or a base that `obstacle` names; the base layer is untouched then.
    """

    base_type: type[nn.Module]

    @classmethod
    def obstacle(cls, base_layer: nn.Module) -> str:
        """Why this base layer cannot carry a LoRA, as the rest of a sentence; empty when it can."""
        if type(base_layer).forward is not cls.base_type.forward:
            return f"has a forward of its own ({type(base_layer).__name__}), which its weight alone does not describe"
        weight = base_layer._parameters.get("weight")
        if weight is None or isinstance(weight, nn.UninitializedParameter):
            return "has no plain weight: it is computed (pruned, normalised) or not there yet"
        return "" if weight.is_floating_point() else f"has a weight of {weight.dtype}, which cannot be added to"

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        if not isinstance(base_layer, self.base_type):
            raise TypeError(
                f"{type(self).__name__} wraps an nn.{self.base_type.__name__}; got {type(base_layer).__name__}."
            )
        if reason := self.obstacle(base_layer):
            raise ValueError(f"this layer {reason}.")
        r, lora_alpha = whole_rank("the rank r", r), finite_alpha("lora_alpha", lora_alpha)
        lora_dropout = probability("lora_dropout", lora_dropout)
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.enabled = True
        self._unmerged: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, W."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        """Whether the update is inside W at present."""
        return self._unmerged is not None

    def _like_weight(self) -> dict[str, Any]:
        """Device and dtype of A and B: those of W, but float32 for a base in half precision, as in peft."""
        W = self.weight
        half = W.dtype in (torch.float16, torch.bfloat16)
        return {"device": W.device, "dtype": torch.float32 if half else W.dtype}

    def _plain(self) -> bool:
        """Whether forward is the base layer's alone. Refuses to train while merged: A and B would get no gradient."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "this layer is merged, so A and B cannot train: unmerge it, or call eval() or no_grad()."
            )
        return self.merged or not self.enabled

    def delta(self) -> Tensor:
        """What merging adds to W, of the shape of W."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """W with the update, summed in float32 at least. Raises ValueError when it is not finite."""
        return accumulate(self.weight, self.delta())

    @torch.no_grad()
    def merge(self, weight: Tensor | None = None) -> None:
        """W <- W + update. The size of W does not change; the extra products per call are gone.

        Keeps the old W, so that `unmerge` restores it bit for bit. Whoever shares W sees the change; `merge_lora` looks
        for such modules, this method does not. Raises RuntimeError when merged already and
        ValueError when the result is not finite; W is untouched then. `weight` is `merged_weight()`, if at hand.
        """
        if self.merged:
            raise RuntimeError("this layer is merged already; merging again would add the update twice.")
        weight = self.merged_weight() if weight is None else weight
        self._unmerged = self.weight.detach().clone()
        self.weight.copy_(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the W from before `merge` back, bit for bit. Raises RuntimeError when not merged."""
        if self._unmerged is None:
            raise RuntimeError("this layer is not merged; there is nothing to take out.")
        self.weight.copy_(self._unmerged)
        self._unmerged = None

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}, merged={self.merged}"


class LoRALinear(LoRALayer):
    """y = W x + b + s B A dropout(x), with W and b frozen and only A and B trainable.

    Shapes: x (..., in), W (out, in), A = lora_A.weight (r, in), B = lora_B.weight (out, r); s = alpha / r.
    Trainable parameters: r (in + out), with DoRA out more.

    At the start A is uniform in +-1 / sqrt(in) and B is zero, so the layer computes exactly what `base_layer`
    does. Dropout acts on the input of A, in training only, and never on the frozen path.

    With use_dora, y = (m / |W + s B A|) (W x + s B A x) + b, where m = lora_magnitude_vector (out,) is trained and
    starts as the length of every row of W; the norm, of every row, counts as a constant in the backward pass. It starts
    as the base up to rounding. As in peft, its dropout also touches what m changes of W x. A row of zeros has no
    direction and is refused.

    Source: Hu et al. 2021, section 4.1; the start is that of loralib and peft (Kaiming uniform with a = sqrt 5),
    where the paper says Gaussian. DoRA: Liu et al. 2024, equation 5 and section 4.3.
    """

    base_type = nn.Linear
    base_layer: nn.Linear

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        if use_dora and isinstance(base_layer, nn.Linear) and (reason := self.no_direction(base_layer)):
            raise ValueError(f"this layer {reason}.")
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)
        like = self._like_weight()
        # Drawn in this order, one seed gives peft's start.
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False, **like)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False, **like)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.lora_magnitude_vector: nn.Parameter | None = None
        if use_dora:
            self.lora_magnitude_vector = nn.Parameter(self._norm())
        self.train(base_layer.training)

    @staticmethod
    def no_direction(base_layer: nn.Linear) -> str:
        """Why DoRA cannot start from this layer, as the rest of a sentence; empty when it can."""
        zeros = (base_layer.weight == 0).all(1).nonzero().flatten()
        return f"has a row of zeros (row {zeros[0]}), which has no direction for DoRA" if len(zeros) else ""

    def forward(self, x: Tensor) -> Tensor:
        if self._plain():
            return self.base_layer(x)
        if self.lora_magnitude_vector is not None:
            return self._dora(x, self.lora_magnitude_vector)
        W, A, B, s, b = self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling, self.base_layer.bias
        dropped = self.lora_dropout(x)
        if dropped is x and not self._watched():
            return lora_linear(x, W, A, B, s, b)
        y = self.base_layer(x)
        return (y + s * self.lora_B(self.lora_A(cast_to(A, dropped)))).to(y.dtype)

    def _dora(self, x: Tensor, m: Tensor) -> Tensor:
        W, A, B, s, b = self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling, self.base_layer.bias
        factor = m / self._norm()
        dropped = self.lora_dropout(x)
        if dropped is x and x.dtype == A.dtype and not autocast(x) and not self._watched():
            return dora_linear(x, W, A, B, s, factor, b)
        # In the dtype of A, rounded once: in bfloat16 the factor itself would be rounded to 1.
        y = self.base_layer(x)
        again = dropped is not x or y.dtype != A.dtype  # otherwise W x is y without the bias: no second product
        through = F.linear(dropped, W).to(A.dtype) if again else y if b is None else y - b
        update = s * self.lora_B(self.lora_A(cast_to(A, dropped)))
        return (y + (factor - 1) * through + factor * update).to(y.dtype)

    def _watched(self) -> bool:
        """Whether calling a part does more than its formula; the fused products never call it."""
        return bool(_has_any_global_hook()) or any(  # type: ignore[no-untyped-call]
            part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
            or "forward" in part.__dict__
            for part in (self.base_layer, self.lora_A, self.lora_B)
        )

    def _norm(self) -> Tensor:
        A = self.lora_A.weight
        with torch.no_grad():
            return dora_norm(self.weight.to(A.dtype), A, self.lora_B.weight, self.scaling)

    def delta(self) -> Tensor:
        """s B A (out, in); with DoRA what brings W to (m / |W + s B A|) (W + s B A)."""
        update = delta(self.lora_A.weight, self.lora_B.weight, self.scaling)
        if self.lora_magnitude_vector is None:
            return update
        W = self.weight.to(update.dtype)
        return (self.lora_magnitude_vector / self._norm())[:, None] * (W + update) - W


class LoRAEmbedding(LoRALayer):
    """y = W[ids] + s (B A)^T[ids]: row i of the table gets s B A[:, i].

    Shapes: ids of integers (...), W (num, dim), A = lora_embedding_A (r, num), B = lora_embedding_B (dim, r).
    At the start A is zero and B normal, the other way round than in a linear layer, as in loralib and peft.

    Raises ValueError for an embedding with max_norm, which rewrites W while it is read.
    """

    base_type = nn.Embedding
    base_layer: nn.Embedding

    @classmethod
    def obstacle(cls, base_layer: nn.Module) -> str:
        if getattr(base_layer, "max_norm", None) is not None:
            return "has a max_norm, so it rewrites its weight while it is read"
        return super().obstacle(base_layer)

    def __init__(self, base_layer: nn.Embedding, r: int, lora_alpha: float, use_rslora: bool = False) -> None:
        super().__init__(base_layer, r, lora_alpha, use_rslora=use_rslora)
        like = self._like_weight()
        # Drawn twice, as in peft, so that one seed gives its start.
        self.lora_embedding_A = nn.Parameter(torch.randn(r, base_layer.num_embeddings, **like))
        self.lora_embedding_B = nn.Parameter(torch.randn(base_layer.embedding_dim, r, **like))
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)
        self.train(base_layer.training)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.base_layer(ids)
        if self._plain():
            return y
        base = self.base_layer
        z = F.embedding(ids, self.lora_embedding_A.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        return (y + self.scaling * F.linear(z, self.lora_embedding_B)).to(y.dtype)

    def delta(self) -> Tensor:
        """s (B A)^T, of shape (num, dim)."""
        return delta(self.lora_embedding_A, self.lora_embedding_B, self.scaling).t()


class LoRAConv2d(LoRALayer):
    """y = conv(x, W) + b + s conv_1x1(conv(dropout(x), A), B), with stride, padding and dilation of the base.

    Shapes: W (out, in, h, w), A = lora_A.weight (r, in, h, w), B = lora_B.weight (out, r, 1, 1). The update of W is
    sum over k of B[:, k] A[k], whatever the dilation and the kind of padding. The start is that of a linear layer.

    Raises ValueError for groups > 1: the 1x1 convolution would mix the groups, and W has no place for that.
    """

    base_type = nn.Conv2d
    base_layer: nn.Conv2d

    @classmethod
    def obstacle(cls, base_layer: nn.Module) -> str:
        if (groups := getattr(base_layer, "groups", 1)) != 1:
            return f"is a convolution with groups={groups}; groups must be 1"
        return super().obstacle(base_layer)

    def __init__(
        self, base_layer: nn.Conv2d, r: int, lora_alpha: float, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)
        like, c = self._like_weight(), base_layer
        self.lora_A = nn.Conv2d(
            *(c.in_channels, r, c.kernel_size, c.stride, c.padding, c.dilation),  # type: ignore[arg-type]
            bias=False,
            padding_mode=c.padding_mode,
            **like,
        )
        self.lora_B = nn.Conv2d(r, c.out_channels, 1, bias=False, **like)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self._plain():
            return y
        x = cast_to(self.lora_A.weight, self.lora_dropout(x))
        return (y + self.scaling * self.lora_B(self.lora_A(x))).to(y.dtype)

    def delta(self) -> Tensor:
        """s sum_k B[:, k] A[k], of shape (out, in, h, w)."""
        return self.scaling * torch.einsum("ok,kihw->oihw", self.lora_B.weight[:, :, 0, 0], self.lora_A.weight)
