"""A language model fine-tuned on what a data selector keeps, or by a training method: how well it then predicts
held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt, Share, Within
from prunelab.common.tasks import base
from prunelab.common.tasks.base import SIZES, TRAINED, Catalogue, Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Tune(Task):
    """The data set is what the model is to learn; `among` names another whose pieces make up half of what there is to
    choose from, so that there is something to leave out. Without a method the model is trained on all of it, for as
    many steps. Pieces begin with a prompt that enters no loss. The service `reference` is the model trained on a clean
    sample of the data set, `history` the model as it was, `teacher` that model for the methods that train. Bytes and
    parameters are those of what comes out."""

    name: ClassVar[str] = "tune"
    roles: ClassVar[tuple[str, ...]] = ("data_selector", "training_method")
    scales: ClassVar[tuple[str, ...]] = ("testbed", "real")
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    named: ClassVar[Mapping[str, Catalogue]] = {"among": "dataset"}
    metrics: ClassVar[Mapping[str, Metric]] = {
        "perplexity": Metric("perplexity of held-out text", higher_is_better=False),
        "loss": Metric("negative log likelihood of held-out text", "nats a token", higher_is_better=False),
        "kl_reduction": Metric("KL reduction against a random choice", "nats", higher_is_better=True),
        "samples": Metric("samples that entered the training", "%", cost="samples"),
        "tokens": Metric("tokens that entered the loss", "%", cost="tokens trained on"),
        **SIZES,
        **TRAINED,
    }

    class Settings(base.Settings):
        """length: of the pieces in tokens. samples: pieces to choose from. prompt: the share of a piece that is prompt.
        clean: pieces of the clean sample, the target of the methods that have one. held_out: pieces to measure on.
        steps, batch: of the training. rate, warmup: of the learning rate, which falls in a line. rank, alpha: of
        low-rank adapters (the extra `training`), which alone learn where there is a rank."""

        length: PositiveInt
        among: str | None = None
        samples: PositiveInt = 256
        prompt: Within = 0.25
        clean: NonNegativeInt = 64
        held_out: PositiveInt = 48
        steps: PositiveInt = 24
        batch: PositiveInt = 8
        rate: PositiveFloat = 3e-4
        warmup: Share = 0.1
        rank: NonNegativeInt = 0
        alpha: NonNegativeInt = 16

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import tune

        return tune.measure(bench)
