"""DSIR beyond its golden cases: draws follow the weights, filters, the room of q, several targets, and bad input."""

from __future__ import annotations

import numpy as np
import pytest

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection import ngrams, streaming
from prunelab.common.data_selection.engine import select
from prunelab.common.data_selection.ngrams import HashedNgrams, kl_reduction
from prunelab.methods.dsir.method import DSIR, Quality, gumbel_top_k, shares

NEWS = [f"The river rose above flood level {day} and hundreds of families left the valley" for day in "abcdefgh"]
SPACE = [f"The probe entered orbit {day} around the small moon after a journey of nine years" for day in "abcdefgh"]
RAW = [text for pair in zip(NEWS[2:], SPACE[2:]) for text in pair]


def test_what_resembles_the_target_is_chosen_and_is_closer_to_it_than_chance():
    method = DSIR(min_length=5)
    chosen = select(method, RAW, "6count", target=NEWS[:2])
    assert list(chosen) == NEWS[2:]
    bags = HashedNgrams()
    target, drawn = bags.counts(NEWS[:2]), bags.counts(RAW[:6])
    assert kl_reduction(target, bags.counts(chosen), drawn) > 0 == kl_reduction(target, drawn, drawn)
    assert list(select(method, RAW, "6count", target={"a": NEWS[:1], "b": NEWS[1:2]})) == NEWS[2:], "targets pool"


def test_targets_choose_their_proportions_apart():
    method = DSIR(min_length=5, separate=True, proportions=(0.25, 0.75), top_k=True)
    chosen = select(method, RAW, "8count", target={"news": NEWS[:2], "space": SPACE[:2]})
    assert sum(text in NEWS for text in chosen) == 2 and sum(text in SPACE for text in chosen) == 6
    even = select(DSIR(min_length=5, separate=True), RAW, "4count", target={"news": NEWS[:2], "space": SPACE[:2]})
    assert sum(text in NEWS for text in even) == 1, "by n-grams: 46.7 % of 4, rounded down, and the rest"
    assert shares(10, (0.35, 0.35, 0.3)) == [3, 3, 4]


def test_draws_without_replacement_follow_the_weights():
    scores, rng = np.log([0.6, 0.3, 0.1]), np.random.RandomState(0)
    first = np.bincount([gumbel_top_k(scores, 1, rng.gumbel(size=3))[0] for _ in range(4000)]) / 4000
    assert np.abs(first - [0.6, 0.3, 0.1]).max() < 0.03
    assert gumbel_top_k(np.zeros(4), 2, None).tolist() == [0, 1], "equal ones: the earlier"


@pytest.mark.parametrize("at_hand", [0, 700, 1 << 20])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_choice_does_not_depend_on_chunks_or_on_what_is_kept_of_them(monkeypatch, chunk, at_hand):
    monkeypatch.setattr(streaming, "CHUNK", chunk)
    monkeypatch.setattr(streaming, "AT_HAND", at_hand)
    monkeypatch.setattr(streaming.chunks, "__defaults__", (chunk,))
    method = DSIR(min_length=5, fitted=100)
    assert (
        select(method, RAW, "5count", target=NEWS[:2], seed=3).indices
        == select(DSIR(min_length=5, fitted=100), RAW, "5count", target=NEWS[:2], seed=3).indices
    )
    parts = [method.read(texts) for texts in streaming.chunks(RAW)]
    raw = streaming.total(map(method.count, parts), 100, method.again(parts))
    per = len(HashedNgrams().places(RAW[0])), len(HashedNgrams().places(RAW[1]))
    assert raw.sum() == 2 * sum(per), "to the end of the document that goes beyond 100"


def test_the_quality_filter_keeps_text_and_drops_lists_and_numbers():
    seen = ["abalone", "beetle", "cricket", "dingo", "egret", "finch", "gecko"]
    prose = " ".join(f"in the year of {word} they saw" for word in seen)
    quality = Quality()
    assert quality.passes(prose) and not quality.passes("in the year") and not quality.passes("")
    assert not quality.passes("a " * 60) and not quality.passes("7 " * 20 + prose)
    junk = ["7 1 3 " * 30] * 3
    chosen = select(DSIR(min_length=5, quality=True), [*junk, prose, prose + " again"], "2count", target=[prose])
    assert chosen.indices == [3, 4]


@pytest.mark.parametrize(
    ("options", "budget", "target", "message"),
    [
        ({}, "2count", NEWS[:2], "may choose among 0 of 12 documents"),
        ({"min_length": 5}, "2count", ["völlig andere wörter"], "shares no n-gram"),
        ({"min_length": 5}, "2count", [], "a target corpus holds no document"),
        ({"min_length": 5}, "2count", None, "give its texts as target"),
        ({"min_length": 5, "separate": True, "proportions": (0.5,)}, "2count", NEWS[:2], "one proportion for each"),
        ({"min_length": 5, "ngrams": 0}, "2count", NEWS[:2], "ngrams must be"),
    ],
)
def test_bad_input_is_one_line(options, budget, target, message):
    with pytest.raises(PrunelabError, match=message):
        select(DSIR(**options), RAW, Budget.parse(budget), target=target)


def test_everything_may_stay():
    assert len(select(DSIR(min_length=5), RAW, 1.0, target=NEWS[:2])) == len(RAW)


def test_bags_of_many_documents_are_those_of_each(monkeypatch):
    texts = [*RAW[:3], "", "alone", RAW[0], "..."]
    for buckets in (7, 300, 70_000):
        features = HashedNgrams(2, buckets)
        for _ in range(2):  # the second time all n-grams are known
            bags = features.bags(texts)
            each = np.split(bags.places, bags.sizes.cumsum()[:-1])
            assert [sorted(own.tolist()) for own in each] == [sorted(features.places(text)) for text in texts]
            monkeypatch.setattr(ngrams, "_REMEMBERED", 5)  # and then forgotten
    assert HashedNgrams().bags([""]).sizes.tolist() == [0] and HashedNgrams().bags([]).places.size == 0
