"""`apply`: a method on an image, a video or a text of one's own, by the kind of the file and the method's role."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunelab.common.catalogue import lookup
from prunelab.common.cli.app import Options, Settings, app, settings
from prunelab.common.core import files, index, registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError

Kind = Literal["picture", "video", "text"]

OF_TEXTS = ("ranker", "cache_pruner", "draft_decoder", "expert_pruner")  # roles; token pruners work on all three
PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")  # first bytes; others name a brand further on
VIDEOS = (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"FLV")


@app.command()
def apply(
    method: str,
    file: Annotated[Path, typer.Argument(help="an image, a video (MP4, WebM, GIF ...) or a text file of your own")],
    budget: Annotated[
        str, typer.Argument(help="0.7 or 0.9,0.8,0.7 for an image; 3count, 100words or 665bytes for a text")
    ],
    out: Annotated[
        Path | None, typer.Option(help="where the picture (SVG) or summary goes; pictures: else the working folder")
    ] = None,
    model: Annotated[
        str, typer.Option(help="a testbed, an assets checkpoint, timm/<name> of the hub's cache, or a folder")
    ] = "",
    question: Annotated[str, typer.Option(help="what to ask an image or video language model")] = "",
    frames: Annotated[int, typer.Option(help="taken of a video, at even distances")] = 16,
    weights: Annotated[Path | None, typer.Option(help="safetensors file for a timm model")] = None,
    options: Options = None,
    config: Settings = None,
) -> None:
    """Apply a method to an image, a video or a text of your own and see what it keeps."""
    # Whatever can be told without libraries is told before they load, which takes seconds.
    entry, limit = registry.entry(method), Budget.parse(budget)
    given, values = lookup.pairs(options or []), settings(config)
    registry.fit(entry, given)
    kind = kind_of(file)
    _refuse(entry, kind, file)
    if out is not None and out.resolve() == file.resolve():
        raise PrunelabError(f"--out names the file {file} itself; give another")
    if weights is not None and not weights.is_file():
        raise PrunelabError(f"the weights file {weights} does not exist")
    if model and "/" in model and not model.startswith("timm/") and not Path(model).is_dir():
        raise PrunelabError(f"the folder {model} does not exist; give --model a folder in the hub's layout")
    if entry.role == "ranker":
        from prunelab.common.cli import texts

        texts.run(registry.create(method, **given), file, limit, out)
        return
    if kind == "text":
        from prunelab.common.cli import prompts

        prompts.run(registry.create(method, **given), file, limit, out, model, values)
        return
    picture = _picture(out, file, method)
    chosen: Any = registry.create(method, **given)
    from prunelab.common.cli import images, questions

    answering = kind == "video" or bool(question) or questions.answers(model)
    if not model and not weights:
        testbed = questions.TESTBEDS[kind == "video"]
        answering = images.reader(chosen, (testbed,) if answering else (*images.CLASSIFIERS, testbed)) == testbed
    if answering:
        questions.run(chosen, file, limit, picture, model, question, frames, values)
    else:
        images.run(chosen, file, limit, picture, model, weights, values)


def kind_of(file: Path) -> Kind:
    """What a file holds, by its first bytes. Raises PrunelabError where it is not there or none of the three."""
    if not file.exists():
        raise PrunelabError(f"the file {file} does not exist; give an image, a video or a text file")
    if not file.is_file():
        raise PrunelabError(f"{file} is no file; give an image, a video or a text file")
    try:
        with file.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise PrunelabError(f"the file {file} cannot be read ({error.strerror}); give another") from None
    brand = head[8:12]
    if head.startswith(b"GIF8"):
        return "video" if b"NETSCAPE2.0" in head else "picture"
    if head.startswith(PICTURES) or brand in (b"WEBP", b"avif", b"heic"):
        return "picture"
    if head.startswith(VIDEOS) or head[4:8] == b"ftyp" or brand == b"AVI ":
        return "video"
    guess = str(mimetypes.guess_type(file.name)[0]).partition("/")[0]  # a damaged picture is told as one
    return "picture" if guess == "image" else "video" if guess == "video" else "text"


def _refuse(entry: index.Entry, kind: Kind, file: Path) -> None:
    """Say what a role works on, where it is not what the file holds."""
    if entry.role in OF_TEXTS and kind != "text":
        what = "ranks sentences" if entry.role == "ranker" else "works while a language model writes"
        raise PrunelabError(
            f"{entry.name} {what}: give a text file, not the {kind} {file}, or a method for pictures and videos"
            " (python -m prunelab list --role token_pruner)"
        )
    if entry.role not in (*OF_TEXTS, "token_pruner"):
        call = f'prunelab.prune("{entry.name}", model, budget, token_ids)' if entry.role == "weight_pruner" else "code"
        raise PrunelabError(
            f"{entry.name} is a {entry.role}, which no file shows; use {call}, see methods/{entry.slug}/README.md"
        )


def _picture(out: Path | None, file: Path, method: str) -> Path:
    """Where the picture goes: into the working folder unless told otherwise, never beside the user's file."""
    name = f"{file.stem}.{method}.svg"
    path = Path(name) if out is None else out / name if out.is_dir() else out
    if path.suffix.lower() != ".svg":
        raise PrunelabError(f"the picture is an SVG file; give --out {path.with_suffix('.svg')}")
    return path


def deliver(path: Path, content: str, what: str) -> str:
    """Write what a command made; the line that says where it is."""
    files.write_text(path, content, "give another --out")
    return f"{what}: {path}"
