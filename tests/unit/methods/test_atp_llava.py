"""ATP-LLaVA: importances, sampling, thresholds, masks, losses, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.training.lessons import lesson
from prunelab.methods.atp_llava.method import (
    ATPLLaVA,
    Thresholds,
    cross_importance,
    sampled,
    self_importance,
    soft_mask,
    standard,
)
from tests.contract.vlms import images, prompt, vlm


@pytest.mark.parametrize("rule", ["received", "paid"])
def test_self_importance_is_the_mean_logit_among_visual_tokens(rule):
    q, k = torch.randn(2, 2, 3, 7, 4)
    visual = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 0]]).bool()
    logits = (q @ k.transpose(-1, -2) * 4**-0.5).mean(1)
    pairs = visual[:, :, None] & visual[:, None, :] & torch.ones(7, 7, dtype=torch.bool).tril()
    axis = 1 if rule == "received" else 2
    want = (logits * pairs).sum(axis) / pairs.sum(axis).clamp_min(1)
    assert torch.allclose(self_importance(q, k, visual, rule)[visual], want[visual], atol=1e-5)


def test_cross_importance_leaves_out_rows_that_hold_nothing():
    text = torch.rand(2, 3, 4, 5)
    text[1, :, :2] = 0
    found = cross_importance(text)
    assert torch.allclose(found[0], text[0].mean((0, 1))) and torch.allclose(found[1], text[1, :, 2:].mean((0, 1)))


def test_every_so_many_rows_and_columns_are_sampled():
    found = sampled(torch.arange(24).view(1, -1), 6, (0.25,), 3.0).view(4, 6)
    assert float(found[0, 0]) == float(found[2, 4]) == 0.25 and int((found > 0).sum()) == 6
    both = sampled(torch.arange(64).view(1, -1), 8, (0.25, 0.0625), 3.0)
    assert int((both == 0.8125).sum()) == 4 and int((both > 0).sum()) == 16, "of several rates the sparsest counts"


def test_what_stands_out_is_above_a_half():
    scores, visual = torch.tensor([[9.0, 1.0, 2.0, 3.0]]), torch.tensor([[False, True, True, True]])
    found = standard(scores, visual)
    assert found[0, 1] < 0.5 == found[0, 2] < found[0, 3]
    assert torch.equal(standard(scores * 1e3, visual)[visual] > 0.5, found[visual] > 0.5)


def test_masks_are_steps_at_high_temperature():
    redundant, spatial = torch.tensor([[0.2, 0.6, 0.2]]), torch.tensor([[0.0, 0.0, 0.8]])
    mask = soft_mask(redundant, spatial, (torch.tensor([[0.5]]), torch.tensor([[0.5]])), 1e4)
    assert mask.tolist() == [[0.0, 1.0, 1.0]]
    theta = Thresholds(8)(torch.rand(3), torch.rand(3))
    assert all(t.shape == (3, 1) and bool(((t > 0) & (t < 1)).all()) for t in theta)


def test_modules_stand_as_deep_as_in_the_paper():
    def layers(depth: int) -> list[int]:
        return [site.layer for site in ATPLLaVA().sites(ModelInfo("vlm", depth, 4, 8, 9))]

    assert layers(32) == [4, 14, 24] and layers(16) == [2, 7, 12] and layers(5) == [1, 2, 3]


def run(method, budget=1.0, count=2):
    model, given = vlm("llava"), prompt("llava", images("llava", count))
    parts = method.build(adapter_for(model).info)
    with torch.no_grad(), apply(method, model, budget, parts=parts) as handle:
        model(**given)
        return handle.kept()


def visual(kept):
    """How many of the 16 visual tokens, which stand behind 3 words, are in each sample."""
    return [((index >= 3) & (index < 19)).sum(1).tolist() for _, index in kept]


def test_given_thresholds_decide():
    assert visual(run(ATPLLaVA(layers=(1, 3), thresholds=(-99.0, 99.0)))) == [[16, 16]] * 2
    every_second = ATPLLaVA(layers=(1, 2), thresholds=(99.0, 0.1))
    assert visual(run(every_second)) == [[4, 4], [4, 4]], "rows and columns"
    assert visual(run(replace(every_second, spatial=False))) == [[0, 0], [0, 0]]
    assert visual(run(ATPLLaVA(layers=(1,), thresholds=(-99.0, 99.0)), "5count")) == [[5, 5]], "the budget bounds it"


def test_places_are_those_of_the_picture_after_earlier_pruning():
    kept = run(ATPLLaVA(layers=(1, 3), thresholds=(99.0, 0.1)))
    grid = [3 + 4 * row + column for row in (0, 2) for column in (0, 2)]
    for _, index in kept:
        assert [i for i in index[0].tolist() if 3 <= i < 19] == grid


def test_losses_draw_the_mean_to_the_target():
    model, given = vlm("llava").train(), prompt("llava", images("llava", 2))

    def outputs(net):
        logits = net(**given, use_cache=False, logits_to_keep=1).logits[:, -1]
        return SimpleNamespace(loss=F.cross_entropy(logits, torch.arange(2)), logits=logits)

    def loss(budget, **options):
        method = ATPLLaVA(layers=(1, 2), thresholds=(-99.0, 99.0), **options)  # all of the 16 stay
        return float(lesson(method, model, [Budget.parse(budget)], outputs).detach())

    plain = loss("1.0", progressive=0.0, target=0.0)
    assert loss("0.25", progressive=0.0, target=0.2) == pytest.approx(plain + 0.2 * 12, abs=1e-3)
    assert loss("1.0", progressive=0.05, target=0.2) == pytest.approx(plain + 0.05 * (1 + 2), abs=1e-3)
    parts = ATPLLaVA(layers=(1, 2)).build(adapter_for(model).info)
    lesson(ATPLLaVA(layers=(1, 2)), model, [Budget(0.25)], outputs, parts=parts).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts[0].redundant.parameters())
    with pytest.raises(PrunelabError, match=r"call model\.train\(\) first"):
        lesson(ATPLLaVA(layers=(1, 2)), model.eval(), [Budget(0.25)], outputs, parts=parts)


def test_layers_beyond_the_model_are_refused():
    with pytest.raises(PrunelabError, match="set the method's layers"), apply(ATPLLaVA((24,)), vlm("llava"), 1.0):
        pass
