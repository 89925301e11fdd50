"""Ask an image or video language model about one's own image or video, and see what pruning leaves of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from torch import Tensor

from prunelab.common import testbeds
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits, questions, videos
from prunelab.common.data.pictures import CELL, FRAME, FRAMES, PICTURE
from prunelab.common.drawing import contact_sheet
from prunelab.common.models import loading
from prunelab.common.tokens.inspection import Asked, look
from prunelab.common.tokens.role import TokenPruner

WORDS = 64  # of an answer, at most


def answers(name: str) -> bool:
    """Whether a model's name is that of a testbed that answers questions, or a folder in the hub's layout."""
    return kind_of(name) is not None or (Path(name) / "config.json").is_file()


def kind_of(name: str) -> questions.Kind | None:
    """What a testbed answers questions about."""
    kind: questions.Kind | None = getattr(testbeds.testbeds().get(name), "kind", None)
    return kind


def run(
    method: TokenPruner,
    file: Path,
    budget: Budget,
    out: Path,
    name: str,
    question: str,
    frames: int,
    config: Mapping[str, Any],
    console: Console,
) -> None:
    """Print both answers and every frame's tokens, and draw a contact sheet at `out`. `frames` are taken of a video."""
    if not question.strip():
        raise PrunelabError(f"{name} answers questions; add --question '...'")
    kind = kind_of(name)
    shown = read(file, FRAMES if kind else frames)
    if kind:
        testbed_question(kind, shown, question)  # its mistakes are told before weights are read
    model, processor = loading.vision_language({"testbed": name} if kind else {"folder": name}, config)
    asked = testbed_question(kind, shown, question) if kind else processed(processor, model, shown, question)
    found = look(model, asked, method, budget, counted=True)
    lines = [
        question,
        f"unpruned: {found.dense}",
        f"{method.name} at {budget}: {found.pruned}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    console.print(str(found.report), highlight=False)
    if len(found.tokens) > 1:
        for stage in found.stages:
            each = " ".join(contact_sheet.amount(n) for n in stage.tokens)
            console.print(f"tokens of each frame or crop {stage.name}: {each}", highlight=False)
    pictures = panels(asked, processor, shown, len(found.tokens))
    contact_sheet.draw(pictures, found.tokens, found.stages, lines).save(out)
    console.print(f"picture: {out} (paler patches have less left, blue ones more than they had)", highlight=False)


# -- files -----------------------------------------------------------------------------------------------------------


def read(file: Path, count: int) -> NDArray[np.uint8]:
    """An image as one frame, or `count` frames of a video, moving GIFs included: [T, H, W, 3] in RGB."""
    try:
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) == 1:
                return np.asarray(image.convert("RGB"))[None]
    except UnidentifiedImageError:
        pass  # no image: a video, or neither
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PrunelabError(f"the image {file} cannot be read ({error}); give another") from None
    return videos.frames(file, count)


# -- prompts ---------------------------------------------------------------------------------------------------------


def testbed_question(kind: questions.Kind, shown: NDArray[np.uint8], question: str) -> Asked:
    """A question to a testbed, with the picture or video brought to the size it was trained at."""
    if (kind == "picture") != (len(shown) == 1):
        what, other = ("a single image", "digits_video_qa") if kind == "picture" else ("a video", "digits_qa")
        raise PrunelabError(f"this testbed is asked about {what}; give one, or use --model {other}")
    side, count = (PICTURE * CELL, 1) if kind == "picture" else (FRAME * CELL, FRAMES)
    places = np.linspace(0, len(shown) - 1, count).astype(int)  # a short video repeats frames
    small = [np.asarray(Image.fromarray(shown[i]).resize((side, side))) for i in places]
    pixels = (torch.from_numpy(np.stack(small)).movedim(-1, 1) / 255 - digits.SHIFT) / digits.SCALE
    tokens = questions.prompt(kind, questions.encoded(question)).unsqueeze(0)
    name = "pixel_values" if kind == "picture" else "pixel_values_videos"
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    given[name] = pixels if kind == "picture" else pixels.unsqueeze(0)
    return Asked(given, lambda new: " ".join(questions.WORDS[token] for token in new.tolist()), words=1)


def processed(processor: Any, model: Any, shown: NDArray[np.uint8], question: str) -> Asked:
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
    return Asked(tensors, lambda new: str(processor.decode(new, skip_special_tokens=True)), WORDS)


# -- pictures --------------------------------------------------------------------------------------------------------


def panels(asked: Asked, processor: Any, shown: NDArray[np.uint8], count: int) -> Sequence[Image.Image]:
    """The `count` frames or crops as the model was given them; where it cuts patches by itself, the user's own."""
    name = "pixel_values_videos" if asked.modality == "video" else "pixel_values"
    pixels = asked.given[name]
    if pixels.dim() < 4:
        places = np.linspace(0, len(shown) - 1, count).astype(int)
        return [Image.fromarray(shown[i]) for i in places]
    pixels = pixels[0] if pixels.dim() == 5 else pixels
    return [Image.fromarray(frame.numpy()) for frame in coloured(pixels[:count].float(), processor, asked.modality)]


def coloured(pixels: Tensor, processor: Any, modality: str) -> Tensor:
    """Normalised pixels [T, 3, H, W] as [T, H, W, 3] uint8."""
    of = getattr(processor, f"{modality}_processor", None)
    mean = torch.tensor(getattr(of, "image_mean", None) or [digits.SHIFT] * 3).view(3, 1, 1)
    spread = torch.tensor(getattr(of, "image_std", None) or [digits.SCALE] * 3).view(3, 1, 1)
    return (255 * (pixels * spread + mean).clamp(0, 1)).round().byte().movedim(1, -1)
