"""Which channels of a convolutional network leave together.

The forward is traced once by torch.fx. Every convolution or linear opens a space of channels, what is elementwise in
channels passes spaces on, a residual add makes two spaces one, a concatenation sets them side by side, and the next
convolution reads them. Spaces that an operation mixes in a way not known here, and those of the network's input and
output, are closed: nothing leaves them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from prunelab.common.weights.adapters.projections import IN, OUT, Projection, length

_Conv, _Norm = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm
_PASS: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.ELU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.Flatten,
)
_PASS_CALLS: set[Any] = {
    F.relu,
    F.relu6,
    F.silu,
    F.gelu,
    F.dropout,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.interpolate,
    torch.relu,
    torch.sigmoid,
    torch.flatten,
    "relu",
    "sigmoid",
    "contiguous",
    "flatten",
}
_JOIN: set[Any] = {operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul}
_JOIN |= {"add", "add_", "mul", "mul_"}


@dataclass(eq=False)
class Space:
    """Channels that leave together: how many there are, who makes them, reads them, or carries them."""

    size: int
    closed: bool = False
    merged: Space | None = None
    made: list[Use] = field(default_factory=list)
    read: list[Use] = field(default_factory=list)

    def root(self) -> Space:
        """The space this one has become part of."""
        return self if self.merged is None else self.merged.root()


@dataclass(eq=False)
class Use:
    """A module that makes or reads the channels of `spaces`, side by side; of them `place` is meant here."""

    path: str
    module: Any
    axis: int
    spaces: tuple[Space, ...]
    place: int

    def part(self) -> Projection:
        """Where the channels lie in the module as it is now; behind a flattening a channel has several inputs."""
        sizes = [space.root().size for space in self.spaces]
        span = length(self.module, self.axis) // sum(sizes)
        start = sum(sizes[: self.place])
        channels = torch.arange(start, start + sizes[self.place])
        return Projection(self.module, self.axis, (channels.unsqueeze(1) * span + torch.arange(span)))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, (_Conv, _Norm, nn.Linear)) or super().is_leaf_module(m, qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The network's graph, with its layers as leaves. Raises what torch.fx raises where it cannot follow."""
    return _Tracer().trace(model)


Value = tuple[Space, ...] | None  # what a tensor's channels are; None where they are not known


class ChannelGraph:
    """The spaces of a network, in forward order of their first maker. held: layers whose channels cannot leave, since
    they are called twice or their weights are read elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values: dict[fx.Node, Value] = {}
        self.spaces: list[Space] = []
        nodes = list(trace(model).nodes)
        called = [id(model.get_submodule(str(n.target))) for n in nodes if n.op == "call_module"]
        read = [str(n.target).rpartition(".")[0] for n in nodes if n.op == "get_attr"]
        self.held = {module for module in called if called.count(module) > 1}
        self.held |= {id(model.get_submodule(path)) for path in read}
        for node in nodes:
            self.values[node] = self._visit(node)

    def open(self) -> list[Space]:
        """The spaces that channels can leave: made by a layer and read by another."""
        return [s for s in self.spaces if s.merged is None and not s.closed and s.made and s.read and s.size > 1]

    def _visit(self, node: fx.Node) -> Value:
        inputs = [self.values[n] for n in node.all_input_nodes]
        if node.op == "call_module":
            return self._module(str(node.target), self.model.get_submodule(str(node.target)), inputs)
        if node.op in ("call_function", "call_method"):
            if node.target in _JOIN:
                return self._join(inputs)
            if node.target in (torch.cat, torch.concat) and self._dim(node) == 1 and all(inputs):
                return tuple(space for value in inputs if value for space in value)
            if len(inputs) == 1 and (node.target in _PASS_CALLS or self._pools(node)):
                return inputs[0]
        return self._close(inputs)  # the output too

    def _module(self, path: str, module: Any, inputs: list[Value]) -> Value:
        if isinstance(module, (_Conv, nn.Linear)):
            return self._layer(path, module, inputs)
        if len(inputs) == 1 and isinstance(module, _Norm) and id(module) not in self.held:
            self._note(path, module, inputs[0])
            return inputs[0]
        return inputs[0] if len(inputs) == 1 and isinstance(module, _PASS) else self._close(inputs)

    def _layer(self, path: str, module: Any, inputs: list[Value]) -> Value:
        (given,) = inputs
        groups = getattr(module, "groups", 1)
        held = id(module) in self.held or _transposed(module)
        if groups > 1 and groups == module.in_channels == module.out_channels and not held:
            self._note(path, module, given)  # depthwise: what goes in comes out
            return given
        made = Space(length(module, OUT))
        if groups > 1 or held:
            made.closed = True  # assumption: grouped and transposed convolutions stay whole, and layers used twice
            self._close(inputs)
        elif given is not None:
            width = sum(space.root().size for space in given)
            if length(module, IN) % width:
                self._close(inputs)
            for place, space in enumerate(given):
                space.root().read.append(Use(path, module, IN, given, place))
        made.made.append(Use(path, module, OUT, (made,), 0))
        self.spaces.append(made)
        return (made,)

    def _note(self, path: str, module: Any, value: Value) -> None:
        """A layer that carries channels through."""
        for place, space in enumerate(value or ()):
            space.root().made.append(Use(path, module, OUT, value or (), place))

    def _join(self, inputs: list[Value]) -> Value:
        """Tensors added or multiplied entry by entry."""
        known = [value for value in inputs if value is not None]
        if len(known) < len(inputs) or len({tuple(s.root().size for s in value) for value in known}) > 1:
            return self._close(inputs)
        for other in known[1:]:
            for a, b in zip(known[0], other, strict=True):
                _merge(a.root(), b.root())
        return known[0]

    def _close(self, inputs: list[Value]) -> Value:
        for space in (space for value in inputs for space in value or ()):
            space.root().closed = True
        return None

    @staticmethod
    def _dim(node: fx.Node) -> Any:
        return node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)

    @staticmethod
    def _pools(node: fx.Node) -> bool:
        """Whether a mean runs over places only."""
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return node.target in ("mean", torch.mean) and dims is not None and set(_listed(dims)) <= {2, 3, -1, -2}


def _listed(dims: Any) -> Iterator[Any]:
    return iter(dims if isinstance(dims, (list, tuple)) else (dims,))


def _transposed(module: Any) -> bool:
    return bool(getattr(module, "transposed", False))


def _merge(a: Space, b: Space) -> None:
    if a is b:
        return
    b.merged, a.closed = a, a.closed or b.closed
    a.made += b.made
    a.read += b.read
