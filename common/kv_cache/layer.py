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
class CacheState:
    """What the layers of one cache share.

    memory: what the method leaves for all layers. closed_up: columns of the prompt that the method left out. Of the
    pass at hand: running, whether a method decides about it; fresh [B, M] bool, which of its tokens are no padding,
    None where all are; tree [1, 1, M, T] bool, which of all T tokens so far each of its tokens sees, None where that is
    causal order; ahead, how many tokens at its end a draft wrote, which never stay.
    """

    memory: dict[str, Any] = field(default_factory=dict)
    closed_up: int = 0
    running: bool = False
    fresh: Tensor | None = None
    tree: Tensor | None = None
    ahead: int = 0


class PrunedLayer(DynamicLayer):
    """Entries [B, KV, N, d] of one layer, fewer than the tokens it has seen.

    It tells its users the tokens seen as its length, so that positions and `generate` go on as if nothing had left.
    valid: [B, KV, N] entries that count, None while all do. pads: [B] tokens of each sample so far that were padding,
    None while none was. prompt: tokens that each sample began with. tail: entries added since the last pruning.
    shared: whether all heads still hold the same entries. marks: what the method leaves of each entry, [B, KV, N].
    """

    def __init__(self, state: CacheState, index: int) -> None:
        super().__init__()
        self.state, self.index = state, index
        self.seen = self.tail = self.added = 0
        self.shared = True
        self.packed: list[tuple[Bitmap, Bitmap]] = []
        self._unpacked: list[tuple[Bitmap, Bitmap]] = []  # what `update` unpacked, as it was
        self.valid: Tensor | None = None
        self.pads: Tensor | None = None
        self.prompt: tuple[int, ...] = ()
        self.marks: dict[str, Tensor] = {}
        self._places: Tensor  # of the entries but for the newest ones, whose tokens are the last `_loose` seen
        self._loose = 0

    @property
    def places(self) -> Tensor:
        """Number [B, KV, N] of each entry's token among those of its sample."""
        if self._loose:
            newest = torch.arange(self.seen - self._loose, self.seen, device=self.device)
            self._places = torch.cat([self._places, newest.expand(*self._places.shape[:2], -1)], -1)
            self._loose = 0
        return self._places

    @property
    def counts(self) -> Tensor | int:
        """Tokens [B] of each sample so far, a number where they are equally many."""
        return self.seen if self.pads is None else self.seen - self.pads

    # -- what transformers asks for --------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._places = torch.zeros(*key_states.shape[:2], 0, dtype=torch.long, device=self.device)
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.keys):
            raise PrunelabError(f"the cache holds {len(self.keys)} samples, not {len(key_states)}; give each its own")
        if self.packed:
            self.keys = torch.cat([*(keys.unpack() for keys, _ in self.packed), self.keys], 2)
            self.values = torch.cat([*(values.unpack() for _, values in self.packed), self.values], 2)
        self._unpacked, self.packed = self.packed, []
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self.added = key_states.shape[2]
        if not self.state.running:
            self._outside()
            self.admit(None)
        return self.keys, self.values

    def _outside(self) -> None:
        """Refuse to go on without the method where the model's own masks or positions would be wrong."""
        if self.state.closed_up or self.valid is not None:
            raise PrunelabError(
                "this cache was pruned with padding or a shortened prompt; go on inside the `with` block of the method"
            )

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Without a method at work the entries left are the last columns of the model's mask."""
        entries = self.keys.shape[2] + sum(keys.shape[2] for keys, _ in self.packed) if self.is_initialized else 0
        return entries + query_length, self.seen - entries

    def admit(self, fresh: Tensor | None) -> None:
        """Take the entries in that `update` added; fresh [B, M] bool says which are no padding, None: all."""
        batch, heads, new = len(self.keys), self.keys.shape[1], self.added
        if fresh is None and self.valid is None and self.pads is None:
            self._loose += new
        else:
            real = torch.ones(batch, new, dtype=torch.bool, device=self.device) if fresh is None else fresh
            counts = self.counts if self.pads is None else self.counts.unsqueeze(1)  # type: ignore[union-attr]
            places = (counts + real.long().cumsum(1) - 1).clamp_min(0)
            if self.valid is not None or fresh is not None:
                before = torch.ones_like(self.places, dtype=torch.bool) if self.valid is None else self.valid
                self.valid = torch.cat([before, real.unsqueeze(1).expand(-1, heads, -1)], -1)
            self._places = torch.cat([self.places, places.unsqueeze(1).expand(-1, heads, -1)], -1)
            if fresh is not None:
                pads = (~fresh).sum(1)
                self.pads = pads if self.pads is None else self.pads + pads
        if self.marks:
            self.marks = {name: torch.nn.functional.pad(mark, (0, new)) for name, mark in self.marks.items()}
        if self.seen == 0:
            self.prompt = (new,) * batch if fresh is None else tuple(fresh.sum(1).tolist())
        self.seen, self.tail = self.seen + new, self.tail + new

    def crop(self, tokens_to_remove: int) -> None:
        gone = abs(tokens_to_remove)
        if gone > self.tail:
            raise PrunelabError(f"cannot take {gone} tokens back: only {self.tail} were added since the last pruning")
        if gone:
            self.unpack()
            self._cut(self.keys.shape[2] - gone)

    def _cut(self, left: int) -> None:
        """Let the entries behind the first `left` go, and their tokens with them."""
        gone = self.keys.shape[2] - left
        if self.valid is not None and self.pads is not None:
            self.pads = self.pads - (~self.valid[:, 0, left:]).sum(-1)
        self._places = self.places[:, :, :left]
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        self.valid = None if self.valid is None else self.valid[:, :, :left]
        self.marks = {name: mark[:, :, :left] for name, mark in self.marks.items()}
        self.seen, self.tail = self.seen - gone, self.tail - gone

    def keep_path(self, nodes: Tensor, loose: int) -> None:
        """Of the newest `loose` entries, a draft's tree, keep the path of nodes [A], as the tokens that come next."""
        start = self.keys.shape[2] - loose
        for entries in (self.keys, self.values):
            entries[:, :, start : start + len(nodes)] = entries.index_select(2, start + nodes.to(entries.device))
        self._cut(start + len(nodes))

    def reset(self) -> None:
        self.__init__(self.state, self.index)  # type: ignore[misc]
        self.state.memory.clear()

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
        if len(set(self.prompt)) > 1:
            self.prompt = tuple(move(torch.tensor(self.prompt, device=self.device)).tolist())
        self.keys, self.values, self._places = move(self.keys), move(self.values), move(self.places)
        self.prompt = self.prompt if len(self.prompt) == len(self.keys) else self.prompt[:1] * len(self.keys)
        self.valid = None if self.valid is None else move(self.valid)
        self.pads = None if self.pads is None else move(self.pads)
        self.marks = {name: move(mark) for name, mark in self.marks.items()}
        if self.index == 0:
            memory = self.state.memory
            memory.update({name: move(value) for name, value in memory.items() if isinstance(value, Tensor)})

    # -- what pruning does -----------------------------------------------------------------------------------------

    def mask(self) -> Tensor | None:
        """Which entries each of the newest queries may attend to, [B, 1 or KV, M, N] bool; None where plain causal
        attention says the same."""
        new, total, tree = self.added, self.keys.shape[2], self.state.tree
        if self.valid is None and tree is None and (new == 1 or new == total):
            return None
        order = torch.arange(total, device=self.device)
        own = order[total - new :].unsqueeze(1)
        causal = order <= own
        if tree is not None:  # what came since the last pruning is told apart, what is left of the time before is seen
            causal = torch.nn.functional.pad(tree[..., tree.shape[3] - self.tail :], (total - self.tail, 0), value=True)
        if self.valid is None:
            return causal.expand(1, 1, -1, -1)
        valid = self.valid[:, :1] if self.shared else self.valid
        return causal & (valid.unsqueeze(2) | (order == own))

    def keep(self, kept: Gather) -> None:
        """Let every entry go that is not kept."""
        if kept.outputs == self.keys.shape[2] and kept.valid is None:
            return
        self._unpacked = []  # made anew from what stays
        self.keys, self.values = kept.apply(self.keys), kept.apply(self.values)
        self._places = kept.apply(self.places)
        self.marks = {name: kept.apply(mark) for name, mark in self.marks.items()}
        self.valid = kept.valid
        self.shared, self.tail = False, 0

    def forget(self, ahead: int) -> None:
        """The newest `ahead` tokens, which the method has let go, were never part of the sequence."""
        self._places = self.places
        self.seen = self.seen - ahead
        self.prompt = tuple(length - ahead for length in self.prompt)

    def pack(self, frozen: int) -> None:
        """Store the first `frozen` entries, which change no more, as bitmaps: all at first, later whole blocks. Called
        behind every `update`, which unpacks them; only what is not packed can be taken back."""
        self.packed, self._unpacked = self._unpacked if len(self._unpacked) < BLOCKS else [], []
        held = sum(keys.shape[2] for keys, _ in self.packed)
        new = max(frozen - held, 0)
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
        tokens = self.seen + self.state.closed_up
        return batch * heads * tokens * (width + self.values.shape[-1]) * self.keys.element_size()

    def entries(self) -> float:
        """Mean number of entries of a head and sample that count."""
        if self.valid is not None:
            return float(self.valid.sum(-1).float().mean())
        return float(self.places.shape[-1])
