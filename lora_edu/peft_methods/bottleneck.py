"""The bottleneck adapter, the first of the family."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import gelu

from lora_edu.config import whole_rank
from lora_edu.peft_methods.base import Method, Wrapped, linears


class Adapted(Wrapped):
    """h = W x + b, then y = h + U GELU(D h + c) + e: D (r, d), c (r,) in `down`, U (d, r), e (d,) in `up`, zero at first."""

    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Linear, r: int) -> None:
        super().__init__(base_layer)
        d, like = base_layer.out_features, self.new(0)
        self.down = nn.Linear(d, r, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(r, d, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base_layer(x)
        return (h + self.up(gelu(self.down(h.to(self.up.weight.dtype))))).to(h.dtype)


class Bottleneck(Method):
    """d -> r -> d with a skip, in series after each half of a block: behind o_proj and down_proj, before the residual.

    Parameters: `lora_edu.cost.adapter_parameters`, 2 d r + r + d each. It starts as the base, exactly: U = 0, where
    the paper starts near the identity. The paper trains the LayerNorms and the head too (reported); here, as in the formula, the
    adapters alone.

    Source: Houlsby et al. 2019, arXiv 1902.00751, figure 2.
    """

    mergeable = False
    why = "a nonlinearity stands between U and D, so no W does the same, and every call pays for two more products."

    def __init__(self, r: int = 16, targets: str | Sequence[str] = ("o_proj", "down_proj")) -> None:
        self.r, self.targets = whole_rank("the width r", r), targets

    def wraps(self, model: nn.Module) -> dict[str, Wrapped]:
        return {path: Adapted(layer, self.r) for path, layer in linears(model, self.targets, "an adapter").items()}
