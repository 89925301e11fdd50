"""Training with a token pruner at work: of its learned parts, of the model that it works on, or of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.learned import PARTS, fitting
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.training import trainer
from prunelab.common.training.batches import Batches
from prunelab.common.training.lessons import Learns, lesson, prepared
from prunelab.common.training.recipe import Recipe, plain


def train(
    method: TokenPruner,
    model: nn.Module,
    budgets: Sequence[Budget | float | str] | Budget | float | str,
    data: Sequence[Any],
    recipe: Recipe,
    *,
    learns: Learns = "both",
    objective: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> nn.Module | None:
    """Train a model with a token pruner at work, in place, and return the method's learned parts, None where it has
    none.

    Parameters
    ----------
    budgets
        One, or several that each batch passes under; the loss is the mean.
    data
        Samples to draw batches from (see `Batches`), at least as many as a step reads.
    learns
        `parts` alone, with the model frozen, the `model` alone, or `both`.
    objective
        What the model gives of a batch, with its `loss`; by default `model(**batch)`. Where tokens leave, labels no
        longer stand beside them, and the loss has to be taken of the logits.
    folder, accelerator, seed
        As of `training.engine.train`.
    """
    listed = list(budgets) if isinstance(budgets, Sequence) and not isinstance(budgets, str) else [budgets]
    if not listed:
        raise PrunelabError("there is no budget to train under; give at least one")
    if len(data) < recipe.batch:
        raise PrunelabError(
            f"{len(data)} samples are fewer than the {recipe.batch} of a step; give more of them or a smaller batch"
        )
    learned = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    carried = getattr(model, PARTS, None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prepared(method, model, learns)
    job = _Job(method, model, [Budget.of(b) for b in listed], Batches(data, recipe.batch, seed), recipe, objective)
    header = {"method": repr(method), "budgets": [str(b) for b in job.budgets], "seed": seed, "learns": learns}
    was_training = model.training
    try:
        trainer.run(
            job, recipe, None if folder is None else Path(folder), header | {"recipe": plain(asdict(recipe))},
            observer=job, accelerator=accelerator, progress=progress,
        )  # fmt: skip
    finally:
        parts = getattr(model, PARTS, None)
        if carried is None:
            model._modules.pop(PARTS, None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learned.get(name, True))
        model.train(was_training)
    return None if parts is None else fitting(method, adapter_for(model).info, parts.eval(), None)


@dataclass
class _Job(trainer.Observer):
    """What the loop trains."""

    method: TokenPruner
    model: nn.Module
    budgets: Sequence[Budget]
    batches: Batches
    recipe: Recipe
    objective: Callable[[nn.Module, Mapping[str, Any]], Any] | None
    step: int = 0

    @property
    def name(self) -> str:
        return self.method.name

    def build(self) -> nn.Module:
        return self.model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.recipe.optimizer(model)

    def before_step(self, step: int) -> None:
        self.step = step

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        device = next(self.model.parameters()).device
        batch = {name: value.to(device) for name, value in self.batches(self.step).items()}

        def outputs(net: nn.Module) -> Any:
            return net(**batch) if self.objective is None else self.objective(net, batch)

        return lesson(self.method, self.model, self.budgets, outputs, seed=self.step)

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        return {}
