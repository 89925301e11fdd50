"""A token pruner on an image or a video that a language model is asked about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from prunelab.common import testbeds
from prunelab.common.cli.app import console
from prunelab.common.cli.apply import deliver
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.data import digits, images, questions, videos
from prunelab.common.data.pictures import CELL, FRAME, FRAMES, PICTURE
from prunelab.common.drawing import sheets
from prunelab.common.drawing.sheets import WHOLE, Panel
from prunelab.common.models import loading
from prunelab.common.tokens.inspection import Inspection, Query, inspect
from prunelab.common.tokens.role import TokenPruner

WORDS = 64  # of an answer, at most
LARGE, SMALL, COLUMNS = 190.0, 90.0, 8  # sides of a panel where there are few or many, panels a row
TESTBEDS = ("digits_qa", "digits_video_qa")  # for an image, for a video
EXAMPLES: Mapping[questions.Kind, str] = {
    "picture": "how many digits are there ?",
    "video": "which digit is seen first ?",
}
GENERAL = "What is shown?"


def answers(name: str) -> bool:
    """Whether a model's name is that of a testbed that answers questions, or a folder of a language model."""
    if kind_of(name) is not None:
        return True
    try:
        return "model_type" in json.loads((Path(name) / "config.json").read_text(encoding="utf-8")) if name else False
    except (OSError, ValueError):
        return False


def kind_of(name: str) -> questions.Kind | None:
    """What a testbed answers questions about."""
    kind: questions.Kind | None = getattr(testbeds.testbeds().get(name), "kind", None)
    return kind


def run(
    method: Method,
    file: Path,
    budget: Budget,
    out: Path,
    name: str,
    question: str,
    frames: int,
    config: Mapping[str, Any],
) -> None:
    """Print both answers and every frame's tokens, and draw them at `out`. `frames` are taken of a video."""
    assert isinstance(method, TokenPruner)
    shown = read(file, frames)
    name = name or TESTBEDS[len(shown) > 1]
    kind = kind_of(name)
    if kind is None and not answers(name):
        what = "no questions" if question else "no questions about videos" if len(shown) > 1 else "no questions"
        raise PrunelabError(
            f"{name} answers {what}; use --model {TESTBEDS[len(shown) > 1]} or a folder of an image or video language"
            " model, or leave --question out"
        )
    if kind == "video":
        shown = read(file, FRAMES)
    question = question.strip() or (EXAMPLES[kind] if kind else GENERAL)
    if kind:
        testbed_question(kind, shown, question)  # its mistakes are told before weights are read
    model, processor = loading.vision_language({"testbed": name} if kind else {"folder": name}, config)
    query = testbed_question(kind, shown, question) if kind else processed(processor, model, shown, question)
    result = inspect(model, query, method, budget, counted=True)
    lines = [question, f"unpruned: {result.dense}", f"{method.name} at {budget}: {result.pruned}"]
    if kind:
        lines.append(f"{name} is a toy of ours that knows drawn digits alone: of anything else it says nothing.")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    console.print(str(result.report))
    if len(result.tokens) > 1:
        for stage in result.stages:
            each = " ".join(sheets.amount(n) for n in stage.tokens)
            console.print(f"tokens of each frame or crop {stage.name}: {each}", soft_wrap=True)
    pictures = panels(query, processor, shown, len(result.tokens))
    drawn = sheets.standalone(drawing(pictures, result, lines, f"What {method.name} leaves of {file.name}"))
    console.print(deliver(out, drawn, "picture"), soft_wrap=True)
    console.print("paler patches have less left, blue ones more than they had")


# -- files -----------------------------------------------------------------------------------------------------------


def read(file: Path, count: int) -> NDArray[np.uint8]:
    """An image as one frame, or `count` frames of a video, moving GIFs included: [T, H, W, 3] in RGB."""
    try:
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) == 1:
                return np.asarray(images.rgb(ImageOps.exif_transpose(image)))[None]
    except UnidentifiedImageError:
        pass  # no image: a video, or neither
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PrunelabError(f"the image {file} cannot be read ({error}); give another") from None
    return videos.frames(file, count)


# -- prompts ---------------------------------------------------------------------------------------------------------


def testbed_question(kind: questions.Kind, shown: NDArray[np.uint8], question: str) -> Query:
    """A question to a testbed, with the picture or video brought to the size it was trained at."""
    if (kind == "picture") != (len(shown) == 1):
        what, other = ("a single image", "digits_video_qa") if kind == "picture" else ("a video", "digits_qa")
        raise PrunelabError(f"this testbed is asked about {what}; give one, or use --model {other}")
    side, count = (PICTURE * CELL, 1) if kind == "picture" else (FRAME * CELL, FRAMES)
    indices = np.linspace(0, len(shown) - 1, count).astype(int)  # a short video repeats frames
    small = [np.asarray(Image.fromarray(shown[i]).resize((side, side))) for i in indices]
    pixels = (torch.from_numpy(np.stack(small)).movedim(-1, 1) / 255 - digits.SHIFT) / digits.SCALE
    tokens = questions.prompt(kind, questions.encoded(question)).unsqueeze(0)
    name = "pixel_values" if kind == "picture" else "pixel_values_videos"
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    given[name] = pixels if kind == "picture" else pixels.unsqueeze(0)
    return Query(given, lambda new: " ".join(questions.WORDS[token] for token in new.tolist()), words=1)


def processed(processor: Any, model: Any, shown: NDArray[np.uint8], question: str) -> Query:
    """A question to a model with its own processor and chat template."""
    if getattr(processor, "chat_template", None) is None:
        raise PrunelabError("the model's processor has no chat template; use a folder that has one")
    moving = len(shown) > 1
    if moving and getattr(processor, "video_processor", None) is None:
        raise PrunelabError("this model reads no videos; give a single image, or a model that does")
    content = [{"type": "video" if moving else "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if moving:
        given = processor(text=[text], videos=[shown], do_sample_frames=False, return_tensors="pt")
    else:
        given = processor(text=[text], images=[Image.fromarray(shown[0])], return_tensors="pt")
    tensors = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in given.items()
        if torch.is_tensor(value)
    }
    return Query(tensors, lambda new: str(processor.decode(new, skip_special_tokens=True)), WORDS)


# -- pictures --------------------------------------------------------------------------------------------------------


def drawing(pictures: Sequence[Image.Image], results: Inspection, lines: Sequence[str], title: str) -> str:
    """The frames with their tokens, and what is left of each behind every site."""
    photos, many = [sheets.photo(picture) for picture in pictures], len(pictures) > 1
    bands = [
        (
            f"unpruned: {sheets.amount(sum(results.tokens))} tokens",
            [Panel(image, sheets.amount(n) if many else "") for image, n in zip(photos, results.tokens, strict=True)],
        )
    ]
    for stage in results.stages:
        panels = []
        for image, share, left, full in zip(photos, stage.shares, stage.tokens, results.tokens, strict=True):
            shares = bytes((WHOLE * share).round().clamp(0, 255).to(torch.uint8).flatten().tolist())
            grid = (int(share.shape[0]), int(share.shape[1]))
            caption = f"{sheets.amount(left)} of {sheets.amount(full)}" if many else ""
            panels.append(Panel(image, caption, grid, shares))
        bands.append((f"{stage.name}: {sheets.amount(sum(stage.tokens))} tokens", panels))
    width, height = pictures[0].size
    side = SMALL if len(pictures) > 2 else LARGE
    return sheets.sheet(bands, title, side=side, ratio=width / height, columns=COLUMNS, lines=lines, least=2 * LARGE)


def panels(query: Query, processor: Any, shown: NDArray[np.uint8], count: int) -> Sequence[Image.Image]:
    """The `count` frames or crops as the model was given them; where it cuts patches by itself, the user's own."""
    name = "pixel_values_videos" if query.modality == "video" else "pixel_values"
    pixels = query.inputs[name]
    if pixels.dim() < 4:
        indices = np.linspace(0, len(shown) - 1, count).astype(int)
        return [Image.fromarray(shown[i]) for i in indices]
    pixels = pixels[0] if pixels.dim() == 5 else pixels
    return [Image.fromarray(frame.numpy()) for frame in coloured(pixels[:count].float(), processor, query.modality)]


def coloured(pixels: Tensor, processor: Any, modality: str) -> Tensor:
    """Normalised pixels [T, 3, H, W] as [T, H, W, 3] uint8."""
    of = getattr(processor, f"{modality}_processor", None)
    mean = torch.tensor(getattr(of, "image_mean", None) or [digits.SHIFT] * 3).view(3, 1, 1)
    spread = torch.tensor(getattr(of, "image_std", None) or [digits.SCALE] * 3).view(3, 1, 1)
    return (255 * (pixels * spread + mean).clamp(0, 1)).round().byte().movedim(1, -1)
