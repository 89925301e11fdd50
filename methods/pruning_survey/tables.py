"""The survey's contrast settings: pairs of choices that it compares with all else equal, and the trainings from scratch
that two of them need."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.data import digits
from prunelab.common.metrics import uncertainty

STEPS, BATCH, RATE = 160, 64, 0.1  # of every training
WIDTHS = (1, 16, 32)


@dataclass(frozen=True)
class Contrast:
    """Two ways to do one thing. version: of the preprint that first compares them. named: whether its abstract names
    them; the others are as the literature has them, since the body was not readable here."""

    name: str
    first: str
    second: str
    version: int = 1
    named: bool = False


CONTRASTS = (
    Contrast("granularity", "unstructured", "structured", named=True),
    Contrast("schedule", "one-shot", "iterative", named=True),
    Contrast("data", "data-free", "data-driven", named=True),
    Contrast("weights", "initialised", "pre-trained", named=True),
    Contrast("retraining", "from scratch", "fine-tuned"),
    Contrast("task", "original", "transfer"),
    Contrast("decision", "static", "dynamic"),
    Contrast("allocation", "layer-wise", "global", version=2),
)


def contrasts() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}: how many pairs each version compares."""
    return {
        f"abstract/v{version}/contrast settings": {"value": float(sum(c.version <= version for c in CONTRASTS))}
        for version in (1, 2)
    }


# -- the two that need a training from scratch -----------------------------------------------------------------------


def trainings(density: float = 0.05, seeds: int = 3) -> dict[str, dict[str, Any]]:
    """Accuracy on handwritten digits that were not trained on, of a small network whose smallest weights went, layer by
    layer, until the share `density` of each was left, and which was then trained: pruned as it was initialised
    (`initialised`); after a training, with the weights that this left (`pre-trained`, `fine-tuned`), or with weights
    drawn anew under the same masks (`from scratch`). Means over networks and orders of images, image by image."""
    return uncertainty.over_seeds([_arms(density, seed) for seed in range(seeds)])


def _arms(density: float, seed: int) -> dict[str, dict[str, Any]]:
    drawn, again = network(seed), network(seed + 1000)
    dense = trained(deepcopy(drawn), None, seed)
    masks = smallest_gone(dense, density)
    tuned = accuracy(trained(deepcopy(dense), masks, seed + 1))
    return {
        "dense": accuracy(dense),
        "initialised": accuracy(trained(deepcopy(drawn), smallest_gone(drawn, density), seed + 1)),
        "pre-trained": tuned,
        "from scratch": accuracy(trained(again, masks, seed + 1)),
        "fine-tuned": tuned,
    }


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(WIDTHS):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTHS[-1], 10))


def prunable(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.dim() > 1]


def smallest_gone(model: nn.Module, density: float) -> list[Tensor]:
    """Masks that leave the largest weights of every layer."""
    results = []
    for weight in prunable(model):
        order = weight.detach().abs().flatten().argsort(descending=True)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[order[: max(1, round(density * weight.numel()))]] = True
        results.append(mask.view_as(weight))
    return results


def trained(model: nn.Module, masks: list[Tensor] | None, seed: int) -> nn.Module:
    """The model after its training; what the masks leave out is zero throughout."""
    images, labels = digits.digits("train")
    weights = prunable(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, STEPS)
    rng = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(STEPS + 1):
        with torch.no_grad():
            for weight, mask in zip(weights, masks or (), strict=False):
                weight.mul_(mask)
        if step == STEPS:
            break
        rows = torch.randint(len(images), (BATCH,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows].unsqueeze(1)), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model: nn.Module) -> dict[str, Any]:
    images, labels = digits.digits("test")
    with torch.inference_mode():
        return uncertainty.share(model(images.unsqueeze(1)).argmax(1) == labels)
