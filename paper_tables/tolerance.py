"""How far a reproduction may lie from a printed number and still agree with it: computed, with its reason in words.

Two things are always forgiven. The paper rounds: half a unit of the last digit it prints. And a metric over an
evaluation set is a sample: one standard error of the set, sqrt(p (1 - p) / n) for a share p of n right answers, with n
from `configs/evaluation_sets.yaml`; for other means, the standard error that our own run found. A `tolerance` in
paper.yaml goes before both and carries its own reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prunelab.common import tasks
from prunelab.common.catalogue.evaluation_sets import EvaluationSet, evaluation_sets
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import planning, schema

SLACK = 1e-9  # differences are sums of floats
MEANS = ("average", "relative")  # metrics that are means of several


@dataclass(frozen=True)
class Tolerance:
    """What a difference may come to, in the printed number's unit, and why."""

    value: float
    reason: str

    def allows(self, difference: float) -> bool:
        """Whether a reproduction that far off counts as reproduced."""
        return abs(difference) <= self.value + SLACK


def decimals(text: str) -> int:
    """Decimals of a printed number."""
    return len(text.partition(".")[2])


def rounding(text: str) -> float:
    """Half a unit of a printed number's last digit."""
    return 0.5 * 10.0 ** -decimals(text)


def share_error(percent: float, sizes: tuple[int, ...]) -> float:
    """Standard error, in points, of the mean over sets of these sizes of their shares of right answers. Papers print
    the mean of several sets alone, so every set is taken to have its p."""
    p = min(max(percent / 100, 0.0), 1.0)
    return 100 * math.sqrt(p * (1 - p) * sum(1 / n for n in sizes)) / len(sizes)


def _set(metric: str, data: str | None) -> EvaluationSet | None:
    """The set over which a metric is a share: that of the data set, or of the task that the metric names first."""
    task, _, measure = metric.partition(" ")
    name, measured = (data, metric) if data else (task, measure.partition(",")[0])
    result = evaluation_sets().get(name or "")
    return result if result and measured in result.shares else None


def sets(column: schema.Column, metric: str) -> tuple[EvaluationSet, ...]:
    """The sets behind a column's metric, one for each part of an average; none unless all are shares, nor where it is
    derived of other cells."""
    if column.derived:
        return ()
    parts = column.settings.get("average", ()) if metric in MEANS else (metric,)
    results = [_set(part, column.data) for part in parts]
    return tuple(s for s in results if s) if all(results) else ()


def unsized(column: schema.Column, metric: str) -> list[str]:
    """The evaluation sets that a column's metric is a mean over and that `configs/evaluation_sets.yaml` lacks."""
    if column.derived:
        return []
    task = tasks.get(column.task)
    own = "own data" in task.reads
    if not own and ("data" not in task.reads or task.metric(metric).unit != "%"):
        return []
    parts = column.settings.get("average", ()) if metric in MEANS else (metric,)
    if own:  # metrics of evaluation libraries are named `task measure`; others, such as a perplexity, are no shares
        parts = [part for part in parts if " " in part]
    names = [part.partition(" ")[0] if own else column.data or "" for part in parts]
    return [name for name in names if name not in evaluation_sets()]


def of(cell: planning.Cell, stderr: float | None = None, samples: int | None = None) -> Tolerance | None:
    """The tolerance of a reported number; None where nothing here can make it. `stderr` and `samples` are our run's,
    where there is one: a run over fewer samples than the set has is forgiven its own sampling error."""
    column, text = cell.column, cell.reported.text
    if column is None:
        return None
    if column.tolerance:
        return Tolerance(column.tolerance.value, column.tolerance.because)
    if lacking := unsized(column, cell.metric):
        raise PrunelabError(
            f"configs/evaluation_sets.yaml lacks {', '.join(lacking)}, which '{cell.reported.table}', column"
            f" '{cell.reported.column}', is a mean over; add the size, or give the column a `tolerance`"
        )
    error, reason = 0.0, "half a unit of the last printed digit"
    if behind := sets(column, cell.metric):
        sizes = tuple(s.size for s in behind)
        if len(sizes) == 1:
            sizes = (min(sizes[0], samples or sizes[0]),)
        error = share_error(cell.reported.value, sizes)
        over = f"{sizes[0]:,} {behind[0].of}" if len(sizes) == 1 else f"the {sum(sizes):,} of {len(sizes)} sets"
        reason += f" and one standard error of a share of {over}"
    elif stderr:
        error = stderr
        reason += " and one standard error of " + ("ours" if column.derived else "our run's mean")
    return Tolerance(round(rounding(text) + error, 6), reason)
