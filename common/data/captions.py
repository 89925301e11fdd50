"""Captions of images, for text-to-image models: of handwritten digits for the testbed, of COCO at paper scale, and
lines of a file of the user's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import inside
from prunelab.common.data import digits

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = ("a {}", "the digit {}", "a handwritten {}", "number {} drawn by hand", "a picture of the digit {}")
PAD, START, END = "<pad>", "<start>", "<end>"
WORDS = (PAD, START, END, *sorted({w for form in FORMS for w in form.replace("{}", "").split()}), *NUMBERS)
LENGTH = 8  # tokens of a caption of a digit
LINES = "captions.txt"


class Captioned(NamedTuple):
    """A text, and what it is of: the path of an image, or a digit."""

    text: str
    of: Any


def encoded(texts: Sequence[str]) -> Tensor:
    """Token ids [N, 8] of captions of digits."""
    rows = []
    for text in texts:
        unknown = [word for word in text.split() if word not in WORDS]
        if unknown:
            raise PrunelabError(f"captions of digits do not hold '{unknown[0]}'; they are such as '{FORMS[1]}'")
        words = [START, *text.split()[: LENGTH - 2], END]
        rows.append([WORDS.index(word) for word in words] + [0] * (LENGTH - len(words)))
    return torch.tensor(rows)


def of_digits(labels: Tensor, generator: torch.Generator) -> list[Captioned]:
    """A caption of each digit [N], in one of a few forms."""
    forms = torch.randint(len(FORMS), (len(labels),), generator=generator).tolist()
    return [Captioned(FORMS[f].format(NUMBERS[n]), n) for f, n in zip(forms, labels.tolist(), strict=True)]


def drawn(identity: Mapping[str, Any], config: Mapping[str, Any], count: int, seed: int) -> list[Captioned]:
    """`count` captions of a catalogue entry: of digits with labels in turn, of COCO one of each image, drawn without
    repetition, of a file of the user's its first lines."""
    loader = identity["loader"]
    if loader == "digit_captions":
        return of_digits(torch.arange(count) % len(NUMBERS), torch.Generator().manual_seed(seed))
    if loader == "caption_lines":
        return _lines(Path(config[identity["setting"]]) / LINES, count)
    if loader == "coco_captions":
        return _coco(Path(config[identity["setting"]]), identity, count, seed)
    raise PrunelabError(f"{loader} holds no captions; use coco_captions")


def _lines(path: Path, count: int) -> list[Captioned]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
    except OSError:
        raise PrunelabError(f"{path} cannot be read; write one caption a line") from None
    if len(lines) < count:
        raise PrunelabError(f"{path} holds {len(lines)} captions, and {count} are wanted")
    return [Captioned(line, None) for line in lines[:count]]


def _coco(folder: Path, identity: Mapping[str, Any], count: int, seed: int) -> list[Captioned]:
    """Images drawn as the authors of the Stable Diffusion study did: by NumPy's choice among those with a caption, in
    the order in which the annotations first name them; the first caption of each."""
    path = inside(folder, identity["annotations"])
    try:
        content = json.loads(path.read_text(encoding="utf8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        first: dict[int, str] = {}
        for note in content["annotations"]:
            first.setdefault(note["image_id"], note["caption"])
    except (OSError, ValueError, KeyError, TypeError):
        raise PrunelabError(
            f"{path} holds no captions in COCO's format; give COCO's folder (--config coco=DIR)"
        ) from None
    if count > len(first):
        raise PrunelabError(f"{path} has {len(first)} images with captions, and {count} are wanted")
    names = list(first)
    chosen = np.random.RandomState(seed).choice(len(names), count, replace=False)
    images = inside(folder, identity["images"])
    return [Captioned(first[names[i]], inside(images, files[names[i]])) for i in chosen.tolist()]


def real_digits() -> tuple[Tensor, Tensor]:
    """Real digits [n, 1, 8, 8] from -1 to 1 and their labels [n], of which no model has seen one."""
    images, labels = digits.digits("test")
    return 2 * images.unsqueeze(1) - 1, labels
