"""The simulated arm: what an episode is, the scripted expert, the task's metrics, and control steps that are
remembered."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from prunelab.common import testbeds
from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import arm, questions
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.methods.random_drop.method import RandomDrop
from prunelab.methods.vla_pruner.method import VLAPruner

IDS = {"model": {"testbed": "digits_arm"}, "data": {"loader": "digit_arm"}}
STEPS = {"layer": 1, "action_layer": 3}


def tables(count: int = 40, goals: int = 2) -> arm.Table:
    return arm.tables("test", count, torch.Generator().manual_seed(3), goals)


@pytest.fixture(scope="module")
def policy() -> Any:
    return testbeds.load("digits_arm")[0]


def test_an_episode_is_a_table_with_the_gripper_and_what_to_take():
    table = tables(goals=3)
    assert table.target.shape == (40, 3) and all(len(set(row)) == 3 for row in table.target.tolist())
    given = table.seen()
    assert given["input_ids"][0, -5:].tolist() == arm.instruction(table.target[:1, 0])[0].tolist()
    assert questions.WORDS[int(given["input_ids"][0, -1])] == str(int(table.target[0, 0]))
    changed = (given["pixel_values"] != table.pixels).any(1).view(40, 9, 4, 9, 4).any(-1).any(2)
    for row, (y, x) in zip(changed, table.gripper.tolist(), strict=True):
        assert row.nonzero().tolist() == [[y, x]], "the gripper is in one cell, and nothing else changes"


def test_the_expert_takes_everything_by_the_shortest_way():
    table = tables()
    first = (table.now()[1] - table.gripper).abs().amax(1)

    def expert(given: Any) -> Any:
        return arm.written(arm.expert(table.now()[1]))

    seen: list[int] = []
    steps = arm.play(expert, table, 40, lambda active: seen.append(active) or (lambda: None))
    assert bool((table.taken == 2).all()) and not bool(table.failed.any())
    assert seen[0] == 40 and sum(seen) == int(steps.sum()) and bool((steps >= first).all())


def test_closing_elsewhere_fails_and_words_that_are_no_action_move_nothing():
    table = tables(4)
    before = table.gripper.clone()
    strange = questions.ids(["red", "yes"]).expand(4, 2)
    assert arm.read(strange).tolist() == [[-1, -1]] * 4
    table.step(arm.read(strange))
    assert torch.equal(table.gripper, before) and not bool(table.done.any())
    away = (table.now()[1] + 4) % 9  # two cells and more from the digit
    table.gripper = away.clone()
    table.step(away)
    assert bool(table.failed.all())
    table.step(table.now()[1])
    assert torch.equal(table.gripper, away), "over is over"


def measured(method: str | None = None, budget: str | None = None, options: Any = None, **settings: Any) -> Any:
    given = {"samples": 12, **settings}
    return runner.measure(Run("act", "testbed", method, options or {}, budget, given, IDS), {})


def test_a_control_step_counts_for_the_episodes_that_are_not_over(policy):
    table = arm.tables("test", 12, torch.Generator().manual_seed(1000))
    steps = arm.play(partial(arm.written_by, policy), table, 24)
    found = measured()
    assert found["kept"]["value"] == 100 and found["saving"]["value"] == 0
    assert found["steps"]["value"] == pytest.approx(float(steps.float().mean()), abs=1e-3)
    assert found["success"]["value"] == pytest.approx(100 * float((table.taken == 2).float().mean()), abs=1e-3)
    # The first three steps are not pruned: an episode of s steps keeps min(s, 3) + share * max(s - 3, 0) of s.
    pruned = measured("vla_pruner", "0.25", STEPS, horizon=6)
    table = arm.tables("test", 12, torch.Generator().manual_seed(1000))
    with apply(VLAPruner(**STEPS), policy, 0.25):
        steps = arm.play(partial(arm.written_by, policy), table, 6).float()
    share = (1 + 4 * 20 / 81) / 5  # before layer 1 of five
    kept = (steps.clamp(max=3) + share * (steps - 3).clamp(min=0)).sum() / steps.sum()
    assert pruned["kept"]["value"] == pytest.approx(100 * float(kept), abs=0.01)


def test_the_policy_succeeds_and_chance_does_not(policy):
    log = testbeds.load("digits_arm")[1]
    assert log["test"]["success"] > 0.5
    dense, chance = (
        measured(samples=30),
        measured("random_drop", "0.125", {"layers": [0], "where": "packed"}, samples=30),
    )
    assert dense["success"]["value"] == pytest.approx(100 * log["test"]["success"], abs=25)
    assert dense["success"]["value"] - chance["success"]["value"] > 20


def test_episodes_are_remembered_step_by_step_until_reset(policy):
    table = tables(3)
    with apply(VLAPruner(**STEPS), policy, 0.25) as handle:
        lengths = []
        for step in range(6):
            if step == 4:
                handle.reset()  # in mid-episode: the next steps remember nothing
            table.step(arm.read(arm.written_by(policy, table.seen())))
            lengths.append(handle.kept()[0][1].shape[1])
        assert [n == lengths[0] for n in lengths] == [True, True, True, False, True, True]
        with pytest.raises(PrunelabError, match=r"call handle.reset\(\)"):
            arm.written_by(policy, tables(2).seen())
    with apply(RandomDrop((0,), "packed"), policy, 0.25) as handle:
        handle.reset()  # harmless where nothing is remembered
