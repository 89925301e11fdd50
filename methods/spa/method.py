"""SPA (Wang et al., 2024): any criterion of single weights becomes one of whole channels, on any network at any time.

Channels that an operation ties together leave together: the rows that make one and the columns that read one, in every
layer. A coupled channel is as important as its weights together; importance is made comparable between groups, and the
least important channels of the whole network leave. OBSPA takes the criterion from the Hessian of each layer that reads
the channels, and what is left of that layer then makes up for what it lost.

A reconstruction: there is no code, and of the paper only the abstract and an overview could be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveInt
from prunelab.common.weights import masks
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Observation, Probe, Statistics, Target, Unit, WeightSignals

Criterion = Literal["l1", "l2", "snip", "grasp", "crop", "obs", "random"]
GRADIENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {  # by weight, and gradient or Hessian times gradient
    "snip": lambda weight, gradient: (weight * gradient).abs(),
    "grasp": lambda weight, turned: weight * turned,
    "crop": lambda weight, turned: (weight * turned).abs(),
}
COLUMNS = ("o", "down")  # weights that read the units: their columns, and not their rows, are the units'


def reads(role: str) -> bool:
    """Whether a weight of this role reads the units."""
    return role.partition(".")[0] in COLUMNS


def of_units(elements: Tensor, units: int, columns: bool) -> Tensor:
    """The elements of each unit [units, n], from those of a weight whose rows, or columns, are the units'."""
    return elements.T.reshape(units, -1) if columns else elements.reshape(units, -1)


def members(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a group: each layer's, where several make or read the units, and no biases."""
    several = {role: w for role, w in weights.items() if role.rpartition(".")[2].isdigit()}
    return several or {role: w for role, w in weights.items() if w.dim() > 1 and not role.endswith(".bias")}


def obs_elements(weight: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """w_ij^2 / [H^-1]_jj, what the layer's outputs lose at least without a weight; of the shape of weight [R, C]."""
    inverse = torch.linalg.inv(damped(hessian, damping).double()).diagonal()
    return (weight.double().square() / inverse).float()


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian [C, C] with a share of its mean diagonal on the diagonal; inputs that were never used count as 1."""
    diagonal = hessian.diagonal()
    result = hessian.clone()
    result.diagonal().copy_(diagonal.masked_fill(diagonal == 0, 1) + damping * diagonal.mean())
    return result


def made_up_for(weight: Tensor, hessian: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The weight [R, C] of which the columns `kept` [C] give, by least squares, what all gave: OBS for many columns at
    once."""
    full = damped(hessian, damping).double()
    solved = torch.linalg.solve(full[kept][:, kept], full[kept] @ weight.double().T).T
    result = torch.zeros_like(weight)
    result[:, kept] = solved.to(weight.dtype)
    return result


def normalised(scores: Tensor, how: str) -> Tensor:
    """Scores [C] of a group, relative to it: they sum to one, have a mean or a maximum of one, or stay as they are. Of
    signed scores the sizes are summed."""
    size = scores.abs()
    by = {"sum": size.sum(), "mean": size.mean(), "max": size.amax(), "none": size.new_ones(())}[how]
    return scores / by if float(by) > 0 else scores


class Hessians(Accumulator):
    """2 x x^T [n, n] of what each weight that reads the units is given, a sequence on average, in one row."""

    def __init__(self, target: Target) -> None:
        self.sums: dict[str, Tensor] = {}
        self.seen = 0

    def update(self, observed: Observation) -> None:
        self.seen += 1
        for role, x in observed.given.items():
            x = x.float()
            self.sums[role] = self.sums.get(role, 0) + 2 * x.T @ x

    def value(self) -> Tensor:
        return torch.cat([total.flatten() for total in self.sums.values()]) / self.seen


class Elements(Accumulator):
    """The scores of each unit's elements in one weight, summed [units], from its gradient or Hessian times gradient."""

    def __init__(self, criterion: str, weight: Tensor, units: int, columns: bool) -> None:
        self.criterion, self.weight, self.units, self.columns = criterion, weight, units, columns
        self.state: Tensor | None = None

    def update(self, observed: Tensor) -> None:
        self.state = observed.float() if self.state is None else self.state + observed.float()

    def value(self) -> Tensor:
        gradient = torch.zeros_like(self.weight) if self.state is None else self.state
        scores = GRADIENTS[self.criterion](self.weight.float(), gradient.to(self.weight.device))
        return of_units(scores, self.units, self.columns).sum(1)


@dataclass(frozen=True)
class SPA(WeightPruner):
    """Structured pruning of coupled channels by any criterion of weights (arXiv 2403.18955). A reconstruction.

    The budget is the share of the parameters of coupled channels that stays, over the whole network; with `local` the
    share of the channels of each group.

    Parameters
    ----------
    criterion
        `l1`, `l2`: |w|, w^2. `snip`: |w g| for the gradient g of the loss. `grasp`: w H g for the Hessian H; `crop`:
        its size. `obs` (OBSPA): w^2 / [H^-1]_jj in the layers that read a channel, which are solved anew then.
        `random`.
    structures
        What is coupled: `channels` of any network, `heads` of transformers.
    aggregate
        Over the elements of a coupled channel: their `sum`, or `mean`.
    normalise
        Scores of a group: they `sum` to one, as in the authors' figure, have a `mean` or `max` of one, or `none`.
    local
        Each group loses the same share, rather than the network as a whole.
    inputs
        `obs` looks at the samples as they are `given`, or at `noise` of their shape (data-free).
    damping
        Of a Hessian, as a share of its mean diagonal.
    batch
        Samples to a gradient.
    """

    criterion: Criterion = "l1"
    structures: tuple[Unit, ...] = ("channels",)
    aggregate: Literal["sum", "mean"] = "sum"
    normalise: Literal["sum", "mean", "max", "none"] = "sum"
    local: bool = False
    inputs: Literal["given", "noise"] = "given"
    damping: NonNegativeFloat = 0.01
    batch: PositiveInt = 1

    name: ClassVar[str] = "spa"
    exempt = {"budget": "groups lose different numbers of channels, counted in parameters of all"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.structures or not {*self.structures} <= {"channels", "heads"}:
            raise PrunelabError(f"spa couples channels and heads, not {', '.join(self.structures) or 'nothing'}")

    @property
    def sequential(self) -> bool:
        return False  # channels of all groups are compared

    @property
    def units(self) -> Sequence[Unit]:
        return self.structures

    @property
    def calibrated(self) -> bool:
        return self.criterion not in ("l1", "l2", "random")

    def prepared(self, samples: list[Any]) -> list[Any]:
        if self.inputs == "given" or self.criterion != "obs":
            return samples
        if not all(isinstance(s, Tensor) and s.is_floating_point() for s in samples):
            raise PrunelabError("spa makes noise of images; give token ids as they are (inputs='given')")
        draws = torch.Generator().manual_seed(0)
        return [torch.randn(s.shape, generator=draws).to(s) for s in samples]

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"hessians": Hessians} if self.criterion == "obs" else {}

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        if self.criterion not in GRADIENTS:
            return {}

        def elements(member: Target) -> Accumulator:
            weight = probe.weights(member)[member.role]
            return Elements(self.criterion, weight, member.units, reads(member.role))

        if self.criterion == "snip":
            return probe.gradients({"elements": elements}, batch=self.batch)
        return probe.curvature({"elements": elements}, batch=self.batch)

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        if self.criterion == "random":
            return torch.rand(target.shape, generator=signals.rng)
        weights = members(signals.weights)
        sums, count = torch.zeros(target.units, device=next(iter(weights.values())).device), 0
        hessians = self.hessians(weights, signals) if self.criterion == "obs" else {}
        for role, weight in weights.items():
            if self.criterion == "obs" and role not in hessians:
                continue  # assumption: of the layers that make a channel the Hessians are other groups'
            count += weight.numel() // target.units
            if self.criterion in GRADIENTS:
                sums += signals[f"elements.{role}"]
                continue
            if self.criterion == "obs":
                elements = obs_elements(weight, hessians[role], self.damping)
            else:
                elements = weight.float().abs() if self.criterion == "l1" else weight.float().square()
            sums += of_units(elements, target.units, reads(role)).sum(1)
        return normalised(sums / count if self.aggregate == "mean" else sums, self.normalise)

    def hessians(self, weights: Mapping[str, Tensor], signals: WeightSignals) -> dict[str, Tensor]:
        """By role the Hessian of each weight that reads the units."""
        roles = [role for role in weights if reads(role)]
        sizes = [weights[role].shape[1] for role in roles]
        parts = signals["hessians"].split([size * size for size in sizes])
        return {role: part.view(size, size) for role, part, size in zip(roles, parts, sizes, strict=True)}

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        if self.local or budget.unit != "ratio":
            return super().select(targets, signals, scores, budget)
        if len(budget.amounts) > 1:
            raise PrunelabError(f"spa shares one budget out over the whole network; it got {budget}")
        return masks.within(scores, [t.size + t.read for t in targets], budget.amounts[0])

    def update(self, target: Target, signals: WeightSignals, mask: Tensor) -> Mapping[str, Tensor]:
        if self.criterion != "obs" or bool(mask.all()):
            return {}
        weights = members(signals.weights)
        results = {}
        for role, hessian in self.hessians(weights, signals).items():
            kept = mask.repeat_interleave(len(hessian) // target.units).to(hessian.device)
            results[role] = made_up_for(weights[role], hessian, kept, self.damping)
        return results
