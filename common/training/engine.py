"""One engine for every training method: attach, train, decide, and carry the decisions out as one-shot pruning does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.training import peft, trainer
from prunelab.common.training.batches import Batches
from prunelab.common.training.method import Batch, Training, TrainingMethod
from prunelab.common.training.parametrizations import LowRank, put_on
from prunelab.common.training.recipe import Recipe, plain
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.checkpoints import fingerprint
from prunelab.common.weights.plan import PLAN, Tally, WeightPlan, packed
from prunelab.common.weights.pruning import SAMPLED, prunable_of, report, size_of
from prunelab.common.weights.targets import Decision, Target


def train(
    method: Method,
    model: nn.Module,
    budget: Budget | float | str,
    data: Sequence[Any] | Callable[[int], Batch],
    recipe: Recipe,
    *,
    objective: Callable[[nn.Module, Batch], Any] | None = None,
    services: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    threads: int | None = None,
    accelerator: Any = None,
    eight: bool = False,
    progress: bool = True,
) -> WeightPlan:
    """Train a model under `method` until it holds `budget`, in place, and return the plan, which repeats what came of
    it on the model as it was. Its header holds the training log under `log`: by steps the loss (smoothed), the
    parameters that masks leave, what `evaluate` gives, and seconds.

    Parameters
    ----------
    model
        Of transformers, timm or torch; of `peft`, whose factors are then those that train. They are merged in the end,
        so that the model underneath holds the result.
    data
        Samples to draw batches from (see `Batches`), or a function that gives the batch of a number.
    objective
        What the model and a batch give, with its `loss`; by default `model(**batch)`, as models of transformers have
        it.
    services
        Second models that the method names, such as `teacher`.
    evaluate
        The model's quality on held-out data, for the training log.
    folder
        Keeps checkpoints, so that the same call on the untrained model goes on after an interruption, and in the end
        the plan.
    accelerator
        An `accelerate.Accelerator`, for devices, precision and accumulated gradients.
    eight
        Hold the weights on which the method puts low-rank factors in codes of eight bits while it trains. They come
        back rounded, also where the training fails: start again from the model as it was.

    Raises
    ------
    PrunelabError
        Before any work, where the model lacks what the method prunes, or schedule, budget and training do not fit each
        other; and where the loss is no longer finite.
    """
    if not isinstance(method, TrainingMethod):
        raise PrunelabError(f"{method.name} is a {method.role}, which does not train")
    budget = Budget.of(budget)
    services = dict(services or {})
    missing = [name for name in method.services if name not in services]
    if missing:
        raise PrunelabError(f"{method.name} needs the service '{missing[0]}'; give services={{'{missing[0]}': ...}}")
    batches = data if callable(data) else Batches(data, recipe.batch, seed)
    own = peft.base(model)
    with peft.without_factors(own):
        adapter = weight_adapter(own)
        targets, linears = method.targets(adapter), adapter.targets("linear")
        before, prunable, config = size_of(own), prunable_of(adapter, targets), adapter.config()
    training = Training(
        adapter, targets, linears, budget, method.schedule(recipe.steps), recipe.steps,
        objective or _forward, services, torch.Generator().manual_seed(seed),
    )  # fmt: skip
    training.schedule.fits(recipe.steps)
    training.schedule.budget(0, budget)  # refuses what it cannot approach
    header = {"method": repr(method), "budget": str(budget), "seed": seed, "model": type(own).__qualname__}
    identity = {**header, "recipe": plain(asdict(recipe)), "weights": fingerprint(model, SAMPLED)}
    folder = None if folder is None else Path(folder)
    identity |= {"eight": True} if eight else {}
    if folder is not None and (folder / PLAN).exists():
        return _repeated(folder, identity, model)

    header |= identity | {"config": config}
    names, learns = dict(model.named_parameters()), {n: p.requires_grad for n, p in model.named_parameters()}
    job = _Job(method, training, model, recipe, batches, evaluate, before[0], accelerator, eight)
    was_training = model.training
    try:
        log = trainer.run(job, recipe, folder, identity, threads, job, accelerator, progress).curve
        training.step = recipe.steps
        model.eval()
        decisions = method.finish(training)
        job.take_off(True)
    finally:
        job.take_off(False)
        for name, parameter in names.items():
            parameter.requires_grad_(learns[name])
        model.train(was_training)
    if own is not model:
        job.touched |= {id(m.base_layer.weight) for m in own.modules() if peft.has_factors(m)}
        model.merge_and_unload()  # type: ignore[operator]
    kept = _with_values(decisions, training, job.touched)
    tally = Tally()
    plan = _carried_out(method, adapter, kept, header, tally)
    plan.header["log"] = log
    plan.header["report"] = asdict(
        replace(report(tally, before, size_of(own), prunable), average_parameters=job.average)
    )
    if folder is not None and (accelerator is None or accelerator.is_main_process):
        plan.save(folder)
        (folder / trainer.CHECKPOINT).unlink(missing_ok=True)
    return plan


@dataclass
class _Job(trainer.Observer):
    """What the loop trains, and what it calls around its steps."""

    method: TrainingMethod
    training: Training
    model: nn.Module
    recipe: Recipe
    batches: Callable[[int], Batch]
    held_out: Callable[[nn.Module], dict[str, float]] | None
    dense: int
    accelerator: Any
    eight: bool = False
    off: Callable[[bool], None] = field(default=lambda keep: None)
    around: ExitStack = field(default_factory=ExitStack)
    touched: set[int] = field(default_factory=set)  # parameters that learn at some step, or had something put on
    drawn: int = 0  # batches of this step
    absent: Tensor | float = 0.0  # parameters at zero, summed over steps

    @property
    def name(self) -> str:
        return self.method.name

    def build(self) -> nn.Module:
        self.training.attachments = list(self.method.attach(self.training))
        under = {id(parameter) for parameter in self.training.model.parameters()}
        if self.eight and not any(isinstance(each.module, LowRank) for each in self.training.attachments):
            raise PrunelabError(
                f"{self.name} puts no low-rank factors on plain weights, so that none can be held in eight bits"
            )
        self.off = put_on(self.training.adapter, self.training.attachments, self.eight)
        self.learn = {name: p for name, p in self.training.model.named_parameters() if p.requires_grad}
        self.touched = {id(p) for name, p in self.training.model.named_parameters() if name.endswith(".original")}
        self.touched &= under
        self.around.enter_context(self.method.around(self.training))
        self.method.start(self.training)
        return self.model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.recipe.optimizer(model, self.method.options)

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        batch = self.next_batch(generator)
        inputs = {**batch, **self.method.arguments()}
        outputs = self.training.objective(model, inputs)
        teacher = self.training.services.get("teacher")
        if teacher is not None:
            with torch.no_grad():
                teacher = self.training.objective(teacher.eval(), inputs)
        return self.method.loss(batch, outputs, teacher, self.training)

    def next_batch(self, generator: torch.Generator) -> Batch:
        """The next batch of this step and process, on the device."""
        processes, rank, accumulated, device = 1, 0, 1, next(self.training.model.parameters()).device
        if self.accelerator is not None:
            processes, rank = self.accelerator.num_processes, self.accelerator.process_index
            accumulated = self.accelerator.gradient_accumulation_steps
        number = (self.training.step * accumulated + self.drawn) * processes + rank
        self.drawn += 1
        return _moved(self.batches(number), device)

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        told = {} if self.held_out is None else self.held_out(model)
        return told | {"parameters": self.dense - float(self.training.removed())}

    def take_off(self, keep: bool) -> None:
        self.around.close()
        off, self.off = self.off, lambda keep: None
        off(keep)

    @property
    def average(self) -> float:
        """Parameters of the model, the mean over steps."""
        return self.dense - float(self.absent) / self.recipe.steps

    # -- around the steps --------------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        self.training.step, self.drawn = step, 0
        self.method.before_step(self.further, self.training)
        self.absent = self.absent + self.training.removed()
        chosen = set(self.method.trainable(list(self.learn), self.training))
        for name, parameter in self.learn.items():
            parameter.requires_grad_(name in chosen)
            if name in chosen:
                self.touched.add(id(parameter))

    def further(self) -> Batch:
        """A batch at random, beside those of the steps."""
        number = int(torch.randint(2**31, (), generator=self.training.rng))
        return _moved(self.batches(number), next(self.training.model.parameters()).device)

    def after_backward(self, step: int) -> None:
        with torch.no_grad():
            self.method.after_backward(self.training)

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            self.method.after_step(self.training)

    def state(self) -> dict[str, Any]:
        touched = [name for name, p in self.training.model.named_parameters() if id(p) in self.touched]
        return {
            "memory": self.training.memory, "rng": self.training.rng.get_state(), "absent": self.absent,
            "touched": touched,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        parameters, device = dict(self.training.model.named_parameters()), next(self.training.model.parameters()).device
        self.training.memory = {name: tensor.to(device) for name, tensor in state["memory"].items()}
        self.training.rng.set_state(state["rng"])
        self.absent = state["absent"]
        self.touched |= {id(parameters[name]) for name in state["touched"]}


def _forward(model: nn.Module, batch: Batch) -> Any:
    return model(**batch)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


# -- decisions -------------------------------------------------------------------------------------------------------


def _with_values(
    decisions: Mapping[str, Decision], training: Training, touched: Collection[int]
) -> list[tuple[Target, Decision]]:
    """Every decision with the values that its target has learned, and one that keeps all for every further weight that
    learned. Weights come before the structures they lie in, which change their shapes; hidden channels lie in all."""
    adapter = training.adapter
    known = {target.name: target for target in training.targets}
    unknown = decisions.keys() - known.keys()
    if unknown:
        raise PrunelabError(f"the method decides on {min(unknown)}, which is none of its targets")
    kept: dict[str, tuple[Target, Decision]] = {}
    for target in (*adapter.targets("linear"), *adapter.targets("tensor")):
        decision = decisions.get(target.name) if known.get(target.name) == target else None
        if id(adapter.parameter(target)) in touched:
            values = {"weight": adapter.weights(target)["weight"].clone()}
            if decision is None:
                decision = Decision(torch.ones(target.shape, dtype=torch.bool), values)
            elif decision.code is None:
                decision = replace(decision, values=values | dict(decision.values))
        if decision is not None:
            kept[target.name] = (target, decision)
    structures = [(t, decisions[t.name]) for t in training.targets if not t.loose and t.name in decisions]
    return sorted([*kept.values(), *structures], key=lambda e: (e[0].unit == "hidden", e[0].block, not e[0].loose))


def _carried_out(
    method: TrainingMethod,
    adapter: WeightAdapter,
    decisions: Sequence[tuple[Target, Decision]],
    header: dict[str, Any],
    tally: Tally,
) -> WeightPlan:
    """Prune the trained model, and return the plan that says how."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for target, decision in decisions:
        if decision.kept == 0 and target.unit not in ("layers", "tensor"):
            raise PrunelabError(f"{method.name} would remove everything in {target.name}; keep more")
        if not all(bool(value.isfinite().all()) for value in decision.values.values()):
            raise PrunelabError(f"{method.name} gives {target.name} NaN or infinite values; lower the rate")
        adapter.check(target, decision)
    decisions = [(target, decision.like(adapter.weights(target))) for target, decision in decisions]
    for target, decision in decisions:
        tensors = {f"{target.name}|{role}": tensor for role, tensor in packed(decision).items()}
        blocks.setdefault(target.block, {}).update(tensors)
    for target, decision in decisions:
        tally.write(adapter, target, decision)
    return WeightPlan({**header, "stock": adapter.finish()}, [target for target, _ in decisions], blocks)


def _repeated(folder: Path, identity: Mapping[str, Any], model: nn.Module) -> WeightPlan:
    """The finished plan of a folder, carried out on the model."""
    plan = WeightPlan.load(folder)
    if {key: plan.header.get(key) for key in identity} != dict(identity):
        raise PrunelabError(f"{folder} holds another finished training; choose an empty folder")
    own = peft.base(model)
    if own is not model:
        model.unload()  # type: ignore[operator]  # the plan holds what its factors became
    plan.apply(own)
    return plan
