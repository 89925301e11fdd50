"""Budgets of token pruners that meet a cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs.meter import macs
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner


def fit(
    budget_at: Callable[[float], Budget], cost_at: Callable[[Budget], float], target: float, *, tolerance: float = 0.002
) -> Budget:
    """The budget of a one-parameter family whose cost comes nearest to `target`, by bisection.

    budget_at maps a level in [0, 1] (1 keeps all) to a budget, cost_at a budget to its cost, which must not fall as
    the level rises. Outside the family's range its nearest end is returned: read the cost before comparing.
    """
    low, high = 0.0, 1.0
    most = cost_at(budget_at(high))
    best, best_error = budget_at(high), abs(most - target)
    for _ in range(16):
        middle = (low + high) / 2
        budget = budget_at(middle)
        value = cost_at(budget)
        if abs(value - target) < best_error:
            best, best_error = budget, abs(value - target)
        if best_error <= tolerance * target:
            break
        low, high = (middle, high) if value < target else (low, middle)
    return best


def match(method: TokenPruner, model: nn.Module, budget: Budget, calibration: Tensor | None = None) -> Budget:
    """A budget in `macs` or `cost` (share of the dense MACs) as one the method plans with; others pass unchanged.

    The MACs matched include the method's scoring. Methods whose counts depend on the input are run on the
    `calibration` batch for every trial.
    """
    if budget.unit not in ("macs", "cost"):
        return budget
    with applied(method, model, 1.0) as handle:
        info, sites, example = handle.adapter.info, len(handle.application.sites), handle.adapter.example()
    dense = macs(model, example)
    target = budget.amounts[0] * (dense if budget.unit == "cost" else 1)

    def cost_at(trial: Budget) -> float:
        with applied(method, model, trial) as handle, torch.no_grad():
            if method.adaptive:
                if calibration is None:
                    raise PrunelabError(f"{method.name} needs calibration inputs to match a cost")
                model(calibration)
            return handle.macs()

    return fit(lambda level: method.family(level, sites, info), cost_at, target)


def share_kept(tokens: Sequence[float], text: int, visual: int) -> float:
    """The share of the visual tokens in the sequences that the layers see, in the mean over layers."""
    return (sum(tokens) / len(tokens) - text) / visual


def match_mean(method: TokenPruner, model: nn.Module, budget: Budget) -> Budget:
    """The method's own budget under which the layers of an image language model see as many visual tokens of its
    standard prompt, in the mean, as `budget` keeps. It follows from shapes; how many a method leaves that looks at what
    an image shows is then an estimate.
    """
    with torch.device("meta"):
        twin = type(model)(model.config)
    adapter = adapter_for(twin)
    if not isinstance(adapter, VisionLanguage):
        raise PrunelabError(f"budgets are matched by their mean on image language models; {adapter.family} is none")
    example = adapter.prompt(0)
    visual = adapter.visual_tokens(example)
    wanted = budget.count(visual) / visual
    with applied(method, twin, 1.0) as handle:
        sites = len(handle.application.sites)

    def kept(trial: Budget) -> float:
        try:
            with applied(method, twin, trial) as handle:
                tokens = [seen for seen, _ in handle.report(example).tokens]
        except PrunelabError:  # less than the method can work with
            return 0.0
        return share_kept(tokens, example.text, visual)

    best = fit(lambda level: method.family(level, sites, adapter.info), kept, wanted, tolerance=0.5 / visual)
    if (short := abs(kept(best) - wanted) * visual) > max(2.0, 0.02 * visual):
        raise PrunelabError(
            f"{method.name} comes no nearer than {short:.0f} tokens to a mean of {wanted * visual:.0f} of {visual}; set"
            " its layers"
        )
    return best
