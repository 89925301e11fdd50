"""A residual stream that every sublayer gets in a basis of its own, with fewer directions than the model was built with
(SliceGPT, arXiv 2401.15024, sections 3.3 to 3.4).

Norms have no gain and do not centre: both moved into the linears around them. Between two sublayers the stream is
rotated and cut, so that what passes a sublayer by is multiplied by a small matrix, the shortcut. A sublayer gets one
when the stream in front of it or behind it is turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.weights.adapters.rotation import gain_of

SHORTCUTS = ("attention_shortcut", "mlp_shortcut")
ENTRY = "entry"  # of the first block: the embedding's basis, until it is multiplied into the embedding


class StreamNorm(nn.Module):
    """Divides states by their root mean square over `width` directions, however few of them are left."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, states: Tensor) -> Tensor:
        wide = states.float()
        square = wide.square().sum(-1, keepdim=True) / self.width
        return (wide * torch.rsqrt(square + self.eps)).to(states.dtype)


@dataclass(frozen=True)
class Sublayer:
    """Attention or the MLP of a block, or both where they stand side by side: the `norm` in front by its name, and the
    linears that read the stream and that write to it."""

    block: nn.Module
    norm: str
    shortcut: str
    readers: tuple[nn.Linear, ...]
    writers: tuple[nn.Linear, ...]


@dataclass(frozen=True)
class Sliceable:
    """What of a decoder holds the residual stream."""

    model: Any
    embeddings: tuple[nn.Embedding, ...]  # whose sum enters the first block
    sublayers: tuple[Sublayer, ...]  # in forward order
    final: tuple[nn.Module, str]  # the last norm, by the module that holds it and its name

    @property
    def width(self) -> int:
        return int(self.embeddings[0].weight.shape[1])

    def fuse(self, centre: bool, eps: float | None) -> None:
        """Move gains and means of all norms into the linears around them. `centre` takes the mean out of the
        embeddings, which only models with layer norms bear without change."""
        head = self.model.get_output_embeddings()
        if head.weight is self.model.get_input_embeddings().weight:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
            self.model.config.tie_word_embeddings = False
        norms: list[tuple[Any, str, tuple[nn.Linear, ...]]]
        norms = [(part.block, part.norm, part.readers) for part in self.sublayers]
        layer_norms = centres(getattr(*self.final))
        for holder, name, readers in [*norms, (*self.final, (head,))]:
            norm = getattr(holder, name)
            shift = norm.bias.detach().double() if getattr(norm, "bias", None) is not None else None
            gain = norm.weight.detach().double() if centres(norm) else gain_of(norm)
            for reader in readers:
                if shift is not None:
                    _add_bias(reader, _product(reader.weight, shift.to(reader.weight.device)))
                _write(reader.weight, lambda weight, gain=gain: weight * gain)
            own = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
            setattr(holder, name, StreamNorm(self.width, float(own or 0) if eps is None else eps))
        first = self.sublayers[0].block
        one = torch.eye(self.width, dtype=torch.float64, device=head.weight.device)
        entry = one - 1 / self.width if centre or layer_norms else one
        first.register_buffer(ENTRY, entry, persistent=False)
        for part in self.sublayers:
            for writer in part.writers if layer_norms else ():
                _write(writer.weight, lambda weight: weight - weight.mean(0))
                if writer.bias is not None:
                    _write(writer.bias, lambda bias: bias - bias.mean())

    def turn(self, place: int, basis: Tensor | None, kept: int) -> None:
        """Bring the stream behind sublayer `place` (-1 is the embedding) into a basis [D, D'], of which the first
        `kept` directions stay; without a basis, on the meta device, only the shapes change."""
        head = self.model.get_output_embeddings()
        if basis is None:
            basis = torch.eye(self.width)
        basis = basis.to(head.weight.device, torch.float64)[:, :kept]
        if place < 0:
            first = self.sublayers[0].block
            first.register_buffer(ENTRY, first.get_buffer(ENTRY) @ basis, persistent=False)
        else:
            part = self.sublayers[place]
            for writer in part.writers:
                _replace(writer, "weight", _apply(writer.weight, lambda weight: basis.T @ weight))
                if writer.bias is not None:
                    _replace(writer, "bias", _apply(writer.bias, lambda bias: basis.T @ bias))
                writer.out_features = kept
            self._pass(part, lambda through: through @ basis)
        behind = self.sublayers[place + 1] if place + 1 < len(self.sublayers) else None
        for reader in (head,) if behind is None else behind.readers:
            _replace(reader, "weight", _apply(reader.weight, lambda weight: weight @ basis))
            reader.in_features = kept
        if behind is not None:
            self._pass(behind, lambda through: basis.T @ through)

    def _pass(self, part: Sublayer, change: Any) -> None:
        """Change a sublayer's shortcut, which passes all directions on as they are where there is none yet."""
        weight = part.writers[0].weight
        if not hasattr(part.block, part.shortcut):
            whole = nn.Parameter(torch.eye(self.width).to(weight), requires_grad=weight.requires_grad)
            part.block.register_parameter(part.shortcut, whole)
        through = part.block.get_parameter(part.shortcut)
        _replace(part.block, part.shortcut, _apply(through, change))

    def enter(self) -> None:
        """Multiply the first basis into the embeddings."""
        first: Any = self.sublayers[0].block
        entry = first.entry
        for embedding in self.embeddings:
            _replace(embedding, "weight", _apply(embedding.weight, lambda weight: weight @ entry))
            embedding.embedding_dim = entry.shape[1]
        del first.entry


def sliced_forward(block: Any, own: tuple[str, ...], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A block whose sublayers have shortcuts; `own` are the names of its norms: a single one is in front of attention
    and MLP side by side."""
    x = hidden_states
    if hasattr(block, ENTRY):
        x = (x.double() @ block.entry).to(x.dtype)
    p = getattr(block, "dropout", 0.0) if block.training else 0.0
    normed = getattr(block, own[0])(x)
    added, _ = block.self_attn(normed, *args, **kwargs)
    if len(own) == 1:
        drop = getattr(block, "resid_dropout", nn.Identity())
        return _passed(block, SHORTCUTS[1], x) + drop(added) + drop(block.mlp(normed))
    x = _passed(block, "attention_shortcut", x) + nn.functional.dropout(added, p)
    normed = getattr(block, own[1])(x)
    added = block.mlp(normed) if hasattr(block, "mlp") else block.fc2(block.activation_fn(block.fc1(normed)))
    return _passed(block, "mlp_shortcut", x) + nn.functional.dropout(added, p)


def _passed(block: nn.Module, shortcut: str, x: Tensor) -> Tensor:
    through = getattr(block, shortcut, None)
    return x if through is None else x @ through


def make_sliced(blocks: list[Any], norms: tuple[str, ...]) -> None:
    """Let blocks use their shortcuts."""
    for block in blocks:
        block.forward = partial(sliced_forward, block, norms)


def centres(norm: nn.Module) -> bool:
    """Whether a norm takes the mean out."""
    return isinstance(norm, nn.LayerNorm)


def sliceable(results: Sequence[nn.Module]) -> bool:
    """Whether all of these norms are layer norms with a gain, or all RMS norms."""
    rms = all(type(n).__name__.endswith("RMSNorm") and getattr(n, "bias", None) is None for n in results)
    return rms or all(isinstance(n, nn.LayerNorm) and n.weight is not None for n in results)


def _product(weight: Tensor, vector: Tensor) -> Tensor:
    return weight.detach().double() @ vector


def _add_bias(linear: nn.Linear, bias: Tensor) -> None:
    before = linear.bias
    whole = bias if before is None else before.detach().double() + bias
    linear.bias = nn.Parameter(whole.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)


def _write(parameter: Tensor, change: Any) -> None:
    with torch.no_grad():
        parameter.copy_(change(parameter.double()))


def _apply(parameter: Tensor, change: Any) -> Tensor:
    result: Tensor = change(parameter.detach().double()).to(parameter.dtype)
    return result


def _replace(module: Any, name: str, value: Tensor) -> None:
    before = getattr(module, name)
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=before.requires_grad))
