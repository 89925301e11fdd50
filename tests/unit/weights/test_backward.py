"""Gradients block by block: those of one backward pass through the whole model, in memory that is flat in depth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.memory import Live
from prunelab.common.weights import prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.backward import Backward, Unchained
from prunelab.common.weights.checkpoints import Shelf, Work
from prunelab.common.weights.corpora import loss_of
from prunelab.common.weights.probe import ModelProbe
from prunelab.methods.gblm.method import GBLM
from prunelab.methods.llm_pruner.method import LLMPruner
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids
from tests.contract.weights_references import DomainFisher, MeanSquare, triplets

FAMILIES = ["llama", "qwen3", "mixtral", "gemma2", "gpt2", "gpt_neox", "deepseek_v2"]


def build(family: str) -> nn.Module:
    return WEIGHT_FAMILIES[family]() if family in WEIGHT_FAMILIES else language_model(family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("together", [False, True])
def test_gradients_are_those_of_the_whole_model(family, together, tmp_path):
    model = build(family)
    adapter = weight_adapter(model)
    targets = [t for unit in ("linear", "channels") for t in adapter.targets(unit)]
    samples = list(token_ids())
    samples[1] = samples[1][:7]
    found = []
    for folder in (None, tmp_path / family):
        probe = ModelProbe(adapter, targets, samples, work=Work(folder))
        found.append(probe.gradients({"square": MeanSquare}, together=together, batch=2))
    assert set(found[0]) >= set(found[1]) and len(found[1]) == len(targets)
    for target, values in found[1].items():
        assert set(values) == set(found[0][target])
        for name, value in values.items():
            assert torch.allclose(value, found[0][target][name], rtol=1e-4, atol=1e-9), (target, name)
    assert all(p.grad is None for p in model.parameters()) and not any("forward" in vars(m) for m in model.modules())
    assert not list((tmp_path / family / "shelf_states").glob("*.safetensors"))


@pytest.mark.parametrize("method", [GBLM(), LLMPruner(), DomainFisher()], ids=lambda m: m.name)
def test_a_folder_changes_no_decision_and_a_run_goes_on(method, tmp_path):
    given, options = token_ids(), {}
    if isinstance(method, DomainFisher):
        given, options = {"domain": triplets(4, 1), "general": triplets(3, 2)}, {"objective": "contrastive"}
    models = [language_model() for _ in range(2)]
    prune(method, models[0], 0.5, given, progress=False, **options)
    prune(method, models[1], 0.5, given, progress=False, folder=tmp_path / "run", **options)
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-6)


def test_what_was_measured_is_found_again(tmp_path):
    adapter = weight_adapter(language_model())
    work = Work(tmp_path / "run")
    probe = ModelProbe(adapter, adapter.targets("linear"), list(token_ids()), work=work)
    found = probe.gradients({"square": MeanSquare})
    kept = work.measured("precompute", {**found, "other": {"value": torch.ones(2)}}, torch.device("cpu"))
    again = Work(tmp_path / "run").recalled("precompute", torch.device("cpu"))
    assert again is not None and set(again) == set(kept) == {*found, "other"}
    for name, values in found.items():
        assert torch.equal(again[name]["square"], values["square"])


def test_memory_is_flat_in_depth(tmp_path):
    peaks = []
    for depth in (2, 16):
        model = language_model(num_hidden_layers=depth)
        with Live(model) as live:
            prune(GBLM(), model, 0.5, token_ids(4, 48), progress=False, folder=tmp_path / str(depth))
        peaks.append(live.peak - live.own)
    assert peaks[1] <= 1.2 * peaks[0]


def test_states_that_change_between_the_blocks_are_noticed():
    model = language_model()
    adapter = weight_adapter(model)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1, *args[1:]))
    inner = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(Unchained, match="from block to block"):
        Backward(adapter, loss_of(adapter, None, model), [list(token_ids(1))], Shelf(None))
    assert "forward" in vars(model.model.layers[0]) and "forward" not in vars(model.model.layers[1])
