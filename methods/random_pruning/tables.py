"""An experiment of our own in the paper's manner: small networks trained sparse from the start, under random masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional as F

from prunelab.common.data import digits
from prunelab.common.metrics import uncertainty
from prunelab.common.training.engine import train
from prunelab.common.training.recipe import MomentumRecipe
from prunelab.methods.random_pruning.method import RandomPruning, Ratio

RECIPE = MomentumRecipe(steps=240, batch=64, rate=0.1, check_every=240, save_every=240)
WIDTHS = (24, 48, 48)


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *WIDTHS), WIDTHS, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def objective(model: nn.Module, batch: Any) -> Any:
    logits = model(batch["pixel_values"])
    return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, batch["labels"]))


def sparse(densities: tuple[float, ...] = (0.05, 0.02)) -> dict[str, dict[str, Any]]:
    """`ratio/density/accuracy` on handwritten digits that were not trained on, and of the dense network."""
    images, labels = digits.digits("train")
    samples = [{"pixel_values": x.unsqueeze(0), "labels": y} for x, y in zip(images, labels, strict=True)]
    results = {"dense/1/accuracy": trained(RandomPruning("uniform"), 1.0, samples)}
    for ratio in get_args(Ratio):
        for density in densities:
            results[f"{ratio}/{density:g}/accuracy"] = trained(RandomPruning(ratio), density, samples)
    return results


def trained(method: RandomPruning, density: float, samples: list[Any]) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network()
    train(method, model, density, samples, RECIPE, objective=objective, progress=False)
    images, labels = digits.digits("test")
    with torch.inference_mode():
        return uncertainty.share(model.eval()(images.unsqueeze(1)).argmax(1) == labels)
