"""The one interface of all methods: apply, trainable, merge, remove.

A method either trains tensors that the model has (`selects`) or puts a layer in the place of one (`wraps`); the rest,
freezing, remembering and giving back, is the same for all and stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_edu.config import LoRAConfig
from lora_edu.inject import STATE as LORA
from lora_edu.inject import _owners, _put, _reader, _stored, _targets
from lora_edu.layers import LoRALinear

STATE = "_lora_edu_method"  # where a model keeps what `remove` restores


@dataclass
class State:
    """What an adapted model remembers: the method, the base's requires_grad, the paths of the layers put in.

    `originals` holds the base's values of what the method trains itself or has merged into.
    """

    method: str
    required_grad: dict[str, bool]
    originals: dict[str, Tensor]
    layers: list[str]
    merged: bool = False


class Wrapped(nn.Module):
    """A layer in the place of another, which stays in it as `base_layer`, frozen."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def new(self, *shape: int) -> Tensor:
        """Zeros on the base's device and in its dtype; float32 beside a base in half precision."""
        W = next(self.base_layer.parameters())
        half = W.dtype in (torch.float16, torch.bfloat16)
        return torch.zeros(shape, device=W.device, dtype=torch.float32 if half else W.dtype)

    def folded(self) -> dict[str, Tensor]:
        """The base layer's tensors with the change inside, by name."""
        raise NotImplementedError


class Method:
    """A way to fine-tune with few parameters. A subclass says what it selects or wraps.

    mergeable   whether what was learned fits into the base's own tensors, so that inference costs what the base costs
    why         the reason, in one sentence
    """

    mergeable: ClassVar[bool]
    why: ClassVar[str]

    def selects(self, model: nn.Module) -> Iterable[str]:
        """Names of the base's own parameters that train. Raises ValueError where the model does not suit."""
        return ()

    def wraps(self, model: nn.Module) -> dict[str, Wrapped]:
        """Layers to put in, by path. Raises ValueError where the model does not suit; leaves the model alone."""
        return {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze `model`, add what trains, and return the same model.

        Raises RuntimeError when it has a method already, ValueError when it does not suit; it is unchanged then.
        """
        refuse_second(model)
        parameters = dict(model.named_parameters())
        layers, names = self.wraps(model), list(self.selects(model))
        required_grad = {name: p.requires_grad for name, p in parameters.items()}
        originals = {name: parameters[name].detach().clone() for name in names}
        model.requires_grad_(False)
        for name in names:
            parameters[name].requires_grad_(True)
        for path, layer in layers.items():
            model.set_submodule(path, layer.train(layer.base_layer.training))
        setattr(model, STATE, State(type(self).__name__, required_grad, originals, list(layers)))
        return model

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that train, by name. `lora_edu.parameter_report(model)` counts them."""
        self._state(model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        """Put the change into the base's tensors and the base's layers back. Nothing trains then; `remove` still works.

        Raises RuntimeError where that is impossible or was done, ValueError when a weight is shared or a result not
        finite; the model is unchanged then.
        """
        state = self._state(model)
        if not self.mergeable:
            raise RuntimeError(f"{state.method} cannot be merged: {self.why}")
        if state.merged:
            raise RuntimeError(f"{state.method} is merged already; merging again would apply the change twice.")
        layers = {path: model.get_submodule(path) for path in state.layers}
        folded = {
            f"{path}.base_layer.{leaf}": value
            for path, layer in layers.items()
            for leaf, value in layer.folded().items()  # type: ignore[operator]
        }
        refuse_shared(model, folded, "merging would change both")
        if broken := next((name for name, value in folded.items() if not torch.isfinite(value).all()), ""):
            raise ValueError(f"merging would put NaN or infinity into {broken}; nothing was changed.")
        stored = _stored(model)
        state.originals |= {name.replace(".base_layer.", "."): stored[name].detach().clone() for name in folded}
        _put(model, folded)
        _unwrap(model, state)
        model.requires_grad_(False)
        state.merged = True
        return model

    def remove(self, model: nn.Module) -> nn.Module:
        """Give the base back, bit for bit, each parameter with its own requires_grad. Returns the same model.

        Raises RuntimeError when the method is not there.
        """
        state = self._state(model)
        _unwrap(model, state)
        _put(model, state.originals)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(state.required_grad[name])
        delattr(model, STATE)
        return model

    def _state(self, model: nn.Module) -> State:
        state, name = getattr(model, STATE, None), type(self).__name__
        if state is None or state.method != name:
            there = f"it has {state.method}" if state else "apply it first"
            raise RuntimeError(f"this model has no {name}; {there}.")
        return state


def linears(model: nn.Module, targets: str | Sequence[str], method: str) -> dict[str, nn.Linear]:
    """The linear layers that `targets` names, by path, with the rules and the messages of `LoRAConfig`."""
    found: dict[str, nn.Linear] = {}
    for path, layer in _targets(model, LoRAConfig(targets)).items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{path!r} is a {type(layer).__name__}; {method} goes on nn.Linear.")
        if reader := _reader(model, path):
            raise ValueError(f"{path!r}: nn.{reader} reads this weight directly, past the layer put in.")
        if reason := LoRALinear.obstacle(layer):
            raise ValueError(f"{path!r} {reason}.")
        found[path] = layer
    return found


def refuse_second(model: nn.Module) -> None:
    """Raises RuntimeError when the model has a method already."""
    if hasattr(model, STATE) or hasattr(model, LORA):
        name = getattr(model, STATE).method if hasattr(model, STATE) else "LoRA"
        raise RuntimeError(f"this model has {name} already; remove it first.")


def refuse_shared(model: nn.Module, names: Iterable[str], doing: str) -> None:
    """Raises ValueError when a named parameter lies in the memory of another one."""
    places = list(_owners(model).values())
    for name in names:
        shared = next(together for together in places if name in together)
        if len(shared) > 1:
            raise ValueError(f"{' and '.join(sorted(shared))} share one memory; {doing}.")


def _unwrap(model: nn.Module, state: State) -> None:
    for path in state.layers:
        model.set_submodule(path, model.get_submodule(path).base_layer)  # type: ignore[arg-type]
    state.layers.clear()
