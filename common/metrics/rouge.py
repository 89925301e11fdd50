"""ROUGE-1 and ROUGE-2 by the `rouge-score` package, with what summarisation papers of the DUC years add to it.

This is not ROUGE-1.5.5, the Perl program behind published tables: tokens and stems differ in places, and so may
the second decimal. Added here: cutting the summary to a number of bytes, and several references, either averaged
or by the jackknife.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer

from prunelab.common.core.errors import PrunelabError

DUC_2004_BYTES = 665


@dataclass(frozen=True)
class Rouge:
    """Scores between 0 and 1 of one summary."""

    rouge1_recall: float
    rouge1_f: float
    rouge2_recall: float
    rouge2_f: float


def cut(text: str, limit: int) -> str:
    """The first `limit` bytes of the text in UTF-8; a character that would be split is left out."""
    return text.encode("utf8", "replace")[:limit].decode("utf8", "ignore")


def score(
    summary: str,
    references: Sequence[str],
    limit: int | None = None,
    stem: bool = False,
    several: Literal["average", "jackknife"] = "average",
) -> Rouge:
    """ROUGE of a summary, cut to `limit` bytes where one is given, against its references.

    several: `average` takes the mean over the references. `jackknife` takes, for each reference in turn, the best
    score against the others, and the mean of these, which lets people and systems be compared (Lin 2004, section 6).
    """
    if not references:
        raise PrunelabError("ROUGE needs at least one reference summary")
    if limit is not None:
        summary = cut(summary, limit)
    scorer = _scorer(stem)
    each = [scorer.score(reference, summary) for reference in references]
    return Rouge(
        *(
            _combine([getattr(s[kind], measure) for s in each], several)
            for kind in ("rouge1", "rouge2")
            for measure in ("recall", "fmeasure")
        )
    )


def _combine(values: Sequence[float], several: str) -> float:
    if several == "jackknife" and len(values) > 1:
        values = [max(v for j, v in enumerate(values) if j != i) for i in range(len(values))]
    return sum(values) / len(values)


@cache
def _scorer(stem: bool) -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2"], use_stemmer=stem)
