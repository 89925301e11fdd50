"""LexRank against the published packages sumy and lexrank (crabcamp's), and at 100,000 sentences.

    python -m benchmarks.lexrank [--sentences 10000] [--large 100000] [--patience 120]

Text is synthetic: words follow Zipf's law over 50,000 words, about 20 a sentence. All are timed from sentences to
scores, threshold 0.1; sumy gets a tokeniser that only splits at blanks, which flatters it. A peer that cannot finish
the full size is run at doubling sizes as long as its `patience` in seconds lasts, and extrapolated with the exponent
fitted to the last three; the table says so. Each measurement has a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

VOCABULARY, WORDS = 50_000, 20


def text(sentences: int, seed: int = 0) -> list[str]:
    """Sentences of words drawn independently by Zipf's law, 5 to 60 words each and 20 on average."""
    rng = np.random.default_rng(seed)
    lengths = rng.poisson(WORDS, sentences).clip(5, 60)
    chance = 1 / np.arange(1, VOCABULARY + 1)
    ranks = rng.choice(VOCABULARY, lengths.sum(), p=chance / chance.sum())
    names = np.array([_letters(i) for i in range(VOCABULARY)])
    words = np.split(names[ranks], lengths.cumsum()[:-1])
    return [f"{' '.join(w)}.".capitalize() for w in words]


def _letters(number: int) -> str:
    """A number as a word of letters only, for one package drops words with digits."""
    word = ""
    while True:
        number, digit = divmod(number, 20)
        word = "aeiou"[digit % 5] + "bdkt"[digit // 5] + word
        if not number:
            return word


# -- contestants -----------------------------------------------------------------------------------------------------


def ours(sentences: Sequence[str], centrality: str = "lexrank") -> dict[str, float]:
    """Prunelab's LexRank, and the number of edges where there is a graph."""
    from prunelab.common.ranking.sentences import Passage
    from prunelab.methods.lexrank.method import LexRank

    method = LexRank(centrality=centrality)  # type: ignore[arg-type]
    start = time.perf_counter()
    scores = method.rank(Passage(tuple(sentences)))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "sum": float(scores.sum())}


def edges(sentences: Sequence[str]) -> dict[str, float]:
    """Links of the graph above 0.1, each way and with self links, and the time to find them."""
    from prunelab.common.ranking.sentences import Passage
    from prunelab.methods.lexrank.method import LexRank

    method, passage = LexRank(), Passage(tuple(sentences))
    similarity = method.similarity(passage)
    start = time.perf_counter()
    graph = similarity.graph(method.threshold)
    return {"seconds": time.perf_counter() - start, "edges": float(graph.nnz)}


def sumy(sentences: Sequence[str]) -> dict[str, float]:
    """sumy's ratings of all sentences."""
    dom = importlib.import_module("sumy.models.dom")
    package = importlib.import_module("sumy.summarizers.lex_rank")

    class Blanks:
        def to_words(self, sentence: str) -> list[str]:
            return sentence.rstrip(".").split()

    start = time.perf_counter()
    document = dom.ObjectDocumentModel([dom.Paragraph([dom.Sentence(s, Blanks()) for s in sentences])])
    package.LexRankSummarizer()(document, 1)
    return {"seconds": time.perf_counter() - start}


def crabcamp(sentences: Sequence[str]) -> dict[str, float]:
    """The package lexrank, each sentence a document of its idf corpus, as in ours."""
    package = importlib.import_module("lexrank")
    start = time.perf_counter()
    package.LexRank([[s] for s in sentences]).rank_sentences(list(sentences), threshold=0.1)
    return {"seconds": time.perf_counter() - start}


# -- measuring -------------------------------------------------------------------------------------------------------


def _job(contestant: Callable[..., dict[str, float]], size: int, options: dict[str, Any]) -> dict[str, float]:
    result = contestant(text(size), **options)
    return result | {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def measure(contestant: Callable[..., dict[str, float]], size: int, **options: Any) -> dict[str, float]:
    """A contestant on fresh text in a fresh process: seconds and peak memory in GiB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_job, contestant, size, options).result()


def extrapolated(contestant: Callable[..., dict[str, float]], size: int, patience: float) -> tuple[float, str]:
    """Seconds at `size`, and how they came about."""
    sizes: list[int] = []
    seconds: list[float] = []
    following = 250
    while sum(seconds) + 4 * (seconds[-1] if seconds else 0) < patience:
        sizes.append(min(following, size))
        seconds.append(measure(contestant, sizes[-1])["seconds"])
        if sizes[-1] == size:
            return seconds[-1], "measured"
        following *= 2
    exponent = float(np.polyfit(np.log(sizes[-3:]), np.log(seconds[-3:]), 1)[0])
    estimate = seconds[-1] * (size / sizes[-1]) ** exponent
    return estimate, f"extrapolated from {sizes[-1]:,} sentences in {seconds[-1]:.1f} s, exponent {exponent:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sentences", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=100_000, help="0 leaves it out")
    parser.add_argument("--patience", type=float, default=120)
    options = parser.parse_args(arguments)

    own = measure(ours, options.sentences)["seconds"]
    print(f"{options.sentences:,} sentences, tokenise to scores, threshold 0.1")
    print(f"  {'prunelab':<16}{own:>10.2f} s      1x  measured")
    for name, contestant in (("sumy", sumy), ("lexrank", crabcamp)):
        seconds, how = extrapolated(contestant, options.sentences, options.patience)
        label = f"{name} {importlib.metadata.version(name)}"
        print(f"  {label:<16}{seconds:>10.1f} s {seconds / own:>6.0f}x  {how}", flush=True)
    if options.large:
        print(f"{options.large:,} sentences, prunelab alone")
        for centrality in ("lexrank", "continuous"):
            result = measure(ours, options.large, centrality=centrality)
            if not math.isclose(result["sum"], 1, abs_tol=1e-6):
                sys.exit(f"the scores sum to {result['sum']}, not to 1")
            print(f"  {centrality:<16}{result['seconds']:>10.1f} s, peak memory {result['gib']:.2f} GiB", flush=True)
        outcome = measure(edges, options.large)
        print(f"  {outcome['edges']:,.0f} links above 0.1, found in {outcome['seconds']:.1f} s")


if __name__ == "__main__":
    main()
