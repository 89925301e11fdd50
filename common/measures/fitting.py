"""Fine-tuning for a measurement: a causal language model on samples, whole or by low-rank adapters, and what a data
selector leaves of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from math import ceil
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data.tuning import Piece
from prunelab.common.data_selection.engine import Handle, select
from prunelab.common.data_selection.gradients import Checkpoint
from prunelab.common.data_selection.losses import counted
from prunelab.common.data_selection.role import DataSelector
from prunelab.common.data_selection.signals import GRADES
from prunelab.common.training import trainer
from prunelab.common.training.batches import Batches
from prunelab.common.training.recipe import Recipe

POINTS = 24  # of a training log


@dataclass
class _Job:
    """The training of a model on samples, as the loop sees it."""

    model: nn.Module
    samples: Sequence[Any]
    recipe: Recipe
    seed: int
    name: str = "tune"
    numbers: Any = field(default_factory=count)

    @cached_property
    def batches(self) -> Batches:
        return Batches(self.samples, self.recipe.batch, self.seed)

    def build(self) -> nn.Module:
        return self.model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.recipe.optimizer(model)

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in self.batches(next(self.numbers)).items()}
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        return {}


def trained(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    seed: int,
    rank: int = 0,
    alpha: int = 16,
    accelerator: Any = None,
    progress: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """The model after its training on samples, in eval mode; low-rank adapters, where there is a rank, are merged in
    the end."""
    learner: Any = _with_adapters(model, rank, alpha, dropout) if rank else model
    job = _Job(learner, samples, recipe, seed)
    trainer.run(job, recipe, None, {"seed": seed}, accelerator=accelerator, progress=progress)
    return (learner.merge_and_unload() if rank else learner).eval()


@dataclass
class _Noted(trainer.Observer):
    """Checkpoints of a training, one after each epoch of so many steps."""

    model: nn.Module
    recipe: Recipe
    epoch: int
    optimizer: Any = None
    checkpoints: list[Checkpoint] = field(default_factory=list)

    def after_step(self, step: int) -> None:
        if (step + 1) % self.epoch == 0:
            rates = [self.recipe.rate * self.recipe.factor(each) for each in range(step + 1 - self.epoch, step + 1)]
            self.checkpoints.append(Checkpoint.of(self.model, self.optimizer, fmean(rates)))


@dataclass
class _WarmUp(_Job):
    """A training whose optimiser the observer sees."""

    observer: Any = None

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.observer.optimizer = super().optimizer(model)
        made: torch.optim.Optimizer = self.observer.optimizer
        return made


@contextmanager
def warmed(
    method: DataSelector,
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    seed: int,
    rank: int = 0,
    alpha: int = 16,
    accelerator: Any = None,
    dropout: float = 0.0,
) -> Iterator[tuple[nn.Module, list[Checkpoint]]]:
    """A model as it was warmed up on a drawn part of the samples, as the method wants it (`warm_share`, `warm_epochs`),
    with a checkpoint of every epoch; the model given comes back as it was. `recipe`: all but its length."""
    wanted: Any = method
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    drawn = [samples[i] for i in sorted(order[: max(1, round(wanted.warm_share * len(samples)))].tolist())]
    parts = getattr(accelerator, "gradient_accumulation_steps", 1)
    epoch = ceil(len(drawn) / (recipe.batch * parts))
    steps = wanted.warm_epochs * epoch
    recipe = replace(recipe, steps=steps, check_every=steps)
    learner: Any = _with_adapters(model, rank, alpha, dropout) if rank else copy.deepcopy(model)
    observer = _Noted(learner, recipe, epoch)
    job = _WarmUp(learner, drawn, recipe, seed, "warm-up", observer=observer)
    try:
        trainer.run(job, recipe, None, {"seed": seed}, observer=observer, accelerator=accelerator, progress=False)
        yield learner.eval(), observer.checkpoints
    finally:
        if rank:
            vars(learner.unload()).pop("peft_config", None)  # or else it warns of a second training


def _with_adapters(model: nn.Module, rank: int, alpha: int, dropout: float) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise PrunelabError(
            'low-rank adapters need peft; install it with pip install -e ".[training]", or give rank 0'
        ) from None
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def chosen_before(
    method: DataSelector,
    pieces: Sequence[Piece],
    model: nn.Module,
    budget: Budget,
    seed: int,
    *,
    services: Mapping[str, Any],
    target: Mapping[str, Sequence[Piece]],
    grades: Tensor | None = None,
) -> tuple[list[Any], dict[str, Any], Sequence[int] | None]:
    """The samples that a method leaves for the training, what percent of them and of their tokens that is, and which
    they are, where it leaves whole ones. target: what the data should come to resemble, by name. grades [n, G]: what
    graders gave them."""
    whole: list[Any] = [piece.model_input() for piece in pieces]
    if method.requires() == {"text"}:
        aims = {name: [piece.text for piece in part] for name, part in target.items()}
        result = select(method, [piece.text for piece in pieces], budget, target=aims, seed=seed)
        left: list[Any] = [whole[i] for i in result.indices]
    else:
        graded = whole
        if grades is not None:
            graded = [{**sample, GRADES: given} for sample, given in zip(whole, grades, strict=True)]
        samples = {name: [piece.model_input() for piece in part] for name, part in target.items()}
        read = samples if "gradients" in method.requires() else None
        result = select(method, graded, budget, model=model, target=read, services=services, seed=seed)
        left = [{name: value for name, value in sample.items() if name != GRADES} for sample in result]
    before, after = (sum(int(counted(s["labels"][None]).sum()) for s in samples) for samples in (whole, left))
    kept = {"samples": _percent(len(left), len(whole)), "tokens": _percent(after, before)}
    return left, kept, result.indices if result.plan.tokens is None else None


def chosen_each_batch(handle: Handle) -> dict[str, Any]:
    """What percent of samples and tokens a method left of the batches that it saw."""
    return {
        "samples": _percent(handle.kept_samples, handle.samples),
        "tokens": _percent(int(handle.kept_tokens), int(handle.tokens)),
    }


def _percent(part: float, whole: float) -> dict[str, Any]:
    return {"value": round(100 * part / whole, 3)}
