"""ReAGent and its baselines beyond their golden cases: batching, edges, axioms, samplers, and bad input."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures.attribute import log_ratio
from prunelab.common.metrics.faithfulness import distance, faithfulness
from prunelab.common.ranking.attribution import Attribution, Explained, alike, kinds
from prunelab.methods.attribution_baselines.method import (
    AttentionImportance,
    IntegratedGradients,
    OwnGradients,
    attention_importance,
    gradients,
    path,
)
from prunelab.methods.reagent.method import ReAGent, update
from tests.contract.references import language_model

METHODS = [c() for c in registry.load().values() if issubclass(c, Attribution)]
TOKENS = torch.tensor([3, 17, 4, 9, 22, 17, 30])


def services():
    model = Explained(language_model(), baseline=1, end=0)
    return {"model": model, "next_token_logits": model.next_token_logits, "replace": alike([0] * 61)}


def copying(context):
    """The next token is the second one of the context, whatever else stands there."""
    return 9 * torch.nn.functional.one_hot(context[:, 1], 31).float()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_importance_is_a_distribution_and_repeats_itself(method):
    given = {name: services()[name] for name in method.services}
    first, second = method.rank(TOKENS, given), method.rank(TOKENS, given)
    assert (
        torch.equal(first, second) and first.shape == TOKENS.shape and float(first.sum()) == pytest.approx(1, abs=1e-5)
    )
    assert bool((first >= 0).all())
    kept = method.plan(TOKENS, Budget(3, "count"), given).reduce.index[0]
    assert set(kept.tolist()) == set(first.topk(3).indices.tolist())
    if method.services:
        with pytest.raises(PrunelabError, match="needs the service"):
            method.plan(TOKENS, Budget(3, "count"))
        with pytest.raises(PrunelabError, match="at least one token"):
            method.rank(TOKENS[:0], given)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_half_precision_gives_nearly_the_same(method):
    half = Explained(language_model().bfloat16(), baseline=1, end=0)
    low = {"model": half, "next_token_logits": half.next_token_logits, "replace": alike([0] * 61)}
    found, wanted = (method.importance(TOKENS, {n: s[n] for n in method.services}, 5) for s in (low, services()))
    assert found.dtype == torch.float32 and float(found.sum()) == pytest.approx(1, abs=1e-3)
    if method.name != "reagent":  # its draws meet other stopping steps
        assert torch.allclose(found, wanted, atol=0.1)


def test_the_token_that_decides_is_found():
    found = ReAGent(runs=5, ratio=0.3, top_n=1, top_k=1).importance(
        torch.arange(6), {"next_token_logits": copying, "replace": alike([0] * 31)}
    )
    assert int(found.argmax()) == 1


@pytest.mark.parametrize("together", [1, 3, 64])
def test_reading_steps_together_changes_passes_and_nothing_else(together):
    passes = []

    def logits(context):
        passes.append(len(context))
        return copying(context) * 0.1

    def replace(units, rng):
        return (units + 7) % 31

    given = {"next_token_logits": logits, "replace": replace}
    tokens = torch.arange(20)
    one = ReAGent(together=1, at_once=3, top_n=1, top_k=1, ratio=0.2).trace(tokens, given)
    before = len(passes)
    many = ReAGent(together=together, at_once=999, top_n=1, top_k=1, ratio=0.2).trace(tokens, given)
    assert torch.allclose(one.importance, many.importance, atol=1e-6) and torch.equal(one.stop, many.stop)
    assert torch.equal(one.masks, many.masks) and len(one.stop) > 8
    assert together == 1 or len(passes) - before < before // 2


def test_contexts_in_which_nothing_was_replaced_are_not_read():
    seen = []

    def logits(context):
        seen.extend(context.tolist())
        return torch.arange(31.0).expand(len(context), -1)

    method = ReAGent(max_steps=40, top_k=1)
    given = {"next_token_logits": logits, "replace": lambda units, rng: (units + 7) % 31}
    trace = method.trace(TOKENS, given, target=0)
    empty = int((~trace.masks.any(-1)).sum())
    assert empty > 20 and seen.count(TOKENS.tolist()) == 1, "the whole context is read once"
    assert len(seen) == 1 + 2 * 3 * 40 - empty


def test_where_no_run_stops_all_of_them_count():
    never = {"next_token_logits": lambda c: torch.arange(31.0).expand(len(c), -1), "replace": alike([0] * 31)}
    method = ReAGent(max_steps=20, top_k=1)
    trace = method.trace(TOKENS, never, target=0)
    assert len(trace.stop) == 20 and not bool(trace.stopped.any()) and bool(trace.mean().isnan().all())
    assert torch.allclose(method.importance(TOKENS, never, target=0), trace.final.mean(0))
    assert bool(torch.isfinite(update(torch.tensor([1.0, -1.0]), torch.tensor([[True], [True]]))).all())


def test_contexts_shorter_than_the_rationale():
    found = ReAGent(top_n=9).importance(TOKENS[:2], {n: services()[n] for n in ReAGent.services})
    assert found.shape == (2,)
    with pytest.raises(PrunelabError, match="ratio above 0"):
        ReAGent(ratio=0.0).importance(TOKENS, services())


def test_samplers_keep_the_kind_of_a_token():
    class Tokenizer:
        words = ["def", " name", "7", "(", "\n  ", "tion"]

        def decode(self, ids):
            return self.words[ids[0]]

        def __len__(self):
            return 6

    assert kinds(Tokenizer(), 8) == [1, 0, 2, 3, 4, 1, 5, 5]
    tokens = torch.tensor([[0, 1, 2, 5]] * 50)
    drawn = alike(kinds(Tokenizer(), 8))(tokens, torch.Generator().manual_seed(0))
    assert set(drawn[:, 0].tolist()) == {0, 5} == set(drawn[:, 3].tolist())
    assert set(drawn[:, 1].tolist()) == {1} and set(drawn[:, 2].tolist()) == {2}


def test_integrated_gradients_are_complete_and_rules_agree():
    model = services()["model"]
    ends = torch.stack([model.embed(TOKENS), model.embed(model.without(TOKENS))])
    (whole, blank), _ = gradients(model, ends, 5)
    for rule in ("gausslegendre", "riemann_middle"):
        total = IntegratedGradients(60, rule).raw(model, TOKENS, 5).sum()
        assert float(total) == pytest.approx(float(whole - blank), rel=1e-3)
    for rule in ("riemann_left", "riemann_right", "average", "riemann_middle", "gausslegendre"):
        places, weights = path(10, rule)
        assert float(weights.sum()) == pytest.approx(1) and float(places.min()) >= 0 and float(places.max()) <= 1
    assert float(path(10, "riemann_trapezoid")[1].sum()) == pytest.approx(0.9), "as captum has it"
    with pytest.raises(PrunelabError, match="no rule 'simpson'"):
        path(3, "simpson")
    with pytest.raises(PrunelabError, match="kind must be one of"):
        OwnGradients("other")


def test_rollout_is_the_product_of_mixed_layers():
    maps = torch.rand(3, 1, 2, 4, 4).tril().add(1e-3)
    maps = maps / maps.sum(-1, keepdim=True)
    mixed = [0.5 * layer + 0.5 * torch.eye(4) for layer in maps.mean(2)[:, 0]]
    whole = mixed[2] @ mixed[1] @ mixed[0]
    assert torch.allclose(attention_importance(maps, "rollout")[0], whole[-1], atol=1e-6)
    with pytest.raises(PrunelabError, match="read by one of"):
        attention_importance(maps, "first")
    model = services()["model"]
    before = model.model.config._attn_implementation
    AttentionImportance().read(model, TOKENS, 1)
    assert model.model.config._attn_implementation == before


def test_an_importance_that_keeps_all_is_sufficient():
    embeddings, original = torch.randn(5, 8), torch.tensor([0.7, 0.2, 0.1])

    def probabilities(given):
        return torch.where(given.abs().sum((1, 2))[:, None] > 1e-6, original, torch.ones(3) / 3)

    found = faithfulness(embeddings, torch.ones(5), probabilities, original, torch.rand(3, 5, 8))
    assert float(found.normalised_sufficiency) == pytest.approx(1) == float(found.normalised_comprehensiveness)
    assert float(distance(original, original)) == 0


def test_a_ratio_of_sums_has_a_jackknife_error():
    own, control = torch.tensor([2.0, 4.0, 6.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    exact = log_ratio(own, control)
    assert exact["value"] == pytest.approx(0.6931, abs=1e-4) and exact["stderr"] == 0 and exact["n"] == 3
    assert log_ratio(own, control.flip(0))["stderr"] > 0.1
    with pytest.raises(PrunelabError, match="more contexts"):
        log_ratio(torch.zeros(3), control)
