"""The layers of a pruned cache: their entries, whose they are, and where they stood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    causal order; ahead, how many tokens at its end a draft wrote, which never stay. stack: all layers' entries in one,
    where they are kept so; each layer's own stand empty then.
    """

    memory: dict[str, Any] = field(default_factory=dict)
    closed_up: int = 0
    running: bool = False
    fresh: Tensor | None = None
    tree: Tensor | None = None
    ahead: int = 0
    stack: Stack | Growing | Cascade | None = None

    def unstack(self) -> None:
        """Give every layer its own entries back."""
        stack, self.stack = self.stack, None
        if stack is not None:
            stack.dissolve()


class AllButOne(Gather):
    """Of `entries` of each head all but the `worst` [B, KV, 1] stay. The index [B, KV, K] is made when it is read."""

    worst: Tensor
    entries: int

    def __init__(self, worst: Tensor, entries: int) -> None:
        self.__dict__.update(worst=worst, entries=entries, valid=None)

    def __getattr__(self, name: str) -> Tensor:
        if name != "index":
            raise AttributeError(name)
        order = torch.arange(self.entries - 1, device=self.worst.device)
        self.__dict__["index"] = order + (order >= self.worst)
        return self.index

    @property
    def outputs(self) -> int:
        return self.entries - 1


class Stack:
    """The entries of all layers side by side, so that what a step decides is carried out at once.

    held: keys and values [L, B, KV, K + 1, d], of which each head has one place free, where its next token goes:
    nothing else moves, and the entries stand in no order. indices and marks: [L B, KV, K + 1], as if the next token had
    come. queries: those of the step at hand, a layer each.
    """

    def __init__(self, layers: Sequence[PrunedLayer]) -> None:
        self.layers = layers
        first = layers[0]
        self.entries = first.keys.shape[2]
        self.held = self._stacked([layer.keys for layer in layers]), self._stacked([layer.values for layer in layers])
        indices = self._stacked([layer.indices for layer in layers])
        indices[..., -1] = first.seen
        marks = {name: self._stacked([layer.marks[name] for layer in layers]) for name in first.marks}
        self.marks = {name: mark.flatten(0, 1) for name, mark in marks.items()}
        self.keys, self.values, self.indices = (part.flatten(0, 1) for part in (*self.held, indices))
        self._views = list(zip(*(part.unbind() for part in self.held)))
        self._rows = list(zip(*(part.flatten(1, 3).unbind() for part in self.held)))  # [B KV (K + 1), d] of each layer
        depth, batch, heads, places = indices.shape
        self._first = places * torch.arange(batch * heads, device=self.indices.device)  # row of each head's first place
        self._free = [self._first + places - 1] * depth  # [B KV] row of each head's free place, a layer each
        self.queries: list[Tensor] = []
        self.scale = 1.0
        self._attended = 0  # layers of the step at hand whose attention `_whole` has, [L B, KV, G, K + 1]
        self._whole: Tensor | None = None
        self._weights: Sequence[Tensor] = ()  # [B KV, G, K + 1] of each layer therein
        self._pairs = list(zip(*(part.flatten(1, 2).unbind() for part in self.held)))  # [B KV, K + 1, d] of each layer
        for layer in layers:
            layer.empty()

    @staticmethod
    def _stacked(parts: list[Tensor]) -> Tensor:
        """[L, B, KV, K + 1, ...] of [B, KV, K, ...] each."""
        held = torch.stack(parts)
        return torch.cat([held, torch.zeros_like(held[:, :, :, :1])], 3)

    @property
    def inference(self) -> bool:
        """Whether the tensors can be changed in inference mode alone."""
        return self.indices.is_inference()

    def begin(self) -> None:
        """A step begins, in which no layer has written yet."""
        self.queries, self._attended = [], 0
        for layer in self.layers:
            layer.added = 0

    def attend(self, layer: int, queries: Tensor, scale: float) -> Tensor:
        """What the heads of a layer put out, [B, 1, H, d], for one token's queries [B, H, 1, d]. All entries are seen,
        so that this is two products, between which the attention stands that else is computed again to be read."""
        keys, values = self._pairs[layer]
        batch, heads, _, width = queries.shape
        group = batch * heads // len(keys)
        if self._whole is None:
            self._whole = keys.new_empty(*self.indices.shape[:2], group, keys.shape[1])
            self._weights = self._whole.view(len(self.layers), len(keys), group, keys.shape[1]).unbind()
        weights, self._attended = self._weights[layer], self._attended + 1
        torch.baddbmm(weights, queries.reshape(len(keys), group, width), keys.mT, beta=0, alpha=scale, out=weights)
        torch.softmax(weights, -1, out=weights)
        return torch.bmm(weights, values).view(batch, 1, heads, -1)

    @property
    def attention(self) -> Tensor | None:
        """What a step's queries pay the entries, [L B, KV, G, K + 1], where `attend` computed it in every layer."""
        return self._whole if self._attended == len(self.layers) else None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put one token's keys and values [B, KV, 1, d] into the free place; all entries of the layer."""
        free, (all_keys, all_values) = self._free[layer], self._rows[layer]
        all_keys.index_copy_(0, free, keys.flatten(0, 2))
        all_values.index_copy_(0, free, values.flatten(0, 2))
        return self._views[layer]

    def keep(self, kept: Gather, marks: dict[str, Tensor]) -> bool:
        """Let go what a step does not keep, of entries [L B, KV, K + 1] with the marks that the method left. False, and
        nothing done, where other than K entries of each head stay."""
        if kept.valid is not None or kept.outputs != self.entries:
            return False
        if isinstance(kept, AllButOne):
            worst = kept.worst
        else:  # all places add up to this
            worst = self.entries * (self.entries + 1) // 2 - kept.index.sum(-1, keepdim=True)
        self._free = list((worst.view(len(self.layers), -1) + self._first).unbind())
        self.indices.scatter_(-1, worst, self.layers[0].seen)
        self.marks = {name: mark.scatter(-1, worst, 0) for name, mark in marks.items()}
        return True

    def dissolve(self) -> None:
        """Give the layers back what they hold, in order: K entries, and one more where the step at hand has written it.
        The free place is that of the token to come, and so the last one."""
        samples = len(self.indices) // len(self.layers)
        order = self.indices.argsort(-1)
        for i, layer in enumerate(self.layers):
            own = slice(i * samples, (i + 1) * samples)
            first = order[own, :, : self.entries + (layer.added if layer.state.running else 0)]
            keys, values = (part[own].take_along_dim(first.unsqueeze(-1), 2) for part in (self.keys, self.values))
            marks = {name: mark[own].gather(-1, first) for name, mark in self.marks.items()}
            layer.fill((keys, values, self.indices[own].gather(-1, first)), marks)


class Growing:
    """The dense entries of all layers side by side while single tokens are written, of which none leaves.

    held: keys and values [L, B, KV, C, d]; the first `entries` of their places are taken. frozen: how many of the first
    of so many entries cannot be taken back.
    """

    ROOM = 64  # places that are made at once

    def __init__(self, layers: Sequence[PrunedLayer], frozen: Callable[[int], int]) -> None:
        self.layers, self.frozen = layers, frozen
        self.entries = layers[0].seen
        held: list[Tensor] = []
        for layer in layers:
            layer.unpack()
            for number, part in enumerate((layer.keys, layer.values)):
                if layer is layers[0]:
                    held.append(self._room(part, len(layers)))
                held[number][layer.index, :, :, : self.entries] = part
            layer.empty()
        self.held = held[0], held[1]

    def _room(self, part: Tensor, depth: int) -> Tensor:
        """[L, B, KV, C, d] for a layer's [B, KV, N, d] and what comes."""
        return part.new_zeros(depth, *part.shape[:2], part.shape[2] + self.ROOM, part.shape[3])

    @property
    def inference(self) -> bool:
        """Whether the tensors can be changed in inference mode alone."""
        return self.held[0].is_inference()

    @property
    def now(self) -> tuple[Tensor, Tensor]:
        """Keys and values [L B, KV, N, d], the step's own among them."""
        keys, values = (part.flatten(0, 1)[:, :, : self.entries + 1] for part in self.held)
        return keys, values

    def begin(self) -> None:
        """A step begins, in which no layer has written yet."""
        if self.entries == self.held[0].shape[3]:
            keys, values = (torch.cat([p, p.new_zeros(*p.shape[:3], self.ROOM, p.shape[4])], 3) for p in self.held)
            self.held = keys, values
        self._views = list(zip(*(part.narrow(3, 0, self.entries + 1).unbind() for part in self.held)))
        self._slots = list(zip(*(part.narrow(3, self.entries, 1).unbind() for part in self.held)))
        for layer in self.layers:
            layer.added = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put one token's keys and values [B, KV, 1, d] behind the others; all entries of the layer."""
        for slot, new in zip(self._slots[layer], (keys, values)):
            slot.copy_(new)
        return self._views[layer]

    def dissolve(self) -> None:
        """Give the layers back what they hold, and one more where the step at hand has written it."""
        for i, layer in enumerate(self.layers):
            count = self.entries + (layer.added if layer.state.running else 0)
            keys, values = (part[i, :, :, :count].clone() for part in self.held)
            layer.fill((keys, values, layer._indices), {})
            layer._loose, layer.tail = count, min(layer.tail, count - self.frozen(count))


class Cascade:
    """The entries of layers that all hold the same tokens, of which the first decides in every step for all of them.

    held: keys and values [L, B, KV, K + 1, d]. The first layer writes the next token behind its K entries, and the
    others in the place of the one that left then: nothing else moves, and the entries stand in no order. indices
    [B, K + 1]: their tokens'; worth [B, K + 1]: what these add up to, by `memory["importance"]` of all tokens so far.
    """

    WORTH = "importance"

    def __init__(self, layers: Sequence[PrunedLayer]) -> None:
        self.layers = layers
        first = layers[0]
        self.entries = first.keys.shape[2]
        keys, values = (torch.stack(part) for part in zip(*((layer.keys, layer.values) for layer in layers)))
        room = (torch.cat([p, torch.zeros_like(p[:, :, :, :1])], 3) for p in (keys, values))
        self.held: tuple[Tensor, Tensor] = (next(room), next(room))
        self.indices = torch.nn.functional.pad(first.indices[:, 0], (0, 1))
        self.before = self.indices  # those of layers that the step at hand has not reached
        memory = first.state.memory
        worth = memory[self.WORTH].gather(1, first.indices[:, 0])
        self.worth = torch.nn.functional.pad(worth, (0, 1))
        _, batch, heads, places, _ = self.held[0].shape
        self._rows = list(zip(*(part.flatten(1, 3).unbind() for part in self.held)))  # [B KV (K + 1), d] of each layer
        views = list(zip(*(part.narrow(3, 0, self.entries).unbind() for part in self.held)))
        self._views = [tuple(part[0] for part in self.held), *views[1:]]
        self._first = places * torch.arange(batch * heads, device=self.indices.device)  # row of each head's first place
        self._last = self._first + self.entries
        self._free = self._last
        for layer in layers:
            layer.empty()

    @property
    def inference(self) -> bool:
        """Whether the tensors can be changed in inference mode alone."""
        return self.worth.is_inference()

    def begin(self) -> None:
        """A step begins, in which no layer has written yet."""
        self._free, self.before = self._last, self.indices
        self.indices = self.before.clone()
        self.indices[:, -1] = self.layers[0].seen
        for layer in self.layers:
            layer.added = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put one token's keys and values [B, KV, 1, d] into the free place; all entries of the layer."""
        for rows, new in zip(self._rows[layer], (keys, values)):
            rows.index_copy_(0, self._free, new.flatten(0, 2))
        results: tuple[Tensor, Tensor] = self._views[layer]
        return results

    def add(self, layer: int, worth: Tensor) -> None:
        """What the tokens of a layer are worth for it, [B, N]. Behind the first layer the least of them leaves, and of
        several the latest; never the newest."""
        self.worth.narrow(1, 0, worth.shape[1]).add_(worth)
        if layer:
            return
        older = self.worth[:, :-1]
        better = older > older.amin(-1, keepdim=True)
        worst = self.indices[:, :-1].masked_fill(better, -1).argmax(-1, keepdim=True)
        heads = self.held[0].shape[2]
        self._free = worst.expand(-1, heads).flatten() + self._first
        for rows in self._rows[0]:
            rows.index_copy_(0, self._free, rows.index_select(0, self._last))
        self.worth.scatter_(1, worst, self.worth[:, -1:].clone())
        self.worth[:, -1] = 0
        self.indices = self.indices.scatter(1, worst, self.layers[0].seen - 1)

    def dissolve(self) -> None:
        """Give the layers back what they hold, in order, as far as the step at hand has come."""
        decided = self._free is not self._last
        for i, layer in enumerate(self.layers):
            reached = bool(layer.added) or not layer.state.running
            count = self.entries + (reached and layer.state.running and not decided)
            indices = (self.indices if reached else self.before)[:, :count]
            order = indices.argsort(-1)
            keys, values = (part[i].take_along_dim(order[:, None, :, None], 2) for part in self.held)
            layer.fill((keys, values, indices.gather(1, order).unsqueeze(1).expand(-1, keys.shape[1], -1)), {})
        worth = self.worth.new_zeros(len(self.worth), self.layers[0].seen + 1)
        worth.scatter_(1, self.indices[:, : self.entries], self.worth[:, : self.entries])
        self.layers[0].state.memory[self.WORTH] = worth[:, : self.layers[0].seen]


class PrunedLayer(DynamicLayer):
    """Entries [B, KV, N, d] of one layer, fewer than the tokens it has seen.

    It tells its users the tokens seen as its length, so that positions and `generate` go on as if nothing had left.
    valid: [B, KV, N] entries that count, None while all do. pads: [B] tokens of each sample so far that were padding,
    None while none was. prompt: tokens that each sample began with. tail: entries added since the last pruning.
    shared: whether all heads still hold the same entries.
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
        self._marks: dict[str, Tensor] = {}
        self._indices: Tensor  # of the entries but for the newest ones, whose tokens are the last `_loose` seen
        self._loose = 0

    # -- the entries, which a stack may hold for the layer ---------------------------------------------------------

    @property
    def keys(self) -> Any:
        """[B, KV, N, d]."""
        self.state.unstack()
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._keys = keys

    @property
    def values(self) -> Any:
        """[B, KV, N, d]."""
        self.state.unstack()
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        self._values = values

    @property
    def marks(self) -> dict[str, Tensor]:
        """What the method left of each entry, [B, KV, N] by name."""
        self.state.unstack()
        return self._marks

    @marks.setter
    def marks(self, marks: dict[str, Tensor]) -> None:
        self._marks = marks

    @property
    def indices(self) -> Tensor:
        """Number [B, KV, N] of each entry's token among those of its sample."""
        self.state.unstack()
        if self._loose:
            newest = torch.arange(self.seen - self._loose, self.seen, device=self.device)
            self._indices = torch.cat([self._indices, newest.expand(*self._indices.shape[:2], -1)], -1)
            self._loose = 0
        return self._indices

    def empty(self) -> None:
        """Hand the entries over to a stack."""
        self._keys, self._values, self._indices, self._marks = (
            *(t[:, :, :0] for t in (self.keys, self.values, self.indices)),
            {},
        )

    def fill(self, entries: Iterable[Tensor], marks: dict[str, Tensor]) -> None:
        """Take keys, values and indices back from a stack."""
        (self._keys, self._values, self._indices), self._marks = entries, marks

    @property
    def counts(self) -> Tensor | int:
        """Tokens [B] of each sample so far, a number where they are equally many."""
        return self.seen if self.pads is None else self.seen - self.pads

    # -- what transformers asks for --------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._indices = torch.zeros(*key_states.shape[:2], 0, dtype=torch.long, device=self.device)
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.state.stack is not None and self.state.running:
            self.seen, self.added = self.seen + 1, 1
            self.tail = self.tail + 1 if isinstance(self.state.stack, Growing) else 1
            return self.state.stack.write(self.index, key_states, value_states)
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
        entries = 0
        if self.state.stack is not None:
            entries = self.state.stack.entries
        elif self.is_initialized:
            entries = self._keys.shape[2] + sum(keys.shape[2] for keys, _ in self.packed)
        return entries + query_length, self.seen - entries

    def admit(self, fresh: Tensor | None) -> None:
        """Take the entries in that `update` added; fresh [B, M] bool says which are no padding, None: all."""
        batch, heads, new = len(self.keys), self.keys.shape[1], self.added
        if fresh is None and self.valid is None and self.pads is None:
            self._loose += new
        else:
            real = torch.ones(batch, new, dtype=torch.bool, device=self.device) if fresh is None else fresh
            counts = self.counts if self.pads is None else self.counts.unsqueeze(1)  # type: ignore[union-attr]
            indices = (counts + real.long().cumsum(1) - 1).clamp_min(0)
            if self.valid is not None or fresh is not None:
                before = torch.ones_like(self.indices, dtype=torch.bool) if self.valid is None else self.valid
                self.valid = torch.cat([before, real.unsqueeze(1).expand(-1, heads, -1)], -1)
            self._indices = torch.cat([self.indices, indices.unsqueeze(1).expand(-1, heads, -1)], -1)
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
        self._indices = self.indices[:, :, :left]
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
        self.state.stack = None
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
        self.keys, self.values, self._indices = move(self.keys), move(self.values), move(self.indices)
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
        self._indices = kept.apply(self.indices)
        self.marks = {name: kept.apply(mark) for name, mark in self.marks.items()}
        self.valid = kept.valid
        self.shared, self.tail = False, 0

    def forget(self, ahead: int) -> None:
        """The newest `ahead` tokens, which the method has let go, were never part of the sequence."""
        self._indices = self.indices
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
        self._unpacked = []

    def rest(self, frozen: Callable[[int], int]) -> None:
        """Store as bitmaps what changes no more, where single tokens were written in between."""
        if not self.packed:
            self.pack(frozen(self.keys.shape[2]))

    def nbytes(self) -> tuple[int, int]:
        """Bytes of keys and values as they are stored, and of what keeps book of them."""
        packed = [tensor for pair in self.packed for bitmap in pair for tensor in bitmap.tensors]
        book = (self.indices, self.valid, *self.marks.values())
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
        return float(self.indices.shape[-1])
