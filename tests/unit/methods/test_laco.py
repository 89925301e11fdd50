"""LaCo: merges against the formulas, the walk against a plain loop, the threshold against all others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.methods.laco.method import LaCo, Layers, Similarity, collapse, dense_layers, merged, walk
from tests.contract.references import language_model, token_ids

fast = settings(max_examples=60, deadline=None)


def chance(seed: int) -> Any:
    """A similarity that is drawn once for every arrangement of layers."""

    def similarity(layers: Layers) -> float:
        return float(torch.rand((), generator=torch.Generator().manual_seed(hash((seed, layers)) % 2**60)))

    return similarity


def weights(model: Any, layers: Layers) -> list[torch.Tensor]:
    """The down projections of a collapsed model."""
    dense = [layer.mlp.down_proj.weight.detach() for layer in model.model.layers]
    return [sum(dense[i] * c for i, c in layer.parts) for layer in layers]  # type: ignore[misc]


def test_merges_follow_the_papers_formula_also_of_merged_layers():
    model = language_model(num_hidden_layers=5)
    w = weights(model, dense_layers(5))
    once = merged(dense_layers(5), 2, 2, "differences")
    assert torch.allclose(weights(model, once)[2], w[2] + (w[3] - w[2]) + (w[4] - w[2]), atol=1e-6)
    v = weights(model, once)
    twice = merged(once, 0, 2, "differences")
    assert torch.allclose(weights(model, twice)[0], v[0] + (v[1] - v[0]) + (v[2] - v[0]), atol=1e-6)
    assert [layer.base for layer in twice] == [0]


def test_the_released_rule_keeps_the_last_absorbed_layer():
    assert [layer.parts for layer in merged(dense_layers(5), 1, 2)] == [((0, 1),), ((3, 1),), ((4, 1),)]
    assert merged(dense_layers(3), 1, 0) == dense_layers(3)


@fast
@given(
    depth=st.integers(3, 9), merge=st.integers(2, 5), interval=st.integers(1, 3), threshold=st.floats(0, 1),
    seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_the_walk_is_that_of_a_plain_loop(depth, merge, interval, threshold, seed, data):
    lowest, highest = data.draw(st.integers(0, 1)), data.draw(st.integers(merge + 1, max(depth - 1, merge + 1)))
    similarity, layers, pointer, trace = chance(seed), dense_layers(depth), highest - merge, []
    if highest >= depth:
        return
    while pointer >= lowest:
        candidate = merged(layers, pointer, min(merge - 1, len(layers) - pointer - 1))
        trace.append((pointer, len(layers), len(candidate)))
        if similarity(candidate) > threshold:
            layers, pointer = candidate, pointer - interval
            if pointer >= len(layers):
                pointer = len(layers) - 1 - merge
        else:
            pointer -= 1
    steps = list(walk(dense_layers(depth), similarity, threshold, merge, interval, lowest, highest, most=depth))
    assert [(s.place, len(s.before), len(s.candidate)) for s in steps] == trace
    assert steps[-1].after == layers


@fast
@given(depth=st.integers(3, 8), gone=st.integers(1, 6), merge=st.integers(2, 4), seed=st.integers(0, 99))
def test_the_threshold_meets_the_budget_and_the_next_higher_one_does_not(depth, gone, merge, seed):
    if gone >= depth:
        return
    similarity, seen = chance(seed), {1.0}

    def noted(layers: Layers) -> float:
        seen.add(similarity(layers))
        return similarity(layers)

    def steps(threshold: float) -> Any:
        return walk(dense_layers(depth), noted, threshold, merge, most=gone)

    found = collapse(steps, depth - gone)
    results = []
    for value in sorted(seen, reverse=True):  # what is accepted changes at similarities alone
        results.append([*steps(math.nextafter(value, -1))][-1].after)
    meets = [len(result) == depth - gone for result in results]
    assert (found is not None) == any(meets)
    if found is not None:
        places = [i for i, result in enumerate(results) if result == found]
        assert any(meets[i] and (i == 0 or not meets[i - 1]) for i in places)
        if meets == sorted(meets):  # a lower threshold never leaves more: it is the highest of all
            assert results.index(found) == meets.index(True)


def test_layers_that_do_nothing_are_collapsed_without_a_trace():
    model, dense = language_model(num_hidden_layers=5), language_model(num_hidden_layers=5)
    for m in (model, dense):
        with torch.no_grad():
            for layer in m.model.layers[2:4]:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    plan = prune(LaCo(merge_layers=2), model, "1removed", token_ids(), progress=False)
    assert [t.block for t, d in plan.decisions() if not d.kept] == [3]
    ids = token_ids(2, seed=9)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-5)


@pytest.mark.parametrize("rule", ["last", "differences"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_projections_change_with_their_biases_and_norms_stay(family, rule, tmp_path):
    model, dense = (language_model(family, num_hidden_layers=4) for _ in range(2))
    with torch.no_grad():
        for m in (model, dense):
            for i, layer in enumerate(m.model.layers):
                layer.input_layernorm.weight.fill_(1 + i / 10)
                if family == "qwen2":
                    layer.self_attn.q_proj.bias.fill_(i)
    method = LaCo(-1.0, merge_layers=3, highest=3, rule=rule)
    plan = prune(method, model, "2removed", token_ids(), progress=False)
    assert [t.block for t, d in plan.decisions() if d.kept] == [0, 3]
    took, old = model.model.layers[0], dense.model.layers
    assert torch.equal(took.input_layernorm.weight, old[0].input_layernorm.weight)
    want = {"last": old[2].mlp.up_proj.weight,
            "differences": sum(o.mlp.up_proj.weight for o in old[1:3]) - old[0].mlp.up_proj.weight}[rule]  # fmt: skip
    assert torch.allclose(took.mlp.up_proj.weight, want, atol=1e-6)
    if family == "qwen2":
        assert took.self_attn.q_proj.bias.tolist() == [2.0 if rule == "last" else 3.0] * 32
    save_pruned(model, plan, tmp_path)
    ids = token_ids(2, seed=9)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path)(ids).logits, model(ids).logits)
        plan.apply(dense)
        assert torch.equal(dense(ids).logits, model(ids).logits)


def test_similarity_is_that_of_the_collapsed_model_and_the_dense_one_comes_back():
    model, ids = language_model(num_hidden_layers=4), list(token_ids())
    adapter = weight_adapter(model)
    probe = ModelProbe(adapter, adapter.targets("layers"), ids)
    method, before = LaCo(rule="differences"), {k: v.clone() for k, v in model.state_dict().items()}
    layers = merged(dense_layers(4), 1, 2, "differences")
    with torch.no_grad():
        found = Similarity(method, probe)(layers)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        dense = [model.model(sample[None]).last_hidden_state.flatten() for sample in ids]
        prune(
            LaCo(-1.0, merge_layers=3, lowest=1, highest=3, rule="differences"), model, "2removed", ids, progress=False
        )
        short = [model.model(sample[None]).last_hidden_state.flatten() for sample in ids]
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(dense, short, strict=True)]
    assert len(model.model.layers) == 2 and found == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


def test_a_threshold_that_nothing_passes_leaves_the_model_as_it_is():
    model = language_model()
    plan = prune(LaCo(threshold=1.0), model, "1removed", token_ids(), progress=False)
    assert plan.report.sparsity == 0 and len(model.model.layers) == 3


def test_what_it_cannot_do_is_refused():
    for options in ({"merge_layers": 1}, {"interval": 0}, {"lowest": -1}):
        with pytest.raises(PrunelabError, match=r"a merge takes at least 2 layers|interval must be|lowest must be"):
            LaCo(**options)
    with pytest.raises(PrunelabError, match="cannot take 2 of 3 layers"):
        prune(LaCo(lowest=1, highest=2), language_model(), "2removed", token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="keep more"):
        prune(LaCo(), language_model(), "3removed", token_ids(), progress=False)
    model = language_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = math.nan
    with pytest.raises(PrunelabError, match="NaN"):
        prune(LaCo(), model, "1removed", token_ids(), progress=False)
