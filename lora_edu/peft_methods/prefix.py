"""Prefix tuning: learned keys and values in every block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_edu.lab.model import Attention
from lora_edu.peft_methods.base import Method, Wrapped
from lora_edu.peft_methods.prompt import few, random_text


class PrefixedAttention(Wrapped):
    """softmax(q [K_p; K]^T / sqrt(d / h)) [V_p; V] in every head: `keys` and `values` (h, p, d / h) are trained.

    Every character sees the whole prefix, and of the text itself and what came before.
    """

    base_layer: Attention

    def __init__(self, base_layer: Attention, keys: Tensor, values: Tensor) -> None:
        super().__init__(base_layer)
        self.keys = nn.Parameter(self.new(*keys.shape) + keys)
        self.values = nn.Parameter(self.new(*values.shape) + values)

    def forward(self, x: Tensor) -> Tensor:
        attn, n = self.base_layer, len(x)
        q, k, v = (attn.split(project(x)) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
        k = torch.cat([self.keys.to(k.dtype).expand(n, -1, -1, -1), k], 2)
        v = torch.cat([self.values.to(v.dtype).expand(n, -1, -1, -1), v], 2)
        return attn.attend(q, k, v)


class Prefix(Method):
    """p learned pairs of key and value in front of the text's, in every block's attention.

    A prompt whose every layer is free. It starts as what the blocks compute for p random characters: as the prompt that
    the same characters make, and so, like it, not as the base. The paper trains the prefix through an MLP that is
    dropped later (reported); here, as in peft by default, it trains directly.
    Positions: the text keeps its own, from 0 on; a key has none to add. peft moves the text by p, unless it is given
    position_ids that start at -p. No logits belong to the prefix, so that there is nothing to mask.
    Parameters: `lora_edu.cost.prefix_parameters`. Raises ValueError for a model without the laboratory's Attention.

    Source: Li and Liang 2021, arXiv 2101.00190.
    """

    mergeable = False
    why = "it is p more keys and values in every attention, not another weight, and every call attends to them."

    def __init__(self, tokens: int = 10) -> None:
        self.tokens = few("tokens", tokens)

    def wraps(self, model: nn.Module) -> dict[str, Wrapped]:
        attentions = {path: m for path, m in model.named_modules() if isinstance(m, Attention)}
        if not attentions:
            raise ValueError(f"a {type(model).__name__} has no lora_edu.lab.model.Attention, in which a prefix goes.")
        inputs: dict[nn.Module, Tensor] = {}
        hooks = [
            attn.register_forward_pre_hook(lambda attn, args: inputs.__setitem__(attn, args[0]))
            for attn in attentions.values()
        ]
        try:
            with torch.no_grad():
                model(random_text(model, self.tokens))
                pairs = {
                    path: [attn.split(proj(inputs[attn]))[0] for proj in (attn.k_proj, attn.v_proj)]
                    for path, attn in attentions.items()
                }
        finally:
            for hook in hooks:
                hook.remove()
        return {path: PrefixedAttention(attentions[path], *pair) for path, pair in pairs.items()}
