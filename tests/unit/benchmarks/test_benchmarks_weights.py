"""The benchmark of weight pruning: its measures measure, and its straightforward way agrees with ours."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from benchmarks import weight_pruning
from benchmarks.memory import Live
from benchmarks.weight_pruning import CASES, PLAIN, Speed, language_model, law, measure, speed, token_ids
from prunelab.common.core.budget import Budget
from prunelab.common.costs import meter
from prunelab.common.weights import prune
from prunelab.methods.flap.method import FLAP
from prunelab.methods.wanda.method import Wanda


def test_memory_is_counted_to_the_byte():
    model, other = nn.Linear(10, 10, bias=False), nn.Linear(5, 4, bias=False)
    with Live(model, other) as live, torch.no_grad():
        a = torch.zeros(100)
        a = a + 1  # two of them alive for a moment
        del a
        b = torch.zeros(50)
        b.view(5, 10)  # no storage of its own
        model.weight.detach()
        torch.zeros(10**6, device="meta")
    assert live.own == 400 + 80 and live.peak - live.own == 800
    assert live.now - live.own == 200
    del b
    assert live.now == live.own


def test_laws_are_found_again():
    shapes = [(d, w) for d in (2, 4, 8) for w in (32, 64, 128)]
    found = law(*zip(*shapes, strict=True), [3 * d**0.5 * w**2 for d, w in shapes])
    assert (found.constant, found.depth, found.width, found.r2) == pytest.approx((3, 0.5, 2, 1))
    noisy = law(*zip(*shapes, strict=True), [d * w * (1 + 0.5 * (i % 2)) for i, (d, w) in enumerate(shapes)])
    assert 0.9 < noisy.r2 < 1


@pytest.mark.parametrize("name", PLAIN)
def test_the_straightforward_way_gives_the_same_masks(name):
    found = speed(name, 2, 64, token_ids(3, 16), 1)
    assert isinstance(found, Speed) and min(found.ours, found.by_block, found.by_linear) > 0


def test_other_masks_are_noticed(monkeypatch):
    method, _, ratio = PLAIN["Wanda"]
    monkeypatch.setitem(PLAIN, "Wanda", (method, PLAIN["SparseGPT"][1], ratio))
    with pytest.raises(AssertionError, match=r"model.layers.0"):
        speed("Wanda", 1, 64, token_ids(2, 16), 1)


def test_plain_flap_leaves_the_same_function():
    ours, plain, ids = language_model(2, 64), language_model(2, 64), token_ids(4, 16)
    prune(FLAP(), ours, 0.7, ids, progress=False)
    weight_pruning.plain_flap(plain, ids, Budget(0.7), True)
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, plain(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs(name):
    found = measure(CASES[name], 2, 64, token_ids(3, 16), 1)
    assert found.seconds > 0 and found.bytes > 0


def test_what_comes_back_from_disk_is_measured():
    ids, prompt = token_ids(4, 16), token_ids(1, 32)
    fewer = weight_pruning.through_disk(FLAP(), 0.8, 2, 128, ids)
    zeros = weight_pruning.through_disk(Wanda(), 0.5, 2, 128, ids)
    dense = weight_pruning.through_disk(Wanda(), 1.0, 2, 128, ids)
    assert fewer.weights < dense.weights == zeros.weights
    macs = [meter.macs(entry.model, prompt) for entry in (fewer, zeros, dense)]
    assert macs[0] < macs[1] == macs[2]
    linear = sum(p.numel() for n, p in dense.model.named_parameters() if p.dim() == 2 and "embed" not in n)
    attention = 2 * 2 * 128 * 32 * 32  # blocks, two products, width, tokens squared
    assert macs[2] == 32 * linear + attention
    times = weight_pruning.latencies({"dense": dense.model, "fewer": fewer.model}, prompt, 3)
    assert times["dense"] == 1 and times["fewer"] > 0


def test_the_command_prints_the_tables_asked_for(monkeypatch, capsys):
    table = weight_pruning.Table("a column as wide as its title and caption", title="quick")
    monkeypatch.setitem(weight_pruning.TABLES, "speed", lambda quick: table if quick else None)
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", ["weight_pruning", "--quick", "--tables", "speed", "--threads", threads])
    weight_pruning.main()
    shown = capsys.readouterr().out
    assert "quick" in shown and f"{threads} threads" in shown and "from disk" not in shown
