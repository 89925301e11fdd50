"""The video language model that answers questions about films (`common.data.questions`): `digits_video_qa`, trained on
to find moments in four times as many frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import pictures, questions
from prunelab.common.testbeds.digits_video_qa import DigitsVideoQA, later
from prunelab.common.training.recipe import read_log


@dataclass(frozen=True)
class DigitsFilmQA(DigitsVideoQA):
    """Goes on from the shipped weights of `digits_video_qa`, and names digits and the quarters of frames that they are
    in, and behind `seen` layers whether they are the first.

    start: sha256 of the weights it starts from, by default those that ship; weights that were trained anew since ask
    for a new training.
    """

    steps: int = 1600
    batch: int = 6
    rate: float = 1e-3
    alone: float = 0.05
    ramp: float = 0.0
    check_every: int = 200
    start: str = ""

    name: ClassVar[str] = "digits_film_qa"
    kind: ClassVar[questions.Kind] = "film"

    def __post_init__(self) -> None:
        if not self.start:
            from prunelab.common.testbeds import SHIPPED

            object.__setattr__(self, "start", read_log(SHIPPED / DigitsVideoQA.name)["sha256"])

    def build(self) -> nn.Module:
        from prunelab.common import testbeds

        model: Any
        model, log = testbeds.load(DigitsVideoQA.name)
        if log["sha256"] != self.start:
            raise PrunelabError(
                f"{self.name} started from other weights of {DigitsVideoQA.name}; train {self.name} again"
            )
        model.config.text_config.max_position_embeddings = 1024
        return model

    def compose(self, generator: torch.Generator, clutter: float) -> questions.Facts:
        return pictures.films("train", self.batch, generator, clutter, deformed=True)

    def named(self, net: Any, features: Tensor, facts: Any) -> Tensor:
        known = ((questions.DIGITS, facts.digit), (questions.QUARTERS, facts.quarter))
        return torch.stack([self.patchwise(net, features, words, facts.cells(value)) for words, value in known]).sum()

    def inside(self, facts: Any) -> Iterable[tuple[Sequence[str], Tensor]]:
        yield questions.ENDS, facts.cells(later(facts.digit))
