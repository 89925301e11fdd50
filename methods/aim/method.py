"""AIM (Zhong et al., ICCV 2025): merge alike visual tokens before the decoder, drop the rest step by step inside it.

Unit: a visual token. Before the decoder, the tokens of a frame (or image) are merged in rounds that halve them; inside
it, between layers l1 and l2, those stay that a random walk over the attention map visits most, until none is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt, Share
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

# -- before the decoder ------------------------------------------------------------------------------------------------


def merge(tokens: Tensor, outputs: int, grid: tuple[int, int], pool: int = 1) -> Mix:
    """Brings the tokens [B, N, D] of one frame to `outputs`, at most halving them a round.

    pool: the stride by which a grid (height, width) is pooled first, as the model does with the frames of a video;
    rounded up, bilinear.
    """
    if pool == 1:
        return selection.merged(tokens.float(), outputs)
    size = -(-grid[0] // pool), -(-grid[1] // pool)
    pooled = selection.resized(grid, size, batch=len(tokens), device=tokens.device)
    return selection.merged(pooled.apply(tokens.float()), outputs, pooled)


def every_frame(mix: Mix, frames: int, units: int) -> Mix:
    """Mixtures [B * T, E] of T frames of `units` each as one [B, T * E] of the whole video."""
    number = torch.arange(frames, device=mix.target.device).view(1, frames, 1)
    target, source = (part.unflatten(0, (-1, frames)) for part in (mix.target, mix.source))
    target, source = (target + number * mix.outputs).flatten(1), (source + number * units).flatten(1)
    return Mix(target, source, mix.weight.unflatten(0, (-1, frames)).flatten(1), frames * mix.outputs)


# -- inside the decoder ------------------------------------------------------------------------------------------------


def importance(
    logits: Tensor, temperature: float = 0.1, iterations: int = 5, damping: float = 0.0, valid: Tensor | None = None
) -> Tensor:
    """The PageRank of each token [B, N] on the attention of one layer, for its masked logits [B, H, N, N].

    A walk starts anywhere (padding aside, `valid` [B, N]) and follows the attention, sharpened by the temperature, for
    a few steps; heads are joined by the root of their mean square.
    """
    step = torch.softmax(logits.float() / temperature, dim=-1)
    real = torch.ones_like(step[:, 0, 0]) if valid is None else valid.float()
    start = (real / real.sum(-1, keepdim=True))[:, None, None, :]
    visits = selection.power_iteration(
        lambda v: (1 - damping) * (v @ step) + damping * start, start.expand(-1, step.shape[1], -1, -1), iterations
    )
    return visits.squeeze(2).square().mean(1).sqrt()


def retained(layer: int, first: int, last: int) -> float:
    """The share of the visual tokens that goes on behind a layer: all before `first`, evenly fewer from there on, none
    from layer `last` - 1 on."""
    return 1.0 if layer < first else max(0.0, 1 - (layer - first + 1) / (last - first))


@dataclass(frozen=True)
class AIM(TokenPruner):
    """AIM (arXiv 2412.03248): merges each frame's tokens down to the budget, then empties the decoder's layers of
    visual tokens on a schedule.

    The budget is what merging leaves of a frame (or of an image's crop): the paper's 0.25, or a number of tokens.

    Parameters
    ----------
    layers : (int, int)
        l1 and l2, counted from 0. Layer l1 is the last that sees all of what was merged, layer l2 the first that sees
        none; the paper's for 28 layers. A schedule that ends behind the model's last layer is cut there.
    pool : int
        The stride by which the model pools frames before it packs them, which merging comes behind: 2 for videos of
        LLaVA-OneVision, 1 where it does not pool.
    temperature, iterations, damping : float, int, float
        Of the random walk.
    """

    layers: tuple[NonNegativeInt, NonNegativeInt] = (14, 22)
    pool: PositiveInt = 1
    temperature: PositiveFloat = 0.1
    iterations: NonNegativeInt = 5
    damping: Share = 0.0

    name: ClassVar[str] = "aim"
    ascending: ClassVar[bool] = False
    exempt = {
        "keep_all": "the budget is what merging leaves; tokens leave between the two layers at any",
        "padding": "frames have one length, the even-odd split no padded form; padded samples are refused",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers[0] >= self.layers[1]:
            raise PrunelabError(f"aim: layers {self.layers} are no schedule; give l1 and a larger l2")

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        first, last = self.layers
        return [Site(0, "projected"), *(Site(layer, "input") for layer in range(first + 1, min(last + 1, info.depth)))]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden"} if site.where == "projected" else {"attention_logits"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        if site.where == "projected":
            signals.state["budget"] = budget
            return self.merging(signals, budget)
        if signals.state.get("budget", budget) != budget:
            raise PrunelabError("aim takes one budget, what merging leaves; its decoder follows `layers`")
        visual = signals.state.setdefault("visual", signals.available())  # what the first of these layers still sees
        share = retained(site.layer - 1, *self.layers)
        counts = [int(round(share * n, 6)) for n in visual]
        return Plan(signals.keep(counts, scores=self.score(site, signals)))

    def merging(self, signals: TokenSignals, budget: Budget) -> Plan:
        """Frames are merged alike and apart. Outputs have no order in space."""
        signals.one_length(self.name)
        total, frames = signals.prunable.shape[1], max(1, len(signals.grids))
        special, units = total - signals.units, signals.units // frames
        grid = signals.grids[0] if signals.grids else (1, units)
        start = -(-grid[0] // self.pool) * -(-grid[1] // self.pool) if self.pool > 1 else units
        outputs = budget.count(start)
        every = torch.arange(total, device=signals.prunable.device).expand(len(signals.prunable), -1)
        if outputs == units or outputs == 0:
            return Plan(Gather(every[:, : special + frames * outputs]), positions="renumber")
        tokens = signals.hidden[:, special:].unflatten(1, (frames, units)).flatten(0, 1)
        mix = every_frame(merge(tokens, outputs, grid, self.pool), frames, units)
        return Plan(selection.behind(mix, special), positions="renumber")

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        return importance(signals.attention_logits, self.temperature, self.iterations, self.damping, signals.valid)
