"""The last layer only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lora_edu.config import LoRAConfig
from lora_edu.inject import _targets
from lora_edu.peft_methods.base import Method, refuse_shared


class Head(Method):
    """logits = W h with W (V, d) free and h (..., d) frozen: a linear classifier on the base's features.

    `names` says which modules are the head. Parameters of the course's model: V d. It starts as the base, exactly.
    Raises ValueError for a head tied to the embedding, which would train too.
    """

    mergeable = True
    why = "it trains the base's own last layer, so there is nothing to put in."

    def __init__(self, names: Sequence[str] = ("head",)) -> None:
        self.config = LoRAConfig(names)

    def selects(self, model: nn.Module) -> Iterable[str]:
        paths = _targets(model, self.config)
        names = [f"{path}.{name}" for path, head in paths.items() for name, _ in head.named_parameters()]
        if not names:
            raise ValueError(f"{', '.join(paths)}: there is no parameter to train.")
        refuse_shared(model, names, "training the head would train the other too")
        return names
