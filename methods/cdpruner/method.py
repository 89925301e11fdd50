"""CDPruner (Zhang et al., NeurIPS 2025): visual tokens that differ from one another, as seen by the question.

Unit: a visual token behind the projector, crop by crop. Likeness of two tokens counts by how relevant both are to the
question, and the subset kept is the most probable one of the determinantal point process with that kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import PositiveFloat
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

SIMILARITY = (
    "text_similarity"  # the service: features [B, N, C] of patches, and whether to norm them -> likeness [B, N]
)
FEATURES = Reading("hidden", -1, "tower")  # patches as the encoder hands them to the projector


def relevance(likeness: Tensor, floor: float = 1e-6, turned: bool = True) -> Tensor:
    """How relevant tokens are to the question, from just above 0 to 1, for their likeness [B, N] to it.

    Likeness is turned round, as released: CLIP's patches are unlike the words for what they show. Least and most are
    those of each sample. Where all are alike, all are relevant.
    """
    likeness = -likeness.float() if turned else likeness.float()
    least, most = likeness.amin(-1, keepdim=True), likeness.amax(-1, keepdim=True)
    return torch.where(most > least, (likeness - least + floor) / (most - least), torch.ones_like(likeness))


def kernel(features: Tensor, weight: Tensor) -> Tensor:
    """The conditional kernel [B, N, N]: cosines of features [B, N, D], times the weight [B, N] of both tokens."""
    unit = nn.functional.normalize(features, dim=-1).float()
    return weight.unsqueeze(2) * (unit @ unit.transpose(1, 2)) * weight.unsqueeze(1)


def most_probable(kernel: Tensor, count: int) -> Tensor:
    """Greedy maximum a posteriori picks [B, count] of the process with kernels [B, N, N] (Chen et al., 2018).

    Each pick has the largest gain of the determinant's logarithm. Gains are kept up to date by the rows of a Cholesky
    factor that grows by one row a pick, so that N count^2 numbers are touched and no determinant is made. A pick that
    adds nothing, as where more are asked for than features are wide, brings no row (the released code divides by zero).
    """
    batch, tokens, _ = kernel.shape
    rows = torch.arange(batch, device=kernel.device)
    factor = kernel.new_zeros(batch, count, tokens)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()  # [B, N]
    picks = []
    for i in range(count):
        pick = gain.argmax(-1)
        picks.append(pick)
        before = factor[:, :i]  # [B, i, N]
        known = (before[rows, :, pick].unsqueeze(1) @ before).squeeze(1)
        own = gain[rows, pick].unsqueeze(-1)
        row = torch.where(own > 0, (kernel[rows, pick] - known) * own.clamp_min(1e-12).rsqrt(), 0.0)
        factor[:, i] = row
        gain = gain - row.square()
        gain.scatter_(1, pick.unsqueeze(1), float("-inf"))
    return torch.stack(picks, 1) if picks else rows.new_zeros(batch, 0)


@dataclass(frozen=True)
class CDPruner(TokenPruner):
    """CDPruner (arXiv 2506.10967): keeps the visual tokens that a determinantal point process finds most diverse under
    the question.

    The likeness of patches to the question is a service, `text_similarity`: from features [B, N, C] of the image
    encoder to [B, N]. A number in the budget is a crop's.

    Parameters
    ----------
    floor : float
        What the least relevant token's share of the range is raised by.
    turned : bool
        Whether patches that CLIP finds unlike the text count as relevant, as released.
    theta : float, optional
        How much relevance weighs beside diversity, below 1: the kernel's weights are then exp(theta / (2 (1 - theta))
        times relevance); without it they are the relevance itself, as released.
    positions : str
        The kept tokens are numbered anew, as released, or keep their numbers (one crop only).
    """

    floor: PositiveFloat = 1e-6
    turned: bool = True
    theta: Annotated[float, Interval(ge=0, lt=1)] | None = None
    positions: Positions = "renumber"

    name: ClassVar[str] = "cdpruner"
    services: ClassVar[tuple[str, ...]] = (SIMILARITY,)
    exempt = {"padding": "a picture has no padding; padded samples are refused"}

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[str | Reading]:
        return frozenset({"hidden", FEATURES})

    def weights(self, likeness: Tensor) -> Tensor:
        """What tokens weigh in the kernel, for their likeness [B, N] to the question."""
        share = relevance(likeness, self.floor, self.turned)
        if self.theta is None:
            return share
        return (self.theta / (2 * (1 - self.theta)) * share).exp()

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        crops, first = max(1, len(signals.grids)), signals.prunable.shape[1] - signals.units
        likeness = signals.services[SIMILARITY](signals.at(FEATURES), normed=True)[:, first:]
        weights = self.weights(likeness.to(signals.hidden.device)).unflatten(1, (crops, -1)).flatten(0, 1)
        tokens = signals.hidden[:, first:].unflatten(1, (crops, -1)).flatten(0, 1)  # [B * crops, patches, D]
        patches = tokens.shape[1]
        picks = most_probable(kernel(tokens, weights), budget.count(patches)).unflatten(0, (-1, crops))
        start = first + patches * torch.arange(crops, device=picks.device).view(-1, 1)
        mask = torch.zeros_like(signals.prunable).scatter(1, (picks + start).flatten(1), True)
        return Plan(signals.keep([crops * picks.shape[-1]] * len(mask), mask=mask), positions=self.positions)
