"""ROUGE: parity with rouge-score, hand-counted values, cutting, and several references."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from prunelab.common.core.errors import PrunelabError
from prunelab.common.metrics import rouge

texts = st.lists(st.sampled_from(["The", "cats,", "running", "ran", "runs", "a-b", "dog!"]), max_size=12).map(" ".join)


@given(texts, texts, st.booleans())
def test_parity_with_rouge_score(summary: str, reference: str, stem: bool) -> None:
    ours = rouge.score(summary, [reference], stem=stem)
    theirs = RougeScorer(["rouge1", "rouge2"], use_stemmer=stem).score(reference, summary)
    assert (ours.rouge1_recall, ours.rouge1_f) == (theirs["rouge1"].recall, theirs["rouge1"].fmeasure)
    assert (ours.rouge2_recall, ours.rouge2_f) == (theirs["rouge2"].recall, theirs["rouge2"].fmeasure)


def test_counted_by_hand() -> None:
    found = rouge.score("the cat sat", ["the cat lay on the mat"])
    assert found.rouge1_recall == pytest.approx(2 / 6)  # the second "the" has no partner
    assert found.rouge1_f == pytest.approx(2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))
    assert found.rouge2_recall == pytest.approx(1 / 5)


def test_stemming() -> None:
    assert rouge.score("cats running", ["cat runs"]).rouge1_recall == 0
    assert rouge.score("cats running", ["cats run"], stem=True).rouge1_recall == 1


def test_cut_to_bytes() -> None:
    assert rouge.cut("aé", 2) == "a" and rouge.cut("aé", 3) == "aé"
    assert rouge.score("one two three", ["one two three"], limit=7).rouge1_recall == pytest.approx(2 / 3)
    assert rouge.score("one two three", ["one two three"], limit=0).rouge1_recall == 0


def test_several_references() -> None:
    references = ["a b c d", "a b x y", "p q r s"]  # recall of "a b c": 3/4, 2/4, 0
    assert rouge.score("a b c", references).rouge1_recall == pytest.approx(5 / 12)
    jackknife = rouge.score("a b c", references, several="jackknife").rouge1_recall
    assert jackknife == pytest.approx((2 / 4 + 3 / 4 + 3 / 4) / 3)
    assert rouge.score("a b c", references[:1], several="jackknife").rouge1_recall == 3 / 4
    with pytest.raises(PrunelabError, match="reference"):
        rouge.score("a", [])
