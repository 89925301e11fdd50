"""What is told of every language model that is measured: its size, and what ran of its experts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.measures.bench import Bench

if TYPE_CHECKING:
    from prunelab.common.experts.apply import ExpertHandle
    from prunelab.common.weights import WeightPlan, WeightReport


def without_experts(bench: Bench[Any], model: nn.Module) -> AbstractContextManager[Any]:
    """The `with` block in which the method of the setting `experts` leaves out experts; nothing happens without one."""
    given = bench.settings.experts
    if given is None:
        return nullcontext()
    method = registry.create(given.method, **given.options)
    return bench.at_work(method, model, budget=Budget.parse(given.budget))


def experts_run(model: nn.Module, handle: ExpertHandle | None) -> dict[str, Any]:
    """What such a method left out: `experts_run`, the percent of the choices that ran, and `activated_saving`, that of
    the parameters which a token uses otherwise (all but the experts that it was not sent to), of which
    `activated_gparameters` are left."""
    if handle is None:
        return {}
    report = handle.report()
    sizes = [(b.experts.gate_up_proj.numel() + b.experts.down_proj.numel(), len(b.experts.down_proj))
             for b in handle.blocks.values()]  # fmt: skip
    held = sum(p.numel() for p in model.parameters())
    used = held - sum(size * (1 - k / n) for (size, n), k in zip(sizes, report.chosen, strict=True))
    left = sum(size / n * (k - ran) for (size, n), k, ran in zip(sizes, report.chosen, report.run, strict=True))
    figures = {"experts_run": 100 * report.ratio, "activated_saving": 100 * left / used}
    results = {name: {"value": round(value, 3)} for name, value in figures.items()}
    return results | {"activated_gparameters": {"value": round((used - left) / 1e9, 9)}}


def training(plan: WeightPlan) -> dict[str, Any]:
    """`training_loss`, the smoothed loss of the last step, with the training log behind it."""
    log = plan.header["log"]
    return {"training_loss": {"value": log[-1]["loss"], "log": log}}


def sizes(model: nn.Module, report: WeightReport | None = None) -> dict[str, Any]:
    """`gparameters` that the model holds and `nonzero_gparameters` among them, in G (1e9); after pruning also
    `saving` and `nonzero_saving`, the percent of all parameters that are gone, or gone or zero, and `sparsity`, the
    percent of the prunable ones that are gone, zero, or again what they were before fine-tuning. `weight_gbytes` are
    what the weights take, `weight_saving` the percent that is saved, and `bits` what a prunable one that is left takes
    where some became codes."""
    held = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    stored = sum(p.numel() * p.element_size() for p in model.parameters()) if report is None else report.bytes
    out = {"gparameters": held / 1e9, "nonzero_gparameters": nonzero / 1e9, "weight_gbytes": stored / 1e9}
    if report is not None:
        dense = report.dense_parameters
        out |= {"saving": 100 * (1 - held / dense), "nonzero_saving": 100 * (1 - nonzero / dense)}
        out |= {"sparsity": 100 * report.sparsity, "weight_saving": 100 * (1 - report.bytes / report.dense_bytes)}
        out |= {"bits": report.bits} if report.bits else {}
    billions = ("gparameters", "nonzero_gparameters", "weight_gbytes")
    return {name: {"value": round(value, 9 if name in billions else 3)} for name, value in out.items()}
