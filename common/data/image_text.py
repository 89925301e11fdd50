"""Images with texts as BLIP's authors annotate them: Flickr30k to find the one by the other, COCO in Karpathy's splits
to write captions, NLVR2 to judge sentences about two pictures. Also ImageNet's names, for models that read both."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import inside
from prunelab.common.data import captions, images

Kind = Literal["retrieval", "captions", "pairs", "classes"]
WORDS: Mapping[str, int] = {"retrieval": 30, "captions": 30, "pairs": 40}  # of a text, at most
PROMPTS = (  # of a class's name, seven of those that CLIP's authors published
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.",
)  # fmt: skip
DROPPED = '.!"()*#:;~'  # marks that texts lose


@dataclass(frozen=True)
class Example:
    """One picture, or two, with texts: of `retrieval` and `captions` all that go with it, of a training set one; of
    `pairs` a sentence and whether it is true, of `classes` none and the number of the class. of: which picture it is,
    where several examples show one."""

    pictures: tuple[Path, ...]
    texts: tuple[str, ...]
    label: int = 0
    of: int = 0


def kind(identity: Mapping[str, Any]) -> Kind:
    """What is asked of a model on a catalogue entry."""
    if identity["loader"] in ("imagenet_folder", "imagenet_sample"):
        return "classes"
    named: Kind | None = identity.get("kind") if identity["loader"] == "image_text" else None
    if named is None:
        raise PrunelabError(f"{identity['loader']} holds no images with texts to be scored on")
    return named


def plain(text: str, words: int) -> str:
    """A text in small letters without most marks, at most so many words long."""
    bare = re.sub(r"\s{2,}", " ", re.sub(f"[{re.escape(DROPPED)}]", " ", text.lower())).strip()
    return " ".join(bare.split(" ")[:words])


def load(identity: Mapping[str, Any], config: Mapping[str, Any], split: Literal["train", "test"]) -> list[Example]:
    """The examples of a catalogue entry, in its order."""
    if kind(identity) == "classes":
        return [Example((path,), (), label) for path, label in images.files(identity, config)]
    folder = Path(config[identity["setting"]])
    path, pictures = inside(folder, identity[split]), inside(folder, identity["images"])
    what, seen = kind(identity), dict[str, int]()
    try:
        rows = json.loads(path.read_text(encoding="utf8"))
        results = []
        for row in rows:
            named = row["images"] if what == "pairs" else [row["image"]]
            given = row["sentence"] if what == "pairs" else row["caption"]
            texts = (given,) if isinstance(given, str) else tuple(given)
            truth = {"True": 1, "False": 0}[row["label"]] if what == "pairs" else 0
            number = seen.setdefault(named[0], len(seen))
            results.append(Example(tuple(inside(pictures, name) for name in named), texts, truth, number))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrunelabError(
            f"{path} holds no annotations in BLIP's form ({type(error).__name__}: {error}); see its repository, which"
            f" says where they are (--config {identity['setting']}=DIR)"
        ) from None
    if not results or any(len(e.pictures) != (2 if what == "pairs" else 1) or not e.texts for e in results):
        raise PrunelabError(f"{path} holds rows without a text or with another number of pictures; download it again")
    return results


def drawn(identity: Mapping[str, Any], config: Mapping[str, Any], count: int, seed: int) -> list[Example]:
    """A calibration set: examples of the training split, drawn without repetition, no two of one picture."""
    if identity["loader"] == "coco_captions":
        return [Example((c.of,), (c.text,), of=i) for i, c in enumerate(captions.drawn(identity, config, count, seed))]
    if kind(identity) == "classes":
        raise PrunelabError("names of classes are no texts to calibrate with; name a `calibration_data` of captions")
    results: dict[int, Example] = {}
    examples = load(identity, config, "train")
    for i in torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(results) == count:
            break
        results.setdefault(examples[i].of, examples[i])
    if len(results) < count:
        raise PrunelabError(f"there are {len(results)} training pictures, not {count}; ask for fewer")
    return list(results.values())


def class_names() -> Sequence[str]:
    """ImageNet's classes in words, the first of each that WordNet has."""
    from timm.data import ImageNetInfo

    return [text.split(",")[0] for text in ImageNetInfo("imagenet1k").label_descriptions()]
