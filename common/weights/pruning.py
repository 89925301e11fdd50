"""One engine for every weight-pruning method: calibrate, score, allocate, mask, update, apply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.checkpoints import Work, fingerprint
from prunelab.common.weights.engine import Engine, check_budgets
from prunelab.common.weights.plan import Tally, WeightPlan, WeightReport
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Target

SAMPLED = 997  # every so many-th weight enters a model's fingerprint


def prune(
    method: Method,
    model: nn.Module,
    budget: Budget | float | str,
    calibration: Tensor | Sequence[Tensor] | None = None,
    *,
    base: nn.Module | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    progress: bool = True,
) -> WeightPlan:
    """Prune a model's weights in place by `method` under `budget`, and return the plan, which repeats it elsewhere.

    calibration: token ids [samples, length], or a list of vectors of any lengths (see `windows`). base: the model
    before fine-tuning, for methods that prune what fine-tuning changed. seed starts the draws of random methods.
    folder keeps the plan out of memory, and what a run needs to go on after a crash: call again with the unpruned
    model and the same arguments. Raises PrunelabError, before any work, where the model has no adapter or lacks the
    targets, or where calibration set and budget do not fit them; and later at activations or Hessians that cannot be
    used, when a sequential method has already pruned the blocks before.
    """
    if not isinstance(method, WeightPruner):
        raise PrunelabError(f"{method.name} is a {method.role}, which prunes no weights")
    if method.needs_base != (base is not None):
        says = "needs base=, the model before fine-tuning" if method.needs_base else "reads no base model; leave it out"
        raise PrunelabError(f"{method.name} {says}")
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    adapter = weight_adapter(model)
    targets = _targets(method, adapter, budget)
    samples = _samples(method, adapter, targets, calibration)
    header: dict[str, Any] = {
        "method": repr(method),
        "budget": str(budget),
        "seed": seed,
        "model": type(model).__qualname__,
    }
    work = Work(None) if folder is None else Work(folder, {**header, **_identity(model, samples, base)})
    base_adapter = None if base is None else weight_adapter(base)
    engine = Engine(method, adapter, targets, budget, samples, base_adapter, seed, work, progress)

    rotations = method.rotations(adapter.widths(), torch.Generator().manual_seed(seed))
    header["config"] = adapter.config()
    before, prunable, training = size_of(model), prunable_of(adapter, targets), model.training
    model.eval()
    try:
        if rotations:
            adapter.rotate(rotations)
        engine.go()
        with torch.no_grad():
            header["stock"] = adapter.finish()
    finally:
        model.train(training)
    plan = WeightPlan(header, engine.targets, work.plan, rotations)
    plan.header["report"] = asdict(report(engine.tally, before, size_of(model), prunable))
    if work.folder is not None:
        plan.save_header(work.folder)
        work.close()
    return plan


# -- before any work -------------------------------------------------------------------------------------------------


def check(method: WeightPruner, model: nn.Module) -> None:
    """Raises PrunelabError where the method cannot run on the model, whatever the budget."""
    _targets(method, weight_adapter(model), Budget(1.0))


def _targets(method: WeightPruner, adapter: WeightAdapter, budget: Budget) -> list[Target]:
    """What the method prunes in this model, block by block. Refuses units it lacks and budgets that cannot fit."""
    found = []
    for unit in method.units:
        of_unit = adapter.targets(unit)
        if not of_unit:
            raise PrunelabError(f"{method.name} prunes {unit}, and this {type(adapter.model).__name__} has none")
        found += [target for target in of_unit if method.covers(target)]
    if not found:
        raise PrunelabError(f"{method.name} covers none of this model's targets; change its options")
    if len(budget.amounts) not in (1, len(adapter.blocks)):
        raise PrunelabError(f"the budget names {len(budget.amounts)} amounts for {len(adapter.blocks)} blocks")
    if method.quantises != (budget.unit == "bits"):
        wanted = "bits a weight, such as 3bits" if method.quantises else "what stays, not bits"
        raise PrunelabError(f"{method.name} takes a budget in {wanted}; it got {budget}")
    if min(budget.amounts) == 0 and budget.unit != "removed":
        raise PrunelabError(f"{method.name} would remove everything under {budget}; keep more")
    adapter.refuse_tied(found)
    if budget.unit == "pattern":  # no allocation makes a row divisible, so that this is known now
        check_budgets(found, [budget.at(target.block) for target in found])
    found.sort(key=lambda target: target.block if target.block >= 0 else len(adapter.blocks))
    return found


def _samples(
    method: WeightPruner,
    adapter: WeightAdapter,
    targets: Sequence[Target],
    calibration: Tensor | Sequence[Tensor] | None,
) -> list[Tensor]:
    precomputes = type(method).precompute is not WeightPruner.precompute
    if not precomputes and not any(method.statistics(unit) for unit in method.units):
        return []
    samples = [] if calibration is None else list(calibration)
    if not samples:
        raise PrunelabError(
            f"{method.name} needs a calibration set; give token ids, see prunelab.common.weights.windows"
        )
    device = next(adapter.model.parameters()).device
    for sample in samples:
        adapter.check_sample(sample)
    return [sample.to(device) for sample in samples]


def _identity(model: nn.Module, samples: Sequence[Tensor], base: nn.Module | None) -> dict[str, str]:
    """Hashes by which an interrupted run knows its own."""
    calibration = fingerprint({str(i): sample for i, sample in enumerate(samples)})
    found = {"weights": fingerprint(model, SAMPLED), "calibration": calibration}
    return found if base is None else {**found, "base": fingerprint(base, SAMPLED)}


# -- sizes -----------------------------------------------------------------------------------------------------------


def size_of(model: nn.Module) -> tuple[int, int]:
    """Parameters and their bytes."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def prunable_of(adapter: WeightAdapter, targets: Sequence[Target]) -> int:
    """Parameters of all targets, each counted once where weights lie in structures that are targets as well."""
    structures = [target for target in targets if not target.loose]
    within = {id(parameter) for target in structures for parameter in adapter.structure(target).values()}
    loose = [t for t in targets if t.loose and id(adapter.parameter(t)) not in within]
    return sum(target.parameters for target in (*structures, *loose))


def report(tally: Tally, before: tuple[int, int], after: tuple[int, int], prunable: int) -> WeightReport:
    each = before[1] / before[0]  # bytes
    left = prunable - tally.removed
    dense = each * (left - tally.quantised)
    bits = 8 * (dense + tally.code_bytes) / left if tally.quantised else 0.0
    packed = round(after[1] - each * tally.quantised) + tally.code_bytes
    counts = (prunable, tally.removed, tally.zeroed, tally.reset)
    return WeightReport(before[0], after[0], before[1], packed, *counts, bits=round(bits, 6))
