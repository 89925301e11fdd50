"""Pruning Stable Diffusion (Ramesh & Zhao, 2024): how much of its text encoder and of its U-Net can go, and by what.

The linears of both components lose single weights: those of the U-Net by magnitude, those of the text encoder by
magnitude or by Wanda, either with one share for all layers or with shares by their outliers (OWL). Each component has a
budget of its own. Ratios below are sparsities, as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, Share
from prunelab.common.weights import masks
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Accumulator, Decision, Probe, Statistics, Target, Unit, WeightSignals

Way = Literal["magnitude", "wanda", "owl_magnitude", "owl_wanda"]


def above(scores: Tensor, place: int) -> Tensor:
    """Mask of what lies above the score at a place of the ascending order of the whole matrix: what ties with it goes,
    too. As released, places below zero are counted from the end."""
    if not -scores.numel() <= place < scores.numel():
        raise PrunelabError(f"a matrix of {scores.numel()} weights has no place {place}; prune less of it")
    return scores > scores.flatten().kthvalue(place % scores.numel() + 1).values


def wanda_scores(weight: Tensor, norm: Tensor) -> Tensor:
    """|W_ij| ||x_j||_2 [out, in]; norm [in] is the squared norm over a sample's tokens, averaged over samples."""
    return weight.abs().float() * norm.sqrt()


def wanda_mask(scores: Tensor, ratio: float, spared: float = 0.0) -> Tensor:
    """Mask of which each row lost the same number of its smallest scores, but for the `spared` smallest share."""
    first, last = (Budget(int(scores.shape[1] * share), "removed") for share in (spared, max(spared, ratio)))
    return masks.per_row(scores, last) | ~masks.per_row(scores, first)


def outlier_share(scores: Sequence[Tensor], times: float) -> float:
    """Share in percent of the scores of a layer's matrices that exceed so many times their common mean."""
    joined = torch.cat([s.flatten() for s in scores])
    return float((joined > joined.mean() * times).sum()) / joined.numel() * 100


def keep_ratios(outliers: Sequence[float], ratio: float, spread: float) -> np.ndarray:
    """The share that stays of every layer [L]: more where outliers are many. Shares lie at most 2 `spread` apart
    and are `1 - ratio` on average; layers without a difference share alike. They may exceed 1."""
    shares = np.asarray(outliers, dtype=np.float64)
    width = shares.max() - shares.min()
    scaled = (shares - shares.min()) * (1 / width * spread * 2) if width > 0 else np.zeros_like(shares)
    result: np.ndarray = scaled - scaled.mean() + (1 - ratio)
    return result


def signal_to_noise(kept: Sequence[Tensor], removed: Sequence[Tensor]) -> float:
    """10 log10 of the energy of the weights that stay over that of those that go, in dB; 0 where none goes."""
    signal, noise = (sum(float(w.square().sum()) for w in part) for part in (kept, removed))
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else 0.0


@dataclass(frozen=True)
class SDPruning(WeightPruner):
    """Magnitude, Wanda and OWL by components of a text-to-image model (arXiv 2411.15113).

    The budget is the share that stays of the linears' weights: `text_encoder=0.525,unet=0.65`.

    Parameters
    ----------
    way
        `magnitude`: the smallest weights of each matrix go. `wanda`: of each row those of the smallest product with
        their input's norm. `owl_magnitude`, `owl_wanda`: the same with a share for each layer.
    components
        Those that are pruned by `way`; others by magnitude. A model without components is pruned by it as a whole.
    outlier
        A score is an outlier above so many times the layer's mean.
    spread
        How far a layer's share may lie from the mean of all (lambda).
    least
        Sparsity of a layer that OWL gives none or less (with `owl_wanda`).
    spare
        The smallest share of each matrix (of each row, with Wanda) stays, and what goes lies between it and the
        sparsity: the release's pair of ratios, which shows what weights of a size matter. Not with OWL.
    wraps
        As released, a threshold in front of the first weight is looked for at the end of the order, so that (nearly)
        all of the matrix goes, and what is left empty is refused. By default nothing goes.
    """

    way: Way = "magnitude"
    components: tuple[str, ...] = ("text_encoder",)
    outlier: NonNegativeFloat = 7.0
    spread: NonNegativeFloat = 0.08
    least: Share = 0.01
    spare: Share = 0.0
    wraps: bool = False

    name: ClassVar[str] = "sd_pruning"
    exempt = {"budget": "of each matrix as a whole, and what ties with the last weight goes, too"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spare and self.way.startswith("owl"):
            raise PrunelabError("sd_pruning spares the smallest weights by magnitude and wanda alone, not with OWL")

    def way_of(self, component: str) -> Way:
        """How a component is pruned."""
        return self.way if component in ("", *self.components) else "magnitude"

    def measures(self, component: str) -> bool:
        return self.way_of(component) != "magnitude"

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"input_norm": InputNorm} if self.way.endswith("wanda") else {}

    # -- OWL: a share for each layer ---------------------------------------------------------------------------------

    @property
    def calibrated(self) -> bool:
        return self.way != "magnitude"

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """The sparsity of every layer of the components that OWL prunes, from the unpruned model."""
        targets = [t for t in probe.targets if self.way_of(t.component).startswith("owl")]
        norms = probe.statistics({"linear": {"input_norm": InputNorm}}) if targets else {}
        results: dict[str, Statistics] = {}
        for component in dict.fromkeys(t.component for t in targets):
            layers: dict[int, list[Target]] = {}
            for target in (t for t in targets if t.component == component):
                layers.setdefault(target.block, []).append(target)
            outliers = []
            for members in layers.values():
                scores = [wanda_scores(probe.weights(t)["weight"], norms[t.name]["input_norm"]) for t in members]
                outliers.append(outlier_share(scores, self.outlier))
            budget = probe.budget.at(component if probe.budget.names else 0)
            ratios = 1 - keep_ratios(outliers, sparsity(budget), self.spread)
            for members, outlier, ratio in zip(layers.values(), outliers, ratios.tolist(), strict=True):
                values = torch.tensor([outlier, ratio], dtype=torch.float64)
                results |= {target.name: {"outliers": values[0], "ratio": values[1]} for target in members}
        return results

    # -- which weights -----------------------------------------------------------------------------------------------

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        weight = signals.weight
        return (
            wanda_scores(weight, signals["input_norm"])
            if self.way_of(target.component).endswith("wanda")
            else weight.abs()
        )

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        way = self.way_of(target.component)
        if budget.unit != "ratio" and (budget.unit != "pattern" or way.startswith("owl")):
            raise PrunelabError(
                f"sd_pruning prunes a share of each matrix, or without OWL a pattern (2:4), not {budget}"
            )
        scores = self.score(target, signals)
        masks.refuse_nan(scores, target.name)
        if budget.unit == "pattern":
            return Decision(masks.per_row(scores, budget))
        dense = budget.amounts[0] == 1  # assumption: who asks for everything gets it, whatever shares OWL finds
        ratio = 0.0 if dense else float(signals["ratio"]) if way.startswith("owl") else sparsity(budget)
        if way.endswith("wanda"):
            floored = self.least if ratio <= 0 and way == "owl_wanda" and not dense else ratio
            return Decision(wanda_mask(scores, floored, self.spare))
        place = int(scores.numel() * ratio) - (way == "magnitude")  # OWL's takes one weight more
        if dense or (place < 0 and not self.wraps):
            return Decision(torch.ones_like(scores, dtype=torch.bool))
        kept, spared = above(scores, place), int(scores.numel() * self.spare) - 1
        return Decision(kept if spared < 0 else kept | (scores < scores.flatten().kthvalue(spared + 1).values))


def sparsity(budget: Budget) -> float:
    """The share of a matrix that goes, as a decimal of the papers' digits."""
    return round(1 - budget.amounts[0], 9)
