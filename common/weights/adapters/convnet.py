"""Convolutional networks that torch.fx can trace: residual networks, VGG, MobileNet, DenseNet and their like.

The whole network is one block. Targets of unit `channels` are coupled channels of convolutions and linears, found by
`channel_graph`; kernels are linears [out, in * k * k] that read the patches under them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import Tap, View, WeightAdapter
from prunelab.common.weights.adapters.channel_graph import ChannelGraph, Space, Use, trace
from prunelab.common.weights.adapters.images import check_image
from prunelab.common.weights.adapters.projections import IN, Projection, length, remove
from prunelab.common.weights.targets import Observation, Target


class ConvNet(WeightAdapter):
    """A convolutional network, of whatever class, or one of linears alone. A calibration sample is an image [C, H, W],
    or what else the first layer reads."""

    family = "convnet"
    model_classes = ("timm.models.resnet.ResNet", "torchvision.models.resnet.ResNet", "torchvision.models.vgg.VGG")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.spaces = {_name(space): space for space in ChannelGraph(model).open()}

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        layers = list(_layers(model))
        if len(layers) < 2 and not any(isinstance(layer, nn.Conv2d) for layer in layers):
            return False
        try:
            trace(model)
        except Exception:  # whatever stops torch.fx, the network is not one for this adapter
            return False
        return True

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [self.model]

    def prefix(self, block: int) -> str:
        return ""

    def run(self, sample: Tensor) -> Any:
        return self.model(sample.unsqueeze(0))

    def check_sample(self, sample: Tensor) -> None:
        first = next(_layers(self.model))
        if isinstance(first, nn.Conv2d):
            check_image(sample, first.in_channels)
        elif not sample.is_floating_point() or sample.shape[-1:] != (first.in_features,):
            raise PrunelabError(f"a calibration sample holds {first.in_features} numbers, not {tuple(sample.shape)}")

    def graph(self) -> fx.Graph:
        return trace(self.model)

    def makers(self, target: Target) -> list[str]:
        made = self.spaces[target.name].made if target.unit == "channels" else []
        return [use.path for use in made if use.module.weight.dim() > 1 and not _carries(use.module)]

    def finish(self) -> bool:
        return False

    # -- targets -----------------------------------------------------------------------------------------------------

    def is_linear(self, module: nn.Module) -> bool:
        return super().is_linear(module) or (type(module) is nn.Conv2d and module.groups == 1 and _padded(module))

    def _channels(self, block: int) -> list[Target]:
        """Coupled channels by the name of the layer that makes them first. The size of one is what makes it: rows,
        biases and norms; the columns that read it leave too and are counted with the rows they lie in."""
        results = []
        for name, space in self.spaces.items():
            size = sum(use.part().size for use in space.made) // space.size
            read = sum(use.part().size for use in space.read) // space.size
            results.append(Target("channels", name, block, "channels", (space.size,), size, read=read))
        return results

    def structure(self, target: Target) -> dict[str, Tensor]:
        return {use.path: use.module.weight for use in self._uses(target)}

    def weights(self, target: Target) -> dict[str, Tensor]:
        """Of channels: `up` [C, n], all rows that make one, and `down` [m, C], all weights that read one; and layer by
        layer `up.i` [C, n_i], `down.i` [out, C * n_i] and, where it has one, `down.i.bias` [out]."""
        if target.unit != "channels":
            return super().weights(target)
        parts = {role: view(parameter.detach()) for role, (parameter, view) in self.holders(target).items()}
        up = torch.cat([part for role, part in parts.items() if role.startswith("up.")], 1)
        down = [
            part.unflatten(1, (target.units, -1)).movedim(1, -1).flatten(0, -2)
            for role, part in parts.items()
            if role.startswith("down.")
        ]
        biases = {f"down.{i}.bias": use.module.bias for i, use in enumerate(self.spaces[target.name].read)}
        parts |= {role: bias.detach() for role, bias in biases.items() if bias is not None}
        return {"up": up, "down": torch.cat(down), **parts}

    def holders(self, target: Target) -> dict[str, tuple[nn.Parameter, View]]:
        if target.unit != "channels":
            return super().holders(target)
        space = self.spaces[target.name]
        made = [use for use in space.made if use.module.weight.dim() > 1]
        results: dict[str, tuple[nn.Parameter, View]] = {}
        for role, uses, view in (("up", made, _rows), ("down", space.read, _columns)):
            for i, use in enumerate(uses):
                results[f"{role}.{i}"] = (use.module.weight, partial(view, use))
        return results

    def readers(self, target: Target) -> list[Projection]:
        return [use.part() for use in self.spaces[target.name].read] if target.unit == "channels" else []

    def _uses(self, target: Target) -> list[Use]:
        space = self.spaces[target.name]
        return [*space.made, *space.read]

    # -- what a target reads -----------------------------------------------------------------------------------------

    def taps(self, target: Target) -> tuple[str, ...]:
        return (target.role,) if target.unit == "linear" else tuple(u.path for u in self.spaces[target.name].read)

    def observe(
        self, target: Target, seen: Mapping[str, Tap], before: Tensor, after: Tensor, tokens: Tensor
    ) -> Observation:
        given, read = seen[self.taps(target)[0]][0][0], None
        if target.unit == "linear":
            inputs = _patches(self.model.get_submodule(target.role), given)
        else:  # what the first layer that reads the channels is given, place by place
            entries = self.spaces[target.name].read[0].part().entries.to(given.device)  # [units, span]
            inputs = given[0][entries].flatten(1).T  # [span * places, units]
            uses = self.spaces[target.name].read
            read = lambda: {f"down.{i}": _given(use, seen[use.path][0][0]) for i, use in enumerate(uses)}  # noqa: E731
        weights = self.weights(target)
        return Observation(inputs, weights, before.flatten(0, -2), after.flatten(0, -2), tokens, read=read)

    # -- decisions ---------------------------------------------------------------------------------------------------

    def assign(self, target: Target, role: str, value: Tensor) -> None:
        if target.unit != "channels":
            return super().assign(target, role, value)
        if not role.startswith("down."):
            raise PrunelabError(f"convnet: '{role}' of {target.name} is several layers'; give values as `down.0`")
        use, bias = self._reader(target, role)
        own = (use.module.bias if bias else use.module.weight).detach()
        if bias and own.device.type != "meta":
            own.copy_(value)
        elif own.device.type != "meta":
            wide, entries = own.view(*own.shape[:2], -1), use.part().entries.flatten().to(own.device)
            wide.index_copy_(1, entries, value.to(own).view(len(own), len(entries), -1))

    def _reader(self, target: Target, role: str) -> tuple[Use, bool]:
        """The layer that a role names, `down.0`, and whether its bias is meant, `down.0.bias`."""
        _, number, bias = (*role.split("."), "")[:3]
        return self.spaces[target.name].read[int(number)], bias == "bias"

    def add_bias(self, target: Target, role: str, value: Tensor) -> None:
        if target.unit != "channels" or not re.fullmatch(r"down\.\d+\.bias", role):
            return super().add_bias(target, role, value)
        module = self._reader(target, role)[0].module
        module.bias = nn.Parameter(value.to(module.weight), requires_grad=module.weight.requires_grad)

    def drop_bias(self, target: Target, role: str) -> None:
        self._reader(target, role)[0].module.bias = None

    def remove(self, target: Target, kept: Tensor) -> None:
        remove([use.part() for use in self._uses(target)], kept)
        self.spaces[target.name].size = len(kept)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))


def _carries(module: Any) -> bool:
    """Whether a layer gives every channel that it is given, by itself."""
    return getattr(module, "groups", 1) > 1


def _name(space: Space) -> str:
    return space.made[0].path


def _padded(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _patches(module: Any, given: Tensor) -> Tensor:
    """What each application of a layer reads, [places, in] or [places, in * k * k]."""
    if isinstance(module, nn.Linear):
        return given.flatten(0, -2)
    patches = F.unfold(given, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def _rows(use: Use, tensor: Tensor) -> Tensor:
    """What makes the units [units, n], of a tensor shaped like the module's weight."""
    return use.part().view(tensor)


def _columns(use: Use, tensor: Tensor) -> Tensor:
    """What reads the units [out, units * n], of a tensor shaped like the module's weight."""
    return _of_units(use, tensor.reshape(*tensor.shape[:2], -1)).flatten(1)


def _given(use: Use, given: Tensor) -> Tensor:
    """What a module's columns for the units read, [places, units * n]."""
    if not isinstance(use.module, nn.Linear) and not _padded(use.module):
        raise PrunelabError(f"{use.path} pads with something else than zeros, and what it reads is not known here")
    patches = _patches(use.module, given)
    return _of_units(use, patches.view(len(patches), length(use.module, IN), -1)).flatten(1)


def _of_units(use: Use, tensor: Tensor) -> Tensor:
    """Of a tensor [m, in, n] the units' inputs [m, units * span, n]; a view where these lie side by side."""
    entries = use.part().entries.flatten()
    start = int(entries[0])
    if torch.equal(entries, torch.arange(start, start + len(entries))):
        return tensor.narrow(1, start, len(entries))
    return tensor[:, entries.to(tensor.device)]
