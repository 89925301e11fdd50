"""EASY-EP against loops over tokens, its domains and baselines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.methods.easy_ep.method import EasyEP, longest, mix
from tests.contract.references import language_model, token_ids

MOE = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]


def record(block: nn.Module, seen: dict[str, Tensor]) -> list[RemovableHandle]:
    """Keep what a block's experts and the norm in front of them get and give."""

    def norm(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen["residual"] = args[0].flatten(0, -2)

    def experts(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen["x"], seen["chosen"], seen["gates"] = args[0].flatten(0, -2), args[1], args[2]
        seen["routed"] = out.flatten(0, -2)

    return [
        block.post_attention_layernorm.register_forward_hook(norm),
        block.mlp.experts.register_forward_hook(experts),
    ]


@torch.no_grad()
def by_loops(model: nn.Module, samples: list[Tensor], norm: bool = True, tokens: bool = True) -> dict[int, Tensor]:
    """Scores of every block's experts, token by token and expert by expert."""
    scores = {}
    for target in weight_adapter(model).targets("experts"):
        block, seen = model.model.layers[target.block], {}
        own = scores[target.block] = torch.zeros(target.units)
        handles = record(block, seen)
        for sample in samples:
            model(sample.unsqueeze(0))
            for t in range(len(sample)):
                before, after = seen["residual"][t], seen["residual"][t] + seen["routed"][t]
                moved = 1 - float(before @ after / (before.norm() * after.norm()))
                for index, gate in zip(seen["chosen"][t].tolist(), seen["gates"][t].tolist(), strict=True):
                    a, b = (block.mlp.experts.gate_up_proj[index] @ seen["x"][t]).chunk(2)
                    output = block.mlp.experts.down_proj[index] @ (nn.functional.silu(a) * b)
                    own[index] += gate * (float(output.norm()) if norm else 1) * (moved if tokens else 1)
        for handle in handles:
            handle.remove()
    return scores


@pytest.mark.parametrize("family", MOE)
def test_kept_experts_are_those_of_the_loops(family):
    model, samples = language_model(family), [*token_ids(3, 9), token_ids(1, 5, seed=8)[0]]
    for method, options in (
        (EasyEP(), {}),
        (EasyEP(tokens=False), {"tokens": False}),
        (EasyEP(importance="gate"), {"norm": False}),
        (EasyEP(importance="gate", tokens=False), {"norm": False, "tokens": False}),
    ):
        want = by_loops(model, samples, **options)
        plan = prune(method, language_model(family), Budget(3, "count"), samples, progress=False)
        for target, decision in plan.decisions():
            kept = want[target.block].topk(3).indices
            assert set(decision.mask.nonzero().flatten().tolist()) == set(kept.tolist()), (method, target.name)


def test_frequency_counts_choices():
    model, samples = language_model("mixtral"), list(token_ids())
    chosen: dict[int, list[Tensor]] = {}
    for i, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_hook(lambda m, a, out, i=i: chosen.setdefault(i, []).append(a[1]))
    with torch.no_grad():
        for sample in samples:
            model(sample.unsqueeze(0))
    method = EasyEP(importance="frequency", tokens=False)
    plan = prune(method, language_model("mixtral"), Budget(3, "count"), samples, progress=False)
    for target, decision in plan.decisions():
        counts = torch.cat(chosen[target.block]).flatten().bincount(minlength=4)
        gone = int((~decision.mask).nonzero())
        assert int(counts[gone]) == int(counts.min())


def test_domains_weigh_alike_however_long_they_are():
    scores = torch.tensor([[1000.0, 900.0, 100.0], [1.0, 0.0, 9.0]])
    assert mix(scores).argmax() == 2, "the short domain has as much to say"
    assert torch.allclose(mix(scores).sum(), torch.tensor(2.0))
    silent = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert torch.allclose(mix(silent), torch.tensor([0.25, 0.75])), "a domain without scores has nothing to say"


def test_a_domain_counts_its_own_demonstrations():
    model, samples = language_model("mixtral"), list(token_ids(4, 10))
    parts = [by_loops(model, samples[:1]), by_loops(model, samples[1:])]
    plan = prune(EasyEP(domains=(1, 3)), language_model("mixtral"), Budget(3, "count"), samples, progress=False)
    for target, decision in plan.decisions():
        want = sum(part[target.block] / part[target.block].sum() for part in parts)
        assert int((~decision.mask).nonzero()) == int(want.argmin())


def test_only_the_longest_demonstrations_count():
    assert longest([3, 9, 9, 5], 2) == [1, 2]
    samples = [token_ids(1, n, seed=n)[0] for n in (4, 12, 6, 11)]
    few = prune(EasyEP(longest=2), language_model("mixtral"), Budget(3, "count"), samples, progress=False)
    own = prune(EasyEP(), language_model("mixtral"), Budget(3, "count"), [samples[1], samples[3]], progress=False)
    assert few.diff(own) == "the plans are equal"


def test_shared_experts_do_not_enter_the_contribution():
    loud, quiet = language_model("qwen2_moe"), language_model("qwen2_moe")
    with torch.no_grad():  # in the last block, so that no later one reads what changes
        loud.model.layers[-1].mlp.shared_expert.down_proj.weight *= 100
    plans = [prune(EasyEP(), m, Budget(3, "count"), token_ids(), progress=False) for m in (loud, quiet)]
    assert plans[0].diff(plans[1]) == "the plans are equal"


def test_pruned_models_come_back_as_plain_ones(tmp_path):
    model = language_model("qwen3_moe")
    plan = prune(EasyEP(), model, Budget(2, "count"), token_ids(), progress=False)
    save_pruned(model, plan, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.num_experts == 2
    with torch.no_grad():
        assert torch.equal(again.eval()(token_ids()).logits, model(token_ids()).logits)
    assert torch.equal(load_pruned(tmp_path)(token_ids()).logits, again(token_ids()).logits)


def test_bad_input_says_what_to_do():
    with pytest.raises(PrunelabError, match="must be"):
        EasyEP(longest=-1)
    with pytest.raises(PrunelabError, match="must be"):
        EasyEP(domains=(3, 0))
    with pytest.raises(PrunelabError, match=r"count 5 demonstrations.*has 4"):
        prune(EasyEP(domains=(2, 3)), language_model("mixtral"), 0.5, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="prunes experts"):
        prune(EasyEP(), language_model("llama"), 0.5, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="fewer than the 2 of a token"):
        prune(EasyEP(), language_model("mixtral"), Budget(1, "count"), token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="calibration set"):
        prune(EasyEP(), language_model("mixtral"), 0.5, progress=False)


@pytest.mark.parametrize("family", MOE)
@torch.no_grad()
def test_without_rerouting_the_router_chooses_among_all_and_what_left_gives_nothing(family, tmp_path):
    model, silenced = language_model(family), language_model(family)
    plan = prune(EasyEP(reroute=False), model, Budget(0.5), token_ids(), progress=False)
    masks = [(target, decision.mask) for target, decision in plan.decisions()]
    kept = prune(EasyEP(), language_model(family), Budget(0.5), token_ids(), progress=False).decisions()
    assert [mask.tolist() for _, mask in masks] == [d.mask.tolist() for _, d in kept], "the same experts stay"
    for target, mask in masks:
        experts = silenced.get_submodule(target.name)
        experts.down_proj[~mask] = 0
        small = model.get_submodule(target.name)
        assert len(small.down_proj) == int(mask.sum()) < len(mask)
    ids = token_ids(2, seed=9)
    wanted = silenced(ids).logits
    assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
    save_pruned(model, plan, tmp_path)
    assert torch.allclose(load_pruned(tmp_path)(ids).logits, wanted, atol=1e-5)
    one = prune(EasyEP(reroute=False), language_model(family), Budget(1, "count"), token_ids(), progress=False)
    assert all(decision.kept == 1 for _, decision in one.decisions()), "fewer than a token is sent to"
