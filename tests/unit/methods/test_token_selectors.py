"""Token selectors beyond their golden cases: Rho-1, ssToken, Q-Tuning and PRIOR."""

from __future__ import annotations

import csv

import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.engine import applied, select
from prunelab.common.data_selection.losses import counted, token_loss
from prunelab.common.data_selection.signals import raters, sources
from prunelab.methods.prior_vlp.method import Prior, token_weights
from prunelab.methods.prior_vlp.tables import EXAMPLE, worked_example
from prunelab.methods.q_tuning.method import (
    QTuning,
    SamplesAndTokens,
    bisection,
    corners,
    info_batch,
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


def test_infobatch_drops_low_losses_first_and_lets_those_left_stand_for_them():
    loss, rng = T([1.0, 2.0, 3.0, 8.0, 9.0]), torch.Generator().manual_seed(0)
    worth, weight = info_batch(loss, 4, rng)  # one of the three below the mean goes
    assert worth[:3].max() < worth[3:].min() and torch.allclose(weight, T([1.5, 1.5, 1.5, 1, 1]))
    assert info_batch(loss, 2, rng)[1].tolist() == info_batch(loss, 1, rng)[1].tolist() == [1] * 5
    batch = Batch(T([[0, 1.0, 1.0, 1.0], [0, 5.0, 5.0, 5.0]]), T([1.0, 2.0]))
    plan = SamplesAndTokens("infobatch").plan(batch, Budget((0.5, 1.0)))
    assert plan.samples.index.tolist() == [[1]] and plan.weight.tolist() == [1, 1]


def test_quadrants_go_and_lose_tokens_as_an_ablation_asks():
    loss = T([[0, 3.0, 4.0, 5.0], [0, 1.0, 3.0, 5.0], [0, 0.1, 0.1, 0.1], [0, 0.2, 0.3, 0.4]])
    batch = Batch(loss, T([3.0, 0.1, 0.1, 3.0]))
    kept = QTuning(neighbours=0.0, dropped=("Q3",), thinned=("Q1", "Q2")).plan(batch, Budget((0.75, 0.34)))
    assert kept.samples.index.tolist() == [[0, 1, 3]]
    assert kept.tokens.sum(1).tolist() == [1, 1, 3, 3]
    every = QTuning(neighbours=0.0, thinned=("Q2", "Q4")).plan(batch, Budget((0.5, 0.34)))
    assert every.samples.index.tolist() == [[1, 3]] and every.tokens.sum(1).tolist() == [3, 1, 3, 1]
    batch.reference_loss = torch.zeros_like(batch.loss)
    excess = QTuning(tokens="excess").plan(batch, Budget((0.5, 0.34)))
    assert excess.tokens[1].tolist() == [False, False, False, True] and QTuning(tokens="excess").services


@pytest.mark.parametrize(
    ("rule", "signals"),
    [("fastv", {"last_attention"}), ("sparsevlm", {"rater_attention"}), ("rho1", {"loss", "reference_loss"}),
     ("token_cleaning", {"history_loss", "reference_loss"})],
)  # fmt: skip
def test_tokens_of_largest_score_stay_under_each_rule(rule, signals):
    method = SamplesAndTokens(tokens=rule)
    batch = Batch(torch.zeros(1, 4), T([1.0]))
    for name in signals:
        setattr(batch, name, T([[0, 3.0, 2.0, 1.0]]) if name != "reference_loss" else torch.zeros(1, 4))
    assert method.requires() == signals
    assert method.plan(batch, Budget((1.0, 0.34))).tokens.tolist() == [[False, True, False, False]]


def test_the_last_token_and_the_words_that_an_answer_is_like_are_read_from_attention():
    model, data = language_model(attn_implementation="eager").eval(), batch()
    valid, labels = data["attention_mask"].bool(), data["labels"]
    needed = frozenset({"last_attention", "rater_attention", "prompt_attention"})
    given = sources(needed, data, model, {}, -1)
    found = {name: given[name]() for name in needed}
    with torch.no_grad():
        paid = model(**{**data, "labels": None}, output_attentions=True).attentions[-1].mean(1)
    prompt, answers = (labels == -100) & valid, counted(labels)
    last = valid.sum(1) - 1
    assert torch.allclose(found["last_attention"], paid[torch.arange(6), last] * answers, atol=1e-5)
    words = model.get_input_embeddings()(data["input_ids"])
    for i in range(6):
        alike = (words[i][answers[i]] @ words[i][prompt[i]].T).softmax(-1).mean(0)
        chosen = prompt[i].nonzero().flatten()[alike > alike.mean()]
        assert torch.allclose(found["rater_attention"][i], paid[i][:, chosen].sum(-1) * answers[i], atol=1e-5)
    assert (found["rater_attention"] <= found["prompt_attention"] + 1e-6).all()


def test_without_a_relevant_word_the_whole_prompt_rates():
    same, prompt = torch.ones(1, 4, 2), T([[True, True, False, False]])
    assert raters(same, prompt, ~prompt).tolist() == prompt.tolist()


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
