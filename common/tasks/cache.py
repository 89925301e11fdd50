"""What a language model still knows of a text that it has read, when its key-value cache is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt, Within
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Catalogue, Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Cache(Task):
    """Text behind a prompt whose cache is pruned when it is read, and what the cache holds in the end."""

    name: ClassVar[str] = "cache"
    roles: ClassVar[tuple[str, ...]] = (
        "cache_pruner",
        "token_pruner",
    )
    scales: ClassVar[tuple[str, ...]] = ("testbed", "real", "assets", "paper")
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    named: ClassVar[Mapping[str, Catalogue]] = {"parts": "model"}
    cost: ClassVar[str] = "gbytes"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "perplexity": Metric("perplexity", higher_is_better=False),
        "loss": Metric("negative log likelihood", "nats a token", higher_is_better=False),
        "accuracy": Metric("next tokens right", "%", higher_is_better=True),
        "recall": Metric("definitions given back", "%", higher_is_better=True),
        "gbytes": Metric("cache of a sequence", "GB", cost="bytes of cache"),
        "saving": Metric("bytes of cache saved", "%", higher_is_better=True),
        "entries": Metric("entries a head, in the mean over layers"),
    }

    class Settings(base.Settings):
        """length: of the sequences in tokens. prompt: the share of each that is read before pruning. samples: sequences
        (all). pairs: of definitions that are asked for behind the prompt, for data of source code. A method that prunes
        while writing gets the rest token by token, any other at once. What needs a draft model gets the model itself a
        second time. parts: the catalogue's name of a method's learned parts, of those that prune tokens."""

        length: PositiveInt
        prompt: Within = 0.75
        samples: PositiveInt | None = None
        pairs: PositiveInt | None = None
        parts: str | None = None

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import cache

        return cache.measure(bench)
