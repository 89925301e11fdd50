"""ROUGE of the summaries that a method extracts from documents with references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import track

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data.documents import Document, background, load
from prunelab.common.measures.bench import Bench
from prunelab.common.metrics import rouge, uncertainty
from prunelab.common.ranking.sentences import Passage, SentenceRanker

if TYPE_CHECKING:
    from prunelab.common.tasks.summarise import Summarise


def measure(bench: Bench[Summarise.Settings]) -> dict[str, Any]:
    """ROUGE of the method on a catalogue entry's documents; see `run` for the metrics."""
    method = bench.method(SentenceRanker)
    if method is None:
        raise PrunelabError("documents are summarised by a ranker; name one under `configuration` in paper.yaml")
    result = load(bench.ids["data"], bench.config, bench.settings.samples)
    return run(method, result, bench.budget, progress=True)


def run(
    method: SentenceRanker, documents: Sequence[Document], budget: Budget, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Percentages `rouge1_recall`, `rouge1_f`, `rouge2_recall`, `rouge2_f` with n, standard error and samples, and the
    mean length of the summaries in `bytes`.

    idf comes from the documents themselves. Several references are averaged; words are not stemmed. A budget in
    bytes also cuts the summary there, as the evaluations of the DUC years did.
    """
    if not documents:
        raise PrunelabError("there is no document to summarise; check the data set and its limit")
    corpus = background(documents)
    limit = int(budget.amounts[0]) if budget.unit == "bytes" else None
    columns: dict[str, list[float]] = {}
    for document in track(documents, "summarising", transient=True, disable=not progress):
        summary = "\n".join(method.summarise(Passage.of(document.documents, corpus), budget))
        scores = rouge.score(summary, document.references, limit)
        for name, value in vars(scores).items():
            columns.setdefault(name, []).append(100 * value)
        columns.setdefault("bytes", []).append(float(len(summary.encode("utf8", "replace"))))
    return {name: uncertainty.mean(values) for name, values in columns.items()}
