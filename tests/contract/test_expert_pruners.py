"""The contract of expert pruners, over the reference, on every family of mixtures."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.attention_interface import NAME
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experts.role import ExpertPruner
from tests.contract.caches_references import WeakestExperts
from tests.contract.references import BigramDrafts, ReceivedCache, language_model, token_ids
from tests.contract.test_composition import GREEDY, stacked, untouched

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
every = pytest.mark.parametrize("family", FAMILIES)
METHODS = [WeakestExperts(), WeakestExperts(protect=0.25)]
METHODS += [c() for c in registry.load().values() if issubclass(c, ExpertPruner)]  # type: ignore[abstract]


def by_hand(model: Any, tokens: Tensor, budget: Budget) -> Tensor:
    """Logits of a model whose mixture layers are told anew, token by token and expert by expert."""

    def mixture(block: Any, args: tuple[Any, ...], output: Any) -> Tensor:
        x = args[0].flatten(0, 1)
        _, weights, chosen = block.gate(x)
        ranked = sorted(
            (float(w[j] / w.sum()) if j != int(w.argmax()) else 9.0, t, j)
            for t, w in enumerate(weights)
            for j in range(len(w))
        )
        kept = {(t, j) for _, t, j in ranked[len(ranked) - budget.count(len(ranked)) :]}
        out = torch.zeros_like(x)
        for t, (w, e) in enumerate(zip(weights, chosen, strict=True)):
            mine = [j for j in range(len(w)) if (t, j) in kept or j == int(w.argmax())]
            for j in mine:
                up = block.experts.gate_up_proj[e[j]] @ x[t]
                inner = block.experts.act_fn(up.chunk(2)[0]) * up.chunk(2)[1]
                out[t] += w[j] * w.sum() / sum(w[i] for i in mine) * (block.experts.down_proj[e[j]] @ inner)
        if hasattr(block, "shared_expert"):
            out = out + torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
        return out.view_as(args[0])

    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    hooks = [block.register_forward_hook(mixture) for block in blocks]
    try:
        return model(tokens).logits
    finally:
        for hook in hooks:
            hook.remove()


@every
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_all_choices_are_the_identity_and_fewer_equal_the_sum_by_hand(family, experts):
    model, tokens = language_model(family), token_ids(2, 12)
    model.set_experts_implementation(experts)
    plain = model(tokens).logits
    for method in METHODS:
        with apply(method, model, 1.0) as handle:
            assert torch.equal(model(tokens).logits, plain)
            assert handle.report().ratio == 1
        assert untouched(model)
    with apply(WeakestExperts(), model, 0.7) as handle:
        pruned = model(tokens).logits
    assert handle.report().run == (Budget(0.7).count(48) / 24,) * len(handle.sites)
    assert torch.allclose(pruned, by_hand(model, tokens, Budget(0.7)), atol=1e-4)
    assert not torch.allclose(pruned, plain, atol=1e-3)


@every
def test_gradient_checkpointing_runs_the_same_experts_again(family):
    """Layers decide by what they read, and so the same in the backward pass; it counts no token twice."""
    tokens, found = token_ids(2, 12), []
    for checkpointing in (False, True):
        model = language_model(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with apply(WeakestExperts(), model, 0.6) as handle:
            model(tokens, labels=tokens).loss.backward()
        found.append((handle.report(), [p.grad for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one is other is None or torch.allclose(one, other, atol=1e-5)


@every
@torch.no_grad()
def test_a_fixed_cache_is_read_as_a_growing_one(family):
    """Masks come as four dimensions then, or as one for each kind of layer."""
    model, tokens = language_model(family), token_ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for method in METHODS:
        found = []
        for kind in (None, "static"):
            with apply(method, model, 0.6) as handle:
                text = model.generate(tokens, cache_implementation=kind, **options)
                found.append((text.tolist(), handle.report()))
        assert found[0] == found[1]
        assert found[0][1].tokens == 20 + 2 * 3


@torch.no_grad()
def test_attention_received_is_the_mean_over_later_queries_and_padding_has_none():
    model, tokens = language_model("mixtral"), token_ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    seen: list[Tensor] = []

    class Spy(WeakestExperts):
        def plan(self, site: Any, signals: Any, budget: Budget) -> Tensor:
            seen.append(signals.received.view(2, -1))
            return super().plan(site, signals, budget)

    with apply(Spy(protect=0.25), model, 1.0):
        model(tokens, attention_mask=mask, position_ids=places)
    model.set_attn_implementation("eager")
    maps = model(tokens, attention_mask=mask, position_ids=places, output_attentions=True).attentions
    for got, full in zip(seen, maps, strict=True):
        for b, pad in enumerate((4, 0)):
            square = full[b, :, pad:, pad:].mean(0)  # [n, n]
            want = square.sum(0) / torch.arange(len(square), 0, -1)
            assert torch.allclose(got[b, pad:], want, atol=1e-5)
            assert not got[b, :pad].any()


@torch.no_grad()
def test_experts_go_with_caches_and_drafts_in_any_order():
    model = language_model("mixtral", max_position_embeddings=128, eos_token_id=None)
    tokens = token_ids(1, 20).clamp_min(3)
    plain = model.generate(tokens, **GREEDY)
    everything = (WeakestExperts(protect=0.2), 1.0)
    for other in ((BigramDrafts(), Budget(3, "count")), (ReceivedCache(), 1.0)):
        for order in permutations((everything, other)):
            with stacked(model, order):
                assert torch.equal(model.generate(tokens, **GREEDY), plain)
            assert untouched(model)
    with apply(WeakestExperts(), model, Budget(1, "count")) as handle:
        model.generate(tokens, **GREEDY)
    assert handle.report().run == (1.0,) * 3


@torch.no_grad()
def test_bad_input_is_one_line_and_nothing_is_left():
    model = language_model("mixtral")
    for message, target, budget in (
        ("no mixture of experts", language_model("llama"), 0.5),
        ("not to 100words", model, Budget(100, "words")),
        ("2 amounts but the model has 3", model, Budget((0.5, 0.5))),
    ):
        with pytest.raises(PrunelabError, match=message), apply(WeakestExperts(), target, budget):
            pass
        assert untouched(target)
    with apply(WeakestExperts(0.5), model, 0.5) as handle:
        assert model.config._attn_implementation == NAME
        with pytest.raises(PrunelabError, match="no token ran"):
            handle.report()
    assert untouched(model)
