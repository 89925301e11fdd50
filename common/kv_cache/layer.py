"""One layer of a pruned cache: its entries, whose they are, and where they stood."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather
from prunelab.common.kv_cache.bitmap import Bitmap

BLOCK, BLOCKS = 64, 16  # entries that are packed together while writing, and packed parts before they are made one


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the memory that stands behind the tensors, each block counted once: a view counts all it keeps."""
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(blocks.values())


@dataclass
class Stream:
    """What the layers of one cache share. fresh: which of the tokens at hand are no padding, [B, M] bool, None where
    all are. carry: what the method leaves for all layers. closed_up: columns of the prompt that `shorten` left out."""

    fresh: Tensor | None = None
    carry: dict[str, Any] = field(default_factory=dict)
    closed_up: int = 0


class PrunedLayer(DynamicLayer):
    """Entries [B, KV, N, d] of one layer, fewer than the tokens it has seen.

    It tells its users the tokens seen as its length, so that positions and `generate` go on as if nothing had left.
    places: [B, KV, N] number of each entry's token in its sample. valid: [B, KV, N] entries that count, None while all
    do. counts, prompt: [B] tokens of each sample so far, and in the beginning. tail: entries added since the last
    pruning. shared: whether all heads still hold the same entries.
    """

    def __init__(self, stream: Stream, index: int) -> None:
        super().__init__()
        self.stream, self.index = stream, index
        self.seen = self.tail = self.added = 0
        self.shared = True
        self.packed: list[tuple[Bitmap, Bitmap]] = []
        self._unpacked: list[tuple[Bitmap, Bitmap]] = []  # what `update` unpacked, as it was
        self.places: Tensor
        self.valid: Tensor | None = None
        self.counts: Tensor
        self.prompt: Tensor
        self.marks: dict[str, Tensor] = {}

    # -- what transformers asks for --------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        batch, heads = key_states.shape[:2]
        self.places = torch.zeros(batch, heads, 0, dtype=torch.long, device=self.device)
        self.counts = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.prompt = self.counts
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, new, _ = key_states.shape
        if batch != self.counts.shape[0]:
            raise PrunelabError(f"the cache holds {self.counts.shape[0]} samples, not {batch}; give each batch its own")
        fresh = self.stream.fresh
        real = torch.ones(batch, new, dtype=torch.bool, device=self.device) if fresh is None else fresh
        places = (self.counts.unsqueeze(1) + real.long().cumsum(1) - 1).clamp_min(0)
        if self.valid is not None or fresh is not None:
            before = torch.ones_like(self.places, dtype=torch.bool) if self.valid is None else self.valid
            self.valid = torch.cat([before, real.unsqueeze(1).expand(-1, heads, -1)], -1)
        self.places = torch.cat([self.places, places.unsqueeze(1).expand(-1, heads, -1)], -1)
        self.marks = {name: torch.cat([m, m.new_zeros(batch, heads, new)], -1) for name, m in self.marks.items()}
        first = self.seen == 0
        self.counts = self.counts + real.sum(1)
        self.prompt = self.counts if first else self.prompt
        self.seen, self.tail, self.added = self.seen + new, self.tail + new, new
        self.keys = torch.cat([*(keys.unpack() for keys, _ in self.packed), self.keys, key_states], 2)
        self.values = torch.cat([*(values.unpack() for _, values in self.packed), self.values, value_states], 2)
        self._unpacked, self.packed = self.packed, []
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        gone = abs(tokens_to_remove)
        if gone > self.tail:
            raise PrunelabError(f"cannot take {gone} tokens back: only {self.tail} were added since the last pruning")
        if gone == 0:
            return
        self.unpack()
        left = self.keys.shape[2] - gone
        if self.valid is not None:
            self.counts = self.counts - self.valid[:, 0, left:].sum(-1)
        else:
            self.counts = self.counts - gone
        self.keys, self.values, self.places = (t[:, :, :left] for t in (self.keys, self.values, self.places))
        self.valid = None if self.valid is None else self.valid[:, :, :left]
        self.marks = {name: mark[:, :, :left] for name, mark in self.marks.items()}
        self.seen, self.tail = self.seen - gone, self.tail - gone

    def reset(self) -> None:
        self.__init__(self.stream, self.index)  # type: ignore[misc]
        self.stream.carry.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, 0))

    def _rows(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move whole samples. What the layers share moves with the first of them."""
        if not self.is_initialized:
            return
        self.unpack()
        self.keys, self.values, self.places = move(self.keys), move(self.values), move(self.places)
        self.valid = None if self.valid is None else move(self.valid)
        self.counts, self.prompt = move(self.counts), move(self.prompt)
        self.marks = {name: move(mark) for name, mark in self.marks.items()}
        if self.index == 0:
            carry = self.stream.carry
            carry.update({name: move(value) for name, value in carry.items() if isinstance(value, Tensor)})

    # -- what pruning does -----------------------------------------------------------------------------------------

    def mask(self) -> Tensor | None:
        """Which entries each of the newest queries may attend to, [B, 1 or KV, M, N] bool; None where plain causal
        attention says the same."""
        new, total = self.added, self.keys.shape[2]
        if self.valid is None and (new == 1 or new == total):
            return None
        places = torch.arange(total, device=self.device)
        own = torch.arange(total - new, total, device=self.device).unsqueeze(1)
        causal = places <= own
        if self.valid is None:
            return causal.expand(1, 1, -1, -1)
        valid = self.valid[:, :1] if self.shared else self.valid
        return causal & (valid.unsqueeze(2) | (places == own))

    def keep(self, kept: Gather) -> None:
        """Let every entry go that is not kept."""
        if kept.outputs == self.keys.shape[2] and kept.valid is None:
            return
        self._unpacked = []  # made anew from what stays
        self.keys, self.values = kept.apply(self.keys), kept.apply(self.values)
        self.places = kept.apply(self.places)
        self.marks = {name: kept.apply(mark) for name, mark in self.marks.items()}
        self.valid = kept.valid
        self.shared, self.tail = False, 0

    def forget(self, ahead: int) -> None:
        """The newest `ahead` tokens, which the method has let go, were never part of the sequence."""
        self.seen, self.counts = self.seen - ahead, self.counts - ahead
        self.prompt = self.prompt.clamp(max=self.counts)

    def pack(self, settled: int) -> None:
        """Store the first `settled` entries, which change no more, as bitmaps: all at first, later whole blocks. Called
        behind every `update`, which unpacks them; only what is not packed can be taken back."""
        self.packed, self._unpacked = self._unpacked if len(self._unpacked) < BLOCKS else [], []
        held = sum(keys.shape[2] for keys, _ in self.packed)
        new = max(settled - held, 0)
        end = held + (new if not self.packed else new // BLOCK * BLOCK)
        if end > held:
            self.packed.append((Bitmap.pack(self.keys[:, :, held:end]), Bitmap.pack(self.values[:, :, held:end])))
        self.keys, self.values = self.keys[:, :, end:].clone(), self.values[:, :, end:].clone()
        self.tail = min(self.tail, self.keys.shape[2])

    def unpack(self) -> None:
        """Make all entries dense again."""
        if self.packed:
            self.keys = torch.cat([*(keys.unpack() for keys, _ in self.packed), self.keys], 2)
            self.values = torch.cat([*(values.unpack() for _, values in self.packed), self.values], 2)
            self.packed = []

    def nbytes(self) -> tuple[int, int]:
        """Bytes of keys and values as they are stored, and of what keeps book of them."""
        packed = [tensor for pair in self.packed for bitmap in pair for tensor in bitmap.tensors]
        book = (self.places, self.valid, *self.marks.values())
        return storage_bytes((self.keys, self.values, *packed)), storage_bytes(book)

    def dense_bytes(self) -> int:
        """Bytes of an unpruned layer's keys and values after as many tokens."""
        batch, heads, _, width = self.keys.shape
        tokens = self.seen + self.stream.closed_up
        return batch * heads * tokens * (width + self.values.shape[-1]) * self.keys.element_size()

    def entries(self) -> float:
        """Mean number of entries of a head and sample that count."""
        if self.valid is not None:
            return float(self.valid.sum(-1).float().mean())
        return float(self.places.shape[-1])
