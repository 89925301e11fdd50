"""The image encoder of a language model, the tower: what its layers give of the patches, the patches that leave it on
the way, and what is made of its features before they are projected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from prunelab.common.core.attention_interface import Recorder
from prunelab.common.core.plan import Gather, Plan
from prunelab.common.tokens.adapters.passes import Pass
from prunelab.common.tokens.adapters.recorded import sources

FEATURES = frozenset({"cls_row", "received"})  # of the layer that gives the features, at later sites by name alone
OWN = frozenset({"hidden", "queries", "keys", "values"})  # of single tokens, the class token among them
READ = FEATURES | OWN  # of any layer of the tower

Part = Literal["patches", "class", "all"]  # the tokens of a crop that something is asked of


@dataclass(frozen=True)
class Decision:
    """What a plan made of images [G] that were decided on together: tokens [G, K, D], from units [crops, units] of
    each image, of which the first `special` of every crop are class tokens."""

    images: Sequence[int]
    tokens: Tensor
    plan: Plan
    shape: tuple[int, int]
    special: int = 0

    def patches(self) -> Tensor | None:
        """[G, K] the patch of each output, None where outputs are more than single patches."""
        reduce = self.plan.reduce
        return reduce.index if isinstance(reduce, Gather) and not self.special else None

    def kept(self) -> Tensor | None:
        """[G, K] the patch of each output, -1 where it is a class token or none; None once units were mixed."""
        reduce = self.plan.reduce
        if not isinstance(reduce, Gather):
            return None
        crop, place = reduce.index // self.shape[1], reduce.index % self.shape[1] - self.special
        index = (crop * (self.shape[1] - self.special) + place).masked_fill(place < 0, -1)
        return index if reduce.valid is None else index.masked_fill(~reduce.valid, -1)


@dataclass
class TowerPass(Pass):
    """One run of the encoder on crops [C, N, D], for which it was given arguments. left: [C, K] the tokens that are
    still there, None for all; total: how many there were; decisions: what goes on of each image's features, where a
    plan says so."""

    left: Tensor | None = None
    modality: str = "image"
    given: Mapping[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    recorders: dict[int, Recorder] = field(default_factory=dict)

    def reduce(self, reduce: Gather) -> None:
        """Tokens leave."""
        self.left = reduce.index if self.left is None else self.left.gather(1, reduce.index)
        for seen in self.seen.values():
            seen.follow(reduce)

    def patches(self, special: int) -> Tensor | None:
        """[C, K] the patches that are still there, None for all."""
        return None if self.left is None else self.left[:, special:] - special

    def own(self, name: str, layer: int, head: int) -> Tensor:
        """A signal of a layer of the tokens that are still there, in the shape that it has at a site."""
        seen = self.seen[layer]
        return seen.now(sources(seen, self.recorders[layer], head)[name](), name)

    def signal(self, name: str, layer: int, head: int, special: int, part: Part = "patches") -> Tensor:
        """The same of every patch or class token, channels last: [C, N, channels]; of those that left, zero."""
        value = self.own(name, layer, head)
        if value.dim() == 4:
            value = value.transpose(1, 2).flatten(2)
        elif name != "hidden":
            value = value.transpose(1, 2)
        first = value[:, :special]
        if part == "class":
            return first
        patches = spread_out(value[:, special:], self.patches(special), self.total - special)
        return patches if part == "patches" else torch.cat([first, patches], 1)

    def projected(self, output: Tensor) -> Tensor:
        """The projector's output [1, M, D] for what goes on is that of the decisions. In its place come features as the
        model expects them, [crops, patches, D], which are replaced later and only serve to know the images again."""
        sizes = [d.tokens.shape[:2].numel() for d in self.decisions]
        parts = output.squeeze(0).split(sizes)
        units = sum(len(d.images) * d.shape[0] * (d.shape[1] - d.special) for d in self.decisions)
        _, patches = self.decisions[0].shape
        self.decisions = [
            replace(d, tokens=part.unflatten(0, d.tokens.shape[:2]))
            for d, part in zip(self.decisions, parts, strict=True)
        ]
        stand = output.new_zeros(units, output.shape[2])
        stand[: output.shape[1]] = output[0, :units]
        return stand.unflatten(0, (-1, patches - self.decisions[0].special))


def shaped(value: Tensor, name: str, head: int) -> Tensor:
    """A signal with its channels last, [B, N, channels], in the shape that it has at a site."""
    if name == "hidden":
        return value
    if name in FEATURES:
        return value.transpose(1, 2)
    return value.unflatten(2, (-1, head)).transpose(1, 2)


def spread_out(value: Tensor, index: Tensor | None, total: int) -> Tensor:
    """Rows [C, K, channels] at the places index [C, K] of `total`, zeros elsewhere; unchanged without an index."""
    if index is None:
        return value
    out = value.new_zeros(len(value), total, value.shape[2])
    return out.scatter(1, index.unsqueeze(-1).expand_as(value), value)
