"""Models that `peft` gave low-rank factors: its layers stay as they are while they train, and targets are named as in
the model underneath. Imports no peft: its layers are known by what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError


def has_factors(module: nn.Module) -> bool:
    """Whether a layer is one of peft's, around the layer it was."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def base(model: nn.Module) -> Any:
    """The model within an adapter of peft, or the model itself."""
    find = getattr(model, "get_base_model", None)
    return model if find is None else find()


def adapter(layer: Any) -> str:
    """The one adapter that a layer uses."""
    names = list(layer.active_adapters)
    if len(names) != 1:
        raise PrunelabError(f"the model uses {len(names)} adapters of peft at once; set one active")
    return str(names[0])


@contextmanager
def without_factors(model: nn.Module) -> Iterator[None]:
    """The model as it is underneath, for the length of a `with` block."""
    wrapped = [(name, module) for name, module in model.named_modules() if has_factors(module)]
    for name, layer in wrapped:
        _set(model, name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in wrapped:
            _set(model, name, layer)


def _set(model: nn.Module, name: str, layer: Any) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, layer)


class Factors(nn.Module):
    """The factors of a layer as `LowRank` has them: up [out, rank], down [rank, in], their scale and gain."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        name = adapter(layer)
        self.down, self.up = layer.lora_A[name].weight, layer.lora_B[name].weight
        self._layer = [layer]  # in a list, so that it is no part of this module
        self._name, self.scale = name, layer.scaling[name]

    @property
    def gain(self) -> float:
        """A further factor, for methods that damp a layer's change for a while."""
        return float(self._layer[0].scaling[self._name] / self.scale)

    @gain.setter
    def gain(self, value: float) -> None:
        self._layer[0].scaling[self._name] = self.scale * value

    def delta(self) -> Tensor:
        """What is added to the weight."""
        return (self.scale * self.gain) * (self.up @ self.down)
