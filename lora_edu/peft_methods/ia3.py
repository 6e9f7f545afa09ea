"""(IA)^3: a factor for every key, value and inner feature."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lora_edu.peft_methods.base import Method, Wrapped, linears


class IA3Linear(Wrapped):
    """y = l * (W x + b) with l (out,) trained; with `feedforward` y = W (l * x) + b with l (in,). l starts as ones."""

    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Linear, feedforward: bool) -> None:
        super().__init__(base_layer)
        self.feedforward = feedforward
        size = base_layer.in_features if feedforward else base_layer.out_features
        self.ia3_l = nn.Parameter(self.new(size) + 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.feedforward:
            return self.base_layer((self.ia3_l * x).to(x.dtype))
        y = self.base_layer(x)
        return (self.ia3_l * y).to(y.dtype)

    def folded(self) -> dict[str, Tensor]:
        W, b, l = self.base_layer.weight, self.base_layer.bias, self.ia3_l  # noqa: E741
        if self.feedforward:
            return {"weight": W * l}
        return {"weight": l[:, None] * W} | ({} if b is None else {"bias": l * b})


class IA3(Method):
    """Keys, values and the MLP's inner features, each times a learned factor: dW = (diag(l) - 1) W.

    dW has few parameters and is generically of full rank. `targets` are multiplied at their output, those also in
    `feedforward` at their input. Parameters: `lora_edu.cost.ia3_parameters`. It starts as the base, exactly.

    Source: Liu et al. 2022, arXiv 2205.05638; the targets are peft's.
    """

    mergeable = True
    why = "a factor for an output or an input is a factor for a row or a column of W."

    def __init__(
        self, targets: Sequence[str] = ("k_proj", "v_proj", "down_proj"), feedforward: Sequence[str] = ("down_proj",)
    ) -> None:
        if isinstance(targets, str) or isinstance(feedforward, str):
            raise TypeError(f"targets and feedforward are lists of names; got {targets!r} and {feedforward!r}.")
        if extra := [name for name in feedforward if name not in targets]:
            raise ValueError(f"feedforward must be among the targets; {extra[0]!r} is not.")
        self.targets, self.feedforward = list(targets), list(feedforward)

    def wraps(self, model: nn.Module) -> dict[str, Wrapped]:
        inner = linears(model, self.feedforward, "(IA)^3") if self.feedforward else {}
        return {path: IA3Linear(layer, path in inner) for path, layer in linears(model, self.targets, "(IA)^3").items()}
