"""LESS (Xia et al., ICML 2024, arXiv 2402.04333): training samples by their influence on a few target samples.

A short warm-up on a part of the data leaves checkpoints with Adam's moments. At each, a sample's step under Adam is
compared with the gradient of the target's loss; the cosines, weighed by learning rates, sum up to its influence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt, Share
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.gradients import Checkpoint, projected
from prunelab.common.data_selection.role import DataPlan, DataSelector, best_samples, best_tokens


def adam(
    gradients: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> Tensor:
    """The steps [k, P] that Adam, with its moments [P], would take by gradients [k, P] (section 2.2); given the number
    of steps so far, by moments that are corrected for their start at zero."""
    mean = betas[0] * mean + (1 - betas[0]) * gradients
    square = betas[1] * square + (1 - betas[1]) * gradients**2
    if step is not None:
        mean, square = mean / (1 - betas[0] ** step), square / (1 - betas[1] ** step)
    return mean / (square + epsilon).sqrt()


def unit(vectors: Tensor) -> Tensor:
    """Vectors [k, D] of length 1; zero stays zero."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def direction(gradients: Tensor, average: Literal["cosines", "gradients"] = "cosines") -> Tensor:
    """The vector [D] whose product with a unit vector is its mean cosine to gradients [m, D], or its cosine to their
    mean."""
    return unit(gradients).mean(0) if average == "cosines" else unit(gradients.mean(0))


def shares(rates: Sequence[float]) -> list[float]:
    """How much each checkpoint counts: its learning rate, as a share of all."""
    return [rate / sum(rates) for rate in rates]


def influence(cosines: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """Influence [n, T] on T targets, from the cosines [n, T] at every checkpoint (definition 3.1)."""
    return torch.stack([share * part for share, part in zip(shares(rates), cosines, strict=True)]).sum(0)


@dataclass(frozen=True)
class LESS(DataSelector):
    """LESS (arXiv 2402.04333). Every target corpus is a task; a sample counts by the task that it helps most.

    Parameters
    ----------
    dimensions
        Of the random projection of gradients; None: gradients as they are.
    step : {"adam", "sign", "gradient"}
        What a sample's gradient counts as: the step of Adam, its signs, itself.
    corrected
        Whether Adam's moments are corrected for their start at zero, as in Adam itself; the released code does not.
    average : {"cosines", "gradients"}
        The mean over a target's samples: of cosines (released), or of gradients (paper).
    betas, epsilon
        Adam's.
    projection
        Seed of the projection.
    warm_share, warm_epochs
        Of the warm-up: the share of the data, drawn at random, and epochs, each of which leaves a checkpoint.
    """

    dimensions: PositiveInt | None = 8192
    step: Literal["adam", "sign", "gradient"] = "adam"
    corrected: bool = False
    average: Literal["cosines", "gradients"] = "cosines"
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: PositiveFloat = 1e-8
    projection: NonNegativeInt = 0
    warm_share: Share = 0.05
    warm_epochs: PositiveInt = 4

    name: ClassVar[str] = "less"
    services: ClassVar[tuple[str, ...]] = ("checkpoints",)

    def requires(self) -> frozenset[str]:
        return frozenset({"gradients"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        return DataPlan(best_samples(self.influence(examples), self.budgets(budget)[0]))

    def influence(self, examples: Examples) -> Tensor:
        """The largest influence [n] of every sample on a target."""
        points: Sequence[Checkpoint] = examples.services["checkpoints"]
        if not examples.targets or not points:
            raise PrunelabError(
                f"{self.name} compares with target samples at checkpoints of a warm-up; give target= and"
                " services={'checkpoints': [...]}"
            )
        cosines = []
        for point in points:
            targets = [torch.cat(list(map(self.short, target.gradients(point)))) for target in examples.targets]
            aims = torch.stack([direction(gradients, self.average) for gradients in targets])
            own = (unit(self.short(self.counted(part, point))) @ aims.T for part in examples.gradients(point))
            cosines.append(torch.cat(list(own)))
        scores = influence(cosines, [point.rate for point in points]).amax(1)
        if not bool(torch.isfinite(scores).all()):
            raise PrunelabError("gradients of the training data hold NaN or infinite values; check samples and dtype")
        return scores

    def counted(self, gradients: Tensor, point: Checkpoint) -> Tensor:
        """What gradients [k, P] of training samples count as."""
        if self.step == "gradient":
            return gradients
        if self.step == "sign":
            return gradients.sign()
        mean, square = (moment.to(gradients.device) for moment in (point.mean, point.square))
        return adam(gradients, mean, square, point.step if self.corrected else None, self.betas, self.epsilon)

    def short(self, gradients: Tensor) -> Tensor:
        """Gradients [k, P], projected [k, D]."""
        return gradients if self.dimensions is None else projected(gradients, self.dimensions, self.projection)


@dataclass(frozen=True)
class LESSAndTokens(LESS):
    """LESS (arXiv 2402.04333) for samples, and tokens of those that stay drawn at random, as a paper of joint pruning
    sets it beside its own (arXiv 2509.23873)."""

    name: ClassVar[str] = "less_and_tokens"
    chooses: ClassVar[tuple[Literal["samples", "tokens"], ...]] = ("samples", "tokens")

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        worth = torch.rand(examples.counted.shape, generator=examples.rng)
        tokens = best_tokens(worth, examples.counted, self.budgets(budget)[1])
        return DataPlan(super().plan(examples, budget).samples, tokens)
