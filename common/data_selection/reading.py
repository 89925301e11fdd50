"""What a selection drops, to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from prunelab.common.data_selection.losses import counted

SHOWN, WIDTH = 3, 240  # samples of a kind, and characters of each


@dataclass(frozen=True)
class Lost:
    """A sample that goes (`stays` is None), or that loses tokens.

    where: its place. sample: its text or its tokens [N]. trained: tokens [N] that would enter the loss; stays: those
    that do.
    """

    where: str
    sample: str | Tensor
    trained: Tensor | None = None
    stays: Tensor | None = None

    def text(self, tokenizer: Any) -> str:
        """The sample; tokens that go in brackets, and those without a tokenizer as numbers."""
        if isinstance(self.sample, str):
            return short(self.sample)
        ids: list[int] = self.sample.tolist()
        if self.stays is None or self.trained is None:
            return short(_decoded(ids, tokenizer))
        goes: list[bool] = (self.trained & ~self.stays).tolist()
        runs = [
            (gone, [ids[place] for place, _ in run]) for gone, run in groupby(enumerate(goes), lambda pair: pair[1])
        ]
        texts = [f"[{_decoded(run, tokenizer)}]" if gone else _decoded(run, tokenizer) for gone, run in runs]
        return short(("" if hasattr(tokenizer, "decode") else " ").join(texts))


@dataclass(frozen=True)
class Look:
    """A batch as it came: its number, tokens, labels and what is no padding [B, N] (None: all), and of them the tokens
    [B, N] and samples [K] that stay, None for all. Nothing of it is read before it is shown."""

    number: int
    ids: Tensor
    labels: Tensor
    valid: Tensor | None
    tokens: Tensor | None
    samples: Tensor | None

    def lost(self) -> Iterator[Lost]:
        """The samples that go or lose tokens."""
        trained = counted(self.labels)
        valid = torch.ones_like(trained) if self.valid is None else self.valid.bool()
        kept = set(range(len(self.ids)) if self.samples is None else self.samples.tolist())
        for place, (ids, mask, real) in enumerate(zip(self.ids.cpu(), trained.cpu(), valid.cpu(), strict=True)):
            where = f"batch {self.number}, sample {place}"
            if place not in kept:
                yield Lost(where, ids[real])
            elif self.tokens is not None and bool((mask & ~self.tokens[place].cpu()).any()):
                yield Lost(where, ids[real], mask[real], self.tokens[place].cpu()[real])

    def examples(self) -> list[Lost]:
        """The first of each kind."""
        results: dict[bool, Lost] = {}
        for one in self.lost():
            results.setdefault(one.stays is None, one)
        return list(results.values())


def lines(lost: Sequence[Lost], tokenizer: Any = None) -> list[str]:
    """Samples that go, and samples that lose tokens, in lines to read."""
    whole = [one for one in lost if one.stays is None]
    parts = [one for one in lost if one.stays is not None]
    results = []
    for title, group in (("samples dropped:", whole), ("tokens dropped, in brackets:", parts)):
        if group:
            results += [title, *(f"  {one.where}: {one.text(tokenizer)}" for one in group)]
    return results


def short(text: str, width: int = WIDTH) -> str:
    """The beginning of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def words(row: Any) -> str:
    """The text of a row of a file or table: its first string."""
    values = row.values() if isinstance(row, Mapping) else (row,)
    return next((value for value in values if isinstance(value, str)), "")


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids)) if hasattr(tokenizer, "decode") else " ".join(map(str, ids))
