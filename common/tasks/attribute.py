"""How faithful attributions of a language model's next token to its context are, against random ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

CONTEXTS, PASSES = 100, 100  # guesses to foretell time by: of a set, and to explain one token


class Attribute(Task):
    """Soft normalised sufficiency and comprehensiveness: embeddings are masked by the importance of their tokens, and
    the next token's distributions compared. Both are logarithms of a ratio of sums over all contexts, to those of
    random importance. Contexts are prompts of a data set, or beginnings of its texts; the model goes on greedily, and
    every token that it adds is explained by what stands before it."""

    name: ClassVar[str] = "attribute"
    roles: ClassVar[tuple[str, ...]] = ("ranker",)
    scales: ClassVar[tuple[str, ...]] = ("testbed", "real", "paper")
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    budgeted: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "soft_ns": Metric("soft normalised sufficiency", "log ratio to random", higher_is_better=True),
        "soft_nc": Metric("soft normalised comprehensiveness", "log ratio to random", higher_is_better=True),
        "passes": Metric("contexts that the model read to explain one token", cost="contexts read"),
    }

    class Settings(base.Settings):
        """length: of contexts that are cut from texts, in tokens. samples: contexts (all prompts). new: tokens that
        the model adds. draws: masks a token, over which the measures are averaged."""

        length: PositiveInt = 32
        samples: PositiveInt | None = None
        new: PositiveInt = 1
        draws: PositiveInt = 1

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        """Each token is explained by some passes over what stands before it."""
        contexts = settings.samples or held or CONTEXTS
        return Work(read=PASSES * settings.length * settings.new * settings.draws * contexts)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import attribute

        return attribute.measure(bench)
