"""AdaLoRA's budget: how many triplets there are at a step, and which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_edu.config import probability, whole_rank


class Triplets(nn.Module):
    """What the allocation needs of a layer with dW = s P diag(lambda) Q, of r triplets.

    Q = lora_A (r, in), P = lora_B (out, r), lambda = lora_E (r,); `kept` (r,) says which triplets are in; `score` holds,
    of every number of Q, P and lambda, the smoothed sensitivity S and its uncertainty U.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_E: nn.Parameter
    kept: Tensor
    score: dict[str, tuple[Tensor, Tensor]]

    def watch(self, beta1: float, beta2: float) -> None:
        """I = |w dL/dw|;  S <- beta1 S + (1 - beta1) I;  U <- beta2 U + (1 - beta2) |I - S|."""
        for name in ("lora_A", "lora_B", "lora_E"):
            w = getattr(self, name)
            S, U = self.score.get(name, (torch.zeros_like(w), torch.zeros_like(w)))
            I = (w * w.grad).abs()  # noqa: E741
            S = beta1 * S + (1 - beta1) * I
            self.score[name] = S, beta2 * U + (1 - beta2) * (I - S).abs()

    def importance(self) -> Tensor:
        """S U of lambda, plus the mean of S U over the triplet's row of Q and over its column of P.  (r,)"""
        Q, P, E = (S * U for S, U in (self.score[name] for name in ("lora_A", "lora_B", "lora_E")))
        return E + (Q.mean(1) + P.mean(0))


@dataclass(frozen=True)
class Budget:
    """`init_r` triplets a layer up to step `tinit`, `target_r` from step total_step - tfinal on.

    In between it falls as the cube of the share of steps that is left, and every `deltaT` steps the least important
    triplets of all layers together get lambda = 0. A lambda of 0 has a gradient and may come back, until the end of
    that phase; what is out then stays out.

    Raises TypeError or ValueError, naming the field, for values that cannot be meant.
    Source: Zhang et al. 2023, arXiv 2303.10512; the arithmetic, with its ties, is that of peft's RankAllocator.
    """

    total_step: int
    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        for name in ("total_step", "init_r", "target_r", "deltaT"):
            whole_rank(name, getattr(self, name))
        probability("beta1", self.beta1), probability("beta2", self.beta2)
        if self.target_r > self.init_r:
            raise ValueError(f"target_r must not exceed init_r; got {self.target_r} and {self.init_r}.")
        if self.tinit < 0 or self.tfinal < 0 or self.tinit + self.tfinal >= self.total_step:
            raise ValueError(f"tinit + tfinal must be below total_step; got {self.tinit} + {self.tfinal}.")

    def triplets(self, step: int, layers: int) -> int:
        """The budget of all `layers` together at a step."""
        falling = self.total_step - self.tfinal - self.tinit
        left = 1 - min(max(step - self.tinit, 0), falling) / falling
        return int(layers * (self.init_r - self.target_r) * left**3 + layers * self.target_r)

    @torch.no_grad()
    def allocate(self, layers: Sequence[Triplets], step: int) -> None:
        """Score the triplets by the gradients at hand and, where it is time, choose."""
        last = self.total_step - self.tfinal
        chosen = step == last or (step < last and step % self.deltaT == 0)  # up to tinit it chooses all
        if step < last:
            if any(p.grad is None for m in layers for p in (m.lora_A, m.lora_B, m.lora_E)):
                raise RuntimeError("there is no gradient: call allocate after backward() and before zero_grad().")
            for layer in layers:
                layer.watch(self.beta1, self.beta2)
        elif chosen and not all(layer.score for layer in layers):
            raise RuntimeError("there are no scores yet: call allocate at every step.")
        if chosen:
            scores = torch.cat([layer.importance() for layer in layers])
            out = len(scores) - self.triplets(step, len(layers))
            threshold = scores.kthvalue(out).values if out else -1
            for layer in layers:
                layer.kept = layer.importance() > threshold
        if chosen or step > last:
            for layer in layers:
                layer.lora_E.masked_fill_(~layer.kept, 0)
