"""The values that an adapter of image and video language models keeps: prompts, what the encoder gave, and what the
decoder's layers hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.adapters.recording import Recorder
from common.errors import PrunelabError
from common.types import Gather, Mix

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

    def run(self, model: Any) -> Any:
        """Encoder and prefill. Which tokens are visual is told beside the forward, since ids have no values here."""
        encode = getattr(model.model, f"get_{self.modality}_features")
        count = sum(len(tokens) for tokens in encode(**self.pixels, return_dict=True).pooler_output)
        weight = model.get_input_embeddings().weight
        sequence = torch.empty(1, self.text + count, weight.shape[1], dtype=weight.dtype, device=weight.device)
        visual = torch.zeros(1, self.text + count, dtype=torch.bool)
        visual[:, self.text // 2 : self.text // 2 + count] = True
        token = SHOWN.set(visual)
        try:
            positions = torch.arange(self.text + count, device=weight.device).unsqueeze(0)
            return model(inputs_embeds=sequence, position_ids=positions)
        finally:
            SHOWN.reset(token)


@dataclass
class Encoded:
    """What the encoder made of a batch's images or videos.

    lengths: packed tokens of each; features: [crops, patches, D] of each behind the projector, before they are packed;
    pack: the way from patches to tokens for anything known of patches, [crops, patches, C] of each -> [tokens, C] of
    each, newlines at zero; seen: the tower's attention, one row of its batch a crop.
    """

    lengths: list[int]
    features: list[Tensor]
    pack: Callable[[Sequence[Tensor]], list[Tensor]]
    grids: list[tuple[int, int]]  # patches of each one's crops
    seen: Recorder | None
    first: Tensor  # packed tokens of the first one, to know it again

    def gave(self, output: Any) -> bool:
        """Whether an encoder's output, handed to the model as it is, is the one noted here."""
        return output is not None and torch.equal(output.pooler_output[0], self.first)

    def order(self) -> list[Tensor | None]:
        """The patch [tokens] behind each packed token of each image, -1 for newlines; None where tokens are mixtures
        of patches."""
        counts = [f.shape[0] * f.shape[1] for f in self.features]
        numbers = [torch.arange(1, 1 + n, dtype=torch.float64) for n in counts]
        laid = [n.view(*f.shape[:2], 1) for n, f in zip(numbers, self.features, strict=True)]
        found: list[Tensor | None] = []
        for packed in self.pack(laid):
            ids = packed.flatten()
            real = ids[ids > 0]
            exact = bool((real == real.round()).all()) and len(real.unique()) == len(real)
            found.append(ids.long() - 1 if exact else None)
        return found

    def owners(self, counts: Sequence[int]) -> list[list[int]]:
        """The images of each row of a batch, by the visual tokens it holds; beams repeat a sample's images."""
        copies, rest = divmod(sum(counts), max(1, sum(self.lengths)))
        if rest or not copies:
            raise PrunelabError(
                f"the prompt has {sum(counts)} placeholders for {sum(self.lengths)} visual features; give each image"
                " as many placeholders as the model's processor does"
            )
        found, image = [], 0
        for count in counts[::copies]:
            first, held = image, 0
            while held < count:
                held, image = held + self.lengths[image], image + 1
            if held != count:
                raise PrunelabError("an image's features are split between two samples; order images as their prompts")
            found += [list(range(first, image))] * copies
        return found


@dataclass
class Held:
    """The prompt as the decoder's layers from `layer` on keep it in their caches."""

    layer: int
    places: Tensor  # [B, K] place of each entry in the prompt
    valid: Tensor | None  # [B, K]
    shift: Tensor  # [..., B] by how much later tokens are numbered lower than the model would number them

    def rows(self, index: Tensor) -> Held:
        """Of other samples."""
        index = index.to(self.places.device)
        valid = None if self.valid is None else self.valid[index]
        return Held(self.layer, self.places[index], valid, self.shift[..., index])


@dataclass
class Pass:
    """One prompt on its way: what the layers hold of it, and the number [..., B] that follows its last token's."""

    held: list[Held]
    end: Tensor

    def follow(self, cache: Any) -> None:
        """Be reordered along with the cache, as beam search does."""

        def watch(name: str) -> None:
            original = getattr(type(cache), name)

            @functools.wraps(original)
            def reorder(index: Tensor, *args: Any, **kwargs: Any) -> Any:
                self.held, self.end = [entry.rows(index) for entry in self.held], self.end[..., index]
                return original(cache, index, *args, **kwargs)

            setattr(cache, name, reorder)

        for name in ("reorder_cache", "batch_select_indices"):
            watch(name)


@dataclass
class Span:
    """One image or video in a sample: its places [tokens] in the prompt, the numbers [K] of the tokens that come there
    instead, and which of its packed tokens each of them is (None: none, they stand at the first)."""

    places: Tensor
    rows: Tensor
    seats: Tensor | None


def spliced(words: Tensor, rows: Tensor, spans: Sequence[Span], device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers and places [K] of a sample's sequence: its words (numbers `rows`, places `words`) with each span's new
    tokens where the span began."""
    starts = torch.tensor([int(span.places[0]) for span in spans], device=device)
    order = starts.argsort().tolist()
    cuts = torch.searchsorted(words, starts[order]).tolist()
    pieces: list[Tensor] = []
    places: list[Tensor] = []
    before = 0
    for cut, i in zip(cuts, order, strict=True):
        span = spans[i]
        pieces += [rows[before:cut], span.rows]
        home = span.places.to(rows.device)
        stand = home[:1].expand(len(span.rows)) if span.seats is None else home[span.seats]
        places += [words[before:cut].to(rows.device), stand]
        before = cut
    return torch.cat([*pieces, rows[before:]]), torch.cat([*places, words[before:].to(rows.device)])


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


def with_newlines(tokens: Tensor, layout: Tensor | None, newline: Tensor, every: str) -> Tensor:
    """Tokens [K, D] with the newline vector [D] behind each row of the layout [K, 3] that holds a token (`row`), or
    behind the last token (`end`, and wherever there is no layout)."""
    if every == "row" and layout is not None:
        turns = (layout[1:, :2] != layout[:-1, :2]).any(1)
        ends = torch.cat([turns, turns.new_ones(1)]).nonzero().squeeze(1)
    else:
        ends = torch.tensor([len(tokens) - 1], device=tokens.device)
    slots = torch.arange(len(tokens), device=tokens.device)
    slots = slots + torch.searchsorted(ends, slots)  # newlines before each token
    out = newline.to(tokens).expand(len(tokens) + len(ends), -1)
    return out.index_copy(0, slots, tokens)
