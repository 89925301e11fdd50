"""The engine of training methods: batches, devices, accumulated gradients, averages, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.examples import collate
from prunelab.common.training import engine
from prunelab.common.training.batches import Batches
from prunelab.common.training.distillation import distillation, flops
from prunelab.common.training.recipe import Recipe
from prunelab.common.weights import WeightPlan
from tests.contract.references import MagnitudeWeights, language_model, token_ids
from tests.contract.training_references import DistilledQuantiser, GradualMagnitude, LowRankChannels, RandomMasks

RECIPE = Recipe(steps=6, batch=4, rate=1e-2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)


def train(method, budget=0.5, data=None, recipe=RECIPE, **options):
    model = language_model()
    data = token_ids(16) if data is None else data
    return model, engine.train(method, model, budget, data, recipe, progress=False, **options)


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- batches ---------------------------------------------------------------------------------------------------------


def test_every_sample_comes_once_an_epoch_and_the_step_alone_decides():
    batches = Batches(token_ids(10), 4, seed=1)
    seen = [i for number in range(5) for i in batches.indices(number)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert batches.indices(3) == Batches(token_ids(10), 4, seed=1).indices(3)
    assert Batches(token_ids(3), 7).indices(0).count(0) >= 2, "a batch larger than the data goes on"
    for bad, says in ((([], 1), "no sample"), ((token_ids(3), 0), "1 or more")):
        with pytest.raises(PrunelabError, match=says):
            Batches(*bad)


def test_padding_enters_no_loss():
    batch = collate([torch.tensor([5, 6, 7]), [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    answered = collate([{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6])}])
    assert answered["labels"].tolist() == [[-100, 6]]
    assert collate([{"pixel_values": torch.ones(2)}] * 3)["pixel_values"].shape == (3, 2)
    with pytest.raises(PrunelabError, match="different fields"):
        collate([{"a": torch.ones(1)}, {"b": torch.ones(1)}])


# -- where and how it runs -------------------------------------------------------------------------------------------


def test_accelerate_on_the_cpu_changes_no_bit():
    plain, _ = train(GradualMagnitude())
    accelerated, _ = train(GradualMagnitude(), accelerator=Accelerator(cpu=True))
    assert same(plain, accelerated)


def test_accumulated_gradients_are_those_of_one_large_batch():
    recipe = replace(RECIPE, steps=3)
    whole, _ = train(RandomMasks(), recipe=recipe)
    parts = Accelerator(cpu=True, gradient_accumulation_steps=2)
    summed, _ = train(RandomMasks(), recipe=replace(recipe, batch=2), accelerator=parts)
    for a, b in zip(whole.parameters(), summed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_mixed_precision_trains_and_resumes(tmp_path, monkeypatch):
    def bfloat16():
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, mixed_precision="bf16")

    recipe = replace(RECIPE, save_every=2)
    straight, _ = train(LowRankChannels(), recipe=recipe, accelerator=bfloat16())
    assert not same(straight, train(LowRankChannels(), recipe=recipe)[0])
    step = engine.trainer._step

    def stop(loop, model, optimizer, number, draws):
        if number == 5:
            raise KeyboardInterrupt
        return step(loop, model, optimizer, number, draws)

    monkeypatch.setattr(engine.trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(LowRankChannels(), recipe=recipe, accelerator=bfloat16(), folder=tmp_path)
    monkeypatch.setattr(engine.trainer, "_step", step)
    resumed, _ = train(LowRankChannels(), recipe=recipe, accelerator=bfloat16(), folder=tmp_path)
    assert same(straight, resumed)


# -- what it says of a training --------------------------------------------------------------------------------------


def test_average_parameters_follow_the_masks():
    _, plan = train(RandomMasks())
    report = plan.report
    assert report.average_parameters == report.dense_parameters - report.zeroed, "pruned from the first step on"
    _, gradual = train(GradualMagnitude())
    assert report.average_parameters < gradual.report.average_parameters < report.dense_parameters
    schedule = GradualMagnitude().schedule(RECIPE.steps)
    gone = 0.0
    for step in range(RECIPE.steps):  # the masks of a step were set behind the one before
        budget = schedule.budget(step - 1, Budget(0.5)) if step else Budget(1.0)
        gone += sum(t.shape[0] * budget.pruned(t.shape[1]) for t in gradual.targets if t.unit == "linear")
    assert gradual.report.average_parameters == pytest.approx(report.dense_parameters - gone / RECIPE.steps)


def test_the_plan_holds_the_training_log(tmp_path):
    recipe = replace(RECIPE, check_every=2)
    _, plan = train(
        GradualMagnitude(), recipe=recipe, folder=tmp_path, evaluate=lambda m: {"mean": m.lm_head.weight.mean().item()}
    )
    log = plan.header["log"]
    assert [point["step"] for point in log] == [2, 4, 6] and all({"loss", "mean", "seconds"} <= p.keys() for p in log)
    left = [point["parameters"] for point in log]
    assert left == sorted(left, reverse=True) and left[0] > left[-1]
    assert left[-1] == plan.report.dense_parameters - plan.report.zeroed
    assert WeightPlan.load(tmp_path).header["log"] == log


def test_a_loss_in_the_log_is_the_mean_of_the_first_steps():
    losses = iter([4.0, 2.0, 3.0])

    class Given(RandomMasks):
        def loss(self, batch, outputs, teacher, training):
            return super().loss(batch, outputs, teacher, training) * 0 + next(losses)

    _, plan = train(Given(), recipe=replace(RECIPE, steps=3, check_every=1))
    assert [point["loss"] for point in plan.header["log"]] == [4.0, 3.0, 3.0]


def test_frozen_weights_stay_and_are_not_in_the_plan():
    model, plan = train(LowRankChannels())
    fresh = language_model()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, fresh.model.layers[0].self_attn.q_proj.weight)
    assert {t.role for t in plan.targets} == {"mlp.down_proj", "channels"}
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 20) and plan.report.removed > 0


def test_a_function_gives_the_batches():
    numbers = []

    def batch(number):
        numbers.append(number)
        return collate(list(token_ids(2, seed=number)))

    train(RandomMasks(), data=batch)
    assert numbers == [0, 1, 2, 3, 4, 5]


def test_losses():
    a, b = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    assert float(distillation(a, a, 3.0)) == pytest.approx(0, abs=1e-6)
    expected = 4 * torch.nn.functional.kl_div((a / 2).log_softmax(-1), (b / 2).softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(distillation(a, b, 2.0), expected.mean(), atol=1e-6)
    mask = torch.rand(3, 4) > 0.5
    assert torch.allclose(distillation(a, b, 2.0, mask), expected[mask].mean(), atol=1e-5)
    assert float(flops(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))) == 2.0**2 + 1.0**2


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        (MagnitudeWeights(), {}, "does not train"),
        (DistilledQuantiser(), {}, "needs the service 'teacher'"),
        (GradualMagnitude(), {"budget": "2:4"}, "give a ratio"),
        (GradualMagnitude(), {"data": []}, "no sample"),
    ],
)
def test_refused_before_any_work(method, options, says):
    with pytest.raises(PrunelabError, match=says):
        train(method, **options)


def test_a_loss_that_is_not_finite_stops_the_training():
    model = language_model()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(PrunelabError, match="no longer finite by step 6"):
        engine.train(RandomMasks(), model, 0.5, token_ids(8), RECIPE, progress=False)


def test_zeros_that_left_with_their_structure_are_not_counted_again():
    model = language_model()
    method = registry.load()["loraprune"]()
    report = engine.train(method, model, Budget(0.001), token_ids(8), replace(RECIPE, steps=4), progress=False).report
    assert report.dense_parameters - report.parameters == report.removed <= report.prunable
    assert report.zeroed == 0 and report.sparsity <= 1
