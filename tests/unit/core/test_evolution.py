"""Searches by evolution keep their sums, improve, and repeat themselves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.evolution import Genetic, Stage, evolved, exchanged, halved

WANTED = (4, 0, 3, 1, 2, 2)


def distance(genes, effort=0):
    return sum((a - b) ** 2 for a, b in zip(genes, WANTED, strict=True))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=9), st.integers(0, 9), st.integers(1, 4))
def test_an_exchange_keeps_the_sum_of_every_group_and_the_bounds(genes, seed, exchanges):
    genes, groups = tuple(genes), [i % 2 for i in range(len(genes))]
    found = exchanged(genes, random.Random(seed), [0] * len(genes), [4] * len(genes), groups, exchanges)
    for group in (0, 1):
        assert sum(found[group::2]) == sum(genes[group::2])
    assert all(0 <= gene <= 4 for gene in found)
    assert sum(abs(a - b) for a, b in zip(found, genes, strict=True)) <= 2 * exchanges


def test_genes_without_room_stay():
    assert exchanged((0, 2), random.Random(0), [0, 0], [2, 2]) != (0, 2)
    assert exchanged((0, 0), random.Random(0), [0, 0], [2, 2]) == (0, 0)
    assert exchanged((0, 2), random.Random(0), [0, 0], [2, 2], groups=["a", "b"]) == (0, 2)


def test_halving_measures_few_with_much_and_a_parent_joins_last():
    asked = []

    def cost(genes, effort):
        asked.append((genes, effort))
        return genes[0]

    best = halved([(3,), (1,), (2,), (5,), (1,)], cost, [Stage(10, 2), Stage(100, 1)], parent=(0,))
    assert best == [(0,)]
    assert asked == [((3,), 10), ((1,), 10), ((2,), 10), ((5,), 10), ((0,), 100), ((1,), 100), ((2,), 100)]
    assert halved([(2,), (1,), (1,)], lambda g, e: 0, [Stage(1, 2)]) == [(2,), (1,)], "ties keep their order"


def test_an_evolution_finds_the_optimum_under_its_sum_and_repeats_itself():
    def search(seed):
        return evolved(
            (2,) * 6,
            lambda genes, rng: exchanged(genes, rng, [0] * 6, [4] * 6, exchanges=rng.randint(1, 2)),
            distance,
            [Stage(1, 4), Stage(2, 1)],
            generations=30,
            offspring=12,
            seed=seed,
        )

    assert search(0) == search(1) == WANTED
    assert evolved((1,), lambda genes, rng: genes, distance_of_one, [Stage(1, 1)], 3, 4) == (1,), "nothing to try"


def distance_of_one(genes, effort):
    return abs(genes[0])


def test_a_genetic_algorithm_improves_and_repeats_itself():
    measured = []

    def cost(genes):
        measured.append(genes)
        return distance(genes)

    def mutate(genes, rng):
        place = rng.randrange(6)
        return (*genes[:place], rng.randint(0, 4), *genes[place + 1 :])

    algorithm = Genetic(population=16, generations=40)
    best = algorithm.best([(0,) * 6], cost, mutate, seed=1)
    assert best == WANTED and len(measured) == len(set(measured)), "each genes are measured once"
    assert algorithm.best([(0,) * 6], distance, mutate, seed=1) == best
    doubled = Genetic(8, 5).best([(0,) * 6], distance, mutate, repair=lambda g: tuple(2 * (x // 2) for x in g))
    assert all(gene % 2 == 0 for gene in doubled)
    for wrong in ({"population": 1}, {"elites": 30}, {"mutation": 2.0}, {"tournament": 0}):
        with pytest.raises(PrunelabError):
            Genetic(**wrong)
    with pytest.raises(PrunelabError):
        algorithm.best([], distance, mutate)
