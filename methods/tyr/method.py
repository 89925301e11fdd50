"""Týr-the-Pruner (Li et al., NeurIPS 2025): heads and neurons of every layer at several sparsities, and a search for
the best combination under one total.

Locally, the inputs of the output and down projections leave group by group by optimal brain surgery, and the others are
then solved for exactly. The candidates of all layers make a supernet. Evolution moves sparsity from one layer to
another of its kind, judged by how far the pruned model's next tokens diverge from the dense one's. Each round of both
takes half the step of the last.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.evolution import Genes, Stage, evolved, exchanged
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveShare
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.surgery import damped, inverted, surgery
from prunelab.common.weights.targets import (
    Accumulator,
    Candidates,
    Decision,
    Observation,
    Probe,
    Statistics,
    Target,
    Unit,
    WeightSignals,
)


def remaining(groups: int, sparsity: float) -> int:
    """Groups that stay, rounded down."""
    return math.floor(round(groups * (1 - sparsity), 6))


def divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the pruned model's next tokens from the dense one's, over the logits [T, k]
    that are largest in the dense model."""
    log_dense, log_pruned = dense.float().log_softmax(-1), pruned.float().log_softmax(-1)
    return F.kl_div(log_pruned, log_dense, log_target=True, reduction="batchmean")


class Gram(Accumulator):
    """X^T X [I, I] over all tokens."""

    shared: ClassVar[bool] = True

    def __init__(self, target: Target) -> None:
        self.state = torch.zeros(())

    def update(self, observed: Observation) -> None:
        x = observed.inputs.float()
        self.state = self.state.to(x.device) + x.T @ x

    def value(self) -> Tensor:
        return self.state


class Inverse(Accumulator):
    """The inverse of the damped X^T X that another accumulator gathers, made once for all candidates of a layer."""

    shared: ClassVar[bool] = True

    def __init__(self, of: Gram, damping: float) -> None:
        self.of, self.damping = of, damping

    def update(self, observed: Observation) -> None:
        """The other one takes it in."""

    def value(self) -> Tensor:
        return inverted(damped(self.of.state, self.damping))


def grams(damping: float) -> dict[str, Callable[[Target], Accumulator]]:
    """The statistics `gram` and `inverse` of a layer's inputs. Both read one accumulator, which leaves with them."""
    made: WeakValueDictionary[str, Gram] = WeakValueDictionary()

    def gram(target: Target) -> Gram:
        return made.setdefault(target.name, Gram(target))

    return {"gram": gram, "inverse": lambda target: Inverse(gram(target), damping)}


ROLES: Mapping[Unit, str] = {"attention_output": "o", "channels": "down"}


@dataclass(frozen=True)
class Tyr(WeightPruner):
    """Structured pruning by a search over locally pruned candidates (arXiv 2503.09657).

    Query heads are silenced in the output projection, as released, whether keys and values are shared or not; neurons
    of the MLP leave. The budget is the share of each kind that stays, in the model as a whole.

    Parameters
    ----------
    iterations
        Rounds of candidates and search; each halves the step between sparsities.
    step
        Share of a layer's heads or neurons between candidates at first (an eighth).
    levels
        Most candidates a layer, around the sparsity that it has so far.
    least_neurons
        Smallest step of neurons; that of heads is one.
    head_rounds, neuron_rounds
        In how many rounds heads and neurons leave locally. The paper says one head or 16 neurons at a time.
    generations, offspring, exchanges
        Of the search: mutants of each generation, and up to how many moves of sparsity make one.
    tokens, survivors
        Calibration tokens behind each stage of selection, and how many survive it.
    top
        Logits that are compared.
    accumulate
        Candidates are made on a stream that earlier layers' expected candidates gave; False, on the dense one's.
    damping, gradient
        Share of the Hessian's mean diagonal added to it; whether the score has its term of first order.
    seed
        Of the search.
    """

    iterations: PositiveInt = 4
    step: PositiveShare = 0.125
    levels: PositiveInt = 9
    least_neurons: PositiveInt = 32
    head_rounds: PositiveInt = 1
    neuron_rounds: PositiveInt = 16
    generations: NonNegativeInt = 50
    offspring: PositiveInt = 128
    exchanges: PositiveInt = 4
    tokens: tuple[PositiveInt, ...] = (2048, 16384, 131072)
    survivors: tuple[PositiveInt, ...] = (16, 4, 2)
    top: PositiveInt = 8192
    accumulate: bool = True
    damping: NonNegativeFloat = 0.01
    gradient: bool = True
    seed: NonNegativeInt = 0

    name: ClassVar[str] = "tyr"
    exempt = {"budget": "layers keep different shares of one total of each kind"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.tokens) != len(self.survivors):
            raise PrunelabError("tyr: as many numbers of tokens as of survivors, one a stage")

    @property
    def units(self) -> Sequence[Unit]:
        return ("attention_output", "channels")

    # -- candidates --------------------------------------------------------------------------------------------------

    def local(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        """One candidate of a layer."""
        role, heads = ROLES[target.unit], target.unit == "attention_output"
        rounds = self.head_rounds if heads else self.neuron_rounds
        mask, weight = surgery(
            signals.weights[role], signals["gram"], target.span, target.units - budget.pruned(target.units), rounds,
            self.damping, self.gradient, signals["inverse"],
        )  # fmt: skip
        return Decision(mask, {role: weight.to(signals.weights[role].dtype)}, remove=not heads)

    def step_of(self, target: Target, iteration: int) -> int:
        """Units from one candidate to the next."""
        first = max(1, round(self.step * target.units))
        least = 1 if target.unit == "attention_output" else min(self.least_neurons, first)
        return max(least, round(self.step * target.units / 2**iteration))

    def levels_of(self, target: Target, gone: int, iteration: int) -> list[int]:
        """Units that leave in every candidate: `gone`, and steps below and above as far as there are units."""
        step, reach = self.step_of(target, iteration), self.levels // 2
        return [n for n in (gone + step * place for place in range(-reach, reach + 1)) if 0 <= n < target.units]

    # -- search ------------------------------------------------------------------------------------------------------

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """The mask and the weight of every layer's candidate that the last search chose."""
        gone = {t.name: self.amount(t, probe.budget).pruned(t.units) for t in probe.targets}
        for iteration in range(self.iterations):
            levels = {t.name: self.levels_of(t, gone[t.name], iteration) for t in probe.targets}
            expected = {name: levels[name].index(gone[name]) for name in levels}
            result = probe.candidates(
                {name: [Budget(n, "removed") for n in of] for name, of in levels.items()}, self.local,
                {unit: grams(self.damping) for unit in self.units}, expected if self.accumulate else None,
                name=f"supernet{iteration}",
            )  # fmt: skip
            chosen = self.search(probe, result, levels, expected)
            gone = {name: levels[name][level] for name, level in chosen.items()}
        kept = ((t.name, {"mask": d.mask, "weight": d.values[ROLES[t.unit]]}) for t, d in result.decisions(chosen))
        return probe.shelved("chosen", kept)

    def search(
        self, probe: Probe, result: Candidates, levels: Mapping[str, Sequence[int]], expected: Mapping[str, int]
    ) -> dict[str, int]:
        """The best level of every layer under the total of each kind."""
        names = list(levels)
        fitness = Fitness(probe, result, names, self.top, random.Random(self.seed))
        low, high, kinds = [0] * len(names), [len(levels[n]) - 1 for n in names], [t.unit for t in probe.targets]

        def mutated(genes: Genes, rng: random.Random) -> Genes:
            moves = min(rng.randint(1, self.exchanges), rng.randint(1, self.exchanges))
            return exchanged(genes, rng, low, high, kinds, moves)

        start = tuple(expected[name] for name in names)
        stages = [Stage(*stage) for stage in zip(self.tokens, self.survivors, strict=True)]
        best = evolved(start, mutated, fitness, stages, self.generations, self.offspring, self.seed)
        return dict(zip(names, best, strict=True))

    @staticmethod
    def amount(target: Target, budget: Budget) -> Budget:
        return budget.at(target.component if budget.names else target.block)

    # -- what is left to do ------------------------------------------------------------------------------------------

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals["mask"].float()

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        values = {ROLES[target.unit]: signals["weight"]}
        return Decision(signals["mask"].bool(), values, remove=target.unit == "channels")


class Fitness:
    """Divergence of a combination of candidates on calibration sequences, drawn anew for each stage of selection."""

    def __init__(self, probe: Probe, result: Candidates, names: Sequence[str], top: int, rng: random.Random) -> None:
        self.probe, self.candidates, self.names, self.top, self.rng = probe, result, names, top, rng
        self.effort = 0
        self.dense: list[tuple[Any, Tensor, Tensor]] = []

    def __call__(self, genes: Genes, effort: int) -> float:
        if effort != self.effort or not self.dense:
            self.draw(effort)
        with self.probe.trial(self.candidates.decisions(dict(zip(self.names, genes, strict=True)))):
            return sum(
                float(divergence(values, self.probe.logits(sample)[:-1].gather(-1, places)))
                for sample, values, places in self.dense
            )

    def draw(self, effort: int) -> None:
        """Other sequences of so many tokens, with the dense model's largest logits."""
        self.effort, self.dense, seen = effort, [], 0
        for sample in self.rng.sample(self.probe.samples, len(self.probe.samples)):
            if seen >= effort:
                break
            logits = self.probe.logits(sample)[:-1]  # what follows the last token is not known
            largest = logits.topk(min(self.top, logits.shape[-1]))
            self.dense.append((sample, largest.values, largest.indices))
            seen += len(sample)
