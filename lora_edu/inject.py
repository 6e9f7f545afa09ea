"""Put LoRA into a model by name, take it out again, merge it, switch it off, and count.

Every function checks everything first and changes the model only then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.config import LoRAConfig, ends_in, named
from lora_edu.layers import LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear

STATE = "_lora_edu"  # where a model keeps what `remove_lora` restores


@dataclass
class State:
    """What a model with LoRA remembers: its configuration, the requires_grad of the base, and what is trained whole.

    `originals` holds the base's values of the parameters that train without a LoRA (biases, modules_to_save).
    """

    config: LoRAConfig
    required_grad: dict[str, bool]
    originals: dict[str, Tensor]


@dataclass(frozen=True)
class ParameterReport:
    """Numbers of parameters, each counted once, also where two modules share it."""

    total: int
    trainable: int
    trainable_bytes: int

    @property
    def percent(self) -> float:
        """The trainable share of the total, in per cent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable: {self.trainable:,} of {self.total:,} parameters ({self.percent:.4f} %)"


def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freeze `model`, wrap the layers that `config` names, and return the same model.

    After it, exactly the adapter trains: A, B, with DoRA the magnitudes, and what `bias` and `modules_to_save` name.
    At the start the model computes what it did before.

    Raises RuntimeError when there is a LoRA already; ValueError when a pattern matches nothing (with near names),
    when a target cannot carry a LoRA, or is named in `modules_to_save` too. The model is unchanged then.
    """
    if lora_layers(model):
        raise RuntimeError("this model has a LoRA already; remove_lora or merge_lora first.")
    targets, saved = _targets(model, config), _saved(model, config)
    if both := sorted(t for t in targets for s in saved if t == s or t.startswith(f"{s}.")):
        raise ValueError(f"{both[0]!r} is adapted and also trained whole (modules_to_save); choose one.")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(ends_in(pattern, path) for path in targets):
            raise ValueError(f"the pattern {pattern!r} matches none of the adapted layers{_near(pattern, targets)}.")
    for path, layer in targets.items():
        _refuse_what_cannot_carry(model, path, layer, config)

    required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for path, layer in targets.items():
        model.set_submodule(path, _wrap(layer, path, config))
    whole = [f"{s}.{n}" if n else s for s in saved for n, _ in model.get_submodule(s).named_parameters()]
    originals = {}
    for name, parameter in model.named_parameters():
        if name in whole or _trains_as_bias(model, name, config):
            originals[name] = parameter.detach().clone()
            parameter.requires_grad_(True)
    setattr(model, STATE, State(config, required_grad, originals))
    return model


def remove_lora(model: nn.Module) -> nn.Module:
    """Take the LoRA out: the base again, bit for bit, each parameter with its own requires_grad. Returns the model.

    Raises RuntimeError when there is none.
    """
    state, layers = _state(model)
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()
    _swap(model, state.originals)
    for path, layer in layers.items():
        model.set_submodule(path, layer.base_layer)
    delattr(model, STATE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.required_grad[name])
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge every LoRA into its base weight. The layers stay, so that `unmerge_lora` can take it out again.

    Raises RuntimeError when anything is merged already, ValueError when a weight is shared with another module
    (merging would change that one too) or a result is not finite. Nothing is changed then.
    """
    _, layers = _state(model)
    if any(layer.merged for layer in layers.values()):
        raise RuntimeError("this LoRA is merged already; merging again would add the update twice.")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for path, layer in layers.items():
        if len(shared := owners[layer.weight.data_ptr()]) > 1:
            raise ValueError(
                f"the weight of {path!r} is shared by {', '.join(sorted(shared))}; merging would change both."
            )
    with torch.no_grad():
        weights = {path: layer.merged_weight() for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.merge(weights[path])
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Put all base weights back, bit for bit. Raises RuntimeError when not everything is merged."""
    _, layers = _state(model)
    if not all(layer.merged for layer in layers.values()):
        raise RuntimeError("this LoRA is not merged; there is nothing to take out.")
    for layer in layers.values():
        layer.unmerge()
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model for the length of a `with` block, bit for bit; afterwards, also after an error, as before."""
    state, layers = _state(model)
    merged = [layer for layer in layers.values() if layer.merged]
    trained = {name: model.get_parameter(name).detach().clone() for name in state.originals}
    enabled = {layer: layer.enabled for layer in layers.values()}
    try:
        for layer in merged:
            layer.unmerge()
        for layer in layers.values():
            layer.enabled = False
        _swap(model, state.originals)
        yield model
    finally:
        for layer, was in enabled.items():
            layer.enabled = was
        _swap(model, trained)
        for layer in merged:
            layer.merge()


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train with the adapter, by name: A, B, magnitudes, chosen biases and whole modules."""
    state, layers = _state(model)
    own = {
        f"{path}.{name}" if path else name
        for path, layer in layers.items()
        for name, _ in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    return {name: p for name, p in model.named_parameters() if name in own or name in state.originals}


def parameter_report(model: nn.Module) -> ParameterReport:
    """Total and trainable parameters of any model, shared ones counted once, buffers not at all."""
    parameters = list(model.parameters())
    training = [p for p in parameters if p.requires_grad]
    return ParameterReport(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in training),
        trainable_bytes=sum(p.numel() * p.element_size() for p in training),
    )


def _targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules to adapt, by path. Every pattern must match something."""
    modules = {path: module for path, module in model.named_modules() if path}
    if config.target_modules == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found: dict[str, nn.Module] = {
            path: m for path, m in modules.items() if isinstance(m, nn.Linear) and m is not head
        }
        patterns: list[Any] = []
    else:
        found = {path: m for path, m in modules.items() if named(config.target_modules, path)}
        whole = isinstance(config.target_modules, str)
        patterns = [config.target_modules] if whole else [[name] for name in config.target_modules]
    for pattern in patterns:
        if not any(named(pattern, path) for path in modules):
            text = pattern if isinstance(pattern, str) else pattern[0]
            raise ValueError(f"the target {text!r} matches no module{_near(text, modules)}.")
    saved = _saved(model, config)
    found = {
        path: module
        for path, module in found.items()
        if not (config.exclude_modules and named(config.exclude_modules, path))
        and not (config.target_modules == "all-linear" and any(path == s or path.startswith(f"{s}.") for s in saved))
    }
    if not found:
        raise ValueError("no module is left to adapt: target_modules and exclude_modules together match nothing.")
    return found


def _saved(model: nn.Module, config: LoRAConfig) -> list[str]:
    modules = [path for path, _ in model.named_modules() if path]
    for name in config.modules_to_save:
        if not any(named([name], path) for path in modules):
            raise ValueError(f"modules_to_save: {name!r} matches no module{_near(name, modules)}.")
    return [path for path in modules if named(config.modules_to_save, path)]


def _near(text: str, paths: Any) -> str:
    """A hint with the names most like `text`, of paths or of their last parts."""
    names = sorted({*paths, *(path.rsplit(".", 1)[-1] for path in paths)})
    near = get_close_matches(text, names, n=3)
    return f"; near names: {', '.join(near)}" if near else ""


def _refuse_what_cannot_carry(model: nn.Module, path: str, layer: nn.Module, config: LoRAConfig) -> None:
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{path!r}: nn.MultiheadAttention reads this weight directly, so a LoRA on it would do nothing."
        )
    if not isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv2d)):
        raise ValueError(f"{path!r} is a {type(layer).__name__}; a LoRA goes on nn.Linear, nn.Embedding and nn.Conv2d.")
    if config.use_dora and not isinstance(layer, nn.Linear):
        raise ValueError(f"{path!r} is an nn.{type(layer).__name__}; DoRA is for nn.Linear here.")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise ValueError(
            f"{path!r}: an embedding with max_norm rewrites its weights in forward and cannot carry a LoRA."
        )
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise ValueError(
            f"{path!r}: a convolution with groups={layer.groups} cannot carry this LoRA; groups must be 1."
        )


def _wrap(layer: nn.Module, path: str, config: LoRAConfig) -> LoRALayer:
    r, alpha, rs = config.rank(path), config.alpha(path), config.use_rslora
    if isinstance(layer, nn.Linear):
        return LoRALinear(layer, r, alpha, config.lora_dropout, rs, config.use_dora)
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding(layer, r, alpha, rs)
    assert isinstance(layer, nn.Conv2d)
    return LoRAConv2d(layer, r, alpha, config.lora_dropout, rs)


def _trains_as_bias(model: nn.Module, name: str, config: LoRAConfig) -> bool:
    path, _, leaf = name.rpartition(".")
    if config.bias == "none" or leaf != "bias":
        return False
    return config.bias == "all" or path.endswith("base_layer")


def _state(model: nn.Module) -> tuple[State, dict[str, LoRALayer]]:
    state = getattr(model, STATE, None)
    if state is None:
        raise RuntimeError("this model has no LoRA; add_lora first.")
    return state, lora_layers(model)


@torch.no_grad()
def _swap(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)
