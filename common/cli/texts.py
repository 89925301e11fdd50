"""A ranker on a text: which sentences stay, and how clear the choice was."""

from __future__ import annotations

from pathlib import Path

from prunelab.common.cli import apply
from prunelab.common.cli.app import console
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.ranking import text
from prunelab.common.ranking.sentences import Passage, SentenceRanker


def read(file: Path) -> str:
    """The text of a file."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PrunelabError(f"{file} is not UTF-8 text; convert it first") from None
    if "\0" in content:
        raise PrunelabError(f"{file} is neither an image, a video nor a text that can be read here")
    return content


def run(method: Method, file: Path, budget: Budget, out: Path | None) -> None:
    """Print every sentence with its score, marked where it stays; the summary goes to `out`."""
    assert isinstance(method, SentenceRanker)
    sentences = text.sentences(read(file))
    if not sentences:
        raise PrunelabError(f"{file} holds no sentence; give a text with at least one")
    passage = Passage(tuple(sentences))
    ranking = method.ranking(passage)
    kept, scores = method.take(passage, ranking, budget), ranking.scores
    for i, sentence in enumerate(sentences):
        mark, style = (">", "bold") if i in kept else (" ", "dim")
        console.print(f"{mark} {float(scores[i]):8.4f}  {sentence}", style=style, markup=False, soft_wrap=True)
    console.print(f"{len(kept)} of {len(sentences)} sentences kept under a budget of {budget}")
    if ranking.tied(kept):
        console.print(
            "note: sentences that stay score the same as others that do not, so that their order in the text decided;"
            f" other options may tell them apart (python -m prunelab show {method.name})"
        )
    if out is not None:
        out = out / f"{file.stem}.{method.name}.txt" if out.is_dir() else out
        summary = "\n".join(sentences[i] for i in kept) + "\n"
        console.print(apply.deliver(out, summary, "summary"), soft_wrap=True)
