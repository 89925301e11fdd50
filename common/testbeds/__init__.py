"""Small models that we trained ourselves: what methods are measured on where no real checkpoint is at hand.

One module defines one testbed, found by discovery. The weights of `<name>` lie in `weights/<name>/`: the model, the log
of its training with its sha256, and `seeds.json`, which tells how much the seed matters.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.registry import choose, defined
from prunelab.common.testbeds.base import Testbed
from prunelab.common.training.recipe import LOG, WEIGHTS, read_log
from prunelab.common.training.recipe import read_extra as read_extra

SHIPPED = Path(__file__).resolve().parent / "weights"


@cache
def testbeds() -> dict[str, type[Testbed]]:
    """All testbeds by name, discovered in this package."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {cls.name: cls for module in modules for cls in defined(module, Testbed)}  # type: ignore[type-abstract]


def get(name: str) -> type[Testbed]:
    """The testbed of that name, or an error that suggests the nearest names."""
    return choose(testbeds(), name, "testbed")


def load(name: str, folder: Path | str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model in eval mode, and the log of its training.

    folder: what `train` wrote, None for the weights that ship with Prunelab. Nothing is unpickled, and the weights
    must have the sha256 that the log names.
    """
    import safetensors
    from safetensors.torch import load as read_tensors

    cls = get(name)
    folder = SHIPPED / name if folder is None else Path(folder)
    log = read_log(folder)
    if log["testbed"] != name:
        raise PrunelabError(f"{folder} holds the testbed '{log['testbed']}', not '{name}'")
    path = folder / WEIGHTS
    try:
        weights = path.read_bytes()
    except OSError:
        raise PrunelabError(f"the weights {path} are missing; restore them or train the testbed again") from None
    if hashlib.sha256(weights).hexdigest() != log["sha256"]:
        raise PrunelabError(f"the weights {path} are not those of {LOG} (sha256 differs); restore them or train again")
    recipe: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in log["recipe"].items()}
    try:
        model = cls(**recipe).build()
        model.load_state_dict(read_tensors(weights), strict=True)
    except (TypeError, RuntimeError, safetensors.SafetensorError):
        raise PrunelabError(f"{folder} was trained with another version of {name}; train the testbed again") from None
    return model.eval(), log
