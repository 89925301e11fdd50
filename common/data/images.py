"""Labelled images for classification at every scale, in batches."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.errors import PrunelabError

Transform = Callable[[Image.Image], Tensor]
SEED = 1000  # of the testbed's evaluation scenes


def read(path: Path, transform: Transform) -> Tensor:
    """One image file, decoded and transformed to [C, H, W]."""
    try:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))
    except FileNotFoundError:
        raise PrunelabError(f"the image {path} does not exist") from None
    except (UnidentifiedImageError, OSError):
        raise PrunelabError(
            f"the image {path} cannot be decoded; give a PNG or JPEG file that opens elsewhere"
        ) from None


def batches(
    identity: Mapping[str, Any], config: Mapping[str, Any], transform: Transform | None, samples: int | None, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [B, C, H, W], labels [B]) of the first `samples` images of a catalogue entry (None: all), in order."""
    loader = identity["loader"]
    if loader == "digit_scenes":
        from common.data import digits

        assert samples is not None, "scenes have no end; configs/datasets.yaml says how many"
        images, labels = digits.scenes("test", samples, SEED)
        yield from zip(images.split(batch), labels.split(batch), strict=True)
        return
    assert transform is not None
    files = {"imagenet_sample": _sample, "imagenet_folder": _folder}[loader](identity, config)[:samples]
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        yield torch.stack([read(path, transform) for path, _ in part]), torch.tensor([label for _, label in part])


def _sample(identity: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[Path, int]]:
    folder = Path(config["assets"]) / identity["folder"]
    with (folder / "labels.csv").open(newline="") as file:
        return [(folder / "images" / r["file"], int(r["label"])) for r in csv.DictReader(file)]


def _folder(identity: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[Path, int]]:
    root = Path(config[identity["setting"]])
    classes = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if len(classes) != 1000:
        raise PrunelabError(
            f"{root} must hold one folder for each of the 1000 ImageNet classes; it holds {len(classes)}"
        )
    return [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]
