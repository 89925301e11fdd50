"""PruneNet (Sengupta et al., ICLR 2025): a policy that sees a weight matrix and nothing else says which rows to keep.

One small network serves the MLPs of all layers. Policy gradients (REINFORCE) teach it to change the singular values of
the first projection little, in the distance of Kolmogorov and Smirnov, when rows leave. No data are read, and what was
learned on one model prunes every model of the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveFloat, PositiveInt, PositiveShare
from prunelab.common.weights import masks
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Decision, Probe, Statistics, Target, Unit, WeightSignals

IDENTICAL = 99999.0  # the reward of a spectrum that did not change


class Policy(nn.Module):
    """How much each row of W [I, H] matters: alpha = sigmoid((W A^T + b) s), for A [I, H], b [I] and s [I, 1]."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, rows)
        self.row_sparsities = nn.Parameter(torch.rand(rows, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """The logit [I] of alpha, which large weights would round to 0 or 1."""
        logit: Tensor = self.proj(weight) @ self.row_sparsities
        return logit.squeeze(1)


def keep_logits(alpha: Tensor, noise: Tensor) -> Tensor:
    """Logits [I] of the probabilities to keep a row, from that of alpha [I] and noise [I] uniform in (0, 1): those of
    both added up."""
    return torch.logit(noise) + alpha


def rounded(alpha: Tensor) -> Tensor:
    """Logits [I] of alpha as a floating-point number, which rounds to 0 and 1 and so to infinite logits."""
    return torch.logit(torch.sigmoid(alpha))


def divergence(alpha: Tensor) -> Tensor:
    """How far alpha, of these logits, is from indifference: the sum of -(1 - a) log a - a log(1 - a) + log 1/2."""
    a = torch.sigmoid(alpha)
    return (-F.logsigmoid(alpha) * (1 - a) - a * F.logsigmoid(-alpha) - math.log(2)).sum()


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Largest distance between the distributions of two samples [n] and [m]."""
    a, b = a.sort().values, b.sort().values
    at = torch.cat([a, b])
    shares = [torch.searchsorted(s, at, right=True).double() / len(s) for s in (a, b)]
    return float((shares[0] - shares[1]).abs().max())


def reward(values: Tensor, rows: Tensor) -> float:
    """1 over the distance between the singular values [n] of a matrix and those of what is left of its rows [k, H]."""
    distance = kolmogorov_smirnov(values, torch.linalg.svdvals(rows))
    return IDENTICAL if distance == 0 else 1 / distance


def discounted(rewards: Sequence[float], gamma: float) -> list[float]:
    """The reward of every layer, in forward order, times gamma to the power of its place."""
    return [r * gamma**place for place, r in enumerate(rewards)]


def policy_loss(logits: Tensor, rows: Tensor, value: float) -> Tensor:
    """What REINFORCE minimises for one layer: minus the log probability of the rows [k] kept, times the reward."""
    return -F.logsigmoid(logits[rows]).sum() * value


def sampled(probabilities: Tensor, count: int, rng: torch.Generator | None) -> Tensor:
    """So many rows, drawn without replacement in proportion to these probabilities [I], in order."""
    chances = probabilities.detach().clamp_min(torch.finfo(probabilities.dtype).tiny).cpu()
    return torch.multinomial(chances, count, generator=rng).sort().values.to(probabilities.device)


@dataclass(frozen=True)
class PruneNet(WeightPruner):
    """Pruning of MLP neurons by a learned policy, without data (arXiv 2501.15296).

    The budget is the share of neurons that stays. `prune(..., learned=plan.learned)` uses a policy again, under any
    budget.

    Parameters
    ----------
    episodes
        Passes over all layers in which the policy learns (20).
    rate
        Learning rate of AdamW.
    gamma
        Discount from layer to layer.
    divergence_weight
        Weight of `divergence` in the loss; 0 as in the authors' default, 1 as under their `--use_kld`.
    sample
        Rows are drawn, as released; False keeps the most probable ones under the same noise.
    saturates
        Alpha is rounded to floating-point numbers, as released: where it becomes 0 or 1 the loss is infinite. By
        default logits are kept, whose loss is finite.
    best
        Prune by the policy of the episode with the largest total reward, which the authors store, rather than by the
        last one, with which their run goes on.
    """

    episodes: PositiveInt = 20
    rate: PositiveFloat = 1e-3
    gamma: PositiveShare = 0.99
    divergence_weight: NonNegativeFloat = 0.0
    sample: bool = True
    saturates: bool = False
    best: bool = False

    name: ClassVar[str] = "prunenet"

    @property
    def units(self) -> Sequence[Unit]:
        return ("channels",)

    @property
    def calibrated(self) -> bool:
        return False  # weights are all it reads

    def build(self, info: Any) -> nn.Module:
        shapes = {(target.units, target.read) for target in info}
        if len(shapes) > 1:
            raise PrunelabError("prunenet has one policy for all layers, and their MLPs differ in shape here")
        return Policy(*next(iter(shapes)))

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """What the policy says of every layer once it is trained."""
        device = next(iter(probe.weights(probe.targets[0]).values())).device
        policy = probe.learned.to(device)
        if not probe.trained:
            self.train(policy, probe)
        with torch.no_grad():
            return {target.name: {"alpha": self.alpha(policy, probe.weights(target))} for target in probe.targets}

    def train(self, policy: Policy, probe: Probe) -> None:
        """Let the policy play its episodes: draw rows in every layer, and then one step a layer."""
        rng, optimiser = probe.signals(probe.targets[0]).rng, torch.optim.AdamW(policy.parameters(), lr=self.rate)
        values = [torch.linalg.svdvals(self.seen(probe.weights(target))) for target in probe.targets]
        most, kept = -1.0, None
        for _ in range(self.episodes):
            played, before = [], {name: tensor.clone() for name, tensor in policy.state_dict().items()}
            for target, spectrum in zip(probe.targets, values, strict=True):
                weight = self.seen(probe.weights(target))
                with torch.no_grad():
                    alpha = self.alpha(policy, probe.weights(target))
                    chance = torch.sigmoid(keep_logits(alpha, self.noise(target.units, rng, weight)))
                rows = sampled(chance, self.count(target, probe.budget), rng)
                played.append((target, rows, reward(spectrum, weight[rows])))
            if (total := sum(value for _, _, value in played)) > most:
                most, kept = total, before
            returns = discounted([value for _, _, value in played], self.gamma)
            for (target, rows, _), value in zip(played, returns, strict=True):
                alpha = self.alpha(policy, probe.weights(target))
                loss = policy_loss(keep_logits(alpha, self.noise(target.units, rng, alpha)), rows, value)
                if self.divergence_weight:
                    loss = loss + self.divergence_weight * divergence(alpha)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        if self.best and kept is not None:
            policy.load_state_dict(kept)

    def alpha(self, policy: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """What the policy says of a layer's rows [I]."""
        alpha: Tensor = policy(self.seen(weights))
        return rounded(alpha) if self.saturates else alpha

    @staticmethod
    def seen(weights: Mapping[str, Tensor]) -> Tensor:
        """The first projection [I, H]: the gate's, or where there is none that into the MLP."""
        return weights.get("gate", weights["up"]).float()

    @staticmethod
    def noise(rows: int, rng: torch.Generator | None, like: Tensor) -> Tensor:
        return torch.rand(rows, generator=rng).clamp(1e-6, 1 - 1e-6).to(like.device)

    @staticmethod
    def count(target: Target, budget: Budget) -> int:
        """Rows that stay, rounded down as released."""
        own = budget.at(target.component if budget.names else target.block)
        left = int(round(own.amounts[0] * target.units, 6)) if own.unit == "ratio" else own.count(target.units)
        if left < 1:
            raise PrunelabError(f"prunenet would remove all channels of {target.name} under {budget}; keep more")
        return left

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """Keep probabilities, under noise of their own each time."""
        alpha = signals["alpha"]
        return torch.sigmoid(keep_logits(alpha, self.noise(target.units, signals.rng, alpha)))

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        count, chance = self.count(target, budget), self.score(target, signals)
        masks.refuse_nan(chance, target.name)
        if not self.sample:
            return Decision(masks.per_row(chance, Budget(target.units - count, "removed")))
        rows = torch.arange(target.units) if count == target.units else sampled(chance, count, signals.rng)
        return Decision(F.one_hot(rows.cpu(), target.units).sum(0).bool())
