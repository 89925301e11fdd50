"""The contract of training methods, over every registered method and the reference methods, on tiny language models."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.training import engine, trainer
from prunelab.common.training.method import TrainingMethod
from prunelab.common.training.recipe import Recipe
from prunelab.common.weights import WeightPlan, load_pruned, save_pruned
from tests.contract.references import invariant, language_model, token_ids
from tests.contract.training_references import REFERENCES

METHODS = [c() for c in registry.load().values() if issubclass(c, TrainingMethod)] + list(REFERENCES)
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
RECIPE = Recipe(steps=10, batch=4, rate=1e-2, check_every=5, save_every=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(method: TrainingMethod, budget: Budget = Budget(0.5), family: str = "llama", **options: Any):  # noqa: B008
    model = language_model(family)
    if "teacher" in method.services:
        options["services"] = {"teacher": language_model(family)}
    recipe = options.pop("recipe", RECIPE)
    plan = engine.train(method, model, budget, token_ids(16), recipe, progress=False, **options)
    return model, plan


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, seed=9)).logits


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@every
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_budget_is_met_and_nothing_is_left_on_the_model(method, family):
    model, plan = run(method, family=family)
    decided = [(t, d) for t, d in plan.decisions() if t.unit in method.units and method.covers(t)]
    with invariant("budget", method):
        if any(not bool(d.mask.all()) for _, d in decided):  # a method that prunes at all
            for target, decision in decided:
                kept = target.shape[-1] - Budget(0.5).pruned(target.shape[-1])
                assert bool((decision.mask.sum(-1) == kept).all()), target.name
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert not any(name.startswith("_prunelab") for module in model.modules() for name in module._modules)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {type(m).__module__.split(".")[0] for m in model.modules()} <= {"transformers", "torch"}
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert bool(torch.isfinite(logits(model)).all())
    average, dense = plan.report.average_parameters, plan.report.dense_parameters
    assert average is not None and dense - plan.report.prunable <= average <= dense


@every
def test_it_learns_and_same_seed_same_result(method):
    model, plan = run(method, seed=3)
    again, _ = run(method, seed=3)
    assert same(model, again)
    carried = [t for t, d in plan.decisions() if "weight" in d.values]
    assert carried, "what was learned lies in the plan"


@every
def test_the_plan_repeats_the_training_on_the_untrained_model(method, tmp_path):
    model, plan = run(method)
    plan.save(tmp_path / "plan")
    other = language_model()
    WeightPlan.load(tmp_path / "plan").apply(other)
    assert same(model, other) and plan.diff(WeightPlan.load(tmp_path / "plan")) == "the plans are equal"
    save_pruned(model, plan, tmp_path / "saved")
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(model))
    assert "parameters on average" in str(plan)


@every
def test_an_interrupted_training_ends_with_the_same_weights(method, tmp_path, monkeypatch):
    straight, _ = run(method)
    step, calls = trainer._step, []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(method, folder=tmp_path)
    assert (tmp_path / trainer.CHECKPOINT).exists()
    monkeypatch.setattr(trainer, "_step", step)
    resumed, plan = run(method, folder=tmp_path)
    assert same(straight, resumed) and not (tmp_path / trainer.CHECKPOINT).exists()
    third, repeated = run(method, folder=tmp_path)
    assert same(straight, third) and repeated.diff(plan) == "the plans are equal"
    with pytest.raises(PrunelabError, match="another finished training"):
        run(method, Budget(0.75), folder=tmp_path)


@every
def test_a_model_in_half_precision_stays_in_it(method):
    model = language_model().bfloat16()
    services = {"services": {"teacher": language_model().bfloat16()}} if "teacher" in method.services else {}
    engine.train(method, model, Budget(0.5), token_ids(8), replace(RECIPE, steps=4), progress=False, **services)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and bool(torch.isfinite(logits(model)).all())


@every
def test_fields_are_plain_values_and_the_repr_names_them(method):
    assert all(f"{field.name}={getattr(method, field.name)!r}" in repr(method) for field in fields(method))
