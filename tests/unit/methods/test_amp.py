"""AMP against plain loops: scores averaged over prompts, counts and roundings, groups of query heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, prune, save_pruned
from prunelab.common.weights.targets import Target
from prunelab.methods.amp.method import AMP, head_projections, removed
from tests.contract.references import language_model, token_ids

fast = settings(max_examples=60, deadline=None)
PROMPTS = [token_ids(1, n, seed=n)[0] for n in (4, 11, 7)]


@torch.no_grad()
def inputs_of(model: nn.Module, linear: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for prompt in PROMPTS:
        model(prompt[None])
    handle.remove()
    return seen


def lost(plan: WeightPlan, unit: str) -> list[list[int]]:
    return [(~d.mask).nonzero().flatten().tolist() for t, d in plan.decisions() if t.unit == unit]


@pytest.mark.parametrize("family", ["llama", "llama_mha", "qwen3"])
@pytest.mark.parametrize("order", ["standard", "reversed"])
def test_scores_and_counts_by_plain_loops(family, order):
    model = language_model(family)
    groups, query = model.config.num_key_value_heads, model.config.num_attention_heads
    plan = prune(AMP(order), language_model(family), 0.5, PROMPTS, progress=False)
    for block, layer in enumerate(model.model.layers):
        o, down = layer.self_attn.o_proj, layer.mlp.down_proj
        size, heads = o.in_features // query, []
        for head in range(query):
            columns = slice(head * size, (head + 1) * size)
            per_prompt = []
            for x in inputs_of(model, o):
                added = [float((o.weight.detach()[:, columns] @ token[columns]).abs().sum()) for token in x]
                per_prompt.append(sum(added) / len(x))
            heads.append(sum(per_prompt) / len(PROMPTS))
        in_groups = [sum(heads[g * query // groups : (g + 1) * query // groups]) for g in range(groups)]
        neurons = torch.stack([x.abs().mean(0) for x in inputs_of(model, down)]).mean(0).tolist()
        sign = -1 if order == "reversed" else 1
        for scores, unit, count in ((in_groups, "heads", groups // 2), (neurons, "channels", 20)):
            worst = sorted(sorted(range(len(scores)), key=lambda i: sign * scores[i])[:count])
            assert lost(plan, unit)[block] == worst


def test_prompts_count_alike_whatever_their_length():
    found = []
    for prompts in ([PROMPTS[1], PROMPTS[2]], [PROMPTS[1], PROMPTS[1], PROMPTS[2], PROMPTS[2]]):
        found.append(prune(AMP(), language_model(), 0.5, prompts, progress=False))
    assert found[0].diff(found[1]) == "the plans are equal"
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    assert torch.allclose(head_projections(torch.cat([x, x]), weight, 2), head_projections(x, weight, 2))


def layer(heads: int = 32, head: int = 128, width: int = 4096, inner: int = 11008) -> tuple[Target, Target]:
    return (
        Target("heads", "h", 0, "heads", (heads,), 4 * head * width, head),
        Target("channels", "c", 0, "channels", (inner,), 3 * width),
    )


def test_counts_of_llama_7b():
    heads, neurons = layer()
    assert removed(0.2, heads, neurons, released=True) == (6, round(0.2 * 11008 + 0.4))
    assert removed(0.5, heads, neurons, released=True) == (16, 5504)
    assert removed(0.484375, heads, neurons, released=True)[0] == 16, "15.5 rounds to even"
    assert removed(0.453125, heads, neurons, released=True)[0] == 14, "14.5 rounds to even"
    assert removed(1.0, heads, neurons, released=True) == (31, 11007)
    assert removed(0.3, None, neurons, True) == (0, 3302) and removed(0.3, heads, None, True) == (10, 0)
    assert removed(0.0, heads, neurons, True) == removed(0.0, heads, neurons, False) == (0, 0)


@fast
@given(gone=st.floats(0, 0.9), heads=st.integers(2, 64), inner=st.integers(300, 20000))
def test_exact_counts_meet_the_budget_to_half_a_neuron(gone, heads, inner):
    targets = layer(heads, 64, 512, inner)
    total = sum(t.parameters for t in targets)
    worst: dict[bool, float] = {}
    for released in (True, False):
        counts = removed(gone, *targets, released)
        assert all(0 <= count < t.units for count, t in zip(counts, targets, strict=True))
        left = sum(c * t.size for c, t in zip(counts, targets, strict=True)) - gone * total
        worst[released] = abs(left)
    free = 0 < removed(gone, *targets, False)[1] < inner - 1 and round(gone * heads) < heads
    if free:  # neither at an end: only the rounding of neurons is left
        assert worst[False] <= targets[1].size * 0.51
        assert worst[False] <= worst[True] + targets[1].size


def test_one_kind_alone_random_order_and_budgets_a_layer():
    ids = token_ids()
    plan = prune(AMP(prune=("channels",)), language_model(), 0.7, ids, progress=False)
    assert {t.unit for t in plan.targets} == {"channels"} and [len(x) for x in lost(plan, "channels")] == [12] * 3
    plan = prune(AMP(prune=("heads",)), language_model("llama_mha"), Budget((1.0, 0.75, 0.5)), ids, progress=False)
    assert [len(x) for x in lost(plan, "heads")] == [0, 1, 2]
    drawn = [prune(AMP("random"), language_model(), 0.5, ids, seed=s, progress=False) for s in (0, 0, 1)]
    assert drawn[0].diff(drawn[1]) == "the plans are equal" != drawn[0].diff(drawn[2])
    assert [len(x) for x in lost(drawn[0], "channels")] == [20] * 3


def test_the_reversed_order_loses_more():
    model, ids = language_model("llama_mha", num_hidden_layers=1), token_ids(16)
    with torch.no_grad():
        want = model.model(ids).last_hidden_state
        errors = []
        for order in ("standard", "reversed"):
            pruned = language_model("llama_mha", num_hidden_layers=1)
            prune(AMP(order, ("channels",)), pruned, 0.5, ids, progress=False)
            errors.append(float((pruned.model(ids).last_hidden_state - want).square().mean()))
    assert errors[0] < errors[1]


def test_uniform_plans_are_ordinary_models(tmp_path):
    model = language_model("llama_mha")
    plan = prune(AMP(), model, 0.5, token_ids(), progress=False)
    save_pruned(model, plan, tmp_path)
    stock = type(model).from_pretrained(tmp_path)
    assert (stock.config.num_attention_heads, stock.config.intermediate_size) == (2, 20)
    with torch.no_grad():
        assert torch.equal(stock(token_ids()).logits, model(token_ids()).logits)
    assert plan.report.sparsity == pytest.approx(0.5)


def test_bad_options_and_budgets_are_named():
    for wrong in ((), ("experts",)):
        with pytest.raises(PrunelabError, match="amp prunes heads, channels or both"):
            AMP(prune=wrong)
    for budget, match in ((Budget(4, "count"), "prunes a ratio"), (Budget((0.5, 0.0, 0.5)), "keep more")):
        with pytest.raises(PrunelabError, match=match):
            prune(AMP(), language_model(), budget, token_ids(), progress=False)
