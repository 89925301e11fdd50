"""Training with a token pruner at work: what learns, under which budgets, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.learned import PARTS
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.training.lessons import lesson
from prunelab.common.training.recipe import Recipe
from prunelab.common.training.tokens import train
from prunelab.methods.m3.method import M3
from tests.contract.tokens_references import SoftGate
from tests.contract.vlms import images, prompt, vlm

RECIPE = Recipe(steps=3, batch=2, rate=1e-2, save_every=1)


def samples(count: int):
    given = prompt("llava", images("llava", count))
    return [{name: value[i] for name, value in given.items()} for i in range(count)]


def objective(model: nn.Module, batch):
    batch = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
    return SimpleNamespace(loss=F.cross_entropy(logits, torch.arange(len(logits))), logits=logits)


def test_the_loss_is_the_mean_over_budgets():
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    budgets = [Budget(16, "count"), Budget(4, "count"), Budget(1, "count")]
    with torch.no_grad():
        each = [lesson(M3(), model, [budget], lambda m: objective(m, given)) for budget in budgets]
        whole = lesson(M3(), model, budgets, lambda m: objective(m, given))
    assert whole == pytest.approx(float(torch.stack(each).mean()), abs=1e-6)
    assert len({round(float(loss), 5) for loss in each}) == 3


@pytest.mark.parametrize(
    ("learns", "parts", "rest"), [("parts", True, False), ("model", False, True), ("both", True, True)]
)
def test_what_learns(learns, parts, rest):
    model = vlm("llava")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    new = SoftGate(1).build(adapter_for(model).info)
    made = train(
        SoftGate(1), model, 0.5, samples(4), RECIPE, learns=learns, objective=objective, seed=5, progress=False
    )
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(moved) == rest and torch.equal(made.weight, new.weight) != parts
    assert not hasattr(model, PARTS) and not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_training_goes_on_where_it_was_stopped(tmp_path):
    @dataclass(frozen=True)
    class Stopped(Recipe):
        at: ClassVar[int] = 99

        def factor(self, step: int) -> float:
            if step == type(self).at:
                raise KeyboardInterrupt
            return super().factor(step)

    recipe = Stopped(steps=3, batch=2, rate=1e-2, save_every=1)
    one, other, data = vlm("llava"), vlm("llava"), samples(4)
    train(M3(), one, "4count", data, recipe, learns="model", objective=objective, progress=False)
    Stopped.at = 2
    arguments = {"learns": "model", "objective": objective, "folder": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        train(M3(), other, "4count", data, recipe, **arguments)
    Stopped.at = 99
    again = vlm("llava")
    train(M3(), again, "4count", data, recipe, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("data", "budgets", "learns", "said"),
    [
        (1, 0.5, "model", "1 samples are fewer than the 2 of a step"),
        (4, [], "model", "no budget to train under"),
        (4, 0.5, "parts", "m3 has no learned parts"),
    ],
)
def test_what_cannot_be_trained(data, budgets, learns, said):
    with pytest.raises(PrunelabError, match=said):
        train(M3(), vlm("llava"), budgets, samples(data), RECIPE, learns=learns, objective=objective, progress=False)
