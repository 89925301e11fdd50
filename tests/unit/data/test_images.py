"""Labelled images: the layout of ImageNet folders, limits, and files that do not open."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import images, segmentation
from prunelab.common.data.segmentation import NORMS

ENTRY = {"loader": "imagenet_folder", "setting": "imagenet"}


def small(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32).view(3, 1, 1)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for label in range(1000):
        (root / f"n{label:08d}").mkdir()
        Image.new("RGB", (2, 2), (label % 256, label // 256, 0)).save(root / f"n{label:08d}" / "a.png")
    return {"imagenet": str(root)}


def test_a_folder_gives_every_image_in_class_order(imagenet):
    x, y = (torch.cat(part) for part in zip(*images.batches(ENTRY, imagenet, small, None, 300), strict=True))
    assert torch.equal(y, torch.arange(1000))
    assert torch.equal(x[:, 0, 0, 0] + 256 * x[:, 1, 0, 0], y.float())


def test_a_limit_takes_the_first(imagenet):
    assert sum(len(y) for _, y in images.batches(ENTRY, imagenet, small, 7, 5)) == 7


def test_another_layout_is_named(tmp_path):
    with pytest.raises(PrunelabError, match="one folder for each of the 1000"):
        next(images.batches(ENTRY, {"imagenet": str(tmp_path)}, small, None, 5))


def test_a_file_that_does_not_decode_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(PrunelabError, match=r"broken\.png cannot be decoded"):
        images.read(tmp_path / "broken.png", small)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_greys_of_more_than_8_bits_are_scaled(tmp_path, dtype):
    """By every reader of pictures: Pillow alone would cut everything above 255 off."""
    top = 1.0 if dtype == "float32" else 65535
    values = (np.linspace(0, top, 64).reshape(8, 8)).astype(dtype)
    Image.fromarray(values).save(tmp_path / "grey.tif")
    wanted = np.linspace(0, 255, 64).reshape(8, 8)
    with Image.open(tmp_path / "grey.tif") as picture:
        assert np.abs(np.asarray(images.rgb(picture))[..., 0] - wanted).max() <= 1
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "labels.png")
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in NORMS["imagenet"])
    pixels, _ = segmentation.read(tmp_path / "grey.tif", tmp_path / "labels.png", (8, 8), "imagenet")
    assert np.abs((pixels[0] * deviation + mean)[0].numpy() - wanted).max() <= 1.001
