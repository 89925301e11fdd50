"""The vision-Mamba testbed, its fine-tuning under a method, and the criterion of the naive baseline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from prunelab.common import testbeds
from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits
from prunelab.common.testbeds import digits_vim
from prunelab.common.testbeds.digits_vim import DigitsVim, DigitsVimDecay
from prunelab.common.testbeds.tuned import Tuned
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.training import trainer
from prunelab.methods.cls_similarity.method import ClassSimilarity, similarity

LAYERS, MIDDLE = (2, 4, 6), Budget(0.6)
TUNED = ("digits_vim_naive", "digits_vim_hold", "digits_vim_decay", "digits_vim_original")
TINY = {"steps": 4, "batch": 4, "width": 16, "depth": 2, "check_every": 2, "save_every": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(digits_vim, "QUICK", 10)
    monkeypatch.setattr(digits_vim, "FULL", 20)


@pytest.fixture(scope="module")
def shipped():
    return testbeds.load("digits_vim")


def accuracy(model, method=None, budget=MIDDLE, count: int = 300) -> float:
    x, y = digits.scenes("test", count, 2)  # not the scenes of the training log

    def share() -> float:
        with torch.no_grad():
            return float((model(x).argmax(1) == y).float().mean())

    if method is None:
        return share()
    with apply(method, model, budget):
        return share()


# -- curriculum ------------------------------------------------------------------------------------------------------


def test_the_digit_is_found_where_it_lies():
    x, _ = digits.scenes("test", 40, 0, clutter=0.0)
    row, column = digits_vim.place(x)
    ink = x.unfold(2, 8, 4).unfold(3, 8, 4).sum((-1, -2)).squeeze(1)  # [40, 9, 9]
    assert torch.equal(ink.flatten(1).amax(1), ink[torch.arange(40), row, column])
    cells = F.avg_pool2d(x, 4).flatten(1)
    cells = torch.cat([cells[:, :50], cells.new_full((40, 1), -1.0), cells[:, 50:]], 1)  # the class token in the middle
    tokens = digits_vim.inked(x, 50)
    assert not bool((tokens == 50).any())
    assert bool((cells.gather(1, tokens).sum(1) > 0.99 * cells.topk(4).values.sum(1)).float().mean() > 0.8)


def test_scenes_are_pulled_towards_the_middle():
    x, _ = digits.scenes("test", 40, 0, clutter=0.0)
    assert torch.equal(digits_vim.pulled(x, 0.0), x)
    middle = digits_vim.pulled(x, 1.0)
    assert all(bool((at == 4).all()) for at in digits_vim.place(middle))
    assert torch.equal(middle.flatten(1).sort().values, x.flatten(1).sort().values), "pixels move, and all stay"
    half = torch.stack(digits_vim.place(digits_vim.pulled(x, 0.5)))
    assert bool(((half - 4).abs() <= 2).all())


@pytest.mark.parametrize("progress", [0.0, 0.15, 1.0])
def test_every_stage_teaches_and_leaves_no_hook(progress):
    testbed = DigitsVim(**TINY)
    torch.manual_seed(0)
    model = testbed.build()
    loss = testbed.loss(model, progress, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss > 1.5 and all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert not model.read._forward_pre_hooks


def test_hints_end_with_the_ramp(monkeypatch):
    testbed, model = DigitsVim(**TINY), DigitsVim(**TINY).build()
    asked: list[float] = []
    monkeypatch.setattr(digits_vim, "inked", lambda x, middle: asked.append(1.0) or torch.zeros(len(x), 4).long())
    for progress in (0.0, 0.2, 0.25, 1.0):
        testbed.loss(model, progress, torch.Generator().manual_seed(0))
    assert len(asked) == 2
    x, y = digits.scenes("train", 4, torch.Generator().manual_seed(3), deformed=True)
    full = testbed.loss(model, 1.0, torch.Generator().manual_seed(3))
    assert torch.equal(full, F.cross_entropy(model(x), y, label_smoothing=testbed.smoothing))


def test_training_writes_a_model_that_loads(tmp_path, few_scenes):
    log = trainer.fit(DigitsVim(**TINY), tmp_path, seed=1)
    model, read = testbeds.load("digits_vim", tmp_path)
    assert read == log and len(model.layers) == 2 and model.class_place == 50 and log["test"]["scenes"] == 20


# -- shipped weights -------------------------------------------------------------------------------------------------


def test_shipped_weights_are_as_good_as_their_log(shipped):
    model, log = shipped
    assert log["test"]["accuracy"] >= 0.9 and log["seconds"] < 45 * 60
    assert abs(accuracy(model, count=500) - log["test"]["accuracy"]) < 0.04


def test_middle_budget_discriminates(shipped):
    model, _ = shipped
    dense = accuracy(model)
    found = {
        name: accuracy(model, registry.create(name, layers=LAYERS, **options))
        for name, options in {
            "vim_token_pruning": {},
            "random_drop": {"positions": "renumber"},
            "cls_similarity": {"positions": "renumber"},
        }.items()
    }
    assert found["random_drop"] <= dense - 0.10
    assert found["vim_token_pruning"] >= found["random_drop"] + 0.10
    assert found["cls_similarity"] <= found["random_drop"], "the naive criterion is a catastrophe"


def test_held_states_are_plain_removal_on_the_testbed(shipped):
    x, _ = digits.scenes("test", 20, 2)
    logits = []
    for align in ("hold", "renumber", "decay"):
        method = registry.create("vim_token_pruning", layers=LAYERS, align=align)
        with torch.no_grad(), apply(method, shipped[0], MIDDLE):
            logits.append(shipped[0](x))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("name", TUNED)
def test_fine_tuning_wins_back_accuracy(shipped, name):
    model, log = testbeds.load(name)
    cls = testbeds.get(name)
    assert issubclass(cls, Tuned) and log["recipe"]["start"] == shipped[1]["sha256"], "tuned from what ships"
    method = registry.parse(log["recipe"]["method"])
    before, after = (accuracy(m, method, Budget.parse(log["recipe"]["budget"])) for m in (shipped[0], model))
    assert after > before and abs(after - log["test"]["accuracy"]) < 0.07


# -- fine-tuning -----------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_what_ships_and_trains_the_pruned_model(tmp_path, few_scenes, shipped):
    tuned = DigitsVimDecay(steps=2, batch=4, check_every=2)
    start = tuned.build()
    assert tuned.start == shipped[1]["sha256"]
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), shipped[0].state_dict().values()))

    loss = tuned.loss(start, 0.0, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    torch.randint(2**31, (), generator=generator)
    x, y = digits.scenes("train", 4, generator, deformed=True)
    with apply(registry.parse(tuned.method), start, Budget.parse(tuned.budget)):
        pruned = F.cross_entropy(start(x), y, label_smoothing=DigitsVim().smoothing)
    assert torch.equal(loss, pruned) and not torch.allclose(loss, F.cross_entropy(start(x), y, label_smoothing=0.05))

    log = trainer.fit(tuned, tmp_path, seed=0)
    model, _ = testbeds.load("digits_vim_decay", tmp_path)
    moved = [float((a - b).abs().max()) for a, b in zip(model.state_dict().values(), shipped[0].state_dict().values())]
    assert 0 < max(moved) < 0.01 and log["recipe"]["start"] == shipped[1]["sha256"]


def test_weights_tuned_from_another_start_are_refused():
    with pytest.raises(PrunelabError, match="started from other weights of digits_vim"):
        replace(DigitsVimDecay(), start="0" * 64).build()


# -- similarity to the class token -----------------------------------------------------------------------------------


def test_similarity_is_the_cosine_to_the_token_at_its_place():
    hidden = torch.tensor([[[1.0, 0], [3, 3], [0, 2], [-1, 0]]])
    want = torch.tensor([[0.5**0.5, 1, 0.5**0.5, -(0.5**0.5)]])
    assert torch.allclose(similarity(hidden, torch.tensor([1])), want)


def test_similarity_follows_the_class_token_through_vim(shipped):
    model, _ = shipped
    x, _ = digits.scenes("test", 5, 2)
    with torch.no_grad(), apply(ClassSimilarity((1, 2), positions="renumber"), model, 0.6) as handle:
        model(x)
        first, second = (places for _, places in handle.kept())
    assert first.shape == (5, 61) and second.shape == (5, 37)
    for places in (first, second):
        assert bool((places == 50).any(1).all()), "the class token goes on"
    assert bool(((first == 50).int().argmax(1) != 50).all()), "and is found where it has moved to"
    assert len({tuple(row) for row in first.tolist()}) == 5, "every scene has a choice of its own"


def test_similarity_needs_a_class_token(shipped):
    info = adapter_for(shipped[0]).info
    with pytest.raises(PrunelabError, match="this model has none"):
        ClassSimilarity().sites(replace(info, class_token=False))
