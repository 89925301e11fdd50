"""Golden cases of LexRank, answered by our own functions.

paper_: the worked example of the paper, and networkx on its graph. crabcamp_, sumy_: the two libraries' variants.
Thresholds, jumps and tolerances are read from the names of the outputs: `0p1` is 0.1, `1em06` is 1e-06.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from prunelab.common.ranking.text import Background, Similarity, term_counts, threshold_graph
from prunelab.methods.lexrank import variants
from prunelab.methods.lexrank.method import degree_centrality, lexrank

Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCE = {
    r"^out_paper_lexrank_.*$": (1e-3, 0.0),  # the printed matrix has two decimals
    r"^out_(thr_.*|cont)_scores(_fast|_slow)?$": (1e-4, 1e-4),  # crabcamp stops at a relative change of 1e-5
    r"^out_thr_.*_scores_eps_.*$": (1e-6, 1e-5),
    r"^out_(nx|cont|thr).*damped.*$": (1e-6, 0.0),
    r"^out_(idf|tf|similarity|cont_transition|thr_.*_(transition|matrix))$": (1e-6, 1e-5),
}
NOT_APPLICABLE = {
    r"^out_paper_centroid$": "needs the words of DUC 2004 cluster d1003t, which are licensed",
}
# Orders that say nothing where scores tie (crabcamp's sort leaves ties to rounding): what must agree is the sequence
# of the scores in the order given, read from this array of the same case.
RANKED_BY = {r"^(out_thr_.*)_summary_order$": r"\1_scores"}


def number(text: str) -> float:
    """`0p15` -> 0.15, `1em06` -> 1e-06."""
    return float(text.replace("p", ".").replace("m", "-"))


def replay(case: str, inputs: dict[str, Array], wanted: list[str]) -> dict[str, Array]:
    """The arrays named in `wanted` that the family of the case can compute from its inputs."""
    family = {"paper": paper, "crabcamp": crabcamp, "sumy": sumy}[case.split("_")[0]]
    return family(inputs, wanted)


def paper(inputs: dict[str, Array], wanted: list[str]) -> dict[str, Array]:
    found = {}
    for name in wanted:
        if match := re.fullmatch(r"out_(paper_degree|paper_lexrank|nx_damped)_(\w+)", name):
            printed = inputs.get(f"in_similarity_adjusted_for_{match[2]}", inputs["in_similarity"])
            graph = threshold_graph(printed, number(match[2]))
            if match[1] == "paper_degree":
                found[name] = degree_centrality(graph).numpy()
            else:
                scores = lexrank(graph).numpy()
                found[name] = scores / scores.max() if match[1] == "paper_lexrank" else scores
        elif name == "out_nx_cont_damped":
            found[name] = lexrank(inputs["in_similarity"].astype(float)).numpy()
    return found


def crabcamp(inputs: dict[str, Array], wanted: list[str]) -> dict[str, Array]:
    vocabulary = inputs["in_vocab"].tolist()
    # The option is not stored, but shows: without it no word holds a digit.
    keep_numbers = any(c.isdigit() for w in vocabulary for c in w)
    stop_words = frozenset(inputs.get("in_stopwords", np.array([], str)).tolist())
    split = [variants.crabcamp_words(d, stop_words, keep_numbers) for d in inputs["in_documents"].tolist()]
    idf = Background.of(split).idf(vocabulary, unseen=1.0)
    counts, _ = term_counts([t.split() for t in inputs["in_tokens"].tolist()], vocabulary)
    similarity = Similarity.of(counts, idf)
    cosines = similarity.dense()
    found: dict[str, Array] = {"out_idf": idf, "out_similarity": cosines}
    for name in wanted:
        if match := re.fullmatch(r"out_(?:thr_([0-9pem]+)|cont)_(\w+)", name):
            threshold, kind = number(match[1]) if match[1] else None, match[2]
            weights = variants.crabcamp_weights(cosines, threshold)
            transition = variants.crabcamp_transition(weights)
            if kind == "transition":
                found[name] = transition
            elif kind == "component":
                found[name] = variants.crabcamp_components(transition)
            elif kind.startswith("scores"):
                found[name] = variants.crabcamp_scores(transition, squaring=not kind.endswith("slow"))
            elif kind == "summary_order":
                found[name] = variants.crabcamp_order(variants.crabcamp_scores(transition))
            elif kind == "degree_with_self":
                found[name] = degree_centrality(weights).numpy()
            elif kind.startswith("damped_"):
                graph = similarity if threshold is None else weights
                found[name] = lexrank(graph, number(kind.removeprefix("damped_"))).numpy()
    return found


def sumy(inputs: dict[str, Array], wanted: list[str]) -> dict[str, Array]:
    counts, _ = term_counts([t.split() for t in inputs["in_terms"].tolist()], inputs["in_vocab"].tolist())
    tf, idf = variants.sumy_frequencies(counts.toarray()), variants.sumy_idf(counts.toarray())
    cosines = variants.sumy_similarity(tf, idf)
    found: dict[str, Array] = {"out_tf": tf, "out_idf": idf, "out_similarity": cosines}
    for name in wanted:
        if match := re.fullmatch(r"out_thr_([0-9pem]+)_(matrix|scores_eps_(\w+))", name):
            matrix = variants.sumy_transition(cosines, number(match[1]))
            found[name] = matrix if match[2] == "matrix" else variants.sumy_scores(matrix, number(match[3])).numpy()
    return found
