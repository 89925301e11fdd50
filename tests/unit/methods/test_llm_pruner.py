"""LLM-Pruner against autograd by hand, loops over single parameters, and the loss itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.targets import Target, WeightSignals
from prunelab.methods.llm_pruner.method import LLMPruner, folded, group_importance, member_importance, removed
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids

TAYLOR = ("param_first", "param_second", "param_mix", "vectorize")
HEAD, WIDTH = 8, 32  # of the tiny Llama, whose four query heads share two key-value heads


def kept(plan: WeightPlan) -> dict[str, list[bool]]:
    return {target.name: decision.mask.tolist() for target, decision in plan.decisions()}


def scores(model: Any, method: LLMPruner, ids: Tensor) -> dict[str, Tensor]:
    adapter = weight_adapter(model)
    targets = [t for unit in method.units for t in adapter.targets(unit) if method.covers(t)]
    with torch.no_grad():
        found = method.precompute(ModelProbe(adapter, targets, list(ids)))
    signals = [WeightSignals(adapter.weights(t), found.get(t.name, {})) for t in targets]
    return {t.name: method.score(t, s) for t, s in zip(targets, signals, strict=True)}


def gradients(model: Any, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of every weight the gradient of the mean loss, and the squares of single sequences' over their number."""
    linears = {n: p for n, p in model.named_parameters() if p.dim() > 1 and ("layers" in n or ".h." in n)}
    whole = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(linears.values()))
    squares = {name: torch.zeros_like(p) for name, p in linears.items()}
    for row in ids:
        single = torch.autograd.grad(model(input_ids=row[None], labels=row[None]).loss, list(linears.values()))
        for name, gradient in zip(linears, single, strict=True):
            squares[name] += gradient.square() / len(ids)
    return dict(zip(linears, whole, strict=True)), squares


def plainly(criterion: str, w: float, g: float, s: float) -> float:
    return {"param_first": w * g, "param_second": w * s * w, "param_mix": w * g - 0.5 * w * s * w, "vectorize": w * g}[
        criterion
    ]


@pytest.mark.parametrize("criterion", TAYLOR)
def test_importance_by_a_loop_over_single_weights(criterion):
    """Neurons and key-value heads of one layer, weight by weight; query heads count for the heads they read."""
    model, ids = language_model(), token_ids()
    ours = scores(model, LLMPruner(criterion, released=False), ids)
    first, squares = gradients(model, ids)
    layer, start = model.model.layers[1], "model.layers.1"

    def lost(name: str, entries: list[tuple[int, int]]) -> float:
        weight = layer.get_submodule(name).weight.detach()
        g, s = first[f"{start}.{name}.weight"], squares[f"{start}.{name}.weight"]
        each = [plainly(criterion, float(weight[e]), float(g[e]), float(s[e])) for e in entries]
        return abs(sum(each)) if criterion == "vectorize" else sum(map(abs, each))

    for neuron in (0, 7):
        rows, columns = [(neuron, j) for j in range(WIDTH)], [(j, neuron) for j in range(WIDTH)]
        want = lost("mlp.gate_proj", rows) + lost("mlp.up_proj", rows) + lost("mlp.down_proj", columns)
        assert float(ours[f"{start}.mlp"][neuron]) == pytest.approx(want, rel=1e-4)
    for head in (0, 1):
        own, read = range(head * HEAD, (head + 1) * HEAD), range(head * 2 * HEAD, (head + 1) * 2 * HEAD)
        want = sum(lost(f"self_attn.{m}_proj", [(r, j) for j in range(WIDTH)]) for m in "kv" for r in own)
        want += sum(lost("self_attn.q_proj", [(r, j) for j in range(WIDTH)]) for r in read)
        want += sum(lost("self_attn.o_proj", [(j, c) for j in range(WIDTH)]) for c in read)
        assert float(ours[f"{start}.self_attn"][head]) == pytest.approx(want, rel=1e-4)


def test_vectorize_is_what_the_loss_loses_to_first_order():
    """Shrink all weights of a neuron's down column: the loss moves by the signed sum, whose size is the importance."""
    model, ids = language_model(), token_ids()
    adapter = weight_adapter(model)
    target = adapter.targets("channels")[1]
    with torch.no_grad():
        probe = ModelProbe(adapter, [target], list(ids))
        found = LLMPruner("vectorize").precompute(probe)[target.name]["importance.down"]
        loss = [torch.stack([probe.loss(row) for row in ids]).double().mean()]
        column = model.model.layers[1].mlp.down_proj.weight[:, 3]
        column.mul_(1 - 1e-2)
        loss.append(torch.stack([probe.loss(row) for row in ids]).double().mean())
    assert float(found[3]) == pytest.approx(float(abs(loss[0] - loss[1]) / 1e-2), rel=0.05)


def test_members_are_put_together_by_the_reduction():
    members = [torch.tensor([1.0, 4]), torch.tensor([2.0, 3]), torch.tensor([3.0, 8])]
    want = {"sum": [6, 15], "mean": [2, 5], "max": [3, 8], "prod": [6, 96], "first": [1, 4], "second": [2, 3]}
    for reduction, values in want.items():
        assert group_importance(members, reduction).tolist() == values
    weight = torch.tensor([[1.0, -2], [3, 4]])
    assert member_importance("l1", 0, weight).tolist() == [3, 7]
    assert member_importance("l2", 1, weight).tolist() == [10, 20]


def test_query_heads_are_added_to_their_own_key_value_head_or_as_released():
    queries = torch.arange(8.0)  # four heads of two channels over two key-value heads
    assert folded(queries, 4, 2, released=False).tolist() == [0 + 2, 1 + 3, 4 + 6, 5 + 7]
    assert folded(queries, 4, 2).tolist() == [0 + 4, 1 + 5, 2 + 6, 3 + 7]
    assert torch.equal(folded(queries, 8, 4, released=False), queries)


@pytest.mark.parametrize("criterion", [*TAYLOR, "l1", "l2"])
def test_the_least_important_units_leave_every_block(criterion):
    model, ids = language_model(), token_ids()
    method = LLMPruner(criterion)
    want = scores(model, method, ids)
    masks = kept(prune(method, model, 0.5, ids, progress=False))
    for name, values in want.items():
        lowest = values.argsort(stable=True)[: len(values) // 2].tolist()
        assert [i for i, stays in enumerate(masks[name]) if not stays] == sorted(lowest)


@pytest.mark.parametrize("family", ["qwen2", "phi", "phi3", "gpt_neox", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("criterion", ["param_first", "param_mix"])
def test_groups_of_other_families(family, criterion):
    """The importance of all channels is the salience of all their weights, wherever these lie."""
    model: Any = WEIGHT_FAMILIES[family]() if family in WEIGHT_FAMILIES else language_model(family)
    adapter, ids = weight_adapter(model), token_ids()
    units = [u for u in ("heads", "channels") if adapter.targets(u)]
    first, squares = gradients(model, ids)
    for target in (t for u in units for t in adapter.targets(u)):
        with torch.no_grad():
            method = LLMPruner(criterion)
            found = method.precompute(ModelProbe(adapter, [target], list(ids)))[target.name]
        names = {id(p): name for name, p in model.named_parameters()}
        modules = {id(part.module): part.module for part in adapter.projections(target).values()}  # type: ignore[attr-defined]
        want = 0.0
        for module in modules.values():
            name = names[id(module.weight)]
            w = module.weight.detach()
            s = w * first[name] - (0.5 * w * squares[name] * w if criterion == "param_mix" else 0)
            want += float(s.abs().sum())
        total = sum(float(v.sum()) for name, v in found.items() if name.startswith("importance"))
        assert total == pytest.approx(want, rel=1e-3), target.name


def test_blocks_out_of_range_stay_as_they_are():
    model, dense = language_model(), language_model()
    method = LLMPruner(attention_blocks=(1, 2), mlp_blocks=(1, 3))
    plan = prune(method, model, 0.5, token_ids(), progress=False)
    assert [t.name for t in plan.targets] == ["model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.2.mlp"]
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        assert torch.equal(
            model.model.layers[0].get_submodule(name).weight, dense.model.layers[0].get_submodule(name).weight
        )


def test_all_blocks_together_share_a_threshold():
    model, ids = language_model("llama_mha"), token_ids()
    method = LLMPruner("l1", scope="global")
    found = scores(model, method, ids)
    masks = kept(prune(method, model, 0.6, ids, progress=False))
    joined, stays = torch.cat(list(found.values())), torch.tensor([m for name in found for m in masks[name]])
    gone = len(joined) - int(len(joined) * 0.6)
    assert int((~stays).sum()) == gone and float(joined[stays].min()) > float(joined[~stays].max())


def test_the_number_that_leaves_is_taken_in_floats():
    assert removed(10, 0.7) == 3 and removed(100, 1 - 0.71) == 71
    assert removed(10, 1 - 0.9) == 10 - int(10 * (1 - 0.9)) == 10, "0.1 is a little less than a tenth here"


def test_no_gradient_is_kept_and_the_model_is_as_it_was():
    model, ids = language_model(), token_ids()
    dense = [p.clone() for p in model.parameters()]
    scores(model, LLMPruner("param_mix"), ids)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense, strict=True))


def test_random_is_by_lot_and_needs_no_data():
    a, b = (
        kept(prune(LLMPruner("random"), language_model(), 0.5, token_ids(), seed=s, progress=False)) for s in (0, 1)
    )
    assert a != b and a == kept(prune(LLMPruner("random"), language_model(), 0.5, token_ids(), progress=False))


def test_what_it_cannot_use_is_refused():
    with pytest.raises(PrunelabError, match="no range of blocks"):
        LLMPruner(mlp_blocks=(4, 2))
    with pytest.raises(PrunelabError, match="covers none"):
        prune(LLMPruner(attention_blocks=(7, 9), mlp_blocks=(7, 9)), language_model(), 0.5, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="one share of all blocks"):
        prune(LLMPruner(scope="global"), language_model(), "0.5,0.6,0.7", token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="calibration set"):
        prune(LLMPruner(), language_model(), 0.5, progress=False)
    with pytest.raises(PrunelabError, match="single weights"):
        prune(LLMPruner(), language_model(), "2:4", token_ids(), progress=False)
    model = language_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0] = math.nan
    with pytest.raises(PrunelabError, match="NaN"):
        prune(LLMPruner(), model, 0.5, token_ids(), progress=False)


def test_one_amount_a_block():
    plan = prune(LLMPruner(), language_model("llama_mha"), Budget((1.0, 0.5, 0.75)), token_ids(), progress=False)
    shares = {t.name: d.kept / t.units for t, d in plan.decisions()}
    assert [shares[f"model.layers.{i}.self_attn"] for i in range(3)] == [1.0, 0.5, 0.75]


def test_a_target_without_gate_has_two_members():
    target = Target("channels", "mlp", 0, "channels", (2,))
    weights = {"up": torch.tensor([[1.0, 1], [0, 1]]), "down": torch.tensor([[3.0, 0], [0, 2]])}
    assert LLMPruner("l1").score(target, WeightSignals(weights)).tolist() == [2.5, 1.5]


@pytest.mark.parametrize("criterion", [*TAYLOR, "l2"])
def test_channels_of_the_stream_are_scored_in_all_that_reads_or_writes_them(criterion):
    model, ids = language_model(), token_ids()
    (found,) = scores(model, LLMPruner(mode="channel", criterion=criterion), ids).values()
    params = {n: p for n, p in model.named_parameters() if p.shape[0] == WIDTH or p.shape[-1] == WIDTH}
    grads, squares = (
        {n: torch.zeros_like(p) for n, p in params.items()},
        {n: torch.zeros_like(p) for n, p in params.items()},
    )
    for i in range(len(ids)):
        model.zero_grad()
        model(ids[i : i + 1], labels=ids[i : i + 1]).loss.backward()
        for name, p in params.items():
            grads[name] += p.grad / len(ids)
            squares[name] += p.grad**2 / len(ids)
    members = []
    for name, p in params.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        lay = (lambda x: x) if writes else (lambda x: x.unsqueeze(1)) if p.dim() == 1 else (lambda x: x.T)
        weight, gradient, square = (lay(x.detach()) for x in (p, grads[name], squares[name]))
        curved = weight * square * weight
        lost = {"param_second": curved, "param_mix": weight * gradient - curved / 2}.get(criterion, weight * gradient)
        each = lost.sum(1).abs() if criterion == "vectorize" else lost.abs().sum(1)
        members.append(weight.square().sum(1) if criterion == "l2" else each)
    assert len(members) == 1 + 1 + 1 + 9 * model.config.num_hidden_layers  # embedding, head, last norm; nine a block
    want = torch.stack(members).mean(0) if criterion == "l2" else torch.stack(members).sum(0)
    assert torch.allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_channels_of_the_stream_leave_everywhere(tied, tmp_path):
    model = language_model(tie_word_embeddings=tied)
    before = sum(p.numel() for p in model.parameters())
    plan = prune(LLMPruner(mode="channel"), model, 0.75, token_ids(), progress=False)
    width = WIDTH - removed(WIDTH, 0.75)
    assert model.config.hidden_size == width and model.lm_head.weight.shape[1] == width
    assert sum(p.numel() for p in model.parameters()) == before * width // WIDTH
    assert bool(torch.isfinite(model(token_ids()).logits).all())
    other = language_model(tie_word_embeddings=tied)
    plan.apply(other)
    assert torch.equal(other(token_ids()).logits, model(token_ids()).logits)


def test_a_block_that_would_lose_all_under_a_common_threshold_keeps_all():
    low, high = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    targets = [Target("heads", "a", 0, "heads", (2,)), Target("channels", "b", 0, "channels", (3,))]
    seen = [WeightSignals({}), WeightSignals({})]
    kept = LLMPruner(scope="global").select(targets, seen, [low, high], Budget(0.4))
    assert kept[0].tolist() == [True, True] and kept[1].tolist() == [False, True, True]
