"""How the base model was made. Run again on one machine it is the same to the byte; another CPU may round otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import save

from lora_edu.lab import corpus
from lora_edu.lab.model import BASE, GPT, PROVENANCE, bits_per_character
from lora_edu.lab.training import Recipe, train

# Rate and weight decay were chosen on the validation text, in runs of a quarter of the steps.
RECIPE = Recipe(steps=6000, rate=3e-3, batch=16, warmup=0.05, weight_decay=0.1)
EVERY = 250  # steps from one point of the curve to the next


def pretrain(folder: Path, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """Train a new GPT on the manual; write base.safetensors (float16) and base.json to `folder` and return the latter.

    Raises ValueError where this Python lacks pieces of the corpora: the result would be another model.
    """
    corpora = {name: corpus.load(name) for name in ("manual", "code", "shout", "rot13")}
    for text in corpora.values():
        if not text.complete:
            raise ValueError(f"{text.report()} The base model is trained on the whole text.")
    manual = corpora["manual"]
    torch.manual_seed(recipe.seed)
    model = GPT()
    run = train(model, manual.train, recipe, manual.validation, every=EVERY)

    state = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})  # measured as it is stored
    content = save(state)
    curve = [
        [step, round(fmean(run.losses[max(0, step - EVERY) : step]), 4), round(validation, 4)]
        for step, validation in run.validation
    ]
    measured = {
        f"{name} {part}": round(bits_per_character(model, getattr(corpora[name], part)), 4)
        for name in corpora
        for part in (("train", "validation", "test") if name == "manual" else ("validation", "test"))
    }
    provenance = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "corpora": {name: text.sha256 for name, text in corpora.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "safetensors": version("safetensors"),
        },
        "bits_per_character": measured,
        "curve": {"columns": ["step", "train", "validation"], "rows": curve},
    }
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / BASE.name, content)
    _replace(folder / PROVENANCE.name, (json.dumps(provenance, indent=1) + "\n").encode())
    return provenance


def _replace(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)
