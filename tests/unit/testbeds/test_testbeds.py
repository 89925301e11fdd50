"""Testbeds: their data, their shipped weights, and the training that made them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prunelab.common import testbeds
from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits
from prunelab.common.testbeds.digits_vit import DigitsViT
from prunelab.common.training import recipe, trainer

MIDDLE = Budget((0.7, 0.7, 0.7))  # behind blocks 2, 5 and 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- data ------------------------------------------------------------------------------------------------------------


def test_scenes_are_deterministic_and_shaped():
    x, y = digits.scenes("test", 20, 3)
    again, labels = digits.scenes("test", 20, 3)
    assert x.shape == (20, 1, 40, 40) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, again) and torch.equal(y, labels)
    assert not torch.equal(x, digits.scenes("test", 20, 4)[0])
    assert not torch.equal(x, digits.scenes("train", 20, 3)[0])


def test_a_generator_goes_on_where_it_stands():
    generator = torch.Generator().manual_seed(3)
    first, second = (digits.scenes("test", 5, generator)[0] for _ in range(2))
    assert torch.equal(first, digits.scenes("test", 5, 3)[0]) and not torch.equal(first, second)


def test_splits_share_no_image():
    train, test = (digits.digits(split) for split in ("train", "test"))
    assert len(train[0]) + len(test[0]) == 1797 and len(test[0]) == digits.TEST_IMAGES
    seen = {image.numpy().tobytes() for image in train[0]}
    assert not any(image.numpy().tobytes() in seen for image in test[0])


def test_digit_lies_whole_on_the_grid(monkeypatch):
    monkeypatch.setattr(digits, "NOISE", 0.0)
    x, y = digits.scenes("test", 10, 0, clutter=0.0)
    cells = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).mul(digits.SCALE).add(digits.SHIFT)  # [10, 1, 10, 10, 16]
    full = cells.amax(-1).gt(1e-4).flatten(1).sum(1)
    assert int(full.max()) <= 4 and int(full.min()) >= 1
    images, labels = digits.digits("test")
    ink = {(round(float(image.sum()), 2), int(label)) for image, label in zip(images, labels, strict=True)}
    assert all((round(float(scene.sum()), 2), int(label)) in ink for scene, label in zip(cells, y, strict=True))


def test_unknown_split():
    with pytest.raises(PrunelabError, match="train or test"):
        digits.scenes("valid", 1, 0)  # type: ignore[arg-type]


# -- shipped weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return testbeds.load("digits_vit")


def accuracy(model: nn.Module, count: int = 500) -> float:
    x, y = digits.scenes("test", count, 2)  # not the scenes of the training log
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_shipped_weights_are_good(shipped):
    model, log = shipped
    assert not model.training and len(model.blocks) == 12 and log["seed"] == 0
    assert log["test"]["accuracy"] >= 0.95 and log["seconds"] < 45 * 60
    assert accuracy(model) >= 0.95


def test_middle_budget_discriminates(shipped):
    model, _ = shipped
    dense, pruned = accuracy(model), {}
    for name in ("random_drop", "zero_tprune"):
        with apply(registry.create(name), model, MIDDLE):
            pruned[name] = accuracy(model)
    assert pruned["random_drop"] <= dense - 0.10
    assert pruned["zero_tprune"] > pruned["random_drop"]


@pytest.mark.parametrize("path", sorted(testbeds.SHIPPED.glob("*/seeds.json")), ids=lambda path: path.parent.name)
def test_seeds_are_recorded(path):
    seeds, log = json.loads(path.read_text()), recipe.read_log(path.parent)
    assert [run["seed"] for run in seeds["runs"]] == [0, 1, 2]
    assert len({run["sha256"] for run in seeds["runs"]}) == 3
    assert seeds["recipe"] == log["recipe"] and seeds["runs"][0]["sha256"] == log["sha256"]


def test_altered_and_missing_files_are_refused(tmp_path):
    folder = tmp_path / "digits_vit"
    shutil.copytree(testbeds.SHIPPED / "digits_vit", folder)
    weights = folder / recipe.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PrunelabError, match="sha256 differs"):
        testbeds.load("digits_vit", folder)
    weights.unlink()
    with pytest.raises(PrunelabError, match="are missing"):
        testbeds.load("digits_vit", folder)
    (folder / recipe.LOG).write_text("{")
    with pytest.raises(PrunelabError, match="not a training log"):
        testbeds.load("digits_vit", folder)
    (folder / recipe.LOG).unlink()
    with pytest.raises(PrunelabError, match="train the testbed into it first"):
        testbeds.load("digits_vit", folder)


def test_weights_of_another_recipe_are_refused(tmp_path):
    folder = tmp_path / "digits_vit"
    shutil.copytree(testbeds.SHIPPED / "digits_vit", folder)
    log = json.loads((folder / recipe.LOG).read_text())
    log["recipe"]["width"] *= 2
    (folder / recipe.LOG).write_text(json.dumps(log))
    with pytest.raises(PrunelabError, match="another version"):
        testbeds.load("digits_vit", folder)


def test_unknown_testbed():
    with pytest.raises(PrunelabError, match="did you mean digits_vit"):
        testbeds.load("digit_vit")


# -- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interrupted(DigitsViT):
    """Stops as Ctrl-C would, when it has used up its batches."""

    left: ClassVar[list[int]] = []

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        if self.left:
            self.left[0] -= 1
            if self.left[0] < 0:
                raise KeyboardInterrupt
        return super().loss(model, progress, generator)


TINY = {"steps": 7, "batch": 4, "width": 12, "heads": 1, "depth": 2, "check_every": 3, "save_every": 2}


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr("prunelab.common.testbeds.digits_vit.QUICK", 10)
    monkeypatch.setattr("prunelab.common.testbeds.digits_vit.FULL", 20)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / recipe.WEIGHTS)


def test_interrupted_training_ends_the_same(tmp_path, few_scenes, monkeypatch):
    straight = trainer.fit(DigitsViT(**TINY), tmp_path / "straight", seed=5)
    broken = tmp_path / "broken"
    for batches in (5, 0, 2):  # stops behind the checkpoint of step 4, at once, and behind that of step 6
        monkeypatch.setattr(Interrupted, "left", [batches])
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(Interrupted(**TINY), broken, seed=5)
        assert (broken / trainer.CHECKPOINT).exists() and not (broken / recipe.WEIGHTS).exists()
    monkeypatch.setattr(Interrupted, "left", [])
    resumed = trainer.fit(Interrupted(**TINY), broken, seed=5)

    left, right = tensors(tmp_path / "straight"), tensors(broken)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert straight["sha256"] == resumed["sha256"] and straight["test"] == resumed["test"]
    plain = [[{k: v for k, v in p.items() if k != "seconds"} for p in log["curve"]] for log in (straight, resumed)]
    assert plain[0] == plain[1] and [p["step"] for p in plain[0]] == [3, 6, 7]
    assert sorted(p.name for p in broken.iterdir()) == sorted([recipe.WEIGHTS, recipe.LOG])  # nothing half-done is left


def test_trained_folder_loads_and_is_not_trained_again(tmp_path, few_scenes):
    log = trainer.fit(DigitsViT(**TINY), tmp_path, seed=1)
    model, read = testbeds.load("digits_vit", tmp_path)
    assert read == log and not model.training and len(model.blocks) == 2
    written = (tmp_path / recipe.WEIGHTS).stat().st_mtime_ns
    assert trainer.fit(DigitsViT(**TINY), tmp_path, seed=1) == log
    assert (tmp_path / recipe.WEIGHTS).stat().st_mtime_ns == written
    with pytest.raises(PrunelabError, match="another finished training"):
        trainer.fit(DigitsViT(**TINY), tmp_path, seed=2)


def test_seed_matters_and_callers_are_left_alone(tmp_path, few_scenes):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    logs = [trainer.fit(DigitsViT(**TINY), tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    assert logs[0]["sha256"] != logs[1]["sha256"]
    assert torch.equal(torch.rand(3), expected)  # the caller's generator has not moved
    assert torch.get_num_threads() == 1


def test_foreign_and_broken_checkpoints_are_refused(tmp_path, few_scenes, monkeypatch):
    monkeypatch.setattr(Interrupted, "left", [3])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Interrupted(**TINY), tmp_path, seed=0)
    with pytest.raises(PrunelabError, match="another recipe"):
        trainer.fit(replace(Interrupted(**TINY), rate=1.0), tmp_path, seed=0)
    (tmp_path / trainer.CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(PrunelabError, match="to start again"):
        trainer.fit(Interrupted(**TINY), tmp_path, seed=0)


def test_bad_threads(tmp_path):
    with pytest.raises(PrunelabError, match="1 or more"):
        trainer.fit(DigitsViT(**TINY), tmp_path, threads=0)
