"""The values that an adapter of image and video language models keeps: prompts, what the encoder gave, and what the
decoder's layers hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Mix
from prunelab.common.tokens.adapters.vlm_tower import TowerPass

SHOWN: ContextVar[Tensor | None] = ContextVar("SHOWN", default=None)  # [B, N] bool: visual tokens of a meta prompt


@dataclass(frozen=True)
class Prompt:
    """A prompt by its shapes, to count costs with: `text` tokens around what `pixels`, the arguments of the model's
    encoder of one `modality`, give."""

    pixels: Mapping[str, Any]
    text: int = 64  # assumption: a system prompt and a short question
    modality: str = "image"

    def to(self, device: str) -> Prompt:
        """With its pixels on that device; sizes of images are values and stay."""
        moved = {k: v.to(device) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in self.pixels.items()}
        return replace(self, pixels=moved)

    def encoding(self) -> Encoding:
        """The same without the prefill."""
        return Encoding(self)

    def encode(self, model: Any) -> list[Tensor]:
        """Visual tokens [..., D] of each image, video or frame."""
        encode = getattr(model.model, f"get_{self.modality}_features")
        tokens: list[Tensor] = encode(**self.pixels, return_dict=True).pooler_output
        return tokens

    def run(self, model: Any) -> Any:
        """Encoder and prefill, with the output layer for the last token alone, as in `generate`. Which tokens are
        visual is told beside the forward, since ids have no values here."""
        count = sum(tokens.shape[:-1].numel() for tokens in self.encode(model))
        weight = model.get_input_embeddings().weight
        sequence = torch.empty(1, self.text + count, weight.shape[1], dtype=weight.dtype, device=weight.device)
        visual = torch.zeros(1, self.text + count, dtype=torch.bool)
        visual[:, self.text // 2 : self.text // 2 + count] = True
        token = SHOWN.set(visual)
        try:
            positions = torch.arange(self.text + count, device=weight.device).unsqueeze(0)
            given = {"inputs_embeds": sequence, "position_ids": positions, "logits_to_keep": 1}
            return model(**given, **self.more(model))
        finally:
            SHOWN.reset(token)

    def more(self, model: Any) -> dict[str, Any]:
        """What else the model's forward needs on the meta device."""
        return {}


@dataclass(frozen=True)
class Encoding:
    """The encoder's part of a prompt alone."""

    prompt: Prompt

    def to(self, device: str) -> Encoding:
        """See `Prompt.to`."""
        return Encoding(self.prompt.to(device))

    def run(self, model: Any) -> Any:
        """See `Prompt.encode`."""
        return self.prompt.encode(model)


@dataclass
class Encoded:
    """What the encoder made of a batch's images or videos.

    lengths: packed tokens of each; features: [crops, patches, D] of each behind the projector, before they are packed;
    pack: the way from patches to tokens for anything known of patches, [crops, patches, C] of each -> [tokens, C] of
    each, newlines at zero; seen: the run of the tower, one row of its batch a crop.
    """

    lengths: list[int]
    features: list[Tensor]
    pack: Callable[[Sequence[Tensor]], list[Tensor]]
    grids: list[tuple[int, int]]  # patches of each one's crops
    seen: TowerPass
    first: Tensor  # packed tokens of the first one, to know it again
    mosaics: Sequence[tuple[int, int] | None] = ()  # rows and columns of the crops behind a thumbnail
    known: list[Tensor | None] | None = None  # what `order` found

    def gave(self, output: Any) -> bool:
        """Whether an encoder's output, handed to the model as it is, is the one noted here."""
        if output is None:
            return False
        first = output.pooler_output[0]
        same = first.data_ptr() == self.first.data_ptr() and first.shape == self.first.shape
        return same or torch.equal(first, self.first)

    def bounds(self) -> list[int]:
        """The number of each image's first crop."""
        return list(accumulate((len(features) for features in self.features[:-1]), initial=0))

    def order(self) -> list[Tensor | None]:
        """The patch [tokens] behind each packed token of each image, -1 for newlines; None where tokens are mixtures
        of patches."""
        if self.known is None:
            self.known = self._order()
        return self.known

    def packed(self, images: Sequence[int], values: Tensor) -> Tensor:
        """Values [G, crops * patches] of some images' patches as those of their packed tokens [G, tokens], newlines'
        0."""
        laid = [values.new_zeros(*f.shape[:2], 1) for f in self.features]
        for image, own in zip(images, values, strict=True):
            laid[image] = own.view(*self.features[image].shape[:2], 1)
        packed = self.pack(laid)
        return torch.stack([packed[image].squeeze(1) for image in images])

    def alike(self) -> list[list[int]]:
        """The numbers of images whose crops are laid out alike, group by group: a plan can be made for them
        together."""
        keys = []
        for features, grid, order in zip(self.features, self.grids, self.order(), strict=True):
            keys.append((features.shape, grid, None if order is None else order.numpy().tobytes()))
        return [[i for i, key in enumerate(keys) if key == group] for group in dict.fromkeys(keys)]

    def _order(self) -> list[Tensor | None]:
        results: list[Tensor | None] = []
        numbers = [torch.arange(1, 1 + f.shape[0] * f.shape[1], dtype=torch.float64) for f in self.features]
        laid = [torch.stack([n, n**2], -1).view(*f.shape[:2], 2) for n, f in zip(numbers, self.features, strict=True)]
        for packed in self.pack(laid):
            ids, squares = packed.unbind(1)
            mixed = bool((squares - ids**2 > 0.05).any())  # the mean square of unlike numbers is above that of the mean
            results.append(None if mixed else ids.round().long() - 1)
        return results

    def newlines(self) -> list[int]:
        """How many of each image's packed tokens are newlines."""
        packed = self.pack([torch.ones(*f.shape[:2], 1) for f in self.features])
        return [int((tokens == 0).sum()) for tokens in packed]

    def read(self) -> list[int]:
        """How many tokens a decoder reads of each image, newlines apart."""
        return [length - breaks for length, breaks in zip(self.lengths, self.newlines(), strict=True)]

    def patches(self, masses: Sequence[Tensor]) -> list[Tensor]:
        """Masses [tokens] of each image's packed tokens handed back to the patches [crops, patches] they are made of,
        newlines' to none: the transpose of packing, which is linear."""
        with torch.inference_mode(False), torch.enable_grad():
            laid = [torch.zeros(*f.shape[:2], 1, requires_grad=True) for f in self.features]
            packed = self.pack(laid)
            total = sum((t.squeeze(1) * m.cpu().clone()).sum() for t, m in zip(packed, masses, strict=True))
            return list(torch.autograd.grad(torch.as_tensor(total), laid))  # [crops, patches, 1]

    def owners(self, counts: Sequence[int]) -> list[list[int]]:
        """The images of each row of a batch, by the visual tokens it holds; beams repeat a sample's images."""
        copies, rest = divmod(sum(counts), max(1, sum(self.lengths)))
        if rest or not copies:
            raise disagreement(sum(counts), sum(self.lengths))
        results, image = [], 0
        for count in counts[::copies]:
            first, held = image, 0
            while held < count:
                held, image = held + self.lengths[image], image + 1
            if held != count:
                raise PrunelabError("an image's features are split between two samples; order images as their prompts")
            results += [list(range(first, image))] * copies
        return results


def disagreement(placeholders: int, features: int) -> PrunelabError:
    """What to say where a prompt has not one placeholder for each visual token."""
    if not placeholders:
        return PrunelabError("the prompt holds no visual token; put the processor's image or video token into it")
    return PrunelabError(
        f"the prompt has {placeholders} placeholders for {features} visual features; give each image or video as many"
        " as the model's processor does"
    )


@dataclass
class Held:
    """The prompt as the decoder's layers from `layer` on keep it in their caches."""

    layer: int
    source: Tensor  # [B, K] index of each entry in the prompt
    valid: Tensor | None  # [B, K]
    shift: Tensor  # [..., B] by how much later tokens are numbered lower than the model would number them
    bias: Tensor | None = None  # [B, K] added to the logits of attention to each entry
    index: Tensor | None = None  # [B, K] which entries of the layers before these are; None where tokens were mixed

    def rows(self, index: Tensor) -> Held:
        """Of other samples."""
        index = index.to(self.source.device)
        valid = None if self.valid is None else self.valid[index]
        bias = None if self.bias is None else self.bias[index]
        entries = None if self.index is None else self.index[index]
        return Held(self.layer, self.source[index], valid, self.shift[..., index], bias, entries)


@dataclass
class CachedPrompt:
    """What the layers hold of one prompt, where that was visual, [B, N] bool, and the number [..., B] that follows its
    last token's."""

    held: list[Held]
    visual: Tensor
    end: Tensor
    renumbers: bool = False  # the numbers of later tokens that come with them are of no use

    def at(self, layer: int) -> Held:
        """What a layer holds."""
        return [entry for entry in self.held if entry.layer <= layer][-1]

    def follow(self, cache: Any) -> None:
        """Be reordered along with the cache, as beam search does."""

        def watch(name: str) -> None:
            original = getattr(type(cache), name)

            @functools.wraps(original)
            def reorder(index: Tensor, *args: Any, **kwargs: Any) -> Any:
                self.held, self.end = [entry.rows(index) for entry in self.held], self.end[..., index]
                self.visual = self.visual[index.to(self.visual.device)]
                return original(cache, index, *args, **kwargs)

            setattr(cache, name, reorder)

        for name in ("reorder_cache", "batch_select_indices"):
            watch(name)


@dataclass
class Fresh:
    """One image or video behind a plan: its tokens [K, D], newlines included, for each the packed token it is (None:
    none), and how masses [K] over them become masses over its patches [crops, patches]. units: which of the tower's
    tokens each of them is, -1 for newlines (None: mixtures); special: whether its class tokens are counted there;
    groups: [K] see `Plan`; carried: [K, E] see `Prefill`; bias: [K] of the attention paid to each (None: 0)."""

    tokens: Tensor
    source_index: Tensor | None
    back: Callable[[Tensor], Tensor]
    units: Tensor | None = None
    special: bool = False
    groups: Tensor | None = None
    carried: Tensor | None = None
    bias: Tensor | None = None


def grouped(images: Sequence[Fresh], behind: int, rows: Tensor) -> Tensor | None:
    """[B, N] the groups of the tokens with the numbers rows [B, N], of which the first `behind` are no images'; those
    of different images are unlike. None where no plan named any."""
    if all(image.groups is None for image in images):
        return None
    parts = [rows.new_full((behind,), -1)]
    for number, image in enumerate(images):
        own = rows.new_full((len(image.tokens),), -1) if image.groups is None else image.groups.to(rows)
        parts.append(torch.where(own < 0, own, own + (number << 32)))
    return torch.cat(parts)[rows]


@dataclass
class Span:
    """One image or video in a sample: its indices [tokens] in the prompt, the numbers [K] of the tokens that come there
    instead, and which of its packed tokens each of them is (None: none, they stand at the first)."""

    indices: Tensor
    rows: Tensor
    source_index: Tensor | None


def spliced(words: Tensor, rows: Tensor, spans: Sequence[Span], device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers and indices [K] of a sample's sequence: its words (numbers `rows`, indices `words`) with each span's new
    tokens where the span began."""
    starts = torch.tensor([int(span.indices[0]) for span in spans], device=device)
    order = starts.argsort().tolist()
    cuts = torch.searchsorted(words, starts[order]).tolist()
    pieces: list[Tensor] = []
    indices: list[Tensor] = []
    before = 0
    for cut, i in zip(cuts, order, strict=True):
        span = spans[i]
        pieces += [rows[before:cut], span.rows]
        home = span.indices.to(rows.device)
        stand = home[:1].expand(len(span.rows)) if span.source_index is None else home[span.source_index]
        indices += [words[before:cut].to(rows.device), stand]
        before = cut
    return torch.cat([*pieces, rows[before:]]), torch.cat([*indices, words[before:].to(rows.device)])


def heaviest(reduce: Gather | Mix, units: int) -> Tensor:
    """[B, K] the unit that has the largest part in each output."""
    return reduce.index if isinstance(reduce, Gather) else reduce.matrix(units).abs().argmax(-1)


def following(positions: Tensor, valid: Tensor | None) -> Tensor:
    """[..., B] the number behind that of each sample's last token, for positions [..., B, N]."""
    if valid is None:
        return positions[..., -1] + 1
    last = valid.shape[1] - 1 - valid.flip(1).int().argmax(1, keepdim=True)
    return positions.gather(-1, last.expand(*positions.shape[:-1], 1)).squeeze(-1) + 1


def closed(positions: Tensor, valid: Tensor | None) -> Tensor:
    """Positions [..., B, K] without gaps: one after the other, or, with several axes, the rank of each number among
    those in use on any axis. Invalid entries have no say."""
    count = torch.ones(positions.shape[-2:], dtype=torch.long, device=positions.device)
    count = count if valid is None else valid.long()
    plain = (count.cumsum(1) - 1).clamp_min(0)
    if positions.dim() == 2 or positions.device.type == "meta":
        return plain.expand_as(positions)
    if len(positions) > 3:  # `generate` puts the numbers of the tokens as text in front
        return torch.cat([plain.unsqueeze(0), closed(positions[1:], valid)])
    flat = positions.transpose(0, 1).flatten(1)  # [B, axes * K]
    used = flat.new_zeros(len(flat), int(flat.max()) + 1)
    used = used.scatter_reduce(1, flat, count.repeat(1, len(positions)), "amax")
    rank = (used.cumsum(1) - 1).clamp_min(0).gather(1, flat)
    return rank.unflatten(1, (len(positions), -1)).transpose(0, 1)


def grid_places(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[K, 3] frame (or crop), row and column of patches [K] that are counted frame by frame in grids of such size."""
    height, width = grid
    return torch.stack([patches // (height * width), patches // width % height, patches % width], 1)


def newline_order(count: int, layout: Tensor | None, every: str, device: torch.device) -> Tensor:
    """Numbers of `count` tokens, one after the other, with -1 for a newline behind each row of the layout [count, 3]
    that holds a token (`row`; none behind tokens without a place, which are -1), or behind the last token (`end`, and
    wherever there is no layout)."""
    if every == "row" and layout is not None:
        turns = (layout[1:, :2] != layout[:-1, :2]).any(1)
        ends = (torch.cat([turns, turns.new_ones(1)]) & (layout[:, 0] >= 0)).nonzero().squeeze(1).to(device)
    else:
        ends = torch.tensor([count - 1], device=device)
    numbers = torch.arange(count, device=device)
    indices = numbers + torch.searchsorted(ends, numbers)  # newlines before each token
    return numbers.new_full((count + len(ends),), -1).index_copy(0, indices, numbers)


def with_newlines(tokens: Tensor, layout: Tensor | None, newline: Tensor, every: str) -> Tensor:
    """Tokens [K, D] with the newline vector [D] where `newline_order` has one."""
    order = newline_order(len(tokens), layout, every, tokens.device)
    return torch.cat([tokens, newline.to(tokens).unsqueeze(0)])[order]


def in_packed_order(patches: Tensor, order: Tensor, total: int, newlines: bool) -> tuple[Tensor, Tensor]:
    """How tokens that are the patches [K] of `total` follow each other in the order of the packed sequence's patches
    [tokens]: their numbers, with -1, where there are newlines, behind each row that still holds one. Patches that
    packing cuts off go. Also the packed token that each of them is."""
    if patches.device.type == "meta":  # which rows still hold a token is in the values; all are taken to
        numbers = torch.arange(len(patches) + (int((order < 0).sum()) if newlines else 0), device=patches.device)
        return numbers, numbers
    order = order.to(patches.device)
    slot = torch.full((total + 1,), -1, device=patches.device)
    slot[patches] = torch.arange(len(patches), device=patches.device)
    result = slot[order]  # newlines, -1, read the spare last slot
    keep = result >= 0
    if newlines:
        held, at = keep.long().cumsum(0), (order < 0).nonzero().squeeze(1)
        since = torch.cat([held.new_zeros(1), held[at]])
        keep = keep.index_put((at,), since[1:] > since[:-1])  # rows since the newline before
    source_index = keep.nonzero().squeeze(1)
    return result[source_index], source_index
