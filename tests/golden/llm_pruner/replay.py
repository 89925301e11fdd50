"""LLM-Pruner against the authors' importance and pruner classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.weights import prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.targets import Accumulator, Target, WeightSignals
from prunelab.methods.llm_pruner.method import SECOND_ORDER, Importance, LLMPruner, Squares, group_importance
from tests.golden.llama import llama, logits

TOLERANCE = {"_grad": (1e-6, 1e-3), "logits": (1e-4, 1e-4), "": (1e-7, 1e-4)}
NOT_APPLICABLE = {"^out_params": "the cases of weights and gradients alone do not hold the rest of the model"}


class Gradient(Accumulator):
    """The gradient as it is."""

    def update(self, observed: Tensor) -> None:
        self.state = observed.clone()

    def value(self) -> Tensor:
        return self.state


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    pruner = str(inputs["hp_pruner_type"])
    method = LLMPruner(
        str(inputs["hp_taylor"]) if pruner == "taylor" else pruner,  # type: ignore[arg-type]
        str(inputs["hp_group_reduction"]),  # type: ignore[arg-type]
        "global" if bool(inputs["hp_global_pruning"]) else "block",
    )
    budget = Budget(1 - round(float(inputs["hp_pruning_ratio"]), 6))
    out: dict[str, np.ndarray] = {}
    if "in_ids" in inputs:
        targets, signals, out = of_model(method, budget, inputs)
    else:
        targets, signals = of_arrays(method, inputs)
    scores = [method.score(target, seen) for target, seen in zip(targets, signals, strict=True)]
    masks = method.select(targets, signals, scores, budget)
    channels = [group_importance(method.members(t, s), method.reduction or "sum") for t, s in zip(targets, signals)]
    grouped = "hp_num_kv_heads" in inputs
    for unit, name, inner in (
        ("heads", "kv_head" if grouped else "head", "kv_channel" if grouped else "attn_channel"),
        ("channels", "neuron", "neuron"),
    ):
        of_unit = [i for i, target in enumerate(targets) if target.unit == unit]
        out[f"out_{inner}_importance"] = torch.stack([channels[i] for i in of_unit]).numpy()
        out[f"out_{name}_importance"] = torch.stack([scores[i] for i in of_unit]).numpy()
        out[f"out_{name}_keep"] = torch.stack([masks[i] for i in of_unit]).numpy()
    if grouped:
        shared = int(inputs["hp_num_heads"]) // int(inputs["hp_num_kv_heads"])
        out["out_query_head_keep"] = out["out_kv_head_keep"].repeat(shared, 1)
    return out


def of_arrays(method: LLMPruner, inputs: Mapping[str, np.ndarray]) -> tuple[list[Target], list[WeightSignals]]:
    """Targets and what the method measures of them, from stored weights and gradients."""
    head, targets, signals = int(inputs["hp_head_dim"]), [], []
    for unit, roles in (("heads", ["q", "k", "v", "o"]), ("channels", ["gate", "up", "down"])):
        layers = inputs["hp_attention_layers" if unit == "heads" else "hp_mlp_layers"]
        for place, block in enumerate(layers.tolist()):
            found = {role: torch.from_numpy(inputs[f"in_{role}_weight"][place]) for role in roles}
            statistics = {}
            for role in roles if f"in_{roles[0]}_grad" in inputs else ():
                squares = f"in_{role}_acc_grad"
                known = torch.from_numpy(inputs[squares][place]) if squares in inputs else None
                importance = Importance(method.criterion, role, found[role], known)
                importance.update(torch.from_numpy(inputs[f"in_{role}_grad"][place]))
                statistics[f"importance.{role}"] = importance.value()
            units = len(found["k"]) // head if unit == "heads" else len(found["up"])
            targets.append(Target(unit, f"{block}.{unit}", block, unit, (units,)))  # type: ignore[arg-type]
            signals.append(WeightSignals(found, statistics))
    return targets, signals


def of_model(
    method: LLMPruner, budget: Budget, inputs: Mapping[str, np.ndarray]
) -> tuple[list[Target], list[WeightSignals], dict[str, np.ndarray]]:
    """The same from a model, with its gradients and losses and what it gives once pruned."""
    model, ids = llama(inputs), torch.from_numpy(inputs["in_ids"])
    adapter = weight_adapter(model)
    targets = [target for unit in method.units for target in adapter.targets(unit)]
    probe = ModelProbe(adapter, targets, list(ids))
    out: dict[str, np.ndarray] = {}
    with torch.no_grad():
        losses = torch.stack([probe.loss(sample) for sample in ids])
        whole = probe.gradients({"grad": lambda member: Gradient()}, together=True)
        assert method.criterion in SECOND_ORDER
        squares = probe.gradients({"acc_grad": lambda member: Squares(len(ids))})
        statistics = method.precompute(probe)
    for found in (whole, squares):
        for target in targets:
            for name, value in found[target.name].items():
                kind, _, role = name.partition(".")
                out.setdefault(f"out_{role}_{kind}", []).append(value)  # type: ignore[attr-defined]
    out = {name: torch.stack(values).numpy() for name, values in out.items()}
    out |= {"out_sample_losses": losses.numpy(), "out_loss": losses.mean().numpy()}
    signals = [WeightSignals(adapter.weights(target), statistics[target.name]) for target in targets]
    signals = [WeightSignals({k: v.clone() for k, v in s.weights.items()}, s.statistics) for s in signals]
    out["out_params_before"] = np.array(sum(p.numel() for p in model.parameters()))
    prune(method, model, budget, ids, progress=False)
    out["out_params_after"] = np.array(sum(p.numel() for p in model.parameters()))
    out["out_pruned_logits"] = logits(model, ids[:2, :8])
    return targets, signals, out
