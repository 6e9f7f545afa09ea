"""The laboratory's model: a small GPT over characters, and its pretrained checkpoint.

Shapes: n texts of t <= 64 characters, d = 128 features, h = 4 heads, V = 96 characters in the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_edu import cost
from lora_edu.lab import corpus

HERE = Path(__file__).parent
BASE, PROVENANCE = HERE / "base.safetensors", HERE / "base.json"
RESTORE = "restore it from the repository or the package."
CONTEXT = 64  # characters that the model sees at once
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d / h), causal) V in each of h heads, then `o_proj`.  (n, t, d) -> (n, t, d)"""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.o_proj = nn.Linear(d, d)

    def split(self, x: Tensor) -> Tensor:
        """(n, t, d) -> (n, h, t, d / h)"""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of p + t keys and values in each head the first p are seen by all of t queries.  -> (n, t, d)"""
        t, p = q.shape[2], k.shape[2] - q.shape[2]
        later = q.new_full((t, p + t), -math.inf).triu(p + 1)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + later).softmax(-1)  # (n, h, t, p + t)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*(self.split(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj)))


class MLP(nn.Module):
    """down_proj(GELU(up_proj(x))), four times as wide inside.  (n, t, d) -> (n, t, d)"""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d, 4 * d)
        self.down_proj = nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class Block(nn.Module):
    """x + attn(norm1(x)), and to that the same with mlp and norm2.  (n, t, d) -> (n, t, d)"""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(d), Attention(d, heads)
        self.norm2, self.mlp = nn.LayerNorm(d), MLP(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts each next character.  ids (n, t) -> logits (n, t, V)

    forward is `decode(embed(ids))`: a method that puts learned vectors before the text enters between the two.
    """

    def __init__(self, d: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(corpus.CHARACTERS), d)
        self.positions = nn.Embedding(CONTEXT, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, len(corpus.CHARACTERS), bias=False)
        # Uniform, because torch draws these bits alike on every CPU; normal ones differ. Standard deviation 0.02, and
        # on the way into the residual stream less, so that its size does not grow with the number of layers.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.uniform_(parameter, -math.sqrt(3) * std, math.sqrt(3) * std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, ids: Tensor) -> Tensor:
        """Characters and their places.  (n, t) -> (n, t, d)"""
        return self.tokens(ids) + self.positions.weight[: ids.shape[1]]

    def decode(self, x: Tensor) -> Tensor:
        """(n, t, d) -> (n, t, V)"""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def forward(self, ids: Tensor) -> Tensor:
        return self.decode(self.embed(ids))


def shape(d: int = 128) -> cost.Shape:
    """The sizes of `GPT(d)`, as `lora_edu.cost` wants them."""
    return cost.Shape(d, 4 * d, 4, len(corpus.CHARACTERS), heads=4, gated=False, biases=True, positions=CONTEXT)


@torch.no_grad()
def bits_per_character(model: nn.Module, text: str, windows: int = 512) -> float:
    """Mean of -log2 p(character | those before it in its window): lower is better, log2(96) = 6.585 knows nothing.

    Over `windows` evenly spaced windows of 64 characters, the same for every model. Each window starts without
    context: absolute values depend on that, differences between models much less. The model is measured in eval mode
    and given back in the mode in which it came; whatever it is, ids (n, t) in and logits (n, t, V) out is enough.
    """
    if windows < 1:
        raise ValueError(f"windows must be at least 1; got {windows}.")
    starts = torch.arange(windows) * last_start(text) // max(1, windows - 1)
    ids = windows_at(torch.as_tensor(corpus.encode(text)), starts)
    training, total = model.training, 0.0
    model.eval()
    try:
        for batch in torch.split(ids, 64):
            total += cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    finally:
        model.train(training)
    return total / (windows * CONTEXT) / math.log(2)


@torch.no_grad()
def generate(model: nn.Module, prompt: str, length: int = 200, temperature: float = 0.7, seed: int = 0) -> str:
    """`prompt` and `length` more characters, each drawn from softmax(logits / temperature); 0 takes the likeliest.

    The model sees the last 64 characters. No KV cache: the places of the characters are learned and the window slides,
    so that every step is another text.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character to continue.")
    if temperature < 0:
        raise ValueError(f"the temperature must not be negative; got {temperature}.")
    ids = torch.as_tensor(corpus.encode(prompt)).long()
    # Drawn by inverting the distribution function: uniform numbers are the same on every CPU.
    draws = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    training = model.training
    model.eval()
    try:
        for draw in draws:
            logits = model(ids[None, -CONTEXT:])[0, -1].double()
            if temperature:
                reached = (logits / temperature).softmax(-1).cumsum(-1)
                chosen = torch.searchsorted(reached, draw * reached[-1])
            else:
                chosen = logits.argmax()
            ids = torch.cat([ids, chosen[None]])
    finally:
        model.train(training)
    return corpus.decode(ids.tolist())


def last_start(text: str) -> int:
    """Where the last window of `text` starts: it needs 64 characters, and the one that the last of them predicts."""
    if len(text) <= CONTEXT:
        raise ValueError(f"the text must have at least {CONTEXT + 1} characters; it has {len(text)}.")
    return len(text) - CONTEXT - 1


def windows_at(ids: Tensor, starts: Tensor) -> Tensor:
    """The 65 characters from each start on.  ids (length), starts (n) -> (n, 65)"""
    return ids[starts[:, None] + torch.arange(CONTEXT + 1)].long()


def provenance() -> dict[str, Any]:
    """How the shipped checkpoint was made: recipe, seed, corpora, versions, curve, and the SHA-256 of the file."""
    try:
        return json.loads(PROVENANCE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{PROVENANCE.name}, which describes the base model, cannot be read ({error}); {RESTORE}"
        ) from None


def load_base() -> GPT:
    """The pretrained model: float32, in eval mode, every parameter trainable. Draws no random number.

    Raises ValueError when the checkpoint is missing or is not, byte for byte, the one that base.json describes.
    """
    expected = provenance()["sha256"]
    try:
        content = BASE.read_bytes()
    except OSError:
        raise ValueError(f"{BASE.name}, the base model, is missing; {RESTORE}") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"{BASE.name} is not the base model that {PROVENANCE.name} describes; {RESTORE}")
    with torch.device("meta"):
        model = GPT()
    model.load_state_dict({name: tensor.float() for name, tensor in load(content).items()}, assign=True)
    return model.eval()
