"""One engine for every weight-pruning method: calibrate, score, allocate, mask, update, apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import at_work
from prunelab.common.core.method import Method
from prunelab.common.weights.adapters import Model, weight_adapter
from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.checkpoints import Work, fingerprint
from prunelab.common.weights.corpora import Corpus, Objective, calls, corpus, loss_of, named
from prunelab.common.weights.engine import Engine, check_budgets
from prunelab.common.weights.plan import EARLIER, Tally, WeightPlan, WeightReport, note, plans_of
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.rounds import Rounds, Tune, tuned
from prunelab.common.weights.targets import Target

SAMPLED = 997  # every so many-th weight enters a model's fingerprint


def prune(
    method: Method,
    model: Model,
    budget: Budget | float | str,
    calibration: Any = None,
    *,
    base: nn.Module | None = None,
    objective: Objective = None,
    rounds: Rounds | int | None = None,
    tune: Tune | None = None,
    learned: nn.Module | Mapping[str, Tensor] | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    progress: bool = True,
) -> WeightPlan:
    """Prune a model's weights in place by `method` under `budget`, and return the plan, which repeats it elsewhere.

    Parameters
    ----------
    method
        A `WeightPruner`.
    model
        A module, several by name, or whatever has such as its `components` (a pipeline).
    budget
        What stays, or bits a weight; for components `Budget.by({"text_encoder": 0.525, "unet": 0.65})`.
    calibration
        Token ids or images in any of the shapes that `prunelab.common.weights.corpora.corpus` knows; several such by
        name, for methods that read named corpora, or for the components of a model.
    base
        The model before fine-tuning, for methods that prune what fine-tuning changed.
    objective
        What losses and gradients are of: `lm` (the model's own, the default), `labels`, `contrastive`, or a function of
        the model and a batch of items.
    rounds
        How many rounds lead to the budget, in place of the method's own number.
    tune
        Called with the model and the round's number after every round, to train it; what is pruned stays at zero.
        The plan then holds what was cut, and only a saved model the weights.
    learned
        What the method learned on another model with targets of the same shapes (`WeightPlan.learned`).
    seed
        Starts the draws of random methods.
    folder
        Keeps the plan out of memory, and what a run needs to go on after a crash: call again with the unpruned model
        and the same arguments. Gradients of the model's loss then flow one
        block at a time, in memory that is flat in depth, with a state a token and block on disk.

    Raises
    ------
    PrunelabError
        Before any work, where the model has no adapter or lacks the targets, or where calibration set and budget do not
        fit them; and later at activations or Hessians that cannot be used, when a sequential method has already pruned
        the blocks before.
    """
    if not isinstance(method, WeightPruner):
        raise PrunelabError(f"{method.name} is a {method.role}, which prunes no weights")
    if method.needs_base != (base is not None):
        says = "needs base=, the model before fine-tuning" if method.needs_base else "reads no base model; leave it out"
        raise PrunelabError(f"{method.name} {says}")
    budget = Budget.of(budget)
    for given in (model, base):
        refuse_hosts(given)
    adapter = weight_adapter(model, budget.names)
    targets = _targets(method, adapter, budget)
    way = method.rounds if rounds is None else Rounds(rounds) if isinstance(rounds, int) else rounds
    amounts = _amounts(way, budget, targets)
    streams, corpora = _calibration(method, adapter, calibration)
    part = _learner(method, targets, learned, seed, next(adapter.model.parameters()).device)
    header: dict[str, Any] = {
        "method": repr(method),
        "budget": str(budget),
        "seed": seed,
        "model": type(model).__qualname__,
    }
    if len(amounts) > 1 or tune is not None:
        header |= {"rounds": repr(way), "tuned": tune is not None}
    identity = _identity(adapter.model, [s for samples in streams.values() for s in samples], base)
    work = Work(None) if folder is None else Work(folder, {**header, **identity})
    base_adapter = None if base is None else weight_adapter(base)
    rotations = method.rotations(adapter.widths(), torch.Generator().manual_seed(seed))
    header["config"] = adapter.config()
    whole = adapter.model
    before, prunable, training = size_of(whole), prunable_of(adapter, targets), whole.training
    loss = loss_of(adapter, objective, model)
    engine = Engine(
        method, adapter, targets, budget, streams, corpora, loss, base_adapter, seed, work, progress, part,
        learned is not None,
    )  # fmt: skip
    whole.eval()
    try:
        if rotations:
            adapter.rotate(rotations)
        for number, amount in enumerate(amounts[:-1]):
            engine = _round(engine, number, amount, tune)
        engine = replace(engine, budget=budget, work=work, final=True, tally=Tally())
        engine.go()
        if tune is not None:
            tuned(adapter, [pair for pair in _masks(engine) if pair[0].loose], tune, len(amounts) - 1)
        with torch.no_grad():
            header["stock"] = adapter.finish()
    finally:
        whole.train(training)
    if engine.worth:
        header["worth"] = dict(engine.worth)
    earlier, state = plans_of(model), {} if part is None else part.state_dict()
    header["stock"] = header["stock"] and all(plan.header["stock"] for plan in earlier)
    plan = WeightPlan(header, engine.targets, work.plan, rotations, state, earlier)
    note(model, plan)
    plan.header["report"] = asdict(report(engine.tally, before, size_of(adapter.model), prunable))
    if work.folder is not None:
        plan.save_header(work.folder)
        for number, before_it in enumerate(earlier):
            before_it.save(work.folder / f"{EARLIER}{number}")
        work.close()
    return plan


def _round(engine: Engine, number: int, amount: Budget, tune: Tune | None) -> Engine:
    """Take a round before the last, and return the engine of what comes next."""
    work, adapter = engine.work.round(number), engine.adapter
    engine = replace(engine, budget=amount, work=work, final=False)
    if work.is_finished:
        for block in [*range(len(adapter.blocks)), -1]:
            work.was_decided(block)
        for target, decision in WeightPlan({}, engine.targets, work.plan).decisions():
            adapter.write(target, decision)
        if (state := work.tuned()) is not None:
            adapter.model.load_state_dict(state)
    else:
        engine.go()
        if tune is not None:
            tuned(adapter, _masks(engine), tune, number)
        work.finished(None if tune is None else adapter.model.state_dict())
    return replace(engine, alive={target.name: mask for target, mask in _masks(engine)}, learned=engine.learned)


def _masks(engine: Engine) -> list[tuple[Target, Tensor]]:
    return [(target, d.mask) for target, d in WeightPlan({}, engine.targets, engine.work.plan).decisions()]


# -- before any work -------------------------------------------------------------------------------------------------


def check(method: WeightPruner, model: nn.Module) -> None:
    """Raises PrunelabError where the method cannot run on the model, whatever the budget."""
    refuse_hosts(model, present=False)
    _targets(method, weight_adapter(model), Budget(8, "bits") if method.quantises else Budget(1.0))


def refuse_hosts(model: Any, present: bool = True) -> None:
    """Stop at a model whose weights something else holds, wraps or stores in its own way: pruning would miss them, or
    prune what is none of the model's. present: its weights must be there."""
    if not isinstance(model, nn.Module):
        return
    if hasattr(model, "_orig_mod"):
        raise PrunelabError("the model is compiled; prune what it was made of (`_orig_mod`), and compile that anew")
    if len({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}) > 1:
        raise PrunelabError("the model is spread over several devices; load it on one, without a device map")
    for other in at_work(model):
        if other.role in ("token_pruner", "cache_pruner"):
            raise PrunelabError(f"the model runs {other.name} now; prune its weights outside of that `with` block")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.") or hasattr(module, "lora_A"):
            raise PrunelabError(f"{name or 'the model'} has adapters of peft; merge them first (`merge_and_unload`)")
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" and (present or hasattr(model, "_hf_hook")):
            raise PrunelabError(f"{name} is not in memory; load the model whole, without offloading")
        if name.rpartition(".")[2] in ("weight_g", "weight_v") or ".parametrizations." in f".{name}":
            where = name.partition(".parametrizations.")[0].removesuffix("_g").removesuffix("_v")
            raise PrunelabError(f"{where} is computed from other parameters; take the parametrization off first")
        if parameter.is_floating_point() and parameter.element_size() < 2:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise PrunelabError(f"{name} is stored as {kind}; bring the model to bfloat16 or wider first")
        if not parameter.dtype.is_floating_point:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise PrunelabError(f"{name} holds {kind} codes; prune the model in floating point, and quantise it then")


def _targets(method: WeightPruner, adapter: WeightAdapter, budget: Budget) -> list[Target]:
    """What the method prunes in this model, block by block. Refuses units it lacks and budgets that cannot fit."""
    if method.traces and adapter.graph() is None:
        raise PrunelabError(
            f"{method.name} follows activations back layer by layer, and the layers of a {type(adapter.model).__name__}"
            " cannot be traced; prune a convolutional network"
        )
    results = []
    for unit in method.units:
        of_unit = adapter.targets(unit)
        if not of_unit:
            raise PrunelabError(f"{method.name} prunes {unit}, and this {type(adapter.model).__name__} has none")
        results += [target for target in of_unit if method.covers(target)]
    if not results:
        raise PrunelabError(f"{method.name} covers none of this model's targets; change its options")
    if not budget.names and len(budget.amounts) not in (1, len(adapter.blocks)):
        raise PrunelabError(f"the budget names {len(budget.amounts)} amounts for {len(adapter.blocks)} blocks")
    if method.quantises != (budget.unit == "bits"):
        wanted = "bits a weight, such as 3bits" if method.quantises else "what stays, not bits"
        raise PrunelabError(f"{method.name} takes a budget in {wanted}; it got {budget}")
    if min(budget.amounts) == 0 and budget.unit != "removed":
        raise PrunelabError(f"{method.name} would remove everything under {budget}; keep more")
    adapter.refuse_tied(results)
    if budget.unit == "pattern":  # no allocation makes a row divisible, so that this is known now
        check_budgets(results, [budget.at(t.component if budget.names else t.block) for t in results])
    results.sort(key=lambda target: target.block if target.block >= 0 else len(adapter.blocks))
    return results


def _amounts(way: Rounds, budget: Budget, targets: Sequence[Target]) -> list[Budget]:
    """The budgets of all rounds."""
    amounts = way.budgets(budget)
    stays = {target.unit for target in targets if target.whole or target.unit == "experts"}
    if len(amounts) > 1 and stays:
        raise PrunelabError(f"{' and '.join(sorted(stays))} leave at once; rounds are for weights, heads and channels")
    return amounts


def _learner(
    method: WeightPruner,
    targets: Sequence[Target],
    learned: nn.Module | Mapping[str, Tensor] | None,
    seed: int,
    device: torch.device,
) -> nn.Module | None:
    """The method's learned part, on the model's device: new, drawn by the seed, or with what it learned before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        part = method.build(targets)
    part = None if part is None else part.to(device)
    if learned is None:
        return part
    if part is None:
        raise PrunelabError(f"{method.name} learns nothing; leave `learned` out")
    state = learned.state_dict() if isinstance(learned, nn.Module) else learned
    own = {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
    if own != {name: tuple(tensor.shape) for name, tensor in state.items()}:
        raise PrunelabError(f"what {method.name} learned is for targets of other shapes; train it on this model")
    part.load_state_dict(state)
    return part


def _calibration(
    method: WeightPruner, adapter: WeightAdapter, calibration: Any
) -> tuple[dict[str, list[Any]], dict[str, Corpus]]:
    """What streams through each chain of blocks, by its component, and the corpora by name; nothing where the method
    reads none."""
    if not method.calibrated:
        return {chain.component: [] for chain in adapter.chains}, {}
    chains = {chain.component: chain.adapter for chain in adapter.chains}
    device = next(adapter.model.parameters()).device
    parts = named(calibration)
    several = "" not in chains
    if several and (strange := parts.keys() - chains.keys()):
        raise PrunelabError(
            f"'{min(strange)}' is no component to prune; give calibration sets for {', '.join(chains)} by name"
        )
    results = {
        name: (calls if name in chains and chains[name].by_call else corpus)(part).to(device)
        for name, part in parts.items()
    }
    needs_calibration = any(method.statistics(unit) for unit in method.units)
    measured = [name for name in chains if method.measures(name)]
    for name in measured if several and needs_calibration else [""]:
        if not any(
            results[key].items for key in ([name] if several and needs_calibration else results) if key in results
        ):
            of = f" for {name}" if name else ""
            raise PrunelabError(
                f"{method.name} needs a calibration set{of}; give token ids, see prunelab.common.weights.windows"
            )
    streams = {name: results[name].sequences if name in results else [] for name in chains}
    if not several:
        streams = {"": [sequence for part in results.values() for sequence in part.sequences]}
    streams = {name: method.prepared(samples) for name, samples in streams.items()}
    for name, samples in streams.items():
        for sample in samples:
            chains[name].check_sample(sample)
    return streams, results


def _identity(model: nn.Module, samples: Sequence[Any], base: nn.Module | None) -> dict[str, str]:
    """Hashes by which an interrupted run knows its own."""
    calibration = fingerprint(_leaves(samples))
    results = {"weights": fingerprint(model, SAMPLED), "calibration": calibration}
    return results if base is None else {**results, "base": fingerprint(base, SAMPLED)}


def _leaves(samples: Sequence[Any]) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for i, sample in enumerate(samples):
        if isinstance(sample, Tensor):
            results[str(i)] = sample
        else:
            results |= {f"{i}|{j}": leaf for j, leaf in enumerate(tree_leaves(sample)) if isinstance(leaf, Tensor)}
    return results


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
