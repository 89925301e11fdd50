"""PyramidDrop (Xing et al., CVPR 2025): the deeper a decoder gets, the fewer image tokens it needs, so they leave in
stages.

Unit: an image token of the decoder's sequence. Before each of a few layers the last token of the prompt ranks those
that are left, by the attention that this very layer would pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def similarity(coming_row: Tensor) -> Tensor:
    """The ranking [B, N]: the attention [B, H, N] of the last instruction token in the layer that comes, averaged over
    its heads (section 3.2: its query against the keys of the image tokens)."""
    return coming_row.mean(1)


def stages(depth: int, number: int) -> tuple[int, ...]:
    """The layers, from 0, that part a decoder of that depth into `number` stages of one length, the last of which takes
    what is left over: 8, 16 and 24 of 32."""
    length = max(1, depth // number)
    return tuple(range(length, min(depth, length * number), length))


@dataclass(frozen=True)
class PyramidDrop(TokenPruner):
    """PyramidDrop (arXiv 2410.17247): drops image tokens at the end of each stage of the decoder.

    The budget is lambda, the share of the image tokens that goes on at the end of a stage: with the paper's 0.5 the
    four stages see all, a half, a quarter and an eighth of them. One amount a stage may be named.

    Parameters
    ----------
    layers : tuple of int, optional
        The first layer, from 0, of each stage but the first; None: `number` stages of one length.
    number : int
        S, how many stages there are.
    of : {"stage", "image"}
        What amounts in shares are shares of: what the stage has seen, or all of an image's tokens, as the released
        `image_token_ratio_list` has it (0.5, 0.25, 0.125).
    positions : str
        The tokens that are left are numbered anew, as released, or keep their numbers.
    """

    layers: tuple[NonNegativeInt, ...] | None = None
    number: PositiveInt = 4
    of: Literal["stage", "image"] = "stage"
    positions: Positions = "renumber"

    name: ClassVar[str] = "pyramiddrop"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        layers = stages(info.depth, self.number) if self.layers is None else self.layers
        if not layers:
            raise PrunelabError(f"{self.name}: nothing is dropped in one stage; give a larger `number`, or `layers`")
        return [Site(layer, "input") for layer in layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"coming_row"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        scores = similarity(signals.coming_row)
        if self.of == "stage":
            return Plan(signals.keep(budget, scores=scores), positions=self.positions)
        every = signals.state.setdefault("every", signals.available())  # of each sample's image, before the first stage
        return Plan(signals.keep([budget.count(n) for n in every], scores=scores), positions=self.positions)
