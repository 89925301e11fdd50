"""Official checkpoints, read strictly: every name and every shape must be the model's."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError

ROOTS = ("model", "state_dict")  # where training scripts keep the weights, beside optimiser, epoch and arguments
AVERAGES = "ema_"  # buffers of mmcv's EMA hook; the plain names hold the averaged weights already
LISTED = 20
FUSED = r"(.*)\.qkv_proj\.(weight|bias)"  # one layer for queries, keys and values, where ours has three

# A pattern of their names, and ours for it; None for what is not read. The first match counts.
Names = Sequence[tuple[str, str | Callable[[re.Match[str]], str] | None]]


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load a .safetensors file, or a torch file whose weights lie at its top or under `model` or `state_dict`.

    Nothing but tensors and an argparse.Namespace is unpickled. Raises PrunelabError where the file cannot be read, or
    with every name that is missing, not the model's, or of another shape.
    """
    fill(model, read(Path(path)), path)


def fill(model: nn.Module, results: Mapping[str, Tensor], path: Path | str) -> None:
    """Put weights by name, as they were read from `path`, into the model; see `load_checkpoint`."""
    wanted = model.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in results],
        "not the model's": [name for name in results if name not in wanted],
        "of another shape": [
            f"{name} {tuple(results[name].shape)} for {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in results and results[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names)
        raise PrunelabError(f"{path} does not hold the weights of this {type(model).__name__}; {listed}")
    model.load_state_dict(results)


def read_all(path: Path | str) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of all the shards in a folder."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise PrunelabError(f"{path} holds no .safetensors file; give the folder of the official checkpoint")
    return {name: weight for file in files for name, weight in read(file).items()}


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, averages left out."""
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PrunelabError(f"the checkpoint {path} does not exist; download it first") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PrunelabError(f"the checkpoint {path} cannot be read ({reason}); download it again") from None
    if isinstance(content, Mapping):
        root = next((name for name in ROOTS if isinstance(content.get(name), Mapping)), None)
        content = content if root is None else content[root]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise PrunelabError(f"{path} holds no weights at its top or under {' or '.join(ROOTS)}; give an official file")
    return {str(name): value for name, value in content.items() if not str(name).startswith(AVERAGES)}


def renamed(state: Mapping[str, Any], names: Names) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under our names, and the names of theirs that no pattern knows. What we call `qkv_proj` becomes three.
    Raises PrunelabError where entries that are one tensor in the model differ."""
    results: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        pattern, ours = next(((p, to) for p, to in names if re.search(p, name)), (None, None))
        if pattern is None:
            unknown.append(name)
        if pattern is None or ours is None:
            continue
        key = re.sub(pattern, ours, name)
        fused = re.fullmatch(FUSED, key)
        pieces = (
            {f"{fused[1]}.{q}_proj.{fused[2]}": part for q, part in zip("qkv", value.chunk(3))}
            if fused
            else {key: value}
        )
        for key, piece in pieces.items():
            if key in results and not torch.equal(results[key], piece):
                raise PrunelabError(
                    f"the checkpoint is inconsistent: '{name}' differs from another entry for the same tensor"
                )
            results[key] = piece
    return results, unknown


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
