"""Closed-loop episodes of a policy that sees a small simulated arm and writes its actions, its visual tokens pruned or
not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Act(Task):
    """How often the policy succeeds, what a control step keeps in the mean, and what that costs."""

    name: ClassVar[str] = "act"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("testbed",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    cost: ClassVar[str] = "gmacs"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "success": Metric("episodes that succeed", "%", higher_is_better=True),
        "taken": Metric("digits taken", "%", higher_is_better=True),
        "steps": Metric("control steps of an episode", higher_is_better=False),
        "kept": Metric("visual tokens that a layer sees, in the mean over layers and control steps", "%"),
        "gmacs": Metric("multiply-adds of a control step's prompt, the method's scoring included", "G", cost="MACs"),
        "scoring_gmacs": Metric("multiply-adds of the scoring", "G"),
        "saving": Metric("multiply-adds saved", "%", higher_is_better=True),
    }

    class Settings(base.Settings):
        """samples: episodes, all of which act at once. goals: digits to take in each. horizon: control steps after
        which an episode has failed."""

        samples: PositiveInt
        goals: PositiveInt = 2
        horizon: PositiveInt = 24

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import act

        return act.measure(bench)
