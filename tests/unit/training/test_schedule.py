"""Schedules against the papers' formulas, and what they refuse."""

from __future__ import annotations

import math

import pytest

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.training.schedule import Constant, Cubic, Exponential, Linear, Temperature


def test_cubic_is_the_papers():
    steps, warm, cool, initial, final = 100, 10, 30, 1.0, 0.2
    schedule = Cubic.of(steps, initial, final, 0.1, 0.3)
    for step in range(steps):
        inside = final + (initial - final) * (1 - (step - warm) / (steps - (cool + warm))) ** 3
        expected = initial if step <= warm else final if step >= steps - cool else inside
        assert schedule(step) == pytest.approx(expected, abs=1e-12)


def test_exponential_cuts_by_the_same_factor_each_time():
    start, end, every, sparsity = 4, 16, 4, 0.6  # events at 4, 8, 12 and 16
    events = (end - start) // every + 1
    schedule = Exponential(1.0, 1 - sparsity, start - every, end, every)
    kept = [schedule(step) for step in range(start, end + 1, every)]
    assert kept == pytest.approx([(1 - sparsity) ** (k / events) for k in range(1, events + 1)])
    assert [schedule(step) for step in range(4, 8)] == [kept[0]] * 4, "nothing between two events"


def test_linear_and_constant_and_jump():
    assert [Linear(1, 0, 2, 6)(step) for step in range(8)] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert Constant(0.3)(7) == 0.3 and Constant().budget(7, Budget.parse("2:4")) == Budget.parse("2:4")
    assert [Cubic(1, 0, 3, 3)(step) for step in (2, 3)] == [1, 0]


def test_temperature_rises_and_is_frozen():
    schedule = Temperature(100)
    assert schedule(0) == schedule(1) == pytest.approx(1, abs=1e-5)
    assert schedule(50) == pytest.approx(1 / (1 - math.log(50) / math.log(100) + 1e-6))
    assert schedule(80) == schedule(99) == schedule(10_000) and schedule.last == 80


def test_a_budget_is_approached_block_by_block():
    schedule = Linear(1.0, begin=0, end=4)
    assert schedule.budget(2, Budget((0.5, 0.0))) == Budget((0.75, 0.5))
    assert schedule.budget(4, Budget(0.5)) == Budget(0.5)
    with pytest.raises(PrunelabError, match="give a ratio"):
        schedule.budget(1, Budget.parse("2:4"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Cubic(1, 0, 5, 4), "ends at step 4, before it begins at step 5"),
        (lambda: Cubic.of(10, warmup=0.6, cooldown=0.6), "before it begins"),
        (lambda: Cubic.of(10, warmup=1.5), "shares of a training"),
        (lambda: Linear(1, 0, 0, 4, 0), "1 or more"),
        (lambda: Linear(math.nan), "not finite"),
        (lambda: Exponential(0.0, 0.5), "positive"),
        (lambda: Exponential(1.0, 0.0, 0, 4)(2), "never comes to 0"),
        (lambda: Temperature(1), "before it begins"),
        (lambda: Temperature(9, 1.0), "before it begins"),
        (lambda: Linear(1, 0, 0, 9).fits(8), "train longer"),
    ],
)
def test_schedules_that_cannot_be_are_refused(make, says):
    with pytest.raises(PrunelabError, match=says):
        make()
