"""Accuracy of a small convolutional network under weight pruners: data, network, task, and real checkpoints."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import to_tensor

from prunelab.common import weights
from prunelab.common.backbones import cifar_resnet
from prunelab.common.catalogue import lookup
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import images
from prunelab.common.experiments import planning, runner, schema
from prunelab.common.experiments.run import Run
from prunelab.common.measures import classify_weights
from prunelab.common.models import loading
from prunelab.methods.magnitude.method import Magnitude

DATA = {"loader": "cifar10", "folder": "cifar10", "test": "test.npz", "train": "train.npz"}
HERE = os.environ.get("PRUNELAB_ASSETS", "")


@pytest.fixture
def assets(tmp_path):
    """A folder with a few pictures of one colour each, whose label is the colour, and an untrained network."""
    for folder in ("cifar10", "cifar10_resnets"):
        (tmp_path / folder).mkdir()
    for split, count in (("test", 20), ("train", 30)):
        files = []
        for i in range(count):
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (25 * (i % 10), 0, 0)).save(stream, "JPEG", quality=95)
            files.append(stream.getvalue())
        np.savez(
            tmp_path / "cifar10" / f"{split}.npz",
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0, *map(len, files)]),
            label=np.arange(count, dtype=np.uint8) % 10,
        )
    torch.manual_seed(0)
    state = cifar_resnet.resnet56().state_dict()
    old = {f"module.{name}": value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "cifar10_resnets" / "resnet56.safetensors")
    return lookup.settings({"assets": str(tmp_path)})


def run(config, method=None, budget=None, **settings):
    found = planning.resolve(
        "classify_weights",
        "assets",
        config,
        schema.Configuration(method=method, budget=budget),
        model="resnet56_cifar10",
        data="cifar10",
        settings=settings,
    )
    assert isinstance(found, Run)
    return found


def test_pictures_come_whole_and_in_order(assets):
    pictures = [
        (x, y)
        for xs, ys in images.batches(DATA, assets, to_tensor, 12, 5)
        for x, y in zip(xs, ys.tolist(), strict=True)
    ]
    assert [label for _, label in pictures] == [*range(10), 0, 1]
    assert all(abs(255 * float(x[0].mean()) - 25 * y) < 3 and x.shape == (3, 32, 32) for x, y in pictures)


def test_calibration_pictures_are_drawn_from_the_training_set_alone(assets):
    drawn = images.drawn(DATA, assets, to_tensor, 30, seed=1)
    assert len(drawn) == 30 and len({float(x[0].mean()) for x, _ in drawn}) == 10
    assert len({(round(float(x[0].mean()), 2), int(y)) for x, y in drawn}) == 10, "labels go with their pictures"
    again, other = images.drawn(DATA, assets, to_tensor, 8, seed=1), images.drawn(DATA, assets, to_tensor, 8, seed=2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, again, strict=False))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(again, other, strict=True))
    with pytest.raises(PrunelabError, match="ask for fewer"):
        images.drawn(DATA, assets, to_tensor, 31)
    with pytest.raises(PrunelabError, match="no training images"):
        images.drawn({"loader": "imagenet_folder"}, assets, to_tensor, 1)


def test_arrays_that_hold_objects_or_nothing_are_refused(assets, tmp_path):
    path = tmp_path / "cifar10" / "test.npz"
    np.savez(path, jpeg=np.array([object()]), offsets=np.arange(2), label=np.arange(1))
    with pytest.raises(PrunelabError, match="cannot be read"):
        next(images.batches(DATA, assets, to_tensor, 1, 1))
    path.write_bytes(b"no archive")
    with pytest.raises(PrunelabError, match="cannot be read"):
        next(images.batches(DATA, assets, to_tensor, 1, 1))


def test_the_network_is_the_published_one():
    for model, count in ((cifar_resnet.resnet20(), 269_722), (cifar_resnet.resnet56(), 853_018)):
        assert sum(p.numel() for p in model.parameters()) == count  # akamaster/pytorch_resnet_cifar10, README
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_shortcuts_take_every_second_pixel_and_pad_channels_on_both_sides():
    block = cifar_resnet.Block(2, 4, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    found = block(x)
    assert torch.equal(found[:, 1:3], x[:, :, ::2, ::2]) and not found[:, [0, 3]].any()


def test_a_checkpoint_is_read_strictly(assets, tmp_path):
    model = cifar_resnet.resnet56()
    path = tmp_path / "cifar10_resnets" / "resnet56.safetensors"
    cifar_resnet.load_checkpoint(model, path)
    with pytest.raises(PrunelabError, match="does not hold the weights"):
        cifar_resnet.load_checkpoint(cifar_resnet.resnet20(), path)


def test_channels_within_a_block_can_leave_and_those_of_a_stage_cannot():
    from prunelab.common.weights.adapters import weight_adapter

    names = {target.name for block in [0] for target in weight_adapter(cifar_resnet.resnet20())._channels(block)}
    assert names == {f"layer{stage}.{i}.conv1" for stage in (1, 2, 3) for i in range(3)}


def test_the_task_prunes_and_measures(assets):
    dense = runner.measure(run(assets, samples=20), assets)
    pruned = runner.measure(run(assets, "wanda", "0.5", samples=20, calibration=4), assets)
    assert dense["top1"]["n"] == pruned["top1"]["n"] == 20 and 0 <= dense["top1"]["value"] <= 100
    assert "sparsity" not in dense and pruned["sparsity"]["value"] == pytest.approx(50, abs=0.1)
    assert pruned["nonzero_gparameters"]["value"] < dense["nonzero_gparameters"]["value"]
    with pytest.raises(PrunelabError, match="tome is a token_pruner"):
        runner.measure(run(assets, "tome", "4removed", samples=20), assets)


def test_the_unpruned_network_is_one_run_and_a_calibration_set_is_named(assets):
    assert run(assets).identity == run(assets, calibration=9, calibration_data="cifar10").identity
    named = run(assets, "wanda", "0.5", calibration_data="cifar10").ids
    assert named["calibration"]["train"] == "train.npz" and named["model"]["file"] == "resnet56.safetensors"


@pytest.mark.skipif(not HERE, reason="needs PRUNELAB_ASSETS, a folder with cifar10 and cifar10_resnets")
def test_a_real_network_names_real_pictures_as_it_is_known_to():
    """All 10,000 give 83.2 %; the first 300, with a standard error of 2.2, come near, and half the weights can go."""
    config = lookup.settings({"assets": HERE})
    identity = run(config)
    model, transform = loading.load(identity.ids["model"], config)
    data = list(images.batches(identity.ids["data"], config, transform, 300, 100))
    assert 76 < 100 * classify_weights.correct(model, data, torch.device("cpu")).float().mean() < 90
    weights.prune(Magnitude(), model, Budget(0.5), progress=False)
    assert 70 < 100 * classify_weights.correct(model, data, torch.device("cpu")).float().mean() < 90
