"""Save and load an adapter in peft's file format, and combine adapters.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; peft opens it, and what peft saved opens here or
is refused by the name of the setting that is not supported.
Only safetensors are read: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_edu.config import LoRAConfig, named
from lora_edu.inject import _state, _stored, add_lora, lora_parameters, remove_lora

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Fields of peft's file that change nothing in the mathematics.
INFORMATIVE = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
        "peft_version",
    ),
    *(
        "init_lora_weights",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
    ),
    *("ensure_weight_tying", "qalora_group_size", "megatron_config"),
}
OURS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias", "modules_to_save"),
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapter's tensors under peft's names: A, B, magnitudes, trained biases and whole modules."""
    return {PREFIX + n: t.detach().to("cpu", copy=True).contiguous() for n, t in _adapter_tensors(model).items()}


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the adapter consists of: its parameters, and the stored buffers of modules that are trained whole."""
    state, _ = _state(model)
    return {**lora_parameters(model), **{n: t for n, t in _stored(model).items() if n in state.originals}}


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the adapter to `folder` and return it. An error while writing leaves the old files whole.

    The targets are written as the full paths that were really adapted, and what differs in a layer as patterns of
    its path.
    Raises RuntimeError when the model has no LoRA.
    """
    folder = Path(folder)
    tensors, config = adapter_state(model), json.dumps(_to_peft(model), indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = folder / WEIGHTS, folder / CONFIG
    parts = [folder / f"{name}.part" for name in (WEIGHTS, CONFIG)]
    old = weights.read_bytes() if weights.is_file() else None
    try:
        save_file(tensors, parts[0], metadata={"format": "pt"})
        parts[1].write_text(config, encoding="utf-8")
        os.replace(parts[0], weights)
        try:
            os.replace(parts[1], settings)
        except BaseException:  # one new file beside an old one would be a third adapter
            weights.unlink() if old is None else weights.write_bytes(old)
            raise
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return folder


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load an adapter, written here or by peft, into `model` and return it. It goes on training.

    A model without LoRA gets one, as the file's configuration says; one that has a LoRA of the same shape gets its
    values. Everything fits or nothing is loaded. Raises FileNotFoundError; ValueError for a damaged file, a setting
    that changes the mathematics and is not supported, and keys or shapes that do not fit, which are listed.
    """
    config, tensors = _read(Path(folder))
    fresh = getattr(model, "_lora_edu", None) is None
    if fresh:
        add_lora(model, _from_peft(config, model))
    try:
        _, layers = _state(model)
        if any(layer.merged for layer in layers.values()):
            raise RuntimeError("this LoRA is merged; unmerge_lora before loading another.")
        mine = _adapter_tensors(model)
        _compare(mine, tensors)
        if not fresh:
            _compare_settings(model, config)
    except Exception:
        if fresh:
            remove_lora(model)
        raise
    with torch.no_grad():
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
    return model


def combine(
    adapters: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], r: int | None = None
) -> tuple[Tensor, Tensor]:
    """A and B of sum_i w_i B_i A_i, from pairs (A_i (r_i, in), B_i (out, r_i)).

    Without `r` it is exact, by concatenation: A (sum r_i, in), B (out, sum r_i). With `r` it is the best approximation
    of that rank, by an SVD of the small factors; the (out, in) matrix is never formed. Adding the factors instead
    would bring in the cross terms B_i A_j. The scale alpha / r of each adapter belongs into its weight.

    Raises ValueError when there is nothing to combine, or when numbers or shapes do not fit together.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"combine wants one weight per adapter; got {len(adapters)} adapters and {len(weights)} weights."
        )
    shapes = {(A.shape[1], B.shape[0]) for A, B in adapters}
    if len(shapes) > 1 or any(A.shape[0] != B.shape[1] for A, B in adapters):
        raise ValueError(
            "the adapters do not fit together: each A is (r, in) and each B (out, r), with one in and one out."
        )
    A = torch.cat([a for a, _ in adapters])
    B = torch.cat([w * b for (_, b), w in zip(adapters, weights, strict=True)], dim=1)
    if r is None:
        return A, B
    largest = min(*A.shape, *B.shape)
    if not 1 <= r <= largest:
        raise ValueError(f"r must lie between 1 and {largest}, the largest rank that the sum can have; got {r}.")
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.t())
    U, s, Vt = torch.linalg.svd(RB @ RA.t())  # B A = QB (RB RA^T) QA^T
    root = s[:r].sqrt()
    return root[:, None] * (Vt[:r] @ QA.t()), QB @ (U[:, :r] * root)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: an adapter is that file and {CONFIG if name == WEIGHTS else WEIGHTS}."
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stored = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: a file is damaged or cut short: {' '.join(str(error).split())}.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG} does not say peft_type LORA; it is not a LoRA adapter.")
    return config, {
        re.sub(r"(\.lora_\w+)\.default(?=\.|$)", r"\1", key.removeprefix(PREFIX)): t for key, t in stored.items()
    }


def _from_peft(config: dict[str, Any], model: nn.Module) -> LoRAConfig:
    """The configuration of a peft file. Fields that are off in it do not matter; others must be known here."""
    unknown = [k for k, v in config.items() if k not in INFORMATIVE | OURS and v not in (None, False, [], {}, "")]
    if unknown:
        raise ValueError(
            f"the adapter uses {', '.join(sorted(unknown))}, which changes the mathematics and is not supported here."
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        raise ValueError(
            f"the adapter was started with init_lora_weights={start!r}, which may have changed the base; convert it first."
        )
    given = {key: config[key] for key in OURS if config.get(key) is not None}
    if "r" not in given or "lora_alpha" not in given or "target_modules" not in given:
        raise ValueError(f"{CONFIG} must state r, lora_alpha and target_modules.")
    return LoRAConfig(**{"lora_dropout": 0.0, **given})


def _to_peft(model: nn.Module) -> dict[str, Any]:
    state, layers = _state(model)
    c = state.config
    exact = {path: re.escape(path) for path in layers}
    paths = sorted(layers)
    # peft reads a list as endings of paths; where a path is also another one's ending, a regular expression says it.
    only_these = sorted(path for path, _ in model.named_modules() if named(paths, path)) == paths
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": c.r,
        "lora_alpha": c.lora_alpha,
        "lora_dropout": c.lora_dropout,
        "target_modules": paths if only_these else "|".join(exact.values()),
        "rank_pattern": {f"^{exact[p]}": layer.r for p, layer in layers.items() if layer.r != c.r},
        "alpha_pattern": {
            f"^{exact[p]}": layer.lora_alpha for p, layer in layers.items() if layer.lora_alpha != c.lora_alpha
        },
        "use_rslora": c.use_rslora,
        "use_dora": c.use_dora,
        "bias": c.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": sorted(c.modules_to_save) or None,
    }


def _compare(mine: dict[str, Any], stored: dict[str, Tensor]) -> None:
    problems = [f"missing in the file: {name}" for name in mine.keys() - stored.keys()]
    problems += [f"not in the model: {name}" for name in stored.keys() - mine.keys()]
    problems += [
        f"{name} has shape {tuple(stored[name].shape)} in the file and {tuple(mine[name].shape)} in the model"
        for name in mine.keys() & stored.keys()
        if stored[name].shape != mine[name].shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"the adapter does not fit the model, nothing was loaded: {listed}.")


def _compare_settings(model: nn.Module, config: dict[str, Any]) -> None:
    """The file's scale of every layer must be the model's."""
    _, layers = _state(model)
    theirs = _from_peft(config, model)
    for path, layer in layers.items():
        r, alpha = theirs.rank(path), theirs.alpha(path)
        if alpha / (r**0.5 if theirs.use_rslora else r) != layer.scaling:
            raise ValueError(
                f"the adapter's scale of {path!r} differs from the model's {layer.scaling:g}; nothing was loaded."
            )
