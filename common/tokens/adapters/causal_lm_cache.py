"""What a decoder's layers hold of a batch whose prompt tokens leave on their way up, and what waits to come back."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.plan import Gather


@dataclass
class Entries:
    """Cache entries of a segment: the columns [B, K] whose tokens they are, in the order of computation, and which of
    them count (None: all)."""

    columns: Tensor
    valid: Tensor | None

    def joined(self, other: Entries) -> Entries:
        """With other entries behind."""
        valid = None
        if self.valid is not None or other.valid is not None:
            valid = torch.cat([self.real(), other.real()], 1)
        return Entries(torch.cat([self.columns, other.columns], 1), valid)

    def real(self) -> Tensor:
        """Which count, [B, K] bool."""
        return torch.ones_like(self.columns, dtype=torch.bool) if self.valid is None else self.valid

    def of(self, values: Tensor, total: int) -> Tensor:
        """Integers [K] or [B, K] of the entries by column, [B, total]; 0 where a column has no entry."""
        values = (values * self.real()).to(torch.long)
        return self.columns.new_zeros(len(values), total).scatter_reduce(1, self.columns, values, "amax")


@dataclass
class PromptCache:
    """What is known of one batch while it is generated, by the columns of its attention mask.

    real [B, T]: columns that are no padding, None where all are. positions [B or 1, T]: their position ids.
    prompt: columns of the prompt. segments [B, T]: how many of them each token went through, which also says where it
    waits. waiting [B, prompt + 1, D]: hidden states that wait; the last place takes what needs none. held: the cache
    entries of each segment. gated: whether attention to tokens was weighed by gates that learn.
    """

    prompt: int
    positions: Tensor
    real: Tensor | None
    segments: Tensor
    waiting: Tensor | None = None
    held: dict[int, Entries] = field(default_factory=dict)
    gated: bool = False

    @property
    def total(self) -> int:
        return self.positions.shape[1]

    def grow(self, positions: Tensor, real: Tensor | None) -> None:
        """Columns of new tokens, [B or 1, M]."""
        batch, new = self.segments.shape[0], positions.shape[1]
        if self.real is not None or real is not None:
            ones = torch.ones(batch, self.total, dtype=torch.bool, device=positions.device)
            real = ones[:, :1].expand(-1, new) if real is None else real
            self.real = torch.cat([ones if self.real is None else self.real, real], 1)
        rows = max(len(positions), len(self.positions))
        self.positions = torch.cat([self.positions.expand(rows, -1), positions.expand(rows, -1)], 1)
        self.segments = torch.cat([self.segments, self.segments.new_zeros(batch, new)], 1)

    def defer(self, rows: Entries, x: Tensor) -> None:
        """Let hidden states x [B, R, D] wait, unless they are of generated tokens or padding."""
        if self.waiting is None:
            self.waiting = x.new_zeros(len(x), self.prompt + 1, x.shape[2])
        slots = rows.columns.masked_fill(~rows.real(), self.prompt).clamp(max=self.prompt)
        self.waiting.scatter_(1, slots.unsqueeze(-1).expand_as(x), x.detach())

    def enter(self, segment: int, rows: Entries) -> Entries:
        """The rows go through a segment; the entries of its caches afterwards."""
        self.segments = torch.maximum(self.segments, rows.of(torch.full_like(rows.columns, segment + 1), self.total))
        held = self.held[segment] = self.held[segment].joined(rows) if segment in self.held else rows
        return held

    def follow(self, cache: Any) -> None:
        """Be reordered along with the cache, as beam search does."""

        def watch(name: str) -> None:
            original = getattr(type(cache), name)

            @functools.wraps(original)
            def reorder(index: Tensor, *args: Any, **kwargs: Any) -> Any:
                self.select(index)
                return original(cache, index, *args, **kwargs)

            setattr(cache, name, reorder)

        for name in ("reorder_cache", "batch_select_indices"):
            watch(name)

    def select(self, index: Tensor) -> None:
        """Go on with these samples."""
        index = index.to(self.segments.device)
        self.positions = self.positions if len(self.positions) == 1 else self.positions[index]
        self.real = None if self.real is None else self.real[index]
        self.waiting = None if self.waiting is None else self.waiting[index]
        self.segments = self.segments[index]
        for segment, held in self.held.items():
            self.held[segment] = Entries(held.columns[index], None if held.valid is None else held.valid[index])


def in_order(reduce: Gather) -> Gather:
    """The same units in original order, padding in front: the last is then the newest in every sample."""
    keys = reduce.index if reduce.valid is None else reduce.index.masked_fill(~reduce.valid, -1)
    order = keys.argsort(dim=1, stable=True)
    return Gather(reduce.index.gather(1, order), None if reduce.valid is None else reduce.valid.gather(1, order))


def visible(rows: Entries, held: Entries, active: Tensor | None) -> Tensor:
    """Mask [B, 1, R, K] of the entries that the rows, which are the newest of them, may attend to: those that count,
    that stand no later, and whose column is active [B, T]. Padding sees itself, so that no row is empty."""
    count, total = rows.columns.shape[1], held.columns.shape[1]
    keys = held.real() if active is None else held.real() & active.gather(1, held.columns)
    # assumption: what came back sees what stands before it, though later tokens were computed earlier
    seen = (held.columns.unsqueeze(1) <= rows.columns.unsqueeze(2)) & keys.unsqueeze(1)
    own = torch.ones(count, total, dtype=torch.bool, device=seen.device)
    return (seen | (own.triu(total - count) & own.tril(total - count))).unsqueeze(1)
