"""The work folder of a run: what is decided is written block by block, so that a crash loses the current block only."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.plan import block_file, write_json, write_tensors

RUN, DONE, TUNED = "run.json", "done.json", "tuned.safetensors"


class Work:
    """Results by block, in memory or in a folder. `evidence` holds what was measured, `plan` what was decided."""

    def __init__(self, folder: Path | str | None, run: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.folder = None if folder is None else Path(folder)
        self.plan: dict[int, Any] = {}
        self.run = dict(run)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN
        if path.exists():
            result = _run(path)
            differs = [name for name in run if result.get(name) != run[name]]
            if differs:
                raise PrunelabError(
                    f"{self.folder} holds a run with other {', '.join(differs)}; give the unpruned model and the same"
                    " settings again, or name a new folder"
                )
        elif any(path.suffix != ".part" for path in self.folder.iterdir()):
            raise PrunelabError(f"{self.folder} is not empty and holds no run to go on with; name a new folder")
        write_json(path, dict(run))

    def decided(self, block: int, tensors: dict[str, Tensor]) -> None:
        """Keep the decisions of a block."""
        self.plan[block] = tensors
        if self.folder is not None:
            self.plan[block] = block_file(self.folder, block)
            write_tensors(self.plan[block], tensors)

    def was_decided(self, block: int) -> bool:
        """Whether an earlier run decided on a block; its decisions are then part of this one's plan."""
        if self.folder is None or not block_file(self.folder, block).exists():
            return False
        self.plan[block] = block_file(self.folder, block)
        return True

    def measured(
        self, name: str, results: Mapping[str, Mapping[str, Tensor]], device: torch.device
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Keep what was measured at a block or beforehand, by target and name, and return it: in a folder it is read
        when it is asked for."""
        if self.folder is None:
            return results
        shelved = {target: files for target, tensors in results.items() if (files := _files(tensors))}
        where = {target: [str(path.relative_to(self.folder)) for path in files] for target, files in shelved.items()}
        write_json(self.folder / f"evidence_{name}.json", where)
        # Targets may share a tensor, files may not.
        rest = {target: tensors for target, tensors in results.items() if target not in shelved}
        own = {f"{target}|{key}": t.clone() for target, tensors in rest.items() for key, t in tensors.items()}
        write_tensors(self.folder / f"evidence_{name}.safetensors", own)
        return self.recalled(name, device) or {}

    def recalled(self, name: str, device: torch.device) -> dict[str, Mapping[str, Tensor]] | None:
        """What an earlier run measured under that name, by target and name."""
        path = None if self.folder is None else self.folder / f"evidence_{name}.safetensors"
        if path is None or not path.exists():
            return None
        keys: dict[str, list[str]] = {}
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118
                target, _, rest = key.rpartition("|")
                keys.setdefault(target, []).append(rest)
        shelved = path.with_suffix(".json")
        where = json.loads(shelved.read_text()) if shelved.exists() else {}
        return {
            **{
                target: ChainMap(*(_Lazy.whole(path.parent / place, device) for place in places))  # type: ignore[arg-type]
                for target, places in where.items()
            },
            **{target: _Lazy(path, f"{target}|", result, device) for target, result in keys.items()},
        }

    def moved(self, block: int, hidden: Sequence[Tensor]) -> None:
        """Keep the hidden states in front of a block, in place of those of the block before."""
        if self.folder is not None:
            write_tensors(self._hidden(block), {f"{i:06d}": state for i, state in enumerate(hidden)})
            self._hidden(block - 1).unlink(missing_ok=True)

    def has_hidden(self, block: int) -> bool:
        """Whether an earlier run left the hidden states in front of a block."""
        return self.folder is not None and self._hidden(block).exists()

    def hidden(self, block: int, device: torch.device) -> list[Tensor]:
        """These hidden states; none where there are none."""
        if not self.has_hidden(block):
            return []
        return [state.to(device) for _, state in sorted(_tensors(self._hidden(block)).items())]

    def round(self, number: int) -> Work:
        """The work of a round before the last, which has decisions of its own."""
        return Work(None) if self.folder is None else Work(self.folder / f"round_{number:02d}", self.run)

    def finished(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Note that a round is over; `state` is the model's, where it was tuned."""
        if self.folder is not None:
            if state is not None:
                write_tensors(self.folder / TUNED, {name: tensor.clone() for name, tensor in state.items()})
            self.close()
            write_json(self.folder / DONE, True)

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run finished this round."""
        return self.folder is not None and (self.folder / DONE).exists()

    def tuned(self) -> dict[str, Tensor] | None:
        """The state of the model behind a finished round, where it was tuned."""
        path = None if self.folder is None else self.folder / TUNED
        return _tensors(path) if path is not None and path.exists() else None

    def shelf(self, name: str) -> Shelf:
        """Tensors by key, in memory or in a subfolder that leaves with the run."""
        return Shelf(None if self.folder is None else self.folder / f"shelf_{name}")

    def close(self) -> None:
        """Clear away what only an interrupted run needs."""
        if self.folder is not None:
            for pattern in ("hidden_*.safetensors", "evidence_*.safetensors", "evidence_*.json", "*.part"):
                for path in self.folder.glob(pattern):
                    path.unlink()
            for pattern in ("round_*", "shelf_*"):
                for path in self.folder.glob(pattern):
                    shutil.rmtree(path)

    def _hidden(self, block: int) -> Path:
        assert self.folder is not None
        return self.folder / f"hidden_{block:04d}.safetensors"


class Shelf:
    """Small groups of tensors under keys, each in a file of its own or, without a folder, in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.held: dict[str, dict[str, Tensor]] = {}
        if folder is not None:
            folder.mkdir(exist_ok=True)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    def __contains__(self, key: str) -> bool:
        return key in self.held if self.folder is None else self._path(key).exists()

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep copies of tensors."""
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        if self.folder is None:
            self.held[key] = own
        else:
            write_tensors(self._path(key), {name: tensor.cpu() for name, tensor in own.items()})

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key."""
        return self.held[key] if self.folder is None else _tensors(self._path(key))

    def lazily(self, key: str, device: torch.device) -> Mapping[str, Tensor]:
        """The same, each read when it is asked for."""
        return self.held[key] if self.folder is None else _Lazy.whole(self._path(key), device)

    def drop(self, key: str) -> None:
        """Forget a key."""
        if self.folder is None:
            del self.held[key]
        else:
            self._path(key).unlink()


class _Lazy(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for."""

    def __init__(self, path: Path, prefix: str, names: list[str], device: torch.device) -> None:
        self.path, self.prefix, self.names, self.device = path, prefix, names, device

    @classmethod
    def whole(cls, path: Path, device: torch.device) -> _Lazy:
        """All tensors of a file."""
        with _opened(path) as file:
            return cls(path, "", list(file.keys()), device)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with _opened(self.path) as file:
            result: Tensor = file.get_tensor(self.prefix + name).to(self.device)
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _files(tensors: Mapping[str, Tensor]) -> list[Path]:
    """The files that a target's tensors lie in whole; none where any is in memory."""
    maps: Sequence[Any] = tensors.maps if isinstance(tensors, ChainMap) else [tensors]
    return [lazy.path for lazy in maps] if all(isinstance(lazy, _Lazy) for lazy in maps) else []


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> PrunelabError:
    return PrunelabError(f"{path} cannot be read ({error}); move it away, and the run makes it anew")


def _run(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError:
        result = None
    if not isinstance(result, dict):
        raise PrunelabError(f"{path} does not describe a run; name a new folder")
    return result


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def fingerprint(tensors: Mapping[str, Tensor] | nn.Module, every: int = 1) -> str:
    """A hash of tensors by name, of every so many of their entries."""
    named = tensors.named_parameters() if isinstance(tensors, nn.Module) else tensors.items()
    seen = hashlib.sha256()
    for name, tensor in named:
        seen.update(f"{name}{tuple(tensor.shape)}".encode())
        indices = torch.arange(0, tensor.numel(), every, device=tensor.device)
        sample = tensor.detach().flatten()[indices].cpu()
        seen.update(sample.view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:24]
