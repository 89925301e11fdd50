"""Success of a policy in closed-loop episodes of a small simulated arm, its visual tokens pruned or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from prunelab.common.data import arm
from prunelab.common.data.questions import Sample
from prunelab.common.measures.answer import spent
from prunelab.common.measures.bench import Bench
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.apply import Handle, applied
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.act import Act

SEED = 1000  # of the episodes that methods are measured on
COSTS = ("kept", "gmacs", "scoring_gmacs", "saving")


def measure(bench: Bench[Act.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.act`."""
    settings = bench.settings
    model = devices.place(loading.vision_language(bench.ids["model"], bench.config)[0], bench.device)
    adapter = adapter_for(model)
    assert isinstance(adapter, VisionLanguage)
    table = arm.tables("test", settings.samples, torch.Generator().manual_seed(SEED), settings.goals)
    shown, policy = table.seen(), partial(arm.written_by, model)
    sample = Sample("picture", "arm", "", shown["pixel_values"][0], shown["input_ids"][0], 0)
    method = bench.method(TokenPruner)
    if method is None:
        out = outcome(table, arm.play(policy, table, settings.horizon))
        return out | _costs(spent(adapter, sample))
    with applied(method, model, bench.budget, seed=bench.seed) as handle:
        out = outcome(table, arm.play(policy, table, settings.horizon, weighing(handle, settings.samples)))
        return out | _costs(spent(adapter, sample, handle))


def outcome(table: arm.Table, steps: torch.Tensor) -> dict[str, Any]:
    """What episodes that are over, or ran out of steps, came to."""
    goals = table.target.shape[1]
    return {
        "success": uncertainty.share(table.taken == goals),
        "taken": uncertainty.mean([100 * taken / goals for taken in table.taken.tolist()]),
        "steps": uncertainty.mean([float(count) for count in steps.tolist()]),
    }


def weighing(handle: Handle, episodes: int) -> Callable[[int], Callable[[], None]]:
    """Makes a control step count for as many as are not over of the episodes, all of which pass through the model."""

    def watched(active: int) -> Callable[[], None]:
        weigh = handle.application.trace.mark()
        return lambda: weigh(active / episodes)

    return watched


def _costs(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in COSTS}
