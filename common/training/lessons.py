"""One lesson with a token pruner at work, and what learns in it; the loop around lessons is `training.tokens`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.learned import PARTS
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner

Objective = Callable[[nn.Module], Any]
Learns = Literal["parts", "model", "both"]


def lesson(
    method: TokenPruner,
    model: nn.Module,
    budgets: Sequence[Budget],
    objective: Objective,
    seed: int = 0,
    parts: nn.Module | None = None,
) -> Tensor:
    """The loss of one batch with the method at work, the mean over budgets, each of which is a pass of its own.

    objective: runs the model on the batch and gives its outputs, with a `loss`. parts: the method's learned ones, where
    the model does not carry them. Where the method `distils`, the
    unpruned model runs first, without gradients.
    """
    taught = None
    if method.distils:
        with torch.no_grad():
            taught = objective(model)
    losses = []
    for budget in budgets:
        with applied(method, model, budget, parts=parts, seed=seed) as handle:
            outputs = objective(model)
            losses.append(method.loss(outputs, taught, handle.state, budget))
    return torch.stack(losses).mean()


def prepared(method: TokenPruner, model: nn.Module, learns: Learns) -> nn.Module:
    """The model with the method's parts among its modules, new ones where it carries none; of all parameters those
    learn that are to."""
    parts = method.build(adapter_for(model).info)
    if parts is None and learns == "parts":
        raise PrunelabError(f"{method.name} has no learned parts; train the model under it")
    if parts is not None and not hasattr(model, PARTS):
        model.add_module(PARTS, parts)
    own = {id(parameter) for parameter in (() if parts is None else getattr(model, PARTS).parameters())}
    for parameter in model.parameters():
        parameter.requires_grad_(learns == "both" or (id(parameter) in own) == (learns == "parts"))
    return model
