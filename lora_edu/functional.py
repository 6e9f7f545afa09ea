"""The formulas of LoRA as functions of tensors.

Shapes, everywhere: x (..., in), W (out, in), A (r, in), B (out, r), b (out,); s is the scale, alpha / r;
z = x A^T (..., r) is the bottleneck.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear


def lora_linear(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, b: Tensor | None = None) -> Tensor:
    """y = x W^T + b + s (x A^T) B^T, of shape (..., out).

    The (out, in) matrix B A is never formed. Where it may, it runs as one fused step that adds the update in place, so
    that the peak of memory is near the frozen layer's; otherwise, and the same up to rounding, `plain_lora_linear`.
    Either way x and z are kept for the backward pass; where A is frozen, z alone.

    Source: Hu et al. 2021, equation 3, with the scale of section 4.1.
    """
    if autocast(x):  # the casts that it would make, before a step that it does not know
        low = torch.get_autocast_dtype(x.device.type)
        x, W, A, B = (t if t.dtype == torch.float64 else t.to(low) for t in (x, W, A, B))
        b = None if b is None else b.to(x.dtype)
    if _may_fuse(x, W, A, B, b):
        return _fused(x, W, A, B, s, b, None)
    return plain_lora_linear(x, W, A, B, s, b)


def plain_lora_linear(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, b: Tensor | None = None) -> Tensor:
    """The same, as one writes it down; works under autocast, vmap and with a trainable W.

    Where the base has a lower precision than A and B, the update and the sum are computed in theirs and rounded once.
    """
    y = linear(x, W, b)
    return (y + s * linear(linear(cast_to(A, x), A), B)).to(y.dtype)


def cast_to(A: Tensor, x: Tensor) -> Tensor:
    """x in the dtype of A. Under autocast x itself: that casts both, and a low x that maps share is kept once."""
    return x if autocast(x) else x.to(A.dtype)


def autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def dora_linear(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, f: Tensor, b: Tensor | None = None) -> Tensor:
    """y = f (x W^T + s (x A^T) B^T) + b, with a factor f (out,) for every output; fused where `lora_linear` is.

    DoRA with f = m / |W + s B A|, m the trained magnitudes and the norm taken as a constant.

    Source: Liu et al. 2024 (arXiv 2402.09353), equations 5 and 11.
    """
    if _may_fuse(x, W, A, B, b) and f.dtype == x.dtype and not autocast(x):
        return _fused(x, W, A, B, s, b, f)
    y = f * plain_lora_linear(x, W, A, B, s)
    return y if b is None else y + b


def _fused(x: Tensor, *others: Any) -> Tensor:
    y: Tensor = _Fused.apply(x.reshape(-1, x.shape[-1]), *others)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


class _Fused(torch.autograd.Function):
    """y = f (x W^T + s (x A^T) B^T) + b for x (T, in), with W and b frozen; f (out,) may be None, for 1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, b: Tensor | None, f: Tensor | None
    ) -> Tensor:
        ctx.s, z = s, torch.mm(x, A.t())
        u: Any = _added(x, W, z, B, s, b if f is None else None)
        kept = (z, None if f is None else u)
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # checkpoints, offloads, counts
        ctx.save_for_backward(x, W, A, B, f, *(kept if hooked else ()))
        ctx.kept = None if hooked else kept  # may be let go early and written over
        return u if f is None else u * f if b is None else torch.addcmul(b, u, f)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if autocast(g):  # a backward pass inside its block: the dtypes are those of the forward pass
            with torch.autocast(g.device.type, enabled=False):
                return _Fused.backward(ctx, g)
        x, W, A, B, f, *saved = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        kept, ctx.kept = ctx.kept, None
        z, u = cast(Any, kept or saved or (None, None))
        own = kept is not None and not torch.is_grad_enabled() and not _batched(g)
        # Computed again for second derivatives, which stored ones would get wrong, and for a second backward pass.
        if z is None or torch.is_grad_enabled():
            z = torch.mm(x, A.t())
            u = None if f is None else _added(x, W, z, B, ctx.s)
        df = dB = None
        if f is not None:
            df = torch.mv((u.mul_(g) if own else g * u).t(), g.new_ones(len(g)))
            g = torch.mul(g, f, out=u) if own else g * f
        if needs_B:
            dB = _thin(g.t(), z).mul_(ctx.s)
        z = u = saved = kept = None  # freed before dz and dx are made: the peak is lower
        dz = _thin(g, B).mul_(ctx.s)  # (T, r): the gradient at the bottleneck
        dA = torch.mm(dz.t(), x) if needs_A else None
        dx = torch.mm(g, W).addmm_(dz, A) if needs_x else None
        return dx, None, dA, dB, None, None, df


def _added(x: Tensor, W: Tensor, z: Tensor, B: Tensor, s: float, b: Tensor | None = None) -> Tensor:
    return linear(x, W, b).addmm_(z, B.t(), alpha=s)


def _thin(a: Tensor, b: Tensor) -> Tensor:
    """a b. Of fewer than 16 columns it is a faster product the other way round, b^T a^T (measured, MKL)."""
    return torch.mm(a, b) if b.shape[1] >= 16 else torch.mm(b.t(), a.t()).t()


def _may_fuse(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor | None) -> bool:
    frozen = not (W.requires_grad or (b is not None and b.requires_grad))
    one_dtype = x.dtype == W.dtype == A.dtype == B.dtype and x.is_floating_point()
    keeps_x = A.requires_grad or not torch.is_grad_enabled()  # where A is frozen too, the plain formula keeps only z
    return frozen and one_dtype and keeps_x and not _transformed() and not x.is_nested


def _batched(g: Tensor) -> bool:
    """Whether g stands for many gradients at once."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(g) or torch._C._functorch.is_batchedtensor(g))


def _transformed() -> bool:
    """Whether something works on single operations: vmap and the like, forward mode, what counts or caches products."""
    return (
        torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def delta(A: Tensor, B: Tensor, s: float) -> Tensor:
    """s B A, of shape (out, in): what merging adds to W. Its rank is at most r."""
    return s * (B @ A)


def dora_norm(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """The length of every row of W + s B A, of shape (out,), without forming B A.

    |w + s b A|^2 = |w|^2 + 2 s (w A^T) . b + s^2 b (A A^T) . b for each row w (in,) of W and b (r,) of B: products
    with r columns, where the definition needs one of the size of W.

    Rows in which W and the update almost cancel are computed as the definition says. A row is an output, as in
    peft; the paper writes its norm over columns.

    Source: the norm of Liu et al. 2024 (arXiv 2402.09353), equation 5, multiplied out.
    """
    squares = torch.linalg.vector_norm(W, dim=1).square()
    total = squares + s * (torch.addmm(W @ A.t(), B, A @ A.t(), beta=2, alpha=s) * B).sum(1)
    near = total < 2e-3 * squares  # almost cancelled: the sum has lost its digits
    norm: Tensor = total.clamp_min(0).sqrt()
    if near.any():
        norm[near] = torch.linalg.vector_norm(W[near] + s * (B[near] @ A), dim=1)
    return norm


def accumulate(W: Tensor, update: Tensor) -> Tensor:
    """W + update, summed in float32 at least and rounded once, to the dtype of W.

    In bfloat16 the sum itself would round a small update away. Raises ValueError when the result is not finite.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    total = (W.to(wide) + update.to(wide)).to(W.dtype)
    if not torch.isfinite(total).all():
        raise ValueError("merging would put NaN or infinity into the weight; nothing was changed.")
    return total
