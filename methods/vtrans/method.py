"""VTrans (Dutta et al., 2024): structures whose mask is more noise than signal leave.

Every head, channel and layer part is multiplied by a Gaussian factor z = mu + eps sigma. A variational information
bottleneck makes signal cost something, a constraint with learned multipliers holds the expected size at the budget, and
a dense teacher keeps the model what it was. In the end the structures of the largest mu^2 / sigma^2 stay.

A reconstruction: the authors' code of VTrans is not to be had; the mask is that of the same authors' later code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeFloat, PositiveFloat, Share
from prunelab.common.training.distillation import distillation
from prunelab.common.training.method import Batch, Training, TrainingMethod
from prunelab.common.training.parametrizations import Attachment, NoiseGate
from prunelab.common.training.schedule import Linear, Schedule
from prunelab.common.weights import masks
from prunelab.common.weights.targets import Decision, Target, Unit


def noisy(x: Tensor, mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """x [B, ..., d] times mu + eps sigma, with one row of noise [B, d] a sample."""
    factor = mean + noise * (log_variance / 2).exp()
    return x * factor.view(len(noise), *[1] * (x.dim() - 2), -1)


def log_alpha(mean: Tensor, log_variance: Tensor) -> Tensor:
    """ln(sigma^2 / mu^2) [d]: above 0 a factor is more noise than signal."""
    return log_variance - (mean.square() + 1e-8).log()


def soft_mask(log_alpha: Tensor, slope: float = 10.0) -> Tensor:
    """How much a structure is there [d], from 0 to 1; the sum is the number of those that are expected to stay."""
    return torch.sigmoid(-slope * log_alpha)


class Constraint(nn.Module):
    """The constraint on size with its two multipliers, which rise while it is violated. seen: hidden states of the pass
    at hand, the model's and the teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.lambda1, self.lambda2 = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.seen: tuple[list[Tensor], list[Tensor]] = ([], [])

    def forward(self, excess: Tensor) -> Tensor:
        return self.lambda1 * excess + self.lambda2 * excess.square()

    def unlike(self) -> Tensor:
        """Mean squared distance of the model's hidden states from the teacher's, which are then forgotten."""
        own, other = self.seen
        result = torch.stack([nn.functional.mse_loss(a, b) for a, b in zip(own, other, strict=True)]).mean()
        own.clear()
        other.clear()
        return result


@dataclass(frozen=True)
class VTrans(TrainingMethod):
    """Learned noise gates on heads and channels under a constraint on size (arXiv 2406.05276).

    Needs the service `teacher`, the dense model. The budget is the share of the parameters of heads and channels.

    Parameters
    ----------
    information
        What a unit of information costs (all divergences are multiplied by it), and `heads` times that in heads.
    slope
        Of the soft mask by which the expected size is counted.
    learns
        `all` parameters, or the `masks` alone (Faster-VTrans).
    gates, multipliers
        Their learning rates, as multiples of the weights'.
    rise
        Share of the training after which the constraint asks for the whole budget.
    logits, hidden
        Weights of distillation from the teacher's distribution and hidden states; `temperature` is that of the first.
    decides
        `budget`: the units of most signal stay until it is met; `noise`: those with more signal than noise.
    """

    information: NonNegativeFloat = 1e-6
    heads: NonNegativeFloat = 256.0
    slope: PositiveFloat = 10.0
    learns: Literal["all", "masks"] = "all"
    gates: PositiveFloat = 50.0
    multipliers: PositiveFloat = 100.0
    rise: Share = 0.5
    logits: NonNegativeFloat = 1.0
    hidden: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 1.0
    decides: Literal["budget", "noise"] = "budget"

    name: ClassVar[str] = "vtrans"
    services: ClassVar[tuple[str, ...]] = ("teacher",)
    exempt = {"budget": "layers keep different numbers, counted in parameters of the whole model"}

    @property
    def units(self) -> Sequence[Unit]:
        return ("heads", "channels")

    def schedule(self, steps: int) -> Schedule:
        return Linear.of(steps, cooldown=1 - self.rise, whole=False)

    def attach(self, training: Training) -> Sequence[Attachment]:
        gates = [Attachment(target, NoiseGate(target.units), "units") for target in training.targets]
        return [*gates, Attachment(training.targets[0], Constraint(), "held")]

    def constraint(self, training: Training) -> Constraint:
        """The constraint on size."""
        return next(a.module for a in training.attachments if isinstance(a.module, Constraint))

    @contextmanager
    def around(self, training: Training) -> Iterator[None]:
        """The hidden states behind every block are noted, of the model and of its teacher."""
        constraint, removers = self.constraint(training), []
        for model, seen in zip((training.model, training.services["teacher"]), constraint.seen, strict=True):

            def note(block: nn.Module, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
                if training.model.training:
                    seen.append(output[0] if isinstance(output, tuple) else output)

            for block in range(len(training.adapter.blocks) if self.hidden else 0):
                module = model.get_submodule(training.adapter.prefix(block))
                removers.append(module.register_forward_hook(note))
        try:
            yield
        finally:
            for handle in removers:
                handle.remove()

    def trainable(self, names: Sequence[str], training: Training) -> Collection[str]:
        own = ("mean", "log_variance", "lambda1", "lambda2")
        return names if self.learns == "all" else [name for name in names if name.endswith(own)]

    def options(self, name: str) -> Mapping[str, Any]:
        if name.endswith(("lambda1", "lambda2")):
            return {"scale": self.multipliers, "weight_decay": 0.0, "maximize": True}
        return {"scale": self.gates, "weight_decay": 0.0} if name.endswith(("mean", "log_variance")) else {}

    def gate(self, target: Target, training: Training) -> NoiseGate:
        """The gate on a target."""
        return next(module for module in training.modules(target) if isinstance(module, NoiseGate))

    def expected(self, training: Training) -> Tensor:
        """The share of the parameters that is expected to stay."""
        held, whole = [], 0
        for target in training.targets:
            held.append(target.size * soft_mask(self.gate(target, training).log_alpha(), self.slope).sum())
            whole += target.parameters
        return torch.stack(held).sum() / whole

    def loss(self, batch: Batch, outputs: Any, teacher: Any, training: Training) -> Tensor:
        loss: Tensor = outputs.loss
        if self.logits:
            loss = loss + self.logits * distillation(outputs.logits, teacher.logits, self.temperature)
        if self.hidden:
            loss = loss + self.hidden * self.constraint(training).unlike()
        for target in training.targets:
            times = self.heads if target.unit == "heads" else 1.0
            loss = loss + self.information * times * self.gate(target, training).divergence()
        excess: Tensor = self.constraint(training)(self.expected(training) - self.share(training.budget))
        return loss + excess

    def finish(self, training: Training) -> Mapping[str, Decision]:
        scores = [-self.gate(target, training).log_alpha().detach() for target in training.targets]
        if self.decides == "noise":
            kept = [s > torch.minimum(s.max() - 1e-6, torch.zeros_like(s)) for s in scores]
        else:
            sizes = [target.size for target in training.targets]
            kept = masks.within(scores, sizes, self.share(training.target_budget))
        return {target.name: Decision(mask) for target, mask in zip(training.targets, kept, strict=True)}

    def share(self, budget: Budget) -> float:
        """The share of the parameters that a budget keeps."""
        return float(budget.at(0).amounts[0])
