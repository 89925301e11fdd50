"""Models of `peft`: its own factors train, and the plan is of the model underneath."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training import engine, trainer
from prunelab.common.training.recipe import Recipe
from prunelab.common.weights import WeightPlan
from tests.contract.references import language_model, token_ids
from tests.contract.training_references import GradualMagnitude, LowRankChannels, SampledLayers

peft = pytest.importorskip("peft", reason="peft is not installed (the extra `training`)")
RECIPE = Recipe(steps=6, batch=4, rate=1e-2, save_every=2)


def model(dropout: float = 0.0, modules: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")):
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=list(modules))
    return peft.get_peft_model(language_model(), config)


def train(made, method, **options):
    return engine.train(method, made, 0.5, token_ids(16), RECIPE, progress=False, **options)


def logits(made):
    with torch.no_grad():
        return made(token_ids(2, seed=9)).logits


@pytest.mark.parametrize("method", [LowRankChannels(), SampledLayers()], ids=lambda m: m.name)
def test_its_factors_train_and_the_plan_repeats_them_on_the_plain_model(method, tmp_path):
    made = model()
    frozen = made.get_base_model().model.layers[0].self_attn.k_proj.weight.clone()
    plan = train(made, method)
    result = made.get_base_model()
    assert not any(hasattr(module, "lora_A") for module in result.modules())
    assert torch.equal(result.model.layers[0].self_attn.k_proj.weight, frozen)
    roles = {target.role for target in plan.targets}
    assert {"self_attn.q_proj", "mlp.down_proj"} <= roles and "self_attn.k_proj" not in roles
    if method.units == ("channels",):
        assert result.model.layers[0].mlp.down_proj.weight.shape == (32, 20)
    plan.save(tmp_path)
    plain = language_model()
    WeightPlan.load(tmp_path).apply(plain)
    assert torch.equal(logits(plain), logits(result)) and torch.equal(logits(made), logits(result))


def test_masks_reach_the_factors_and_an_interrupted_training_goes_on(tmp_path, monkeypatch):
    straight = model(dropout=0.1)
    train(straight, LowRankChannels())
    step = trainer._step

    def stop(loop, made, optimizer, number, draws):
        if number == 5:
            for module in loop.job.training.model.modules():
                if hasattr(module, "lora_A") and module.in_features == 40:
                    x = torch.randn(1, 40)
                    gone = ~module._modules["_prunelab_0"].gate.mask
                    assert bool(gone.any())
                    changed = torch.where(gone, x + 5, x)
                    assert torch.equal(module.eval()(x), module(changed))
            raise KeyboardInterrupt
        return step(loop, made, optimizer, number, draws)

    monkeypatch.setattr(trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(model(dropout=0.1), LowRankChannels(), folder=tmp_path)
    monkeypatch.setattr(trainer, "_step", step)
    resumed = model(dropout=0.1)
    train(resumed, LowRankChannels(), folder=tmp_path)
    assert torch.equal(logits(straight), logits(resumed))
    repeated = model(dropout=0.1)
    train(repeated, LowRankChannels(), folder=tmp_path)
    assert torch.equal(logits(repeated), logits(resumed))


def test_what_does_not_go_with_its_layers_is_refused():
    made = model()
    with pytest.raises(PrunelabError, match="has factors of peft; merge them first"):
        train(made, GradualMagnitude())
    assert not any(hasattr(module, "parametrizations") for module in made.modules())
    made.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    made.base_model.set_adapter(["default", "other"])
    with pytest.raises(PrunelabError, match="2 adapters of peft at once"):
        train(made, SampledLayers())
