"""BlockPruner against a search that deletes blocks from copies of the model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, prune
from prunelab.common.weights.targets import Target
from prunelab.methods.blockpruner.method import BlockPruner, greedy, window_loss
from tests.contract.references import language_model, token_ids

ROLES = ("attention", "mlp")


class Nothing(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return torch.zeros_like(hidden_states)


class NoAttention(Nothing):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return super().forward(hidden_states), None


def without(model: Any, gone: list[tuple[str, int]]) -> Any:
    copied = copy.deepcopy(model)
    for role, layer in gone:
        setattr(copied.model.layers[layer], "self_attn" if role == "attention" else "mlp",
                NoAttention() if role == "attention" else Nothing())  # fmt: skip
    return copied


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    losses = [F.cross_entropy(model(row[None], use_cache=False).logits[0, :-1], row[1:]) for row in ids]
    return math.exp(sum(map(float, losses)) / len(losses))


def plainly(model: Any, ids: Tensor, steps: int, roles: tuple[str, ...]) -> list[tuple[str, int]]:
    gone: list[tuple[str, int]] = []
    for _ in range(steps):
        left = [(role, i) for role in roles for i in range(len(model.model.layers)) if (role, i) not in gone]
        gone.append(min(left, key=lambda block: perplexity(without(model, [*gone, block]), ids)))
    return gone


def removed(plan: WeightPlan) -> set[tuple[str, int]]:
    return {(target.role, target.block) for target, decision in plan.decisions() if not decision.kept}


@pytest.mark.parametrize(("kind", "roles"), [("mix", ROLES), ("mha", ROLES[:1]), ("mlp", ROLES[1:])])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_search_is_that_over_copies_of_the_model(family, kind, roles):
    model, ids = language_model(family, num_hidden_layers=4), token_ids()
    dense = copy.deepcopy(model)
    plan = prune(BlockPruner(kind), model, "3removed", ids, progress=False)
    gone = plainly(dense, ids, 3, roles)
    assert removed(plan) == set(gone)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, without(dense, gone)(ids, use_cache=False).logits, atol=1e-5)


def test_of_equal_blocks_the_first_goes_and_those_gone_are_not_tried():
    candidates = [Target("sublayers", f"{role}{i}", i, role, (1,)) for role in ROLES for i in range(2)]
    order = [(target.name, [math.isnan(p) for p in tried]) for target, tried in greedy(candidates, lambda gone: 7.0)]
    assert [name for name, _ in order] == ["attention0", "attention1", "mlp0", "mlp1"]
    assert [gone for _, gone in order] == [[j < i for j in range(4)] for i in range(4)]


def test_padding_is_attended_to_but_not_predicted():
    logits, tokens = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 8, 3, 8, 8])
    each = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    assert float(window_loss(logits, tokens)) == pytest.approx(float(each.mean()))
    assert float(window_loss(logits, tokens, 8)) == pytest.approx(float(each[tokens[1:] != 8].mean()))


def test_budgets_count_blocks():
    plan = prune(BlockPruner(), language_model(), 0.5, token_ids(), progress=False)
    assert len(removed(plan)) == 3
    assert len(removed(prune(BlockPruner("mlp"), language_model(), "1count", token_ids(), progress=False))) == 2
    for kind, budget in (("mix", "6removed"), ("mha", "3removed"), ("mlp", "0count")):
        with pytest.raises(PrunelabError, match="keep more"):
            prune(BlockPruner(kind), language_model(), budget, token_ids(), progress=False)


def test_a_loss_that_is_no_number_is_named():
    model = language_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = math.nan
    with pytest.raises(PrunelabError, match="loss is NaN"):
        prune(BlockPruner(), model, "1removed", token_ids(), progress=False)
