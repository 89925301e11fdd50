"""Search by evolution, deterministic by seed: mutation under a fixed sum, successive halving, a genetic algorithm.

Fitness is a cost throughout: smaller is better, and of equal ones the earlier stays first. Genes are whole numbers, as
the levels or counts that pruning chooses among.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from prunelab.common.core.errors import PrunelabError

Genes = tuple[int, ...]


def exchanged(
    genes: Genes,
    rng: random.Random,
    low: Sequence[int],
    high: Sequence[int],
    groups: Sequence[Hashable] | None = None,
    exchanges: int = 1,
) -> Genes:
    """Genes of which pairs moved by one in opposite directions, so that their sum stays; likewise that of every group.

    low, high: bounds of each gene. groups: the group of each gene, None for one group. Where no pair of a group has
    room the genes stay as they are.
    """
    results = list(genes)
    groups = [0] * len(genes) if groups is None else groups
    for _ in range(exchanges):
        down = [i for i in range(len(results)) if results[i] > low[i]]
        pairs = {
            i: [j for j in range(len(results)) if j != i and groups[j] == groups[i] and results[j] < high[j]]
            for i in down
        }
        down = [i for i in down if pairs[i]]
        if not down:
            break
        one = rng.choice(down)
        other = rng.choice(pairs[one])
        results[one] -= 1
        results[other] += 1
    return tuple(results)


@dataclass(frozen=True)
class Stage:
    """One stage of a selection: how costly its fitness is to measure (`effort`, such as calibration tokens), and how
    many survive it."""

    effort: int
    survivors: int


def halved(
    candidates: Sequence[Genes],
    fitness: Callable[[Genes, int], float],
    stages: Sequence[Stage],
    parent: Genes | None = None,
) -> list[Genes]:
    """Successive halving: at each stage the candidates left are measured with more effort, and the best survive, best
    first. A parent joins in front of the last stage."""
    left = list(dict.fromkeys(candidates))
    for number, stage in enumerate(stages, 1):
        if number == len(stages) and parent is not None and parent not in left:
            left.insert(0, parent)
        costs = {genes: fitness(genes, stage.effort) for genes in left}
        left = sorted(left, key=costs.__getitem__)[: stage.survivors]
    return left


def evolved(
    parent: Genes,
    mutate: Callable[[Genes, random.Random], Genes],
    fitness: Callable[[Genes, int], float],
    stages: Sequence[Stage],
    generations: int,
    offspring: int,
    seed: int = 0,
    attempts: int = 100,
) -> Genes:
    """One parent and its mutants: in every generation as many different `offspring`, of which the best that survives
    all stages, or the parent, is the next parent. Where mutation finds fewer, these compete alone; `attempts`
    bounds the tries for each."""
    rng = random.Random(seed)
    for _ in range(generations):
        children: dict[Genes, None] = {}
        for _ in range(offspring * attempts):
            child = mutate(parent, rng)
            if child != parent:
                children[child] = None
            if len(children) == offspring:
                break
        if children:
            parent = halved(list(children), fitness, stages, parent)[0]
    return parent


@dataclass(frozen=True)
class Genetic:
    """A plain genetic algorithm: tournaments, uniform crossover, mutation, and elites that stay.

    Parameters
    ----------
    population, generations : int
        How many live at a time, and for how long.
    crossover : float
        Probability that a child has two parents rather than one.
    mutation : float
        Probability of each child to be mutated.
    elites : int
        The best of a generation that go on as they are.
    tournament : int
        Drawn at random, of which the best becomes a parent.
    """

    population: int = 20
    generations: int = 10
    crossover: float = 0.9
    mutation: float = 0.5
    elites: int = 1
    tournament: int = 2

    def __post_init__(self) -> None:
        shares = 0 <= self.crossover <= 1 and 0 <= self.mutation <= 1
        if self.population < 2 or self.generations < 0 or not shares or not 0 <= self.elites < self.population:
            raise PrunelabError("a genetic algorithm needs two or more individuals, fewer elites, and probabilities")
        if self.tournament < 1:
            raise PrunelabError("a tournament needs at least one participant")

    def best(
        self,
        first: Sequence[Genes],
        fitness: Callable[[Genes], float],
        mutate: Callable[[Genes, random.Random], Genes],
        repair: Callable[[Genes], Genes] = lambda genes: genes,
        seed: int = 0,
    ) -> Genes:
        """The best genes found. first: the population to begin with, filled up with mutants of it; repair: brings
        crossed genes back to what is allowed, a sum for example. Each genes' fitness is measured once."""
        if not first:
            raise PrunelabError("a genetic algorithm needs genes to begin with")
        rng, costs = random.Random(seed), dict[Genes, float]()

        def cost(genes: Genes) -> float:
            if genes not in costs:
                costs[genes] = fitness(genes)
            return costs[genes]

        def chosen(living: Sequence[Genes]) -> Genes:
            return min((rng.choice(living) for _ in range(self.tournament)), key=cost)

        living = list(first[: self.population])
        while len(living) < self.population:
            living.append(repair(mutate(rng.choice(first), rng)))
        for _ in range(self.generations):
            after = sorted(living, key=cost)[: self.elites]
            while len(after) < self.population:
                child = chosen(living)
                if rng.random() < self.crossover:
                    other = chosen(living)
                    child = tuple(rng.choice(pair) for pair in zip(child, other, strict=True))
                if rng.random() < self.mutation:
                    child = mutate(child, rng)
                after.append(repair(child))
            living = after
        return min(living, key=cost)
