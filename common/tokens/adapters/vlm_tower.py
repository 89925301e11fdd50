"""The image encoder of a language model, the tower: what its layers give of the patches, the patches that leave it on
the way, and what is made of its features before they are projected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.attention_interface import Recorder
from prunelab.common.core.plan import Gather, Mix, Plan
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
    merged: bool = False  # within the tower, which knows the outputs as they are

    def units(self) -> Tensor | None:
        """[G, K] which of the tower's tokens each output is; None where outputs are mixtures of them."""
        reduce = self.plan.reduce
        if self.merged:
            return torch.arange(reduce.outputs, device=self.tokens.device).expand(len(self.images), -1)
        return reduce.index if isinstance(reduce, Gather) else None

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
    """One run of the encoder on crops [C, N, D], for which it was given arguments. reduced: what plans made of the
    tokens; total: how many there were; decisions: what goes on of each image's features, where a plan says so; merged:
    [C, K, D] what the projector made of crops whose tokens were merged."""

    reduced: Gather | Mix | None = None
    merged: Tensor | None = None
    modality: str = "image"
    given: Mapping[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    recorders: dict[int, Recorder] = field(default_factory=dict)

    @property
    def left(self) -> Tensor | None:
        """[C, K] the tokens that are still there; None for all, and where they were merged."""
        return self.reduced.index if isinstance(self.reduced, Gather) else None

    def reduce(self, reduce: Gather | Mix) -> None:
        """Tokens leave, or are merged."""
        self.reduced = reduce if self.reduced is None else followed(self.reduced, reduce, self.total)
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
        return stand_in(output[0], units).unflatten(0, (-1, patches - self.decisions[0].special))

    def features(self, output: Tensor, special: int) -> Tensor:
        """What the projector gave of the tokens that are left, as features of all patches [C, patches, D]: zero where
        one left, so that the others are packed as ever; where they were merged something to stand for them."""
        patches = self.total - special
        if isinstance(self.reduced, Mix):
            self.merged = output
            return stand_in(output.flatten(0, 1), len(output) * patches).unflatten(0, (-1, patches))
        return spread_out(output, self.patches(special), patches)

    def left_of(self, crops: slice, count: int, special: int) -> tuple[Tensor, Mix]:
        """Tokens [G, count * K, D] of images that are these crops, `count` each, where they were merged, and what was
        made of their patches."""
        assert self.merged is not None and isinstance(self.reduced, Mix)
        own = {name: getattr(self.reduced, name)[crops] for name in ("target", "source", "weight")}
        tokens = self.merged[crops].unflatten(0, (-1, count)).flatten(1, 2)
        return tokens, of_images(replace(self.reduced, **own), count, special, self.total - special)


def followed(first: Gather | Mix, then: Gather | Mix, units: int) -> Gather | Mix:
    """One reduction of `units` units after another, as one."""
    if isinstance(first, Gather):
        if isinstance(then, Gather):
            return Gather(first.index.gather(1, then.index))
        return replace(then, source=first.index.gather(1, then.source))
    if isinstance(then, Mix):
        return Mix.from_matrix(then.matrix(first.outputs) @ first.matrix(units))
    place = torch.full((len(then.index), first.outputs), -1, device=then.index.device)
    own = torch.arange(then.outputs, device=then.index.device).expand_as(then.index)
    return remapped(first, place.scatter(1, then.index, own), then.outputs)


def remapped(mix: Mix, place: Tensor, outputs: int) -> Mix:
    """With its outputs at place [C, outputs] among fewer; those at -1 are gone."""
    target = place.gather(1, mix.target)
    return Mix(target.clamp_min(0), mix.source, mix.weight.masked_fill(target < 0, 0), outputs)


def of_images(mix: Mix, crops: int, special: int, units: int) -> Mix:
    """Reductions of crops [G * crops] with `special` class tokens in front of `units` patches, as those of the patches
    of whole images [G, crops * units]."""
    place = torch.arange(mix.outputs, device=mix.target.device).expand(len(mix.target), -1) - special
    bare, outputs = remapped(mix, place, mix.outputs - special), mix.outputs - special
    source = bare.source - special
    weight = bare.weight.masked_fill(source < 0, 0)
    return selection.of_crops(Mix(bare.target, source.clamp_min(0), weight, outputs), crops, units)


def shaped(value: Tensor, name: str, head: int) -> Tensor:
    """A signal with its channels last, [B, N, channels], in the shape that it has at a site."""
    if name == "hidden":
        return value
    if name in FEATURES:
        return value.transpose(1, 2)
    return value.unflatten(2, (-1, head)).transpose(1, 2)


def stand_in(rows: Tensor, count: int) -> Tensor:
    """The rows [M, D] as so many, cut off or filled up with zeros."""
    out = rows.new_zeros(count, rows.shape[1])
    out[: len(rows)] = rows[:count]
    return out


def spread_out(value: Tensor, index: Tensor | None, total: int) -> Tensor:
    """Rows [C, K, channels] at the places index [C, K] of `total`, zeros elsewhere; unchanged without an index."""
    if index is None:
        return value
    out = value.new_zeros(len(value), total, value.shape[2])
    return out.scatter(1, index.unsqueeze(-1).expand_as(value), value)
