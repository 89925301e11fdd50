"""Where the units of a structure lie in the weights of its modules, and how they leave them.

A module here is anything with a weight whose outputs and inputs are axes: linears, the Conv1D of GPT-2, whose weight is
stored as [in, out], convolutions and batch norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError

OUT, IN = 0, 1
_COUNTS = {OUT: ("out_features", "out_channels", "num_features", "nf"), IN: ("in_features", "in_channels", "nx")}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, in either layout."""
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


def oriented(module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor shaped like the module's weight as [out, in], or [out, in * k] of a convolution; always a view."""
    if hasattr(module, "nf"):
        return tensor.t()
    if tensor.dim() < 3:
        return tensor
    if not tensor.is_contiguous():
        raise PrunelabError(
            "convolutions are pruned in the plain layout; call model.to(memory_format=torch.contiguous_format)"
        )
    return tensor.view(len(tensor), -1)


def length(module: Any, axis: int) -> int:
    """Number of a module's outputs or inputs."""
    return int(next(getattr(module, name) for name in _COUNTS[axis] if hasattr(module, name)))


@dataclass(frozen=True)
class Projection:
    """What one module holds of a structure: `entries` [units, span] are the places of its units among the module's
    outputs (`axis` 0; the bias goes with them) or inputs (1)."""

    module: Any
    axis: int
    entries: Tensor

    @property
    def size(self) -> int:
        """Parameters that leave with all units."""
        per_entry = self.module.weight.numel() // length(self.module, self.axis)
        biased = self.axis == OUT and getattr(self.module, "bias", None) is not None
        return self.entries.numel() * (per_entry + biased)

    def weight(self) -> Tensor:
        """The part's rows or columns, [out, in]: a view, but a copy where they do not lie side by side."""
        return self.view(self.module.weight.detach())

    def view(self, tensor: Tensor) -> Tensor:
        """The part's rows or columns of a tensor shaped like the module's weight, [out, in]."""
        return self._taken(oriented(self.module, tensor), self.axis)

    def bias(self) -> Tensor | None:
        """The bias: of the part's outputs, or all of it where the part has inputs."""
        bias = getattr(self.module, "bias", None)
        if bias is None:
            return None
        return self._taken(bias.detach(), 0) if self.axis == OUT else bias.detach()

    def write(self, name: str, value: Tensor) -> None:
        """New values for `weight` or `bias`, shaped as they are read."""
        own = getattr(self.module, name).detach()
        own = oriented(self.module, own) if name == "weight" else own
        value = value.to(own.device, own.dtype)
        if own.device.type == "meta":
            return
        if name == "bias" and self.axis == IN:
            own.copy_(value)
        else:
            own.index_copy_(self.axis, self.entries.flatten().to(own.device), value)

    def silence(self, gone: Tensor) -> None:
        """Set what the outputs or inputs of these units [units] hold to zero."""
        self.blank(self.module.weight.detach(), gone)

    def blank(self, tensor: Tensor, gone: Tensor) -> None:
        """Set the entries of these units [units] to zero in a tensor shaped like the module's weight."""
        if tensor.device.type != "meta":
            dim = self.axis ^ (tensor.dim() == 2 and hasattr(self.module, "nf"))
            tensor.index_fill_(dim, self.entries[gone.cpu()].flatten().to(tensor.device), 0)

    def _taken(self, tensor: Tensor, dim: int) -> Tensor:
        places = self.entries.flatten()
        start = int(places[0])
        if torch.equal(places, torch.arange(start, start + len(places))):
            return tensor.narrow(dim, start, len(places))
        return tensor.index_select(dim, places.to(tensor.device))


def remove(projections: list[Projection], kept: Tensor) -> None:
    """Take all units away from the projections but those at `kept` [K]. Parts of one module leave it together."""
    gone = torch.ones(len(projections[0].entries), dtype=torch.bool)
    gone[kept.cpu()] = False
    leaving: dict[tuple[int, int], list[Projection]] = {}
    for part in projections:
        leaving.setdefault((id(part.module), part.axis), []).append(part)
    for together in leaving.values():
        module, axis = together[0].module, together[0].axis
        stays = torch.ones(length(module, axis), dtype=torch.bool)
        for part in together:
            stays[part.entries[gone].flatten()] = False
        cut(module, axis, stays.nonzero().flatten())


def cut(module: Any, axis: int, kept: Tensor) -> None:
    """Keep these outputs (with their biases and running statistics) or inputs of a module."""
    depthwise = axis == OUT and getattr(module, "groups", 1) > 1  # each output has one input of its own
    for name in ("weight",) if axis == IN else ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            setattr(module, name, taken(tensor, kept, axis ^ (tensor.dim() == 2 and hasattr(module, "nf"))))
    for name in _COUNTS[axis] + (("in_channels", "groups") if depthwise else ()):
        if hasattr(module, name):
            setattr(module, name, len(kept))


def taken(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries of a parameter or buffer, as what it was."""
    kept = tensor.detach().index_select(dim, index.to(tensor.device))
    return nn.Parameter(kept, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
