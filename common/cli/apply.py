"""`apply`: a method on an image, a video or a text of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunelab.common.catalogue import lookup
from prunelab.common.cli.app import Options, Settings, app, console, settings


@app.command()
def apply(
    method: str,
    file: Annotated[Path, typer.Argument(help="an image, a video (MP4, WebM, GIF ...) or a text file of your own")],
    budget: Annotated[
        str, typer.Argument(help="0.7 or 0.9,0.8,0.7 for an image; 3count, 100words or 665bytes for a text")
    ],
    out: Annotated[Path | None, typer.Option(help="where the picture goes; default: beside the file")] = None,
    model: Annotated[
        str, typer.Option(help="a testbed, an assets checkpoint, a timm model, or a folder in the hub's layout")
    ] = "digits_vit",
    question: Annotated[str, typer.Option(help="what to ask an image or video language model")] = "",
    frames: Annotated[int, typer.Option(help="taken of a video, at even distances")] = 16,
    weights: Annotated[Path | None, typer.Option(help="safetensors file for the model")] = None,
    options: Options = None,
    config: Settings = None,
) -> None:
    """Apply a method to an image, a video or a text of your own and see what it keeps."""
    from prunelab.common.cli import demo

    values = settings(config)
    demo.run(method, file, budget, out, model, weights, question, frames, lookup.pairs(options or []), values, console)
