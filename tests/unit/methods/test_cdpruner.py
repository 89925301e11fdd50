"""CDPruner: picks by brute force, ranges, weights, and what it refuses."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures.text_similarity import text_similarity
from prunelab.methods.cdpruner.method import CDPruner, kernel, most_probable, relevance


def test_picks_are_those_whose_determinant_grows_most():
    torch.manual_seed(0)
    matrix = kernel(torch.randn(3, 7, 12), relevance(torch.randn(3, 7)))
    for sample, picks in zip(matrix, most_probable(matrix, 3).tolist(), strict=True):
        for i in range(3):
            gains = {j: float(sample[(*picks[:i], j), :][:, (*picks[:i], j)].det()) for j in {*range(7)} - {*picks[:i]}}
            assert picks[i] == max(gains, key=gains.__getitem__)


def test_of_orthogonal_tokens_the_relevant_ones_stay_and_twins_do_not():
    tokens = torch.eye(4).unsqueeze(0)
    assert most_probable(kernel(tokens, torch.tensor([[0.1, 0.9, 0.2, 0.8]])), 2).tolist() == [[1, 3]]
    twins = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    best = max(
        combinations(range(3), 2), key=lambda pair: float(kernel(twins, torch.ones(1, 3))[0][pair, :][:, pair].det())
    )
    assert sorted(most_probable(kernel(twins, torch.ones(1, 3)), 2)[0].tolist()) == list(best) == [0, 2]


def test_more_picks_than_features_are_wide_are_all_different():
    tokens = torch.ones(2, 9, 4)
    picks = most_probable(kernel(tokens, torch.rand(2, 9) + 0.1), 9)
    assert [sorted(row) for row in picks.tolist()] == [list(range(9))] * 2
    assert most_probable(kernel(tokens, torch.ones(2, 9)), 0).shape == (2, 0)


def test_relevance_has_one_range_a_sample_and_is_turned_round():
    assert relevance(torch.tensor([[0.0, 1.0, 2.0]]), 1e-6).tolist() == [
        [pytest.approx(1.0), pytest.approx(0.5), pytest.approx(5e-7)]
    ]
    assert relevance(torch.tensor([[0.0, 2.0]]), 1e-6, turned=False)[0, 1] == pytest.approx(1.0)
    assert relevance(torch.full((1, 3), 0.3)).tolist() == [[1.0, 1.0, 1.0]]


def test_theta_weighs_relevance():
    likeness = torch.tensor([[0.0, 1.0]])
    assert CDPruner(theta=0.0).weights(likeness).tolist() == [[1.0, 1.0]]
    assert CDPruner(theta=0.5).weights(likeness)[0, 0] == pytest.approx(torch.tensor(0.5).exp().item(), rel=1e-5)
    with pytest.raises(PrunelabError, match="theta"):
        CDPruner(theta=1.0)


def test_patches_are_compared_behind_the_last_norm():
    torch.manual_seed(0)
    text, projection, norm = torch.randn(5), nn.Linear(8, 5, bias=False), nn.LayerNorm(8)
    hidden = torch.randn(2, 6, 8) * torch.rand(8)
    service = text_similarity(text, projection, norm)
    assert torch.equal(service(hidden, normed=True), service(norm(hidden)))
    assert not torch.allclose(service(hidden, normed=True), service(hidden))
    with pytest.raises(PrunelabError, match="post_layernorm"):
        text_similarity(text, projection)(hidden, normed=True)
