"""Selective Context (Li et al., EMNLP 2023, arXiv 2310.06201): what a language model expects anyway is left out.

A small causal language model gives every token its self-information, I(x) = -log p(x | before). A lexical unit (phrase,
sentence or token) has the mean of its tokens, and the share of the units with the least goes from the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.ranking.prompts import Informed, PromptShortener, self_information
from prunelab.common.ranking.role import Ranking

__all__ = [
    "Context",
    "SelectiveContext",
    "noun_chunks",
    "self_information",
    "sentences",
    "threshold",
    "unit_information",
]

Array = np.ndarray[Any, np.dtype[Any]]
Level = Literal["phrase", "sentence", "token"]

# A blank behind a full stop or a question mark, but not behind "e.g." or "Dr." (released).
_BREAK = re.compile(r"(?<=[.?])(?<!\w\.\w.)(?<![A-Z][a-z]\.)\s")


def sentences(text: str) -> list[str]:
    """The sentences of a text; white space counts as single blanks."""
    parts = _BREAK.split(re.sub(r"\s+", " ", text))
    return [part.strip() for part in parts if part.strip()]


def unit_information(pieces: Sequence[str], values: Sequence[float], units: Sequence[str]) -> Array:
    """Mean self-information [U] of the units of a sentence from that of its pieces, laid beside each other by their
    lengths; NaN where a unit has no piece.

    A piece within a unit belongs to it, unless it is a blank. One that goes over ends of units is shared out equally
    among those that it ends, and the one that it only begins gets nothing of it (released).
    """
    worth = np.asarray(values, dtype=np.float64)
    ends, stops = (np.cumsum([len(part) for part in parts]) for parts in (units, pieces))
    first = np.searchsorted(ends, np.concatenate([[0], stops[:-1]]), side="right")
    closed = np.searchsorted(ends, stops, side="right") - first  # units that a piece ends
    within = (closed == 0) & (first < len(units)) & np.array([piece != " " for piece in pieces])
    total = np.bincount(first[within], worth[within], len(units)).astype(np.float64)
    count = np.bincount(first[within], minlength=len(units))
    closing = np.searchsorted(stops, ends)
    reached = closing < len(pieces)
    total[reached] += worth[closing[reached]] / closed[closing[reached]]
    count[reached] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class Context:
    """A text in lexical units: their texts, self-information [n], and what stands between them."""

    units: tuple[str, ...]
    information: Array
    between: str = ""

    def __len__(self) -> int:
        return len(self.units)


@dataclass(frozen=True)
class SelectiveContext(PromptShortener[Context]):
    """Selective Context (arXiv 2310.06201). A budget is the share of units that stay; the authors' reduce_ratio of 0.35
    is `Budget(0.65)`.

    Services of `read` and `compress`: `information` gives the pieces of a sentence and their self-information
    (`self_information` makes one of a language model); `phrases` splits a sentence into its phrases, each with the
    blank before it (`noun_chunks` makes one of a spaCy pipeline).

    Parameters
    ----------
    level : {"phrase", "sentence", "token"}
        What a unit is.
    """

    level: Level = "phrase"

    name: ClassVar[str] = "selective_context"
    exempt = {"budget": "units at the percentile stay, and with equal information that is more than the share asked"}

    def read(self, text: str, services: Mapping[str, Any]) -> Context:
        """The units of a text with their self-information. Every sentence is read by itself (released)."""
        if self.level not in get_args(Level):
            raise PrunelabError(f"selective_context has no level '{self.level}'; use {', '.join(get_args(Level))}")
        needed = ("information", "phrases") if self.level == "phrase" else ("information",)
        for name in needed:
            if name not in services:
                raise PrunelabError(
                    f"selective_context needs the service '{name}' to rank a {self.level}; see its README"
                )
        results = sentences(text)
        if not results:
            raise PrunelabError("there is no sentence to shorten; give a text that is not empty")
        informed: list[Informed] = [services["information"](sentence) for sentence in results]
        if self.level == "sentence":
            return Context(tuple(results), np.array([np.mean(values) for _, values in informed]), " ")
        if self.level == "token":
            pieces, values = zip(*informed, strict=True)
            return Context(tuple(p for part in pieces for p in part), np.concatenate([np.asarray(v) for v in values]))
        phrases = [list(services["phrases"]("".join(pieces))) for pieces, _ in informed]
        means = [unit_information(*own, units) for own, units in zip(informed, phrases, strict=True)]
        apart = [(" " if number and not place else "") + unit for number, units in enumerate(phrases)
                 for place, unit in enumerate(units)]  # fmt: skip
        return Context(tuple(apart), np.concatenate(means))

    def rank(self, units: Context, services: Mapping[str, Any] | None = None) -> Tensor:
        """Self-information [n]; a unit without a piece of its own counts as much as the best."""
        best = np.nanmax(units.information)
        return torch.from_numpy(np.where(np.isnan(units.information), best, units.information))

    def take(self, units: Context, ranking: Ranking, budget: Budget) -> list[int]:
        """All units but those below the percentile (`threshold`): ties at it stay, so that more may stay than asked."""
        low = units.information < threshold(units, budget)  # never true of NaN
        return [int(index) for index in np.flatnonzero(~low)]

    def compress(self, text: str, budget: Budget, services: Mapping[str, Any]) -> str:
        """The text without its least informative units. Between sentences a blank stays where one was taken away
        (released)."""
        context = self.read(text, services)
        kept = set(self.take(context, self.ranking(context), budget))
        if context.between:
            return context.between.join(unit if i in kept else "" for i, unit in enumerate(context.units))
        return "".join(unit for i, unit in enumerate(context.units) if i in kept)


def threshold(context: Context, budget: Budget) -> float:
    """The percentile of self-information below which units go, between ranks linear; units without any do not count."""
    share = budget.amounts[0] if budget.unit == "ratio" else budget.count(len(context)) / len(context)
    return float(np.nanpercentile(context.information, round(100 * (1 - float(share)), 6)))


def noun_chunks(pipeline: Callable[[str], Any]) -> Callable[[str], list[str]]:
    """The service `phrases` of a spaCy pipeline that merges noun chunks: `nlp.add_pipe("merge_noun_chunks")`."""

    def phrases(sentence: str) -> list[str]:
        words = list(pipeline(sentence))
        blanks = ["", *(word.whitespace_ for word in words)]
        return [blank + word.text for blank, word in zip(blanks, words)]

    return phrases
