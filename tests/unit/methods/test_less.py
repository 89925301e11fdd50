"""LESS: gradients of single samples, what a projection keeps of them, checkpoints, and whom the influence chooses."""

from __future__ import annotations

import math

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection import gradients
from prunelab.common.data_selection.engine import select
from prunelab.common.data_selection.gradients import Checkpoint, Gradients, projected
from prunelab.common.measures import fitting
from prunelab.common.training.recipe import LinearRecipe
from prunelab.methods.less.method import LESS, LESSAndTokens, adam, direction, shares, unit
from tests.contract.references import language_model

T = torch.tensor


def samples(count, seed=1, low=1, high=60):
    rng = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(low, high, (9 - i % 3,), generator=rng)} for i in range(count)]


def kind(count, *words):
    """Samples that say the same words over and over, each from another one on."""
    return [{"input_ids": T([words[(i + place) % len(words)] for place in range(8)])} for i in range(count)]


def trained(model, data, steps=3, rate=1e-2):
    optimizer, points = torch.optim.AdamW(model.parameters(), rate), []
    for step in range(steps):
        optimizer.zero_grad()
        ids = data[step % len(data)]["input_ids"][None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        points.append(Checkpoint.of(model, optimizer, rate / (step + 1)))
    optimizer.zero_grad()
    return points


@pytest.fixture(scope="module")
def warm():
    model = language_model()
    return model, trained(model, samples(3, 5))


def test_gradients_are_those_of_each_sample_at_the_checkpoint(warm, monkeypatch):
    model, points = warm
    data = samples(4)
    now = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(gradients, "HELD", 3 * len(points[0].mean))
    parts = list(Gradients(model.train(), data)(points[0]))
    assert [len(part) for part in parts] == [3, 1] and model.training
    assert all(torch.equal(value, now[name]) for name, value in model.state_dict().items())
    model.eval().load_state_dict(dict(points[0].parameters), strict=False)
    for row, sample in zip(torch.cat(parts), data, strict=True):
        model.zero_grad()
        ids = sample["input_ids"][None]
        model(input_ids=ids, labels=ids).loss.backward()
        assert torch.allclose(row, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=1e-6)
    model.zero_grad()
    model.load_state_dict(now)


def test_projections_keep_cosines_and_do_not_depend_on_blocks(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 1500, generator=rng)
    vectors[1] = vectors[0] + 0.5 * vectors[1]
    short = projected(vectors, 2048)
    assert torch.allclose(unit(short) @ unit(short).T, unit(vectors) @ unit(vectors).T, atol=0.08)
    assert torch.equal(short, projected(vectors, 2048)) and not torch.equal(short, projected(vectors, 2048, seed=1))
    monkeypatch.setattr(gradients, "HELD", 2048 * 400)
    assert torch.allclose(short, projected(vectors, 2048), rtol=1e-3, atol=1e-2)


def test_corrected_moments_are_adams_own_step():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.Adam([weight], 1.0, eps=0.0)
    for _ in range(2):
        weight.grad = torch.randn(5)
        optimizer.step()
    state, gradient, before = optimizer.state[weight], torch.randn(5), weight.detach().clone()
    step = adam(gradient[None], state["exp_avg"].clone(), state["exp_avg_sq"].clone(), 3, epsilon=0.0)
    weight.grad = gradient
    optimizer.step()
    assert torch.allclose(before - step[0], weight.detach(), atol=1e-5)


def test_directions_average_cosines_or_gradients():
    given = T([[3.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(direction(given), T([0.5, 0.5]))
    assert torch.allclose(direction(given, "gradients"), T([3.0, 1.0]) / math.sqrt(10))
    assert shares([3.0, 1.0]) == [0.75, 0.25]
    assert not unit(torch.zeros(1, 3)).isnan().any()


@pytest.mark.parametrize("options", [{}, {"dimensions": None}, {"average": "gradients"}, {"step": "gradient"},
                                     {"step": "sign"}, {"corrected": True}])  # fmt: skip
def test_samples_of_the_target_s_kind_are_chosen(warm, options):
    model, points = warm
    near, far = kind(6, 1, 2, 3), kind(6, 40, 41, 42, 43)
    mixed = [sample for pair in zip(far, near, strict=True) for sample in pair]
    chosen = select(
        LESS(**{"dimensions": 256, **options}), mixed, 0.5, model=model, target=kind(2, 1, 2, 3),
        services={"checkpoints": points},
    )  # fmt: skip
    assert chosen.indices == [1, 3, 5, 7, 9, 11]


def test_a_sample_counts_by_the_task_that_it_helps_most(warm):
    model, points = warm
    tasks = {"one": kind(3, 1, 2, 3), "two": kind(3, 20, 21)}
    mixed = [*kind(3, 1, 2, 3), *kind(4, 40, 41, 42, 43), *kind(2, 20, 21)]
    chosen = select(LESS(256), mixed, "5count", model=model, target=tasks, services={"checkpoints": points})
    assert chosen.indices == [0, 1, 2, 7, 8]


def test_half_of_the_tokens_of_what_stays_enter_the_loss(warm):
    model, points = warm
    chosen = select(
        LESSAndTokens(64), samples(4), "0.5,0.5", model=model, target=samples(2, 4), services={"checkpoints": points}
    )
    assert len(chosen) == 2
    for row in chosen:
        assert int((row["labels"] >= 0).sum()) == (len(row["input_ids"]) - 1) // 2


def test_what_cannot_be_compared_is_refused(warm):
    model, points = warm
    ready = {"model": model, "services": {"checkpoints": points}}
    with pytest.raises(PrunelabError, match="give target="):
        select(LESS(64), samples(2), 0.5, **ready)
    with pytest.raises(PrunelabError, match="needs the service 'checkpoints'"):
        select(LESS(64), samples(2), 0.5, model=model, target=samples(1))
    with pytest.raises(PrunelabError, match="give model="):
        select(LESS(64), samples(2), 0.5, target=samples(1), services={"checkpoints": points})
    with pytest.raises(PrunelabError, match="of another model"):
        select(LESS(64), samples(2), 0.5, model=torch.nn.Linear(2, 2), target=samples(1),
               services={"checkpoints": points}, forward=lambda m, b: m(b["input_ids"]))  # fmt: skip
    broken = [Checkpoint(p.parameters, p.mean * float("nan"), p.square, p.rate, p.step) for p in points]
    with pytest.raises(PrunelabError, match="NaN or infinite"):
        select(LESS(64), samples(2), 0.5, model=model, target=samples(1), services={"checkpoints": broken})
    with pytest.raises(PrunelabError, match="no parameter of the model learns"):
        Checkpoint.of(language_model().requires_grad_(False), None, 1.0)
    with pytest.raises(PrunelabError, match="Adam's moments"):
        Checkpoint.of(model, torch.optim.SGD(model.parameters(), 1.0), 1.0)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_warm_up_leaves_checkpoints_and_the_model_as_it_was(rank):
    if rank:
        pytest.importorskip("peft")
    model = language_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [dict(sample, labels=sample["input_ids"]) for sample in samples(12)]
    recipe = LinearRecipe(steps=1, batch=2, rate=1e-2, warmup=0.0, decay=0.0)
    method = LESS(64, warm_share=0.5, warm_epochs=2)
    with fitting.warmed(method, model, rows, recipe, 0, rank) as (learner, points):
        assert [point.step for point in points] == [3, 6]
        assert points[0].rate > points[1].rate > 0
        assert len(select(method, rows, 0.5, model=learner, target=rows[:2], services={"checkpoints": points})) == 6
        few = sum(len(value.flatten()) for value in points[0].parameters.values())
        assert few == len(points[0].mean) and (not rank or few < sum(map(torch.numel, before.values())))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert not hasattr(model, "peft_config")
