"""Text that a language model writes under a constraint, in places where real text satisfies it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from prunelab.common.core.options import PositiveInt, Share
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Constrained(Task):
    """What a constrained sampler draws, and how often it asks the constraint. Without a method a text is drawn from the
    model as it is and dies where it breaks the constraint: rejection of whole texts."""

    name: ClassVar[str] = "constrained"
    roles: ClassVar[tuple[str, ...]] = ("constrained_sampler",)
    scales: ClassVar[tuple[str, ...]] = ("testbed", "real", "assets")
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    budgeted: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("weight on the text that stands there", "%", higher_is_better=True),
        "valid": Metric("weight on texts that satisfy the constraint", "%", higher_is_better=True),
        "alive": Metric("particles that met no dead end", "%", higher_is_better=True),
        "log_z": Metric("log mass of the constraint's texts", "nats"),
        "spread": Metric("standard deviation of log weights", "nats", higher_is_better=False),
        "calls": Metric("constraint calls a token", higher_is_better=False),
        "masking_calls": Metric("calls of a full mask a token"),
        "saving": Metric("calls saved of a full mask's", "%", higher_is_better=True),
        "tokens": Metric("tokens drawn"),
    }

    class Settings(base.Settings):
        """pattern: a regular expression, and json: the depth of JSON values that follow it, either or both. after: the
        text that prompts end with. samples: places in the data, with `context` tokens before each. particles: of each
        place, drawn anew where their effective share falls below `threshold`. max_tokens: of a text."""

        pattern: str = ""
        json_depth: PositiveInt | None = Field(None, alias="json")
        after: str
        samples: PositiveInt
        context: PositiveInt = 128
        particles: PositiveInt = 5
        threshold: Share = 0.5
        max_tokens: PositiveInt = 100

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import constrained

        return constrained.measure(bench)
