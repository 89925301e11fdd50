"""LoRAPrune beyond the golden cases: the estimate is the gradient, peft, spared layers, metrics, bad input."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training import engine
from prunelab.common.training.parametrizations import EightBit
from prunelab.common.training.recipe import Recipe
from prunelab.methods.loraprune.method import LoRAPrune, averaged, by_unit, estimated_gradient, importance
from prunelab.methods.random_pruning.method import RandomPruning
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids

RECIPE = Recipe(steps=12, batch=4, rate=1e-3)


def train(model, method=None, **options):
    return engine.train(
        method or LoRAPrune(rank=2, every=2), model, 0.5, token_ids(16), RECIPE, progress=False, **options
    )


def test_the_estimate_is_the_change_of_the_product_under_a_step():
    g = torch.Generator().manual_seed(0)
    up, down, up_g, down_g = (torch.randn(*s, generator=g) for s in ((6, 2), (2, 5), (6, 2), (2, 5)))
    change = up @ down - (up - up_g) @ (down - down_g)
    assert torch.allclose(estimated_gradient(up, down, up_g, down_g), change, atol=1e-5)


def test_importance_is_summed_by_unit_and_averaged():
    scores = importance(torch.tensor([[1.0, -2], [3, 4]]), torch.tensor([[2.0, 1], [0, 1]]))
    assert scores.tolist() == [[2, 2], [0, 4]]
    assert importance(torch.tensor([-3.0]), None, squared=True).tolist() == [9]
    assert by_unit(scores, 2, inputs=False, norm=False).tolist() == [4, 4]
    assert by_unit(scores, 2, inputs=True).tolist() == pytest.approx([2 / 40**0.5, 6 / 40**0.5])
    now = torch.tensor([1.0, torch.nan])
    assert averaged(torch.tensor([2.0, 2]), now, 0.5).tolist() == [1.5, 2]


@pytest.mark.parametrize("metric", ["lora", "magnitude", "grad"])
def test_half_of_the_units_leave_but_of_the_last_layer(metric):
    model = language_model()
    plan = train(model, LoRAPrune(rank=2, every=2, metric=metric))
    decided = {(t.unit, t.block): d.kept for t, d in plan.decisions() if t.unit in ("heads", "channels")}
    assert decided == {("heads", 0): 1, ("heads", 1): 1, ("channels", 0): 20, ("channels", 1): 20}
    assert model.model.layers[2].mlp.up_proj.weight.shape[0] == 40
    assert model.model.layers[0].self_attn.k_proj.weight.shape[0] == 8


def test_a_model_of_peft_is_pruned_by_its_own_factors():
    peft = pytest.importorskip("peft")
    model = language_model()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, lora_dropout=0.05))
    plan = train(wrapped)
    assert {d.kept for t, d in plan.decisions() if t.unit == "channels"} == {20}
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 20)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_above_weights_of_eight_bits_the_factors_train_and_the_pruned_model_holds_both():
    rounded, model, plain = language_model(), language_model(), language_model()
    linears = [m for m in rounded.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for linear in linears[: 2 * 7]:  # of the first two layers, as the last one loses nothing
            eight = EightBit(linear.weight)
            error = (linear.weight - eight(eight.codes(linear.weight))).abs()
            assert bool((error <= eight.scale / 2 + 1e-7).all()) and bool(error.any())
            linear.weight.copy_(eight(eight.codes(linear.weight)))
    seen = {}

    class Watched(LoRAPrune):
        def after_step(self, training):
            weight = training.original(training.linears[0])
            seen["dtype"], seen["held"] = weight.dtype, training.parameter(training.linears[0]).dtype
            super().after_step(training)

    plan = train(model, Watched(rank=2, every=2), eight=True)
    assert seen == {"dtype": torch.int8, "held": torch.float32}
    train(rounded)
    for (name, ours), theirs in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=1e-5), name
    plan.apply(plain)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    with pytest.raises(PrunelabError, match="puts no low-rank factors"):
        train(language_model(), RandomPruning(), eight=True)


def test_eight_bits_come_off_when_training_fails():
    model, before = language_model(), language_model()
    with pytest.raises(ZeroDivisionError):
        train(model, objective=lambda *_: 1 / 0, eight=True)
    for (name, ours), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        assert ours.dtype == torch.float32 and ours.requires_grad == theirs.requires_grad, name
        assert torch.allclose(ours, theirs, atol=float(theirs.detach().abs().max()) / 200), name


def test_what_has_fused_projections_or_too_few_layers_is_refused():
    with pytest.raises(PrunelabError, match="are fused"):
        train(WEIGHT_FAMILIES["phi3"]())
    with pytest.raises(PrunelabError, match="spares all 3 layers"):
        train(language_model(), LoRAPrune(spared=1))
