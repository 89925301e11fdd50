"""MC-MoE's bits of every expert: what experts are worth, what fewer bits cost them, and the integer programme."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.merging import chosen_counts
from prunelab.common.weights.quantisation import Quantiser, rounded
from prunelab.common.weights.targets import Accumulator, Observation, Target


def fake_quantised(weight: Tensor, bits: int, group: int) -> Tensor:
    """The nearest points [R, C] of grids over groups of columns; one bit is a sign times the mean magnitude."""
    return rounded(weight, Quantiser(bits, group=group)).dense().to(weight.dtype)


def router_mass(logits: Tensor, chosen: Tensor) -> Tensor:
    """Sum [E] of the softmax weights of the chosen experts [T, k], over all experts' logits [T, E]."""
    weights = logits.float().softmax(-1).gather(1, chosen)
    return torch.zeros(logits.shape[1], device=logits.device).index_add_(0, chosen.flatten(), weights.flatten())


class Significance(Accumulator):
    """How often each expert is chosen and with what weight, [2, E]."""

    def __init__(self, target: Target) -> None:
        self.sums = torch.zeros(2, target.units, dtype=torch.float64)

    def update(self, observed: Observation) -> None:
        routing = observed.routing
        assert routing is not None
        counts = chosen_counts(routing.chosen, self.sums.shape[1])
        self.sums += torch.stack([counts.double(), router_mass(routing.logits, routing.chosen).double()]).cpu()

    def value(self) -> Tensor:
        return self.sums


class QuantisationErrors(Accumulator):
    """Frobenius norm of what a mixture's output changes by when one expert alone has so many bits, summed over batches
    of sequences: [E, choices]."""

    def __init__(self, target: Target, choices: Sequence[int], group: int, batch: int) -> None:
        self.choices, self.group, self.batch = choices, group, batch
        self.squares = torch.zeros(target.units, len(choices), dtype=torch.float64)
        self.total = torch.zeros_like(self.squares)
        self.seen = 0
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def weights(self, observed: Observation, expert: int, bits: int) -> tuple[Tensor, Tensor]:
        """An expert's projections of so many bits, made once."""
        if (expert, bits) not in self.kept:
            gate_up, down = (observed.weights[role][expert] for role in ("gate_up", "down"))
            self.kept[expert, bits] = (
                fake_quantised(gate_up, bits, self.group),
                fake_quantised(down, bits, self.group),
            )
        return self.kept[expert, bits]

    def update(self, observed: Observation) -> None:
        routing = observed.routing
        assert routing is not None and routing.computed is not None
        for expert in routing.chosen.unique().tolist():
            token, slot, outputs = routing.outputs(expert, observed.inputs)
            gates, inputs = routing.gates[token, slot].double().unsqueeze(-1), observed.inputs[token]
            for place, bits in enumerate(self.choices):
                changed = routing.computed(*self.weights(observed, expert, bits), inputs)
                self.squares[expert, place] += ((outputs.double() - changed.double()) * gates).square().sum().cpu()
        self.seen += 1
        if self.seen % self.batch == 0:
            self.close()

    def close(self) -> None:
        """Count a batch."""
        self.total += self.squares.sqrt()
        self.squares.zero_()

    def value(self) -> Tensor:
        self.close()
        self.kept.clear()
        return self.total


class Curvature(QuantisationErrors):
    """What rounding an expert to so many bits costs by HAWQ-V2's measure (arXiv 1911.03852), [E, choices]: the mean
    diagonal of the layer-wise Hessian of each of its linears times the squared change of the weight, summed."""

    def __init__(self, target: Target, choices: Sequence[int], group: int) -> None:
        super().__init__(target, choices, group, 1)
        self.traces = torch.zeros(target.units, 2, dtype=torch.float64)  # of what reads the input, and of what writes
        self.changes = torch.zeros(target.units, 2, len(choices), dtype=torch.float64)
        self.tokens = 0

    def update(self, observed: Observation) -> None:
        routing = observed.routing
        assert routing is not None and routing.computed is not None
        self.tokens += len(observed.inputs)
        for expert in routing.chosen.unique().tolist():
            token, _ = routing.chosen.eq(expert).nonzero(as_tuple=True)
            gate_up, down = (observed.weights[role][expert] for role in ("gate_up", "down"))
            inputs = observed.inputs[token]
            inner = routing.computed(gate_up, torch.eye(down.shape[1], dtype=down.dtype, device=down.device), inputs)
            seen = torch.stack([part.double().square().mean(-1).sum() for part in (inputs, inner)])
            self.traces[expert] += 2 * seen.cpu()
            for place, bits in enumerate(self.choices):
                rounded = self.weights(observed, expert, bits)
                for part, (new, old) in enumerate(zip(rounded, (gate_up, down), strict=True)):
                    self.changes[expert, part, place] = (new.double() - old.double()).square().sum().cpu()

    def value(self) -> Tensor:
        self.kept.clear()
        return (self.traces.unsqueeze(-1) * self.changes).sum(1) / max(self.tokens, 1)


class BlockScore(Accumulator):
    """How much a mixture turns what passes it, [1]: one minus the cosine of its input and of that input with its output
    added, a mean over tokens (after QuantMoE-Bench, arXiv 2406.08155)."""

    def __init__(self, target: Target) -> None:
        self.total, self.tokens = 0.0, 0

    def update(self, observed: Observation) -> None:
        routing = observed.routing
        assert routing is not None
        before = observed.inputs.float()
        after = before.clone()
        for expert in routing.chosen.unique().tolist():
            token, slot, outputs = routing.outputs(expert, observed.inputs)
            after.index_add_(0, token, outputs.float() * routing.gates[token, slot].float().unsqueeze(-1))
        self.total += float((1 - torch.cosine_similarity(before, after, dim=-1)).sum())
        self.tokens += len(before)

    def value(self) -> Tensor:
        return torch.tensor([self.total / max(self.tokens, 1)], dtype=torch.float64)


def by_blocks(scores: Sequence[float], budget: float, low: int = 2, high: int = 4) -> list[int]:
    """The bits of every mixture's experts: `high` for those of the highest scores, as many as the mean allows, `low`
    for the others."""
    if not low <= budget <= high:
        raise PrunelabError(f"mc_moe: whole mixtures have {low} or {high} bits, and {budget:g} lies outside of these")
    many = math.floor(len(scores) * (budget - low) / (high - low) + 1e-9)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:many]
    return [high if i in best else low for i in range(len(scores))]


def costs(
    usage: Tensor, mass: Tensor, errors: Tensor, alpha: float = 1.0, beta: float = 1.5, gamma: float = 1.0
) -> Tensor:
    """What each choice costs each expert, [E, choices]: phi^alpha w^beta eps^gamma, with phi and w as shares."""
    phi, weight = (part.double() / part.double().sum().clamp_min(1e-300) for part in (usage, mass))
    return 1000 * (phi**alpha * weight**beta).unsqueeze(1) * errors.double() ** gamma


def allocated(cost: Tensor, choices: Sequence[int], total: int, least_one: Sequence[int] = (3, 2)) -> list[int]:
    """The bits of every expert, from its costs [E, choices]: the least sum with at most `total` bits in all and one
    expert or more of each number in `least_one`. Exact, by dynamic programming over experts, bits spent and numbers
    met.

    Raises PrunelabError where no choice fits.
    """
    met = [sum(1 << place for place, bits in enumerate(least_one) if bits == choice) for choice in choices]
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for row in cost.tolist():
        reached: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (spent, flags), (so_far, chosen) in best.items():
            for place, bits in enumerate(choices):
                key, value = (spent + bits, flags | met[place]), so_far + row[place]
                if key[0] <= total and value < reached.get(key, (math.inf,))[0]:
                    reached[key] = (value, (*chosen, bits))
        best = reached
    full = (1 << len(least_one)) - 1
    fitting = [result for (_, flags), result in best.items() if flags == full]
    if not fitting:
        raise PrunelabError(
            f"mc_moe: {total} bits do not suffice for {len(cost)} experts of {', '.join(map(str, choices))} bits, with"
            f" one of {' and one of '.join(map(str, least_one))} at least; keep more"
        )
    return list(min(fitting)[1])
