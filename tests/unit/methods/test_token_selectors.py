"""Token selectors beyond their golden cases: Rho-1, ssToken, Q-Tuning and PRIOR."""

from __future__ import annotations

import csv

import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.engine import applied, select
from prunelab.common.data_selection.losses import counted, token_loss
from prunelab.methods.prior_vlp.method import Prior, token_weights
from prunelab.methods.prior_vlp.tables import EXAMPLE, worked_example
from prunelab.methods.q_tuning.method import (
    QTuning,
    SamplesAndTokens,
    bisection,
    corners,
    quantile,
    smoothed,
    support,
)
from prunelab.methods.rho1.method import Rho1, Rho1Static
from prunelab.methods.sstoken.method import RandomTokens, SsToken, draw, scaled
from tests.contract.references import language_model
from tests.contract.test_data_selectors import batch

T = torch.tensor


def test_rho_keeps_what_only_the_model_in_training_finds_hard():
    model, reference, data = language_model().train(), language_model(seed=7), batch()
    with torch.no_grad():
        losses = [token_loss(m(**data).logits, data["labels"]) for m in (language_model(), reference)]
    excess, mask = losses[0] - losses[1], counted(data["labels"])
    best = excess[mask].sort(descending=True).values[: int(mask.sum()) // 2]
    with applied(Rho1(), model, 0.5, services={"reference": reference}):
        loss = model(**data).loss
    kept = losses[0][mask & (excess >= best[-1])]
    assert float(loss.detach()) == pytest.approx(float(kept.mean()), rel=1e-4)
    samples = [{"input_ids": ids, "labels": labels, "attention_mask": valid} for ids, labels, valid in
               zip(data["input_ids"], data["labels"], data["attention_mask"], strict=True)]  # fmt: skip
    options = {"model": language_model(), "services": {"reference": reference}}
    pooled, each = (select(Rho1Static(scope), samples, 0.5, **options).plan.tokens for scope in ("all", "sample"))
    assert torch.equal(pooled, mask & (excess >= best[-1]))
    assert each.sum(1).tolist() == (mask.sum(1) // 2).tolist()


def test_sstoken_reads_only_what_its_weight_asks_for():
    assert SsToken(1.0).requires() == {"loss", "history_loss"} and SsToken(0.0).requires() == {"prompt_attention"}
    equal = scaled(torch.ones(1, 4), T([[False, True, True, True]]))
    assert torch.equal(equal, torch.zeros(1, 4)), "a model that is its own history decides by attention alone"
    with pytest.raises(PrunelabError, match="gamma must be"):
        SsToken(1.5)
    assert SsToken(layer=0).attention_layer == 0


def test_random_tokens_are_drawn_once_and_from_all_samples():
    responses = torch.ones(4, 9, dtype=torch.bool)
    responses[:, :3] = False
    mask = draw(responses, Budget(0.5))
    assert int(mask.sum()) == 12 and not bool((mask & ~responses).any())
    assert torch.equal(mask, draw(responses, Budget(0.5))) and not torch.equal(mask, draw(responses, Budget(0.5), 1))
    assert RandomTokens().requires() == frozenset()


def test_quantiles_are_values_of_the_batch():
    values = T([3.0, 1.0, 2.0, 4.0])
    assert [float(quantile(values, T(f))) for f in (0.0, 0.25, 0.26, 0.5, 1.0)] == [1, 1, 2, 2, 4]


def test_bisection_relaxes_until_enough_samples_are_in_the_right_corners():
    rng = torch.Generator().manual_seed(0)
    perplexity, entropy = torch.rand(64, generator=rng), torch.rand(64, generator=rng)
    found = []
    for share in (0.05, 0.125, 0.25):
        fraction = bisection(perplexity, entropy, share, rounds=20)
        _, misconceived, _, calibrating = corners(perplexity, entropy, fraction)
        found.append(float((misconceived | calibrating).float().mean()))
        assert 0 < float(fraction) < 0.49 and abs(found[-1] - share) <= 2 / 64
    assert found == sorted(found)


def test_corners_are_named_as_in_the_paper():
    perplexity, entropy = T([9.0, 9.0, 1.0, 1.0, 5.0]), T([9.0, 1.0, 1.0, 9.0, 5.0])
    masks = corners(perplexity, entropy, T(0.25))
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[0], [1], [2], [3]]
    assert support(perplexity, entropy).tolist() == [0, 1, 0, 1, 0]


def test_neighbours_count_as_a_sum_within_the_answer():
    perplexity, answers = T([[5.0, 1.0, 2.0, 4.0]]), T([[False, True, True, True]])
    assert smoothed(perplexity, answers, 0.5).tolist() == [[0.5, 1.5, 3.5, 3.0]]
    assert smoothed(perplexity, answers, 0.0).tolist() == [[0, 1, 2, 4]]


class Batch:
    """A batch of four corners with three tokens each behind a prompt of two."""

    def __init__(self, loss, entropy):
        self.counted = T([[False, True, True, True]]).expand(len(loss), -1)
        self.loss, self.entropy = loss * self.counted, entropy[:, None] * self.counted
        self.lengths, self.rng = self.counted.sum(1), torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.loss)


def test_confident_errors_lose_their_worst_tokens_and_unsure_samples_none():
    loss = T([[0, 3.0, 3.0, 3.0], [0, 1.0, 3.0, 5.0], [0, 0.1, 0.1, 0.1], [0, 0.2, 0.2, 0.2]])
    plan = QTuning(neighbours=0.0).plan(Batch(loss, T([3.0, 0.1, 0.1, 3.0])), Budget((0.5, 0.34)))
    assert plan.samples.index.tolist() == [[1, 3]]
    assert plan.tokens[1].tolist() == [False, True, False, False] and plan.tokens[3].tolist() == [
        False,
        True,
        True,
        True,
    ]
    worst = QTuning(neighbours=0.0, reverse=True).plan(Batch(loss, T([3.0, 0.1, 0.1, 3.0])), Budget((0.5, 0.34)))
    assert worst.tokens[1].tolist() == [False, False, False, True]
    whole = QTuning().plan(Batch(loss, T([3.0, 0.1, 0.1, 3.0])), Budget((1.0, 1.0)))
    assert whole.samples.index.tolist() == [[0, 1, 2, 3]]


def test_pairs_of_baselines():
    batch = Batch(T([[0, 3.0, 1.0, 2.0], [0, 1.0, 3.0, 5.0]]), T([1.0, 2.0]))
    plan = SamplesAndTokens("entropy", "perplexity").plan(batch, Budget((0.5, 0.34)))
    assert plan.samples.index.tolist() == [[1]] and plan.tokens[0].tolist() == [False, False, True, False]
    batch.lengths = T([3, 2])
    assert SamplesAndTokens("shortest").plan(batch, Budget((0.5, 1.0))).samples.index.tolist() == [[1]]
    assert SamplesAndTokens().requires() == frozenset()
    with pytest.raises(PrunelabError, match="samples must be one of"):
        SamplesAndTokens("longest")


def test_weights_of_a_caption_have_the_mean_one():
    probability, captions = T([[0.9, 0.5, 0.1, 0.3], [0.0, 1.0, 1.0, 1.0]]), T([[False, True, True, True]] * 2)
    weight = token_weights(probability, captions)
    assert torch.allclose(weight[0], T([0, 0.5, 0.9, 0.7]) * 3 / 2.1)
    assert weight[1].tolist() == [0, 1, 1, 1], "known by heart: the plain loss"
    assert token_weights(probability, captions, 0.0)[0].tolist() == [0, 1, 1, 1]
    with pytest.raises(PrunelabError, match="alpha must be"):
        Prior(-1.0)


def test_the_figure_of_prior_comes_out():
    with EXAMPLE.open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    found = worked_example()
    for row in rows:
        value = found[f"figure worked example/{row['row']}/PRIOR loss"]["value"]
        assert value == pytest.approx(float(row["weighed"]), abs=0.04)
