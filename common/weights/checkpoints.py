"""The work folder of a run: what is decided is written block by block, so that a crash loses the current block only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.plan import block_file, write_json, write_tensors

RUN = "run.json"


class Work:
    """Results by block, in memory or in a folder. `evidence` holds what was measured, `plan` what was decided."""

    def __init__(self, folder: Path | str | None, run: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.folder = None if folder is None else Path(folder)
        self.plan: dict[int, Any] = {}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RUN
        if path.exists():
            found = _run(path)
            differs = [name for name in run if found.get(name) != run[name]]
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

    def measured(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep what was measured at a block or in a precompute."""
        if self.folder is not None:
            own = {name: tensor.clone() for name, tensor in tensors.items()}  # targets may share one, files may not
            write_tensors(self.folder / f"evidence_{name}.safetensors", own)

    def was_measured(self, name: str) -> dict[str, Tensor] | None:
        """What an earlier run measured under that name."""
        path = None if self.folder is None else self.folder / f"evidence_{name}.safetensors"
        return _tensors(path) if path is not None and path.exists() else None

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

    def close(self) -> None:
        """Clear away what only an interrupted run needs."""
        if self.folder is not None:
            for pattern in ("hidden_*.safetensors", "evidence_*.safetensors", "*.part"):
                for path in self.folder.glob(pattern):
                    path.unlink()

    def _hidden(self, block: int) -> Path:
        assert self.folder is not None
        return self.folder / f"hidden_{block:04d}.safetensors"


def _run(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise PrunelabError(f"{path} does not describe a run; name a new folder")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise PrunelabError(f"{path} cannot be read ({error}); delete it, and the run makes it anew") from None


def fingerprint(tensors: Mapping[str, Tensor] | nn.Module, every: int = 1) -> str:
    """A hash of tensors by name, of every so many of their entries."""
    named = tensors.named_parameters() if isinstance(tensors, nn.Module) else tensors.items()
    seen = hashlib.sha256()
    for name, tensor in named:
        seen.update(f"{name}{tuple(tensor.shape)}".encode())
        places = torch.arange(0, tensor.numel(), every, device=tensor.device)
        sample = tensor.detach().flatten()[places].cpu()
        seen.update(sample.view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:24]
