"""Labelled images for classification at every scale, in batches."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import inside

Transform = Callable[[Image.Image], Tensor]
SEED = 1000  # of the testbed's evaluation scenes


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB of 8 bits a channel; greys of 16 or 32 bits are scaled, which Pillow would cut off."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        whole = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0 if values.max() > 1 else 1.0
        image = Image.fromarray((values.clip(0, whole) * (255 / whole)).round().astype(np.uint8))
    return image.convert("RGB")


def read(path: Path, transform: Transform) -> Tensor:
    """One image file, decoded and transformed to [C, H, W]."""
    try:
        with Image.open(path) as image:
            return transform(rgb(image))
    except FileNotFoundError:
        raise PrunelabError(f"the image {path} does not exist") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        raise PrunelabError(
            f"the image {path} cannot be decoded; give a PNG or JPEG file that opens elsewhere"
        ) from None


def batches(
    identity: Mapping[str, Any], config: Mapping[str, Any], transform: Transform | None, samples: int | None, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [B, C, H, W], labels [B]) of the first `samples` images of a catalogue entry (None: all), in order."""
    loader = identity["loader"]
    if loader == "digit_scenes":
        from prunelab.common.data import digits

        assert samples is not None, "scenes have no end; configs/datasets.yaml says how many"
        images, labels = digits.scenes("test", samples, SEED)
        yield from zip(images.split(batch), labels.split(batch), strict=True)
        return
    assert transform is not None
    if loader == "cifar10":
        pictures, names = _cifar10(identity, config, "test")
        count = len(pictures) if samples is None else min(samples, len(pictures))
        for start in range(0, count, batch):
            end = min(start + batch, count)
            yield torch.stack([transform(_jpeg(p)) for p in pictures[start:end]]), torch.tensor(names[start:end])
        return
    found = files(identity, config)[:samples]
    for start in range(0, len(found), batch):
        part = found[start : start + batch]
        yield torch.stack([read(path, transform) for path, _ in part]), torch.tensor([label for _, label in part])


def files(identity: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[Path, int]]:
    """The image files of a catalogue entry of ImageNet with their labels, in order."""
    return {"imagenet_sample": _sample, "imagenet_folder": _folder}[identity["loader"]](identity, config)


def drawn(
    identity: Mapping[str, Any], config: Mapping[str, Any], transform: Transform | None, count: int, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """A calibration set: `count` training images [C, H, W] of a catalogue entry with their labels, drawn without
    repetition."""
    if identity["loader"] != "cifar10":
        raise PrunelabError(f"{identity['loader']} has no training images; calibrate on another data set")
    assert transform is not None
    pictures, labels = _cifar10(identity, config, "train")
    if count > len(pictures):
        raise PrunelabError(f"there are {len(pictures)} training images, not {count}; ask for fewer")
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]
    return [(transform(_jpeg(pictures[i])), torch.tensor(labels[i])) for i in chosen.tolist()]


def _cifar10(identity: Mapping[str, Any], config: Mapping[str, Any], split: str) -> tuple[list[bytes], list[int]]:
    """The JPEG files of a split, and their labels."""
    path = inside(inside(Path(config["assets"]), identity["folder"]), identity[split])
    try:
        with np.load(path, allow_pickle=False) as stored:
            data, at, labels = stored["jpeg"].tobytes(), stored["offsets"].tolist(), stored["label"].tolist()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PrunelabError(f"{path} cannot be read ({error}); fetch the assets folder again") from None
    return [data[a:b] for a, b in pairwise(at)], labels


def _jpeg(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def _sample(identity: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[Path, int]]:
    folder = Path(config["assets"]) / identity["folder"]
    with (folder / "labels.csv").open(newline="") as file:
        return [(inside(folder / "images", r["file"]), int(r["label"])) for r in csv.DictReader(file)]


def _folder(identity: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[Path, int]]:
    root = Path(config[identity["setting"]])
    classes = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if len(classes) != 1000:
        raise PrunelabError(
            f"{root} must hold one folder for each of the 1000 ImageNet classes; it holds {len(classes)}"
        )
    return [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]
