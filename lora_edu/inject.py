"""Put LoRA into a model by name, take it out again, merge it, switch it off, and count.

Every function checks everything first and changes the model only then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lora_edu.config import LoRAConfig, ends_in, named
from lora_edu.layers import LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear

STATE = "_lora_edu"  # where a model keeps what `remove_lora` restores
KINDS: tuple[type[LoRALayer], ...] = (LoRALinear, LoRAEmbedding, LoRAConv2d)


@dataclass
class State:
    """What a model with LoRA remembers: its configuration, the requires_grad of the base, and what is trained whole.

    `originals` holds the base's values of what trains without a LoRA: biases, and the parameters and stored buffers
    of modules_to_save.
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
    when a target cannot carry a LoRA, is used in two places, or is named in `modules_to_save` too, and when a module
    to save shares a parameter with another. The model is unchanged then.
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
    for path in saved:
        _refuse_to_train_what_is_shared(model, path)

    required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        wrapped = {path: _wrap(layer, path, config) for path, layer in targets.items()}
    except BaseException:  # a dtype that cannot be drawn, no memory: the layers wrapped so far were frozen
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required_grad[name])
        raise
    model.requires_grad_(False)
    for path, layer in wrapped.items():
        model.set_submodule(path, layer)
    originals = {}
    for name, tensor in _stored(model).items():
        trains = isinstance(tensor, nn.Parameter)
        if any(name.startswith(f"{s}.") for s in saved) or (trains and _trains_as_bias(name, config)):
            originals[name] = tensor.detach().clone()
            tensor.requires_grad_(trains)
    setattr(model, STATE, State(config, required_grad, originals))
    return model


def remove_lora(model: nn.Module) -> nn.Module:
    """Take the LoRA out: the base again, bit for bit, each parameter with its own requires_grad. Returns the model.

    Buffers outside modules_to_save, such as a BatchNorm's running mean, are the model's own and stay as they are.
    Raises RuntimeError when there is none.
    """
    state, layers = _state(model)
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()
    _put(model, state.originals)
    for path, layer in layers.items():
        model.set_submodule(path, layer.base_layer)
    delattr(model, STATE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.required_grad[name])
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge every LoRA into its base weight. The layers stay, so that `unmerge_lora` can take it out again.

    A merged model's state_dict holds the merged weights beside A and B: save the adapter, or unmerge first.

    Raises RuntimeError when anything is merged already, ValueError when a weight is shared with another module
    (merging would change that one too) or a result is not finite. Nothing is changed then. A weight that a forward
    reads by hand, as in F.linear(h, embedding.weight), is shared in a way that cannot be seen from here.
    """
    _, layers = _state(model)
    if any(layer.merged for layer in layers.values()):
        raise RuntimeError("this LoRA is merged already; merging again would add the update twice.")
    owners = _owners(model)
    for path, layer in layers.items():
        if len(shared := owners[_memory(layer.weight)]) > 1:
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
    if not any(layer.merged for layer in layers.values()):
        raise RuntimeError("this LoRA is not merged; there is nothing to take out.")
    if not all(layer.merged for layer in layers.values()):
        raise RuntimeError("only some layers are merged, by hand; unmerge these by hand.")
    for layer in layers.values():
        layer.unmerge()
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model for the length of a `with` block, bit for bit; afterwards, also after an error, as before.

    A forward pass from before the block can still be differentiated after it.
    """
    state, layers = _state(model)
    merged = [layer for layer in layers.values() if layer.merged]
    stored = _stored(model)
    trained = {name: stored[name].data for name in state.originals}
    enabled = {layer: layer.enabled for layer in layers.values()}
    try:
        for layer in merged:
            layer.unmerge()
        for layer in layers.values():
            layer.enabled = False
        for name, original in state.originals.items():  # other memory, so that autograd's saved tensors stay valid
            stored[name].data = torch.empty_like(stored[name]).copy_(original)  # wherever the model is by now
        yield model
    finally:
        for layer, was in enabled.items():
            layer.enabled = was
        for name, value in trained.items():
            stored[name].data = value
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
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    if config.target_modules == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found: dict[str, nn.Module] = {
            path: m for path, m in modules.items() if isinstance(m, nn.Linear) and m is not head
        }
        patterns: list[Any] = []
    else:
        found = {path: m for path, m in modules.items() if named(config.target_modules, path)}
        patterns = _patterns(config.target_modules)
    for pattern in patterns:
        if not any(named(pattern, path) for path in modules):
            text = pattern if isinstance(pattern, str) else pattern[0]
            way = (
                " (a string is a regular expression for the whole path; names go in a list)" if text == pattern else ""
            )
            raise ValueError(f"the target {text!r} matches no module{way}{_near(text, modules)}.")
    for pattern in _patterns(config.exclude_modules):
        if not any(named(pattern, path) for path in modules):
            text = pattern if isinstance(pattern, str) else pattern[0]
            raise ValueError(f"exclude_modules: {text!r} matches no module{_near(text, modules)}.")
    saved = _saved(model, config)
    found = {
        path: module
        for path, module in found.items()
        if not (config.exclude_modules and named(config.exclude_modules, path))
        and not (config.target_modules == "all-linear" and any(path == s or path.startswith(f"{s}.") for s in saved))
    }
    if not found:
        raise ValueError("no module is left to adapt: target_modules and exclude_modules together match nothing.")
    return _once(model, found)


def _patterns(names: str | Sequence[str]) -> list[Any]:
    """What has to match something: the regular expression, or each name of a list by itself."""
    return ([names] if names else []) if isinstance(names, str) else [[name] for name in names]


def _once(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Each module under one path. Refuses a module that sits in two places, of which a LoRA would reach only one."""
    places: dict[int, set[tuple[int, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), set()).add((id(parent), name))
    kept: dict[int, str] = {}
    for path, module in found.items():
        if len(places[id(module)]) > 1:
            raise ValueError(f"{path!r} is one module in two places, of which a LoRA would reach only one.")
        kept.setdefault(id(module), path)  # the same place again: an outer module is shared
    return {path: found[path] for path in kept.values()}


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


def _reader(model: nn.Module, path: str) -> str:
    """The class of the parent that reads this layer's weight without calling it; empty where none does."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return type(parent).__name__ if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) else ""


def _refuse_what_cannot_carry(model: nn.Module, path: str, layer: nn.Module, config: LoRAConfig) -> None:
    if reader := _reader(model, path):
        raise ValueError(
            f"{path!r}: nn.{reader} reads this weight directly, so a LoRA on it would do nothing; "
            "leave it out (exclude_modules)."
        )
    kind = next((kind for kind in KINDS if isinstance(layer, kind.base_type)), None)
    if kind is None:
        raise ValueError(f"{path!r} is a {type(layer).__name__}; a LoRA goes on nn.Linear, nn.Embedding and nn.Conv2d.")
    if reason := kind.obstacle(layer):
        raise ValueError(f"{path!r} {reason}; it cannot carry a LoRA.")
    if config.use_dora:
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{path!r} is an nn.{type(layer).__name__}; DoRA is for nn.Linear here.")
        if reason := LoRALinear.no_direction(layer):
            raise ValueError(f"{path!r} {reason}.")


def _refuse_to_train_what_is_shared(model: nn.Module, path: str) -> None:
    """A module to save must own its parameters: trained whole, a shared one would change another module too."""
    inside = {id(module) for module in model.get_submodule(path).modules()}
    for module in model.modules():
        for parameter in module._parameters.values() if id(module) not in inside else ():
            if any(parameter is own for own in model.get_submodule(path).parameters()):
                raise ValueError(
                    f"modules_to_save: {path!r} shares a parameter with another module, which would train too."
                )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """For each piece of memory that parameters lie in, the names of those parameters, a shared module's once."""
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), set()).add(f"{path}.{leaf}" if path else leaf)
    return owners


def _wrap(layer: nn.Module, path: str, config: LoRAConfig) -> LoRALayer:
    r, alpha, rs = config.rank(path), config.alpha(path), config.use_rslora
    if isinstance(layer, nn.Linear):
        return LoRALinear(layer, r, alpha, config.lora_dropout, rs, config.use_dora)
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding(layer, r, alpha, rs)
    assert isinstance(layer, nn.Conv2d)
    return LoRAConv2d(layer, r, alpha, config.lora_dropout, rs)


def _trains_as_bias(name: str, config: LoRAConfig) -> bool:
    path, _, leaf = name.rpartition(".")
    if config.bias == "none" or leaf != "bias":
        return False
    return config.bias == "all" or path.endswith("base_layer")


def _state(model: nn.Module) -> tuple[State, dict[str, LoRALayer]]:
    state = getattr(model, STATE, None)
    if state is None:
        raise RuntimeError("this model has no LoRA; add_lora first.")
    return state, lora_layers(model)


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and the stored buffers by name."""
    keys = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in keys}}


@torch.no_grad()
def _put(model: nn.Module, values: dict[str, Tensor]) -> None:
    stored = _stored(model)
    for name, value in values.items():
        stored[name].copy_(value)
