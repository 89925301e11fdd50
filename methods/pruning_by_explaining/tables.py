"""The toy experiments, as the authors ran them: three sets of points, four criteria, a third of 3000 units removed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.common import testbeds
from prunelab.common.core.budget import Budget
from prunelab.common.data import points
from prunelab.common.metrics import uncertainty
from prunelab.common.weights import prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.corpora import Corpus, Labelled
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.targets import WeightSignals
from prunelab.methods.pruning_by_explaining.method import Criterion, PruningByExplaining

Metrics = dict[str, dict[str, Any]]

CRITERIA: Mapping[str, Criterion] = {"lrp": "lrp", "taylor": "taylor", "grad": "gradient", "weight": "weight"}
PER_CLASS = (1, 2, 5, 10, 20, 50, 100, 200)
REMOVED = Budget(1000, "removed")
BLUR, NOISY_POINTS = 0.3, 500
RANKED = 10  # samples a class behind the selections that are compared
FIRST_AND_LAST = (250, 1000)

ACCURACY, NOISY = "toy post-pruning", "toy post-pruning, noisy test N(0,0.3)"
SAME, CROSS = "toy selection self-consistency over seeds n=10", "toy selection cross-criterion, all seeds n=10"


def method(criterion: Criterion, samples: int) -> PruningByExplaining:
    """The criterion as it is used here: all at once, from the true class's logit, on all samples together."""
    return PruningByExplaining(criterion, step=1.0, start="logit", batch=samples)


def toy(seeds: int = 3, ranked: int = 50) -> Metrics:
    """`table/row/column` as in reported.csv, each the mean over the first seeds (`ranked` of them for selections; the
    authors have 50 everywhere) with its standard error."""
    results: Metrics = {}
    for name in points.CLASSES:
        model = testbeds.load(f"points_{name}")[0]
        results |= accuracies(name, model, seeds) | selections(name, model, ranked)  # type: ignore[arg-type]
    return results


def accuracies(name: points.Set, model: nn.Module, seeds: int) -> Metrics:
    """Accuracy in percent on the training points, on the samples that the criterion read, and on noisy fresh points."""
    trained, classes = points.training(name), points.CLASSES[name]
    fresh = [points.drawn(name, NOISY_POINTS // classes, seed + 1, BLUR) for seed in range(seeds)]
    references = {n: [points.drawn(name, n, seed) for seed in range(seeds)] for n in PER_CLASS}
    dense = {"train accuracy": [accuracy(model, trained)] * seeds}
    noisy = [accuracy(model, points_) for points_ in fresh]
    tested = [accuracy(model, drawn) for drawn in references[RANKED]]
    result = named(ACCURACY, f"{name} unpruned", dense | {"test accuracy": tested})
    result |= named(NOISY, f"{name} unpruned", dense | {"test accuracy": noisy})
    for label, criterion in CRITERIA.items():
        alike = None  # weights alone decide, whatever the samples
        for n in PER_CLASS:
            left = alike or [pruned(model, criterion, reference) for reference in references[n]]
            alike = left if criterion == "weight" else None
            training = {"train accuracy": [accuracy(m, trained) for m in (left[:1] if alike else left)]}
            training = {column: values * (seeds if alike else 1) for column, values in training.items()}
            row = f"{name} {label} n={n} per class"
            tested = [accuracy(m, drawn) for m, drawn in zip(left, references[n], strict=True)]
            noisy = [accuracy(m, drawn) for m, drawn in zip(left, fresh, strict=True)]
            result |= named(ACCURACY, row, training | {"test accuracy": tested})
            result |= named(NOISY, row, training | {"test accuracy": noisy})
    return result


def pruned(model: nn.Module, criterion: Criterion, reference: tuple[Tensor, Tensor]) -> nn.Module:
    """A copy of the network without a third of its units."""
    left = copy.deepcopy(model)
    prune(method(criterion, len(reference[1])), left, REMOVED, pairs(reference), progress=False)
    return left


def pairs(reference: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*reference, strict=True))


@torch.inference_mode()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return 100 * float((model(data[0]).argmax(1) == data[1]).float().mean())


def named(table: str, row: str, columns: Mapping[str, list[float]]) -> Metrics:
    return {f"{table}/{row}/{column}": uncertainty.mean(values) for column, values in columns.items()}


# -- which units are chosen --------------------------------------------------------------------------------------------


def selections(name: points.Set, model: nn.Module, seeds: int) -> Metrics:
    """How far the orders of units agree from seed to seed, and with those of relevance."""
    orders = {label: ascending(name, model, criterion, seeds) for label, criterion in CRITERIA.items()}
    results: Metrics = {}
    for label, own in orders.items():
        for column, agreement in agreements(own, own).items():
            results[f"{SAME}/{name} {label}/{column}"] = among(agreement)
        if label != "lrp":
            for column, agreement in agreements(orders["lrp"], own).items():
                results[f"{CROSS}/{name} lrp vs {label}/{column}"] = between(agreement)
    return results


def ascending(name: points.Set, model: nn.Module, criterion: Criterion, seeds: int) -> np.ndarray:
    """All units [seeds, 3000] from the least to the most important. As in the authors' program equal scores come in
    whatever order NumPy leaves them."""
    adapter, results = weight_adapter(model), []
    targets = adapter.targets("channels")
    for seed in range(seeds if criterion != "weight" else 1):  # weights alone decide, whatever the samples
        items = tuple(Labelled(x, y) for x, y in pairs(points.drawn(name, RANKED, seed)))
        probe = ModelProbe(adapter, targets, [item.inputs for item in items], corpora={"": Corpus(items)})
        judge = method(criterion, len(items))
        known = judge.precompute(probe)
        scores = [judge.score(t, WeightSignals(adapter.weights(t), known.get(t.name, {}))) for t in targets]
        results.append(np.argsort(torch.cat(scores).numpy()))
    return np.stack(results * (seeds // len(results)))


def agreements(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Between all pairs of orders [A, 3000] and [B, 3000] the rank correlation of the two lists of numbers, and the
    share of common units among the first and the last k: each [A, B]."""
    count = a.shape[1]
    centred = [(order - (count - 1) / 2) / math.sqrt((count**2 - 1) / 12) for order in (a, b)]
    results = {"spearman": centred[0] @ centred[1].T / count}
    for k in FIRST_AND_LAST:
        for which, part in (("first", slice(None, k)), ("last", slice(-k, None))):
            held = [np.zeros(order.shape, dtype=np.float32) for order in (a, b)]
            for members, order in zip(held, (a, b), strict=True):
                np.put_along_axis(members, order[:, part], 1.0, 1)
            results[f"{which}-{k}"] = held[0] @ held[1].T / k
    return results


def among(agreement: np.ndarray) -> dict[str, Any]:
    """The mean over pairs of unequal seeds. A seed is in many pairs, which its standard error allows for."""
    n = len(agreement)
    by_seed = (agreement.sum(1) - agreement.diagonal()) / max(n - 1, 1)
    return {"value": float(by_seed.mean()), "stderr": 2 * float(by_seed.std(ddof=1)) / math.sqrt(n), "n": n}


def between(agreement: np.ndarray) -> dict[str, Any]:
    """The mean over all pairs of seeds."""
    spread = agreement.mean(1).var(ddof=1) + agreement.mean(0).var(ddof=1)
    return {"value": float(agreement.mean()), "stderr": math.sqrt(float(spread) / len(agreement)), "n": len(agreement)}
