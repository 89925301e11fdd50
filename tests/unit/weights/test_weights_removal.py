"""Structured pruning really removes, plans repeat it, and pruned models come back from disk."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.plan import packed, unpacked
from prunelab.common.weights.targets import Decision, Target
from prunelab.methods.magnitude.method import Magnitude
from prunelab.methods.random_weights.method import RandomWeights
from prunelab.methods.sparsegpt.method import SparseGPT
from prunelab.methods.wanda.method import Wanda
from tests.contract.references import LANGUAGE_MODELS, NormChannels, language_model, token_ids

families = pytest.mark.parametrize("family", LANGUAGE_MODELS)
MOE = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, seed=9) if ids is None else ids).logits


def grown(model) -> Tensor:
    return model.generate(token_ids(1), max_new_tokens=4, do_sample=False, pad_token_id=0)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@families
@pytest.mark.parametrize("unit", ["heads", "channels"])
def test_removed_heads_and_channels_are_as_if_their_outputs_were_zero(family, unit):
    pruned, dense = language_model(family), language_model(family)
    targets = weight_adapter(dense).targets(unit)
    if not targets:
        pytest.skip("not in this family")
    plan = prune(RandomWeights((unit,)), pruned, Budget(0.5), progress=False)
    last = "o" if unit == "heads" else "down"
    with torch.no_grad():
        for target in targets:
            gone = ~plan.decision(target).mask.repeat_interleave(target.span)
            assert int(gone.sum()) == target.units * target.span // 2
            weight_adapter(dense).weights(target)[last][:, gone] = 0
    assert torch.allclose(logits(pruned), logits(dense), atol=1e-5)
    assert plan.report.parameters == parameters(pruned) < plan.report.dense_parameters == parameters(dense)
    gone = plan.report.dense_parameters - plan.report.parameters
    assert plan.report.removed == gone and plan.report.sparsity == pytest.approx(0.5)
    assert grown(pruned).shape[1] > 12


@pytest.mark.parametrize("family", MOE)
def test_an_expert_no_token_used_can_leave(family):
    pruned, dense = language_model(family), language_model(family)
    with torch.no_grad():
        for model in (pruned, dense):
            for target in weight_adapter(model).targets("experts"):
                weight_adapter(model).weights(target)["router"][2] = 0
                for other in (0, 1, 3):  # large and opposite rows: expert 2 is never among the best two of any token
                    weight_adapter(model).weights(target)["router"][other] *= 20
    targets = weight_adapter(dense).targets("experts")
    plan = WeightPlan(
        {}, targets, {t.block: {f"{t.name}|mask": packed(Decision(torch.arange(4) != 2))["mask"]} for t in targets}
    )
    used: set[int] = set()
    routers = [m for name, m in dense.named_modules() if name.endswith("mlp.gate")]
    handles = [m.register_forward_hook(lambda m, args, out: used.update(out[2].flatten().tolist())) for m in routers]
    want = logits(dense)
    for handle in handles:
        handle.remove()
    assert plan.apply(pruned)
    counts = [getattr(pruned.config, n, 3) for n in ("num_local_experts", "num_experts")]
    assert 3 in counts and grown(pruned).shape[1] > 12
    if 2 not in used:
        assert torch.allclose(logits(pruned), want, atol=1e-5)


def test_experts_kept_route_as_if_the_others_were_masked():
    pruned, dense = language_model("mixtral"), language_model("mixtral")
    plan = prune(RandomWeights(("experts",)), pruned, Budget(3, "count"), progress=False)
    for target, decision in plan.decisions():
        router = dense.model.layers[target.block].mlp.gate
        bias = torch.zeros(4).masked_fill(~decision.mask, float("-inf"))

        def masked(hidden: Tensor, router=router, bias=bias):
            chosen = (hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T + bias).softmax(-1)
            gates, index = chosen.topk(2)
            return chosen, gates / gates.sum(-1, keepdim=True), index

        router.forward = masked
    assert torch.allclose(logits(pruned), logits(dense), atol=1e-5)


def test_removed_layers_are_skipped_and_the_cache_closes_up():
    pruned, dense = language_model(num_hidden_layers=4), language_model(num_hidden_layers=4)
    plan = prune(RandomWeights(("layers",)), pruned, Budget(0.5), seed=3, progress=False)
    kept = [target.block for target, decision in plan.decisions() if decision.kept]
    assert len(kept) == 2 and pruned.config.num_hidden_layers == 2
    dense.model.layers = nn.ModuleList(dense.model.layers[i] for i in kept)
    dense.config.num_hidden_layers = 2
    with torch.no_grad():
        want = dense(token_ids(2, seed=9), use_cache=False).logits
    assert torch.equal(logits(pruned), want)
    out = pruned(token_ids(1), use_cache=True)
    assert len(out.past_key_values.layers) == 2 and out.past_key_values.get_seq_length() == 12


@families
@pytest.mark.parametrize("units", [("heads",), ("channels",), ("experts",), ("layers",), ("heads", "channels")])
def test_uniform_plans_reload_with_the_stock_loader(family, units, tmp_path):
    model = language_model(family)
    if not all(weight_adapter(model).targets(unit) for unit in units):
        pytest.skip("not in this family")
    budget = Budget(0.5) if "heads" in units else Budget(1, "removed")
    plan = prune(RandomWeights(units), model, budget, progress=False)
    save_pruned(model, plan, tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(stock), logits(model)) and torch.equal(grown(stock), grown(model))
    assert torch.equal(logits(load_pruned(tmp_path)), logits(model))


def test_sizes_the_config_refuses_need_the_plan(tmp_path):
    model = language_model("llama_mha")
    plan = prune(RandomWeights(("heads",)), model, Budget(1, "removed"), progress=False)
    assert plan.header["stock"] is False, "Llama's config wants 32 channels to divide by 3 heads"
    save_pruned(model, plan, tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path)), logits(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_adaptive_plans_reload_with_ours_and_stock_loading_fails_clearly(family, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    model = language_model(family, tie_word_embeddings=tied)
    plan = prune(RandomWeights(("heads", "channels")), model, Budget((1.0, 0.5, 0.5)), progress=False)
    save_pruned(model, plan, tmp_path)
    again = load_pruned(tmp_path)
    assert torch.equal(logits(again), logits(model)) and torch.equal(grown(again), grown(model))
    assert parameters(again) == parameters(model) == plan.report.parameters
    assert again.dtype == model.dtype and not any(p.is_meta for p in again.parameters())
    for stock in (AutoModelForCausalLM, type(model)):
        with pytest.raises(
            (ValueError, OSError), match=r"prunelab.common.weights.load_pruned|no file named model.safetensors"
        ):
            stock.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_biases_of_a_plan_are_kept(family, tmp_path):
    model, dense = language_model(family), language_model(family)
    plan = prune(NormChannels(), model, 0.5, token_ids(), progress=False)
    assert all(block.mlp.down_proj.bias is not None for block in model.model.layers)
    save_pruned(model, plan, tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path)), logits(model))
    plan.apply(dense)
    assert torch.equal(logits(dense), logits(model))


def test_uniform_widths_with_biases_reload_stock_where_the_config_knows_them(tmp_path):
    class Uniform(NormChannels):
        def select(self, targets, signals, scores, budget):
            return [self.mask(t, s, budget) for t, s in zip(targets, scores, strict=True)]

    for family, stock in (("llama", True), ("mistral", False)):
        model = language_model(family)
        plan = prune(Uniform(), model, 0.5, token_ids(), progress=False)
        assert plan.header["stock"] is stock
        save_pruned(model, plan, tmp_path / family)
        assert torch.equal(logits(load_pruned(tmp_path / family)), logits(model))
    stock_model = type(language_model("llama")).from_pretrained(tmp_path / "llama")
    assert stock_model.config.mlp_bias and stock_model.config.intermediate_size == 20


def test_damaged_folders_are_named(tmp_path):
    model = language_model()
    plan = prune(RandomWeights(("channels",)), model, Budget((1.0, 0.5, 0.5)), progress=False)
    save_pruned(model, plan, tmp_path)
    with pytest.raises(PrunelabError, match="no finished plan"):
        load_pruned(tmp_path / "nothing")
    block = tmp_path / "plan" / "block_0001.safetensors"
    whole = block.read_bytes()
    block.write_bytes(whole[:20])
    with pytest.raises(PrunelabError, match="damaged"):
        load_pruned(tmp_path)
    block.write_bytes(whole)
    (tmp_path / "plan" / "block_0002.safetensors").write_bytes(
        (tmp_path / "plan" / "block_0000.safetensors").read_bytes()
    )
    with pytest.raises(PrunelabError, match="damaged"):
        load_pruned(tmp_path)
    (tmp_path / "pruned.safetensors").write_bytes(b"")
    (tmp_path / "plan" / "plan.json").write_text(json.dumps({"targets": [{"name": 1}]}))
    with pytest.raises(PrunelabError, match="is not a plan"):
        load_pruned(tmp_path)


def test_weights_that_do_not_fit_the_plan_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file

    model = language_model()
    plan = prune(RandomWeights(("channels",)), model, Budget((1.0, 0.5, 0.5)), progress=False)
    save_pruned(model, plan, tmp_path)
    tensors = load_file(tmp_path / "pruned.safetensors")
    tensors.pop("model.norm.weight")
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "pruned.safetensors")
    with pytest.raises(PrunelabError, match=r"do not fit the plan: extra, model.norm.weight"):
        load_pruned(tmp_path)


def test_sparsity_is_reported_for_what_it_is():
    plan = prune(Wanda(), language_model(), 0.5, token_ids(), progress=False)
    report = plan.report
    assert report.parameters == report.dense_parameters and report.bytes == report.dense_bytes
    assert report.zeroed == report.prunable // 2 and report.sparsity == 0.5
    assert "no smaller or faster" in str(report)
    removed = prune(RandomWeights(("channels",)), language_model(), 0.5, progress=False).report
    assert removed.bytes < removed.dense_bytes and "smaller or faster" not in str(removed)


def test_plans_show_and_compare_themselves(tmp_path):
    first = prune(Magnitude(), language_model(), 0.5, progress=False)
    second = prune(Wanda(), language_model(), 0.5, token_ids(), progress=False)
    shown = str(second)
    assert "Wanda(variant=False) under 0.5" in shown and "block 2: self_attn.q_proj 512/1024" in shown
    lines = first.diff(second).splitlines()
    assert len(lines) == 21
    target = first.targets[0]
    a, b = first.decision(target).mask, second.decision(target).mask
    assert lines[0] == (
        f"{target.name}: {int((a & ~b).sum())} units only in the first, {int((b & ~a).sum())} only in the second"
    )
    third = prune(RandomWeights(("channels",)), language_model(), 0.5, progress=False)
    assert "model.layers.0.mlp: only in the second plan" in first.diff(third)
    with pytest.raises(PrunelabError, match=r"no target .model\.layers\.9"):
        first.decision("model.layers.9")


def test_a_plan_fits_its_own_architecture_only():
    plan = prune(RandomWeights(("channels",)), language_model(), 0.5, progress=False)
    pruned = language_model()
    plan.apply(pruned)
    for other in (pruned, language_model(intermediate_size=48), language_model(num_hidden_layers=2)):
        with pytest.raises(PrunelabError, match="does not fit this model"):
            plan.apply(other)


def test_decisions_survive_packing():
    target = Target("linear", "w", 0, "w", (5, 7))
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    weight, bias = torch.randn(5, 7).bfloat16(), torch.randn(5)
    again = unpacked(target, packed(Decision(mask, {"weight": weight, "x.bias": bias})))
    assert torch.equal(again.mask, mask) and torch.equal(again.values["x.bias"], bias)
    assert torch.equal(again.values["weight"], weight * mask)


def test_updated_weights_are_those_of_the_model():
    model = language_model().bfloat16()
    plan = prune(SparseGPT(), model, "2:4", token_ids(), progress=False)
    dense = language_model().bfloat16()
    plan.apply(dense)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert bool((weight.unflatten(1, (-1, 4)).ne(0).sum(-1) <= 2).all())
