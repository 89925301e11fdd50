"""ClaPS beyond its golden cases: the vocabulary, ties, searches that find what rewards, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.claps.method import (
    ClaPS,
    above_percentile,
    genetic,
    greedy,
    particle_swarm,
    representatives,
    reward,
    word_starts,
)

WANTED = np.array([3, 1, 4, 1, 5])


def hits(prompts):
    """How many tokens stand where they should."""
    return (prompts == WANTED[: prompts.shape[1]]).sum(1).astype(float)


def test_tokens_that_begin_a_word():
    assert word_starts(["\u2581the", "ing", "\u0120dog", "<s>", "\u2581</s>"], ["\u2581</s>"]) == [0, 2]


def test_one_token_of_a_cluster_stays():
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    noise = 0.1 * torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(0))
    points = (centres[:, None] + noise).flatten(0, 1)
    found = representatives(points, 3)
    assert sorted(i // 20 for i in found) == [0, 1, 2] and representatives(points, 3) == found
    assert representatives(torch.zeros(4, 2).index_fill(0, torch.tensor([0]), 1.0), 2) == [0, 1]
    with pytest.raises(PrunelabError, match="choose fewer"):
        representatives(points, 61)


@pytest.mark.parametrize("search", [greedy, genetic, particle_swarm])
def test_searches_find_what_rewards(search):
    found = search(hits, 8)
    assert found.shape == (5,) and hits(found[None])[0] >= (5 if search is greedy else 4)
    assert np.array_equal(found, search(hits, 8))
    assert search(lambda prompts: np.zeros(len(prompts)), 1, 2).tolist() == [0, 0]


def test_the_gap_pays_right_answers_more():
    logits, target = torch.log(torch.tensor([[[0.6, 0.4]], [[0.4, 0.6]], [[0.5, 0.5]]])), torch.tensor([0])
    assert reward(logits, target, "gap").tolist() == pytest.approx([40.0, -36.0, 300.0]), "equal classes count as -1"
    assert float(reward(logits, target, "entropy")[2]) == pytest.approx(-np.log(2))
    twice = torch.tensor([0.6, 0.4]).log_softmax(-1)[0]
    assert float(reward(logits, target)[0]) == pytest.approx(float(twice))


def test_ties_at_the_percentile_go():
    assert above_percentile(torch.tensor([1.0, 2.0, 2.0, 2.0]), 50) == []
    assert above_percentile(torch.arange(10.0), 80) == [8, 9]


def test_a_ranker_of_prompts():
    logits = {"": [0.0, 0.0], "good": [3.0, 0.0], "bad": [0.0, 3.0], "meh": [0.1, 0.0]}
    services = {"class_logits": lambda prompts: torch.tensor([[logits[p]] for p in prompts]), "targets": [0]}
    method, units = ClaPS(batch=2), ["bad", "meh", "good"]
    assert method.plan(units, Budget(0.34), services).reduce.index.tolist() == [[2]]
    assert method.plan(units, Budget(1.0), services).reduce.index.tolist() == [[0, 1, 2]]
    by_change = ClaPS("kl").ranking(units, services)
    assert set(by_change.order[:2]) == {0, 2}, "what changes most, to the good or the bad"
    with pytest.raises(PrunelabError, match="no token"):
        method.rank([], services)
    with pytest.raises(PrunelabError, match="needs the service"):
        method.ranking(units)
