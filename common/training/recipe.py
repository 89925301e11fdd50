"""How a model is trained, as numbers, and the folder that holds what came of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelab.common.core.errors import PrunelabError

WEIGHTS, LOG = "model.safetensors", "training.json"


@dataclass(frozen=True)
class Recipe:
    """AdamW with a warm-up, a cosine and clipped gradients.

    Parameters
    ----------
    steps, batch
        Optimiser steps, and samples in each.
    rate
        Peak learning rate, reached after the share `warmup` of the steps and then lowered to zero along a cosine.
    decay
        Weight decay of matrices.
    clip
        Largest norm of the gradient.
    check_every, save_every
        Steps between entries of the curve, and between checkpoints.
    """

    steps: int
    batch: int
    rate: float
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.05
    clip: float = 1.0
    check_every: int = 100
    save_every: int = 50

    def factor(self, step: int) -> float:
        """Learning rate of a step (counted from 0), as a share of the peak."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def scale(self, parameter: str) -> float:
        """Learning rate of a parameter, by its name in the model, as a share of the others'."""
        return 1.0

    def optimizer(
        self, model: nn.Module, options: Callable[[str], Mapping[str, Any]] = lambda parameter: {}
    ) -> torch.optim.Optimizer:
        """The optimiser; biases, norms and position tables do not decay.

        options: settings that a parameter has for itself, by its name, such as `weight_decay` or `maximize`.
        """
        kept = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
        groups: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            decay = self.decay if parameter.dim() > 1 and name not in kept else 0.0
            settings = {"scale": self.scale(name), "weight_decay": decay, **options(name)}
            groups.setdefault(tuple(settings.items()), []).append(parameter)
        return self.descent([{"params": members, **dict(settings)} for settings, members in groups.items()])

    def descent(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser of these groups of parameters."""
        return torch.optim.AdamW(groups, lr=self.rate, betas=self.betas)


@dataclass(frozen=True)
class LinearRecipe(Recipe):
    """AdamW with a warm-up, and then a straight line down to zero."""

    def factor(self, step: int) -> float:
        rise = max(1, round(self.warmup * self.steps))
        return (step + 1) / rise if step < rise else (self.steps - step) / max(1, self.steps - rise)


@dataclass(frozen=True)
class MomentumRecipe(Recipe):
    """Stochastic gradient descent with momentum, whose rate falls to a tenth at each milestone.

    Parameters
    ----------
    momentum
        Share of the last step that goes on; `betas` are not used.
    milestones
        Shares of the training at which the rate falls.
    """

    warmup: float = 0.0
    decay: float = 5e-4
    momentum: float = 0.9
    milestones: tuple[float, ...] = (0.5, 0.75)

    def factor(self, step: int) -> float:
        rise = round(self.warmup * self.steps)
        start = (step + 1) / rise if step < rise else 1.0
        return start * 0.1 ** sum(step >= round(share * self.steps) for share in self.milestones)

    def descent(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.rate, momentum=self.momentum)


def plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))


def read_log(folder: Path) -> dict[str, Any]:
    """The training log of a folder."""
    try:
        log = json.loads((folder / LOG).read_text())
    except OSError:
        raise PrunelabError(f"there is no {LOG} in {folder}; train the testbed into it first") from None
    except ValueError:
        log = None
    if not isinstance(log, dict) or not {"testbed", "recipe", "sha256"} <= log.keys():
        raise PrunelabError(f"{folder / LOG} is not a training log; restore it or train again")
    return log


def read_extra(folder: Path, name: str) -> str:
    """One of a trained model's further files, checked against the log of its training."""
    expected = read_log(folder).get("extras", {}).get(name)
    try:
        data = (folder / name).read_bytes()
    except OSError:
        data = b""
    if expected is None or hashlib.sha256(data).hexdigest() != expected:
        raise PrunelabError(f"{folder / name} is missing or not the one of {LOG}; restore it or train again")
    return data.decode()
