"""ATP-LLaVA (Ye et al., CVPR 2025): between layers of the decoder small modules learn how many visual tokens go on.

Unit: a visual token. It goes on where it matters to others or where an even sampling of the picture needs it, each
above a threshold that a module predicts for the sample at hand. While training, a soft mask weighs attention in place
of the decision, and two losses draw the number of tokens to a target.

A reconstruction: the authors released no code. Equations are numbered as a third-party course project cites them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import (
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
)
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

DEPTHS = (4 / 32, 14 / 32, 24 / 32)  # where the modules stand in a decoder, as shares of its layers


def self_importance(q: Tensor, k: Tensor, visual: Tensor, rule: str = "received") -> Tensor:
    """S_self [B, N]: mean scaled attention logits between visual tokens, over heads (eq. 3), from queries and keys
    [B, H, N, d] and which tokens are visual [B, N].

    rule: those that a token `received` from visual tokens that see it, or `paid` to those that it sees; itself is among
    them. Sums of queries or keys are taken along the sequence, so that no N x N matrix is made.
    """
    other, count = ~visual[:, None, :, None], visual.float()
    q, k = q.float().masked_fill(other, 0), k.float().masked_fill(other, 0)
    if rule == "received":
        q, number = q.flip(2).cumsum(2).flip(2), count.flip(1).cumsum(1).flip(1)
    else:
        k, number = k.cumsum(2), count.cumsum(1)
    return (q * k).sum(-1).mean(1) * q.shape[-1] ** -0.5 / number.clamp_min(1)


def cross_importance(text: Tensor) -> Tensor:
    """S_cross [B, N]: mean attention that text tokens pay (eq. 4), from [B, H, R, N]; rows of nothing do not count."""
    rows = (text.sum((1, 3)) > 0).sum(1).clamp_min(1)
    return text.float().mean(1).sum(1) / rows.unsqueeze(1)


def standard(scores: Tensor, visual: Tensor) -> Tensor:
    """Scores [B, N] brought to 0 to 1: the sigmoid of how many standard deviations they lie above the mean of the
    visual tokens of each sample."""
    count = visual.sum(1, keepdim=True).clamp_min(1)
    mean = (scores * visual).sum(1, keepdim=True) / count
    spread = (((scores - mean) * visual).square().sum(1, keepdim=True) / count).sqrt().clamp_min(1e-6)
    return ((scores - mean) / spread).sigmoid()


def sampled(place: Tensor, columns: int, rates: Sequence[float], weight: float) -> Tensor:
    """S_spatial [B, N] of tokens at places [B, N] of a map of so many columns (eq. 5): 1 - rate * weight where an even
    sampling at that rate takes the token, else 0; of several rates the largest counts."""
    row, column = place // columns, place % columns
    result = torch.zeros(place.shape, device=place.device)
    for rate in rates:
        stride = round(rate**-0.5)
        taken = (row % stride == 0) & (column % stride == 0)
        result = torch.maximum(result, taken * (1 - rate * weight))
    return result


class Thresholds(nn.Module):
    """One module: theta_r and theta_s of each sample from its mean importances (eq. 6-8)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared, self.redundant, self.spatial = nn.Linear(2, width), nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, own: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """Two thresholds [B, 1] between 0 and 1, for mean importances [B] of both kinds."""
        z = self.shared(torch.stack([own, cross], -1).to(self.shared.weight.dtype))
        return self.redundant(z).sigmoid().float(), self.spatial(z).sigmoid().float()


def soft_mask(redundant: Tensor, spatial: Tensor, theta: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """M [B, N] between 0 and 1 (eq. 9-11): the larger of two sigmoids of what a score is above its threshold."""
    return torch.maximum(
        ((redundant - theta[0]) * temperature).sigmoid(), ((spatial - theta[1]) * temperature).sigmoid()
    )


@dataclass(frozen=True)
class ATPLLaVA(TokenPruner):
    """ATP-LLaVA (arXiv 2412.00447), a reconstruction. Its modules (`build`) are trained with the model.

    The budget bounds the share of a picture's visual tokens behind every module; how many there are below it the
    thresholds say. While training it is the target of the mean over modules (the paper's 144 of 576).

    Parameters
    ----------
    layers
        Before which the modules stand; empty: 4, 14 and 24 of 32, and as deep in others.
    importance
        S_self is of attention that tokens `received` or `paid`; the project takes the latter of the two readings.
    scale
        `raw`: logits and shares of attention as they are, as the project adds them up, though thresholds lie between 0
        and 1; `standard`: each importance as it stands out of its sample, from 0 to 1, so that thresholds can tell
        tokens apart.
    uses
        Which importance counts: `both`, or for the ablation `self` or `cross` alone.
    redundant, spatial
        Whether tokens may stay by their importance, and by the sampling; without one, the paper's ablation.
    rates, sampling
        Of the even sampling, and lambda_sample.
    temperature
        Of the soft masks.
    width
        Of the modules; 0: that of the model.
    progressive, target
        Weights of the losses: of the tokens behind each module times its layer, and of their mean's distance to the
        target, in tokens.
    thresholds
        Two given thresholds in place of learned ones; then there are no modules.
    """

    layers: tuple[PositiveInt, ...] = ()
    importance: Literal["received", "paid"] = "received"
    scale: Literal["raw", "standard"] = "raw"
    uses: Literal["both", "self", "cross"] = "both"
    redundant: bool = True
    spatial: bool = True
    rates: tuple[PositiveShare, ...] = (0.25,)
    sampling: FiniteFloat = 3.0
    temperature: PositiveFloat = 10.0
    width: NonNegativeInt = 0
    progressive: NonNegativeFloat = 0.05
    target: NonNegativeFloat = 0.2
    thresholds: tuple[FiniteFloat, FiniteFloat] | None = None

    name: ClassVar[str] = "atp_llava"
    adaptive = True
    exempt = {
        "budget": "thresholds decide how many stay, the budget is an upper bound",
        "keep_all": "thresholds decide at any budget",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        layers = self.layers or dict.fromkeys(max(1, int(share * info.depth)) for share in DEPTHS)
        return [Site(layer, "input") for layer in layers]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({"queries", "keys", self.text(site)})

    def text(self, site: Site) -> Reading:
        """The attention of the text behind the picture, in the layer before."""
        return Reading("attention", site.layer - 1, rows="text")

    def build(self, info: ModelInfo) -> nn.Module | None:
        if self.thresholds is not None:
            return None
        return nn.ModuleList(Thresholds(self.width or info.width) for _ in self.sites(info))

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        visual, state = signals.prunable, signals.state
        with torch.set_grad_enabled(signals.training):
            own = self_importance(signals.queries, signals.keys, visual, self.importance)
            cross = cross_importance(signals.at(self.text(site)))
            if self.scale == "standard":
                own, cross = standard(own, visual), standard(cross, visual)
            redundant, spatial = self.scores(own, cross, self.places(signals), signals)
            theta = self.theta(site, signals, own, cross)
            if signals.training:
                gate = soft_mask(redundant, spatial, theta, self.temperature).masked_fill(~visual, 1)
                state["gate"] = gate * state.get("gate", 1.0)  # what a module let go is gone for later ones
                left = (state["gate"] * visual).sum(1)
                state.setdefault("kept", []).append((site.layer, left, visual.sum(1)))
                return Plan(signals.keep(mask=visual), gate=gate)
        above = torch.maximum(redundant - theta[0], spatial - theta[1]).masked_fill(~visual, -torch.inf)
        most = budget.count(state.setdefault("units", signals.units))
        rank = above.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return Plan(signals.keep(mask=(above > 0) & (rank < most)))

    def scores(self, own: Tensor, cross: Tensor, place: Tensor, signals: TokenSignals) -> tuple[Tensor, Tensor]:
        """S_redundant and S_spatial [B, N] of tokens at those places."""
        redundant = {"both": (own + cross) / 2, "self": own, "cross": cross}[self.uses]
        columns = signals.info.grid[1] if signals.info.grid else max(1, round(signals.units**0.5))
        spatial = sampled(place, columns, self.rates, self.sampling)
        never = torch.full_like(spatial, -torch.inf)
        return redundant if self.redundant else never, spatial if self.spatial else never

    def places(self, signals: TokenSignals) -> Tensor:
        """Which visual token of the unpruned sequence each is [B, N]; crops and pictures are taken row after row."""
        state, number = signals.state, (signals.prunable.cumsum(1) - 1).clamp_min(0)
        if "places" not in state:
            state["places"] = (number, signals.indices)
            return number
        all_of_them, first = state["places"]
        if signals.indices is None or first is None:
            raise PrunelabError(f"{self.name} samples tokens by their places, which mixtures of tokens have not")
        start = first[:, :1]  # the first site sees the sequence from its first token on
        return all_of_them.gather(1, (signals.indices - start).clamp(0, all_of_them.shape[1] - 1))

    def theta(self, site: Site, signals: TokenSignals, own: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """The thresholds [B, 1] of a module, or the given ones."""
        if self.thresholds is not None:
            redundant, spatial = (torch.full_like(own[:, :1], value) for value in self.thresholds)
            return redundant, spatial
        count = signals.prunable.sum(1).clamp_min(1)
        means = ((x * signals.prunable).sum(1) / count for x in (own, cross))
        results: tuple[Tensor, Tensor] = signals.parts[site.index](*means)
        return results

    def loss(self, outputs: Any, taught: Any, state: Mapping[str, Any], budget: Budget) -> Tensor:
        """L_ntp + progressive L_atp + target L_target (eq. 12-14)."""
        if "kept" not in state:
            raise PrunelabError(f"{self.name} learns in training mode alone; call model.train() first")
        layers, kept, units = zip(*state["kept"], strict=True)
        shares = [(left / all_of_them).mean() * layer for layer, left, all_of_them in zip(layers, kept, units)]
        wanted = budget.at(0).count(int(units[0].max()))
        apart = (torch.stack(kept).mean() - wanted).abs()
        total: Tensor = outputs.loss + self.progressive * torch.stack(shares).sum() + self.target * apart
        return total
