"""ECoFLaP against the authors' block ratios, zeroth-order and gradient scores, and their Wanda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Observation, Target, WeightSignals
from prunelab.methods.ecoflap.method import (
    SEEDS,
    ECoFLaP,
    MeanGradient,
    Score,
    gone,
    importance,
    shared_out,
    slope,
)

TOLERANCE = {
    "drift": (1e-7, 0.0), "zeroth": (0.0, 2e-2), "out_importance_sum": (1e-6, 2e-2), "out_sparsity": (2e-2, 0.0),
    "": (1e-5, 1e-4),
}  # fmt: skip
SCORES: Mapping[str, Score] = {
    "MEZO-GradOnly": "zeroth", "MEZO-GradMagAbs": "zeroth_magnitude", "MEZO-GradMagSquare": "zeroth_square",
    "GradOnly": "gradient", "GradMagAbs": "magnitude", "GradMagSquare": "square",
}  # fmt: skip


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_group_scores" in inputs:
        scores, sizes = torch.from_numpy(inputs["in_group_scores"]), torch.from_numpy(inputs["in_group_numel"])
        keep, most = int(inputs["in_total_parameters_to_keep"]), round(float(inputs["in_max_sparsity"]), 3)
        return {"out_group_sparsity": shared_out(scores, sizes, keep, most).numpy()}
    return of_wanda(inputs) if "in_inputs" in inputs else of_network(inputs)


def of_wanda(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    weight, sparsity = torch.from_numpy(inputs["in_weight"]), round(float(inputs["in_sparsity"]), 3)
    target = Target("linear", "w", 0, "w", tuple(weight.shape))
    norm = InputNorm(target)
    for sample in torch.from_numpy(inputs["in_inputs"]).flatten(0, 1):
        norm.update(Observation(sample, {}, sample, sample, sample))
    method = ECoFLaP()
    signals = WeightSignals({"weight": weight}, {"input_norm": norm.value()})
    scores = method.score(target, signals)
    kept = method.mask(target, scores, Budget(gone(weight.shape[1], sparsity), "removed"))
    outputs = {"out_scaler_row": norm.value(), "out_metric": scores, "out_prune_mask": ~kept}
    return {name: value.numpy() for name, value in outputs.items()}


def of_network(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [name.removeprefix("w_") for name in inputs if name.startswith("w_")]
    weights = {name: torch.from_numpy(inputs[f"w_{name}"].copy()) for name in names}
    before = {name: weight.clone() for name, weight in weights.items()}
    kind, _, how = str(inputs["in_score_method"]).rpartition("_")
    method = ECoFLaP(
        SCORES[kind], group=str(inputs["in_granularity"]), mean=how == "avg", samples=int(inputs["in_num_samples"]),  # type: ignore[arg-type]
        batch=inputs["in_X"].shape[1], draws=int(inputs["in_num_noise"]),
        epsilon=round(float(inputs["in_noise_eps"]), 6), most=round(float(inputs["in_max_sparsity"]), 3),
    )  # fmt: skip
    pairs = [(x, y) for xs, ys in zip(inputs["in_X"], inputs["in_Y"], strict=True) for x, y in zip(xs, ys, strict=True)]
    batches = [tuple(torch.from_numpy(np.stack(part)) for part in zip(*b, strict=True)) for b in method.batches(pairs)]
    found: dict[str, Tensor] = {}
    if kind.startswith("MEZO"):
        draws = np.random.RandomState(int(inputs["in_numpy_seed"]))
        for name in names:
            slopes = [
                slope(weights[name], lambda b=b: loss(weights, names, *b), int(draws.randint(SEEDS)), method.epsilon)  # type: ignore[misc]
                for b in batches
            ]
            found[name] = importance(method.score_by, weights[name], slopes).sum()
    else:
        means = {name: MeanGradient(method.score_by == "square") for name in names}
        for batch in batches:
            for weight in weights.values():
                weight.requires_grad_(True)
            value = loss(weights, names, *batch)
            for name, gradient in zip(names, torch.autograd.grad(value, list(weights.values())), strict=True):
                means[name].update(gradient)
        found = {
            n: importance(method.score_by, w.detach(), gradient=means[n].value()).sum() for n, w in weights.items()
        }
    blocks = [int(name.split("__")[1]) for name in names]
    targets = [Target("linear", n, b, n, tuple(weights[n].shape)) for n, b in zip(names, blocks, strict=True)]
    signals = [WeightSignals({"weight": weights[n]}, {"importance": found[n]}) for n in names]
    exact = ECoFLaP(**{**vars(method), "fine": "sparsegpt"})  # whose amounts are not rounded to a row's
    budgets = exact.allocate(targets, signals, Budget(1 - round(float(inputs["in_target_sparsity"]), 3)))
    out = {}
    for name, budget in zip(names, budgets, strict=True):
        out[f"out_sparsity_{name}"] = np.array(1 - budget.amounts[0])
        out[f"out_importance_sum_{name}"] = found[name].numpy()
        drift = (weights[name].detach() - before[name]).abs().max()
        out[f"out_weights_max_abs_drift_{name}"] = drift.numpy()
    return out


def loss(weights: Mapping[str, Tensor], names: Sequence[str], x: Tensor, y: Tensor) -> Tensor:
    for first, second in zip(names[::2], names[1::2], strict=True):
        x = x + torch.tanh(x @ weights[first].T) @ weights[second].T
    return (x - y).square().mean()
