"""Expert pruning by enumeration: the set that it keeps is the best one of models that were really pruned, and bad
input."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.targets import Decision
from prunelab.methods.expert_sparsity.method import ExpertSparsity, sets
from prunelab.methods.stun.method import Stun, most_missed
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids

MOE = ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"]


def model_of(family):
    return WEIGHT_FAMILIES[family]() if family in WEIGHT_FAMILIES else language_model(family)


def really_lost(family, samples, target, stays):
    """||Z - Z'|| of one layer's routed output, of a model whose layer was pruned to these experts; its inputs are the
    unpruned model's."""
    model, dense = model_of(family), model_of(family)
    mask = torch.zeros(target.units, dtype=torch.bool).index_fill(0, stays, True)
    inputs, outputs = [], []
    gate = target.name.replace("experts", "gate")
    dense.get_submodule(target.name).register_forward_hook(lambda _m, args, out: outputs.append(out))
    dense.get_submodule(gate).register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    for tokens in samples:
        dense(tokens.unsqueeze(0))
    weight_adapter(model).write(target, Decision(mask))
    router, experts, total = model.get_submodule(gate), model.get_submodule(target.name), 0.0
    for x, z in zip(inputs, outputs, strict=True):
        _, gates, chosen = router(x)
        total += float((experts(x.flatten(0, -2), chosen, gates) - z.flatten(0, -2)).double().norm())
    return total


@torch.no_grad()
@pytest.mark.parametrize("family", MOE)
def test_what_stays_loses_least_of_all_sets(family):
    samples = list(token_ids(2, seed=3))
    plan = prune(ExpertSparsity(together=1), model_of(family), Budget(2, "count"), samples, progress=False)
    (target, decision), *_ = plan.decisions()
    losses = {stays: really_lost(family, samples, target, torch.tensor(stays))
              for stays in combinations(range(target.units), 2)}  # fmt: skip
    kept = tuple(decision.mask.nonzero().flatten().tolist())
    assert losses[kept] == pytest.approx(min(losses.values()), rel=1e-5) and len(set(losses.values())) > 1


def test_sets_come_in_the_order_of_what_leaves():
    assert [s.tolist() for s in sets(4, 2)] == [[2, 3], [1, 3], [1, 2], [0, 3], [0, 2], [0, 1]]
    assert [s.tolist() for s in sets(3, 3)] == [[0, 1, 2]]


def test_too_many_sets_and_too_few_experts_are_refused_before_any_is_tried():
    with pytest.raises(PrunelabError, match=r"would try 6 sets of 2 of 4 experts .*raise `most`"):
        prune(ExpertSparsity(most=5), language_model("mixtral"), Budget(2, "count"), token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="fewer than the 2 of a token"):
        prune(ExpertSparsity(), language_model("mixtral"), Budget(1, "count"), token_ids(), progress=False)


@torch.no_grad()
def test_stun_keeps_of_a_cluster_the_expert_that_is_missed_most():
    losses, labels = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.5]), torch.tensor([0, 0, 1, 1, 2])
    assert most_missed(losses, labels).tolist() == [1, 2, 4]
    samples = list(token_ids(2, seed=3))
    missed = Stun(then="none", representative="loss", means_up_to=0)
    plan = prune(missed, language_model("mixtral"), 0.5, samples, progress=False)
    nearest = prune(Stun(then="none"), language_model("mixtral"), 0.5, samples, progress=False)
    found = [(target, decision.mask) for target, decision in plan.decisions()]
    assert [int(m.sum()) for _, m in found] == [d.kept for _, d in nearest.decisions()], "the same clusters"
    target, mask = found[0]
    everything = torch.arange(target.units)
    alone = [really_lost("mixtral", samples, target, everything[everything != gone]) for gone in range(target.units)]
    assert bool(mask[int(torch.tensor(alone).argmax())]), "who is missed most of all is missed most of its cluster"


def test_hooks_around_a_router_are_not_asked_for_the_experts_that_stay():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    plain, hooked = model_of("mixtral"), model_of("mixtral")
    for layer in hooked.model.layers:
        add_hook_to_module(layer.mlp.gate, AlignDevicesHook("cpu"))
    samples = list(token_ids())
    plans = [prune(ExpertSparsity(), model, 0.5, samples, progress=False) for model in (plain, hooked)]
    masks = [[decision.mask for _, decision in plan.decisions()] for plan in plans]
    assert masks[0] and all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
