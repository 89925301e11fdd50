"""LexRank and MEAD's features: against networkx, the printed example, and the rules of a summary."""

from __future__ import annotations

import csv
import xml.dom.minidom
from pathlib import Path

import networkx  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.ranking.sentences import FeatureRanker, Passage, SentenceRanker
from prunelab.common.ranking.text import Background, threshold_graph
from prunelab.methods.lexrank import figure, tables, variants
from prunelab.methods.lexrank.method import LexRank, lexrank
from prunelab.methods.mead.method import Centroid, Lead, RandomSentences

ROOT = Path(__file__).resolve().parents[3]
SENTENCES = figure.EXAMPLE
METHODS: list[SentenceRanker] = [
    LexRank(),
    LexRank(centrality="continuous"),
    LexRank(centrality="degree"),
    Centroid(),
    Lead(),
    RandomSentences(),
]
passages = st.lists(
    st.lists(st.sampled_from(["ant", "bee", "cat", "dog"]), max_size=6).map(" ".join), min_size=1, max_size=8
)


def test_worked_example_of_the_paper() -> None:
    ours = tables.worked_example()
    with (ROOT / "methods/lexrank/reported.csv").open(encoding="utf8", newline="") as file:
        printed = {f"{r['table']}/{r['row']}/{r['column']}": float(r["value"]) for r in csv.DictReader(file)}
    assert len(ours) == 66
    for key, metric in ours.items():
        assert metric["value"] == pytest.approx(printed[key], abs=0 if key.startswith("T1") else 1e-3), key


@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.15, 0.5]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_lexrank_is_networkx_pagerank(n: int, seed: int, jump: float, continuous: bool) -> None:
    cosines = np.random.default_rng(seed).random((n, n)) ** 3
    cosines = np.maximum(cosines, cosines.T)
    np.fill_diagonal(cosines, 1)
    graph = cosines if continuous else threshold_graph(cosines, 0.3)
    dense = graph if isinstance(graph, np.ndarray) else graph.toarray().astype(float)
    expected = networkx.pagerank(networkx.from_numpy_array(dense), alpha=1 - jump, tol=1e-13, max_iter=10_000)
    np.testing.assert_allclose(lexrank(graph, jump).numpy(), list(expected.values()), atol=1e-7)


def test_jump_of_one_is_uniform_and_scores_sum_to_one() -> None:
    graph = threshold_graph(np.array([[1, 0.9, 0.0], [0.9, 1, 0.5], [0.0, 0.5, 1]]), 0.1)
    assert torch.allclose(lexrank(graph, 1.0), torch.full((3,), 1 / 3, dtype=torch.float64))
    scores = lexrank(graph)
    assert float(scores.sum()) == pytest.approx(1) and int(scores.argmax()) == 1


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_registered_and_written_as_its_repr(method: SentenceRanker) -> None:
    assert registry.parse(repr(method)) == method
    assert registry.create(method.name).name == method.name


@pytest.mark.parametrize("method", METHODS, ids=repr)
@given(passages, st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_budgets_are_met_in_document_order(method: SentenceRanker, sentences: list[str], amount: int) -> None:
    if not any(sentences):
        with pytest.raises(PrunelabError, match="no sentence"):
            method.summarise(sentences, Budget(1, "count"))
        return
    passage = Passage(tuple(sentences))
    kept = method.plan(passage, Budget(amount, "count")).reduce.index[0].tolist()  # type: ignore[union-attr]
    assert kept == sorted(set(kept)) and len(kept) == min(amount, len(sentences))
    assert method.summarise(passage, Budget(1.0)) == sentences
    assert torch.isfinite(method.rank(passage)).all()
    limit = 3 * amount
    text = "\n".join(method.summarise(passage, Budget(limit, "bytes")))
    single = amount and len(method.plan(passage, Budget(limit, "bytes")).reduce.index[0]) == 1  # type: ignore[union-attr]
    assert len(text.encode()) <= limit or single
    words = sum(len(s.split()) for s in method.summarise(passage, Budget(100, "words")))
    assert words <= 100


def test_byte_budget_counts_utf8_and_the_newlines_between() -> None:
    sentences = ["Äh öh üh.", "Bee cat dog."]
    size = len("\n".join(sentences).encode())
    assert Lead().summarise(sentences, Budget(size, "bytes")) == sentences
    assert Lead().summarise(sentences, Budget(size - 1, "bytes")) == sentences[:1]
    assert Lead().summarise(sentences, Budget(0, "bytes")) == []


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, RandomSentences)], ids=repr)
def test_ties_go_to_the_earlier_sentence(method: SentenceRanker) -> None:
    kept = method.plan(Passage(("One cow here.",) * 5), Budget(2, "count")).reduce.index.tolist()  # type: ignore[union-attr]
    assert kept == [[0, 1]]
    unrelated = Passage(("Ant bee.", "Cat dog.", "Elk fox.", "Gnu hen."))
    assert method.plan(unrelated, Budget(2, "count")).reduce.index.tolist() == [[0, 1]]  # type: ignore[union-attr]


def test_centrality_finds_the_hub() -> None:
    hub = ["red fox", "blue whale", "red fox blue whale", "quick tiger"]
    for centrality in ("lexrank", "continuous", "degree"):
        method = LexRank(centrality=centrality)
        assert method.summarise(hub, Budget(1, "count")) == ["red fox blue whale"]


def test_background_changes_what_is_similar() -> None:
    sentences = ("the engine stops", "the engine starts", "the garden grows")
    common = Background(100, {"the": 100, "engine": 2})
    similarity = LexRank().similarity(Passage(sentences, background=common)).dense()
    assert similarity[0, 1] > 0.3 and similarity[0, 2] == 0
    uniform = LexRank(without_background="uniform").similarity(Passage(sentences)).dense()
    assert uniform[0, 2] == pytest.approx(1 / 3)
    with pytest.raises(PrunelabError, match="background"):
        LexRank(without_background="error").rank(Passage(sentences))


def test_centroid_sums_over_occurrences() -> None:
    corpus = Background(10, {"cow": 1, "hen": 5})
    passage = Passage(("cow cow hen", "hen"), background=corpus)
    ln = np.log
    expected = [2 * 2 * ln(10) + 2 * ln(2), 2 * ln(2)]
    np.testing.assert_allclose(Centroid().rank(passage).numpy(), expected)
    np.testing.assert_allclose(Centroid(threshold=2.0).rank(passage).numpy(), [4 * ln(10), 0])


def test_lead_takes_the_first_sentences_of_all_documents() -> None:
    passage = Passage.of([["A one.", "A two.", "A three."], ["B one.", "B two."], ["C one."]])
    assert Lead().summarise(passage, Budget(4, "count")) == ["A one.", "A two.", "B one.", "C one."]


def test_random_sentences_depend_on_seed_and_text() -> None:
    passage = Passage(SENTENCES)
    draws = [RandomSentences(seed=s).rank(passage).tolist() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert RandomSentences().rank(Passage(SENTENCES[::-1])).tolist() != draws[0]


def test_features_are_scaled_and_weighed() -> None:
    passage = Passage(SENTENCES)
    centrality = LexRank().rank(passage)
    scaled = (centrality - centrality.min()) / (centrality.max() - centrality.min())
    position = torch.linspace(1, 0, len(SENTENCES), dtype=torch.float64)
    expected = 2.5 * scaled + 0.5 * position
    assert torch.allclose(LexRank(weight=2.5, position=0.5).rank(passage), expected)


def test_length_cutoff_and_reranker() -> None:
    sentences = ["Cows eat grass.", "All the cows of the valley eat green grass here."] * 2
    sentences += ["Hens lay a lot of eggs in the old barn."]
    mead: FeatureRanker = LexRank.mead(2.0)
    assert (mead.weight, mead.position, mead.min_words, mead.max_cosine) == (2.0, 1.0, 9, 0.5)
    assert mead.summarise(sentences, Budget(5, "count")) == [sentences[1], sentences[4]]
    assert LexRank(min_words=99).summarise(sentences, Budget(1, "count"))  # nothing is long enough: all may be chosen


@pytest.mark.parametrize(
    "options", [{"centrality": "pagerank"}, {"jump": 1.5}, {"threshold": 1.0}, {"epsilon": 0.0}], ids=str
)
def test_wrong_options_are_explained(options: dict[str, object]) -> None:
    with pytest.raises(PrunelabError, match="lexrank") as error:
        LexRank(**options).rank(Passage(("A cow.",)))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_string_is_no_list_of_sentences() -> None:
    with pytest.raises(PrunelabError, match="split"):
        LexRank().summarise("A cow. A hen.", Budget(1, "count"))
    with pytest.raises(PrunelabError, match="empty"):
        LexRank().summarise([], Budget(1, "count"))
    with pytest.raises(PrunelabError, match="macs"):
        LexRank().summarise(["A cow."], Budget(1, "macs"))


def test_variants_rank() -> None:
    for method in (variants.SumyLexRank(), variants.CrabcampLexRank(), variants.CrabcampLexRank(threshold=None)):
        assert len(method.summarise(SENTENCES, Budget(2, "count"))) == 2
    scores = variants.CrabcampLexRank().rank(Passage(SENTENCES))
    assert float(scores.sum()) == pytest.approx(len(SENTENCES))


@pytest.mark.parametrize("case", sorted((ROOT / "tests/golden/lexrank").glob("crabcamp_*.npz")), ids=lambda p: p.stem)
def test_crabcamp_words(case: Path) -> None:
    arrays = np.load(case)
    stop_words = arrays["in_stopwords"].tolist() if "in_stopwords" in arrays else ()
    keep_numbers = any(c.isdigit() for w in arrays["in_vocab"].tolist() for c in w)
    found = [" ".join(variants.crabcamp_words(s, stop_words, keep_numbers)) for s in arrays["in_sentences"].tolist()]
    assert found == arrays["in_tokens"].tolist()


def test_figure_is_well_formed_and_self_contained() -> None:
    html = figure.graph(['<script>"A & b" of a.</script>', *SENTENCES], keep=2)
    xml.dom.minidom.parseString(html)
    assert "<script" not in html and "http" not in html and html.count('<li class="kept"') == 2
    with pytest.raises(PrunelabError, match="at most 40"):
        figure.graph(["A cow."] * 41)
