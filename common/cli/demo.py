"""Apply a method to one's own image or text and see what it keeps (`python -m prunelab apply`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.cli import demo_questions
from prunelab.common.core import files, registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import images
from prunelab.common.models import loading
from prunelab.common.ranking.sentences import Passage, SentenceRanker
from prunelab.common.tokens.role import TokenPruner

TILE = 224  # pixels a panel of the picture


def run(
    method: str,
    file: Path,
    budget: str,
    out: Path | None,
    model: str,
    weights: Path | None,
    question: str,
    frames: int,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    console: Console,
) -> None:
    """Dispatch by role and model; prints the outcome and writes a picture or a text beside the file (or at `out`)."""
    chosen, limit = registry.create(method, **options), Budget.parse(budget)
    if not file.is_file():
        raise PrunelabError(f"the file {file} does not exist; give an image, a video or a text file")
    if isinstance(chosen, SentenceRanker):
        _text(chosen, file, limit, out, console)
    elif isinstance(chosen, TokenPruner):
        picture = out or file.with_suffix(".pruned.png")
        if demo_questions.answers(model):
            demo_questions.run(chosen, file, limit, picture, model, question, frames, config, console)
            return
        if question:
            raise PrunelabError(
                f"{model} answers no questions; use --model digits_qa, digits_video_qa or a folder of an image or video"
                " language model, or leave --question out"
            )
        _image(chosen, file, limit, picture, model, weights, config, console)
    else:
        raise PrunelabError(f"{method} is a {chosen.role}: it needs a model in code, see the README of its folder")


def _text(method: SentenceRanker, file: Path, budget: Budget, out: Path | None, console: Console) -> None:
    from prunelab.common.ranking import text

    try:
        sentences = text.sentences(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise PrunelabError(f"{file} is not UTF-8 text; convert it first") from None
    if not sentences:
        raise PrunelabError(f"{file} holds no sentence; give a text with at least one")
    passage = Passage(tuple(sentences))
    kept = set(method.plan(passage, budget).reduce.index[0].tolist())  # type: ignore[union-attr]
    scores = method.rank(passage)
    for i, sentence in enumerate(sentences):
        mark = "[bold]>[/bold]" if i in kept else " "
        console.print(f"{mark} {float(scores[i]):8.4f}  ", end="")
        console.print(sentence, style="bold" if i in kept else "dim", markup=False, highlight=False)
    console.print(f"{len(kept)} of {len(sentences)} sentences kept under a budget of {budget}")
    if out is not None:
        files.write_text(out, "\n".join(sentences[i] for i in sorted(kept)) + "\n")
        console.print(f"summary: {out}")


def _image(
    method: TokenPruner,
    file: Path,
    budget: Budget,
    out: Path,
    name: str,
    weights: Path | None,
    config: Mapping[str, Any],
    console: Console,
) -> None:
    model, transform = loading.named(name, weights, config)
    x = images.read(file, transform).unsqueeze(0)
    with torch.inference_mode():
        dense = model(x).softmax(-1)
        with apply(method, model, budget) as handle:
            pruned = model(x).softmax(-1)
            report, kept, info = handle.report(), handle.kept(), handle.adapter.info
    before, after = int(dense.argmax()), int(pruned.argmax())
    console.print(f"model {name}: class {before} ({100 * float(dense.max()):.1f} %) without pruning,", highlight=False)
    console.print(
        f"class {after} ({100 * float(pruned[0, after]):.1f} %) with {method.name} at {budget}", highlight=False
    )
    console.print(str(report), highlight=False)
    if not kept:
        console.print("tokens were merged, so there is no picture of tokens kept")
        return
    assert info.grid is not None
    panels = [_panel(x[0], info.grid, None)]
    panels += [_panel(x[0], info.grid, set(info.patches(places[0]).tolist())) for _, places in kept]
    picture = Image.new("RGB", (len(panels) * (TILE + 8) - 8, TILE), "white")
    for i, panel in enumerate(panels):
        picture.paste(panel, (i * (TILE + 8), 0))
    picture.save(out)
    console.print(f"picture: {out} (the image, then what is left behind each of {len(kept)} pruning layers)")


def _panel(x: Tensor, grid: tuple[int, ...], kept: set[int] | None) -> Image.Image:
    """An image tensor as a picture, with the patches that are not kept greyed out."""
    low, high = x.min(), x.max()
    pixels = ((x - low) / (high - low).clamp_min(1e-6) * 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB").resize((TILE, TILE))
    if kept is None:
        return image
    rows, columns = grid
    veil = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(veil)
    for place in range(rows * columns):
        if place not in kept:
            y, x0 = divmod(place, columns)
            box = (x0 * TILE // columns, y * TILE // rows, (x0 + 1) * TILE // columns - 1, (y + 1) * TILE // rows - 1)
            draw.rectangle(box, fill=215)
    return Image.composite(Image.new("RGB", image.size, (200, 200, 204)), image, veil)
