"""Attention or the MLP of a layer leaves alone: what is left is the model that never calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.targets import Decision, Target
from prunelab.methods.random_weights.method import RandomWeights
from tests.contract.families import TRANSFORMERS, WEIGHT_FAMILIES, answer
from tests.contract.references import language_model, token_ids

DECODERS = ["llama"] + [name for name, (cls, _) in TRANSFORMERS.items() if cls.endswith(("CausalLM", "LMHeadModel"))]
DECODERS.remove("opt")  # whose MLP is no module of its own
decoders = pytest.mark.parametrize("family", DECODERS)
GONE = Decision(torch.zeros(1, dtype=torch.bool))


def build(family: str) -> Any:
    return language_model() if family == "llama" else WEIGHT_FAMILIES[family]()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def pruned(family: str, gone: list[tuple[int, str]]) -> tuple[Any, Any, list[Target]]:
    """A model without these sublayers, its adapter, and their targets."""
    model = build(family)
    adapter = weight_adapter(model)
    targets = [t for t in adapter.targets("sublayers") if (t.block, t.role) in gone]
    assert len(targets) == len(gone)
    for target in targets:
        adapter.write(target, GONE)
    return model, adapter, targets


def skipped(model: Any, target: Target) -> None:
    """Let a module of the dense model say nothing."""
    module = model.get_submodule(target.name)
    nothing: Any = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)  # noqa: E731
    if target.role == "attention":
        module.forward = lambda hidden_states, *args, **kwargs: (nothing(hidden_states), None)
    else:
        module.forward = nothing


@decoders
def test_every_decoder_has_two_sublayers_a_layer_whose_sizes_add_up(family):
    model = build(family)
    adapter = weight_adapter(model)
    targets = adapter.targets("sublayers")
    assert [(t.block, t.role) for t in targets] == [
        (block, role) for block in range(len(adapter.blocks)) for role in ("attention", "mlp")
    ]
    for block, layer in enumerate(adapter.targets("layers")):
        shared = parameters(adapter.blocks[block].input_layernorm) if family == "phi" else 0
        assert sum(t.size for t in targets if t.block == block) == layer.size - shared


def test_opt_has_no_sublayers():
    assert weight_adapter(build("opt")).targets("sublayers") == []


@decoders
@pytest.mark.parametrize("gone", [[(0, "attention"), (1, "mlp")], [(0, "mlp"), (2, "attention")]])
def test_what_is_left_computes_what_the_model_without_them_does(family, gone):
    model, adapter, targets = pruned(family, gone)
    dense, whole = build(family), parameters(build(family))
    tried = ModelProbe(weight_adapter(dense), targets, [])
    ids = token_ids()[0]
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with torch.no_grad(), tried.trial([(target, GONE) for target in targets]):
        seen = tried.logits(ids)
    after = dense.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for target in targets:
        skipped(dense, target)
    assert torch.allclose(answer(model, family), answer(dense, family), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(seen, dense(ids[None], use_cache=False).logits[0], atol=1e-5)
    assert parameters(model) == whole - sum(target.size for target in targets)
    assert not adapter.finish(), "no config of the family describes it"


@decoders
@pytest.mark.parametrize("gone", [[(0, "attention"), (1, "mlp")], [(0, "attention"), (0, "mlp"), (1, "attention")]])
def test_they_generate_with_their_cache_and_pad(family, gone):
    model, adapter, _ = pruned(family, gone)
    adapter.finish()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = token_ids(2)
    with torch.no_grad():
        grown = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        alone = torch.cat(
            [model.generate(row[None], attention_mask=torch.ones_like(row[None]), **options) for row in ids]
        )
        for length in range(12, 17):  # without a cache
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(grown[:, : length + 1], ids)
    assert torch.equal(grown, alone)


@decoders
def test_they_come_back_from_disk(family, tmp_path):
    model: Any = build(family)
    plan = prune(RandomWeights(("sublayers",)), model, "2removed", progress=False)
    gone = [target.block for target, decision in plan.decisions() if not decision.kept]
    assert len(gone) == 2 and plan.header["stock"] is (gone[0] == gone[1]), "a whole layer less is an ordinary model"
    assert plan.report.removed == plan.report.dense_parameters - plan.report.parameters
    save_pruned(model, plan, tmp_path)
    assert torch.equal(answer(load_pruned(tmp_path), family), answer(model, family))
    again = build(family)
    WeightPlan.load(tmp_path / "plan").apply(again)
    assert torch.equal(answer(again, family), answer(model, family))


def test_a_layer_that_lost_both_is_gone_and_stock_loads_the_rest(tmp_path):
    model, adapter, _ = pruned("llama", [(1, "attention"), (1, "mlp")])
    assert adapter.finish() and len(model.model.layers) == model.config.num_hidden_layers == 2
    dense = language_model()
    del dense.model.layers[1]
    ids: Tensor = token_ids(2, seed=9)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, dense(ids, use_cache=False).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path), "gemma"), answer(model, "gemma"))
