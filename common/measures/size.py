"""Parameters and MACs of a language model before and after structured pruning, on the meta device: from its
configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Decision, Target, WeightSignals

if TYPE_CHECKING:
    from prunelab.common.tasks.size import Size


def measure(bench: Bench[Size.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.size`."""
    length = bench.settings.length
    model = loading.architecture(bench.ids["model"])
    dense = held(model), macs(model, length)
    pruned, method = dense, bench.method(WeightPruner)
    if method is not None:
        cut(method, model, bench.budget)
        pruned = held(model), macs(model, length)
    figures = dict(zip(("gparameters", "gmacs", "dense_gparameters", "dense_gmacs"), (*pruned, *dense), strict=True))
    savings = {"parameters_saving": 1 - pruned[0] / dense[0], "saving": 1 - pruned[1] / dense[1]}
    metrics: dict[str, Any] = {name: {"value": round(value / 1e9, 6)} for name, value in figures.items()}
    return metrics | {name: {"value": round(100 * share, 3)} for name, share in savings.items()}


def held(model: nn.Module) -> int:
    """Parameters of the model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, length: int) -> float:
    """MACs of one forward pass of `length` tokens on the meta device; of experts those that a token is sent to."""
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # the one whose shapes no data decide
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")  # given, as it cannot be made from values
    with torch.no_grad():
        return meter.flops(lambda: model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)) / 2


def cut(method: WeightPruner, model: nn.Module, budget: Budget) -> None:
    """Take away as many units of every target as the method does, whatever their scores. Two sets of random scores
    must leave the same numbers."""
    adapter = weight_adapter(model)
    targets = [target for unit in method.units for target in adapter.targets(unit) if method.covers(target)]
    if not targets or any(target.unit in ("linear", "tensor") for target in targets):
        raise PrunelabError(f"{method.name} changes no size of this model; its zeros are counted where it runs")
    signals = [WeightSignals(adapter.weights(target)) for target in targets]
    plans = [decisions(method, targets, signals, budget, seed) for seed in (0, 1)]
    kept = [[decision.kept for decision in plan] for plan in plans]
    if kept[0] != kept[1]:
        raise PrunelabError(f"{method.name} lets data decide how much every layer keeps; only its run knows the sizes")
    for target, decision in zip(targets, plans[0], strict=True):
        adapter.check(target, decision)
        adapter.write(target, decision)
    adapter.finish()


def decisions(
    method: WeightPruner, targets: list[Target], signals: list[WeightSignals], budget: Budget, seed: int
) -> list[Decision]:
    """What the method decides where scores are drawn by lot."""
    draws = torch.Generator().manual_seed(seed)
    scores = [torch.rand(target.shape, generator=draws) for target in targets]
    try:
        return [Decision(mask) for mask in method.select(targets, signals, scores, budget)]
    except PrunelabError as error:
        raise PrunelabError(f"the sizes that {method.name} leaves cannot be told without data ({error})") from None
