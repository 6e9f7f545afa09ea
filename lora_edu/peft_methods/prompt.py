"""Prompt tuning: learned vectors before the text."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.config import whole_rank
from lora_edu.lab.model import CONTEXT
from lora_edu.peft_methods.base import Method


class Prompt(Method):
    """logits = decode([P, embed(ids)]) without its first p rows, with P = model.prompt (p, d) trained.

    Labels: a virtual token has none. Its logits are cut off, so ids (n, t) still give logits (n, t, V), and a loss over
    them is over real tokens only. The last virtual token would predict the first character, on which peft's loss counts
    unless that label is -100.

    Positions: the text keeps its own, from 0 on, and P is added to none, because the course's table of positions ends
    with its window of 64. In peft the virtual tokens take the positions 0 to p - 1 and the text moves by p, which is this
    with a table that has p rows of zeros in front. Attention sees p + t tokens either way.

    P starts as `embed` of p random characters. So it does not start as the base: what is attended to takes weight from
    the rest, and no finite vector has weight 0. Parameters: `lora_edu.cost.prompt_parameters`.
    Raises ValueError for a model that is not `decode(embed(ids))`, with these two methods.

    Source: Lester, Al-Rfou and Constant 2021, arXiv 2104.08691.
    """

    mergeable = False
    why = "it is p more inputs, not another weight, and every call attends to them."

    def __init__(self, tokens: int = 10) -> None:
        self.tokens = few("tokens", tokens)

    def apply(self, model: nn.Module) -> nn.Module:
        if not (hasattr(model, "embed") and hasattr(model, "decode")):
            raise ValueError(f"a {type(model).__name__} has no embed and decode, between which the prompt enters.")
        with torch.no_grad():
            P = model.embed(random_text(model, self.tokens))[0]  # type: ignore[operator]
        super().apply(model)
        model.prompt = nn.Parameter(P.float() if P.dtype in (torch.float16, torch.bfloat16) else P)
        # On the instance, so that the model keeps its class; a copy of the model gets a forward of its own.
        model.__dict__["forward"] = MethodType(prompted, model)
        return model

    def remove(self, model: nn.Module) -> nn.Module:
        self._state(model)
        del model.__dict__["forward"], model.prompt
        return super().remove(model)


def prompted(model: Any, ids: Tensor) -> Tensor:
    """The forward of a model with a prompt.  (n, t) -> (n, t, V)"""
    x = model.embed(ids)
    P = model.prompt.to(x.dtype).expand(len(x), -1, -1)
    return model.decode(torch.cat([P, x], 1))[:, P.shape[1] :]


def few(name: str, tokens: int) -> int:
    """A number of virtual tokens. They start as a text, so that there are no more than the model's window holds."""
    if whole_rank(name, tokens) > CONTEXT:
        raise ValueError(f"{name} must be at most {CONTEXT}, the model's window; got {tokens}.")
    return tokens


def random_text(model: nn.Module, tokens: int) -> Tensor:
    """Random characters of the model's vocabulary, drawn from torch's generator.  (1, tokens)"""
    table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise ValueError(f"a {type(model).__name__} has no nn.Embedding, as which virtual tokens start.")
    return torch.randint(table.num_embeddings, (1, tokens)).to(table.weight.device)
