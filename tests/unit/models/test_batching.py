"""Batches that halve where memory ends: the same results, only what did not fit again, and a clear failure."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import classify
from prunelab.common.models import batching
from prunelab.common.testbeds import load


def memory_for(most: int, calls: list[int]):
    """A step on a GPU that holds `most` samples: it doubles them."""

    def step(x):
        calls.append(len(x))
        if len(x) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    return step


@pytest.mark.parametrize(("most", "found"), [(64, 64), (63, 32), (9, 8), (1, 1)])
def test_the_largest_batch_that_fits_is_found_by_halves(most, found):
    calls: list[int] = []
    step = memory_for(most, calls)
    value, size = batching.largest(lambda size: step(torch.ones(size)), 64, "one image")
    assert size == found
    assert len(value) == found
    assert calls == [64 >> i for i in range(len(calls))]


def test_not_even_one_is_one_line_that_says_what_to_do():
    calls: list[int] = []
    with pytest.raises(PrunelabError, match="does not hold the model and one image") as error:
        batching.largest(lambda size: memory_for(0, calls)(torch.ones(size)), 8, "one image")
    assert calls == [8, 4, 2, 1]
    assert "\n" not in str(error.value)
    assert error.value.__context__ is None, "the exception that holds on to tensors is gone"


def test_other_errors_pass():
    def attempt(size):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        batching.largest(attempt, 8, "one image")


@pytest.mark.parametrize("most", [100, 16, 5, 3, 1])
def test_slices_give_the_whole_whatever_fits(most):
    x, calls = torch.arange(16.0), []
    slices = batching.Slices("one sample")
    for _ in range(2):
        assert slices(memory_for(most, calls), x).equal(2 * x)
    fitted = [size for size in calls if size <= most]
    assert sum(fitted) == 32, "no sample that fitted is computed again"
    assert len([size for size in calls if size > most]) <= 4, "a size that did not fit is not tried in the next batch"


IDS = {"model": {"testbed": "digits_vit"}, "data": {"loader": "digit_scenes"}}


def cramped(monkeypatch, model, most):
    """The model on a GPU where the middle block holds `most` images at a time."""
    calls: list[int] = []

    def hook(module, args):
        calls.append(len(args[0]))
        if len(args[0]) > most and args[0].device.type != "meta":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model.blocks[len(model.blocks) // 2].register_forward_pre_hook(hook)
    monkeypatch.setattr(classify.loading, "load", lambda identity, config: (model, None))
    return calls


@pytest.mark.parametrize(("name", "budget"), [(None, None), ("zero_tprune", "0.7"), ("ats", "0.6"), ("tome", "0.8")])
def test_a_classifier_measures_the_same_where_memory_ends_in_the_middle(monkeypatch, name, budget):
    """Also the cost, which methods with input-dependent counts (ATS) take from the tokens they were seen to keep."""
    run = Run("classify", "testbed", method=name, budget=budget, settings={"samples": 60}, ids=IDS)
    want = runner.measure(run, {})
    model = load("digits_vit")[0]
    calls = cramped(monkeypatch, model, 13)
    found = runner.measure(run, {})
    assert max(calls) > 13 >= min(calls)
    assert found == want


def test_a_gpu_too_small_for_one_image_is_told_in_one_line(monkeypatch):
    cramped(monkeypatch, load("digits_vit")[0], 0)
    with pytest.raises(PrunelabError, match="does not hold the model and one image"):
        runner.measure(Run("classify", "testbed", settings={"samples": 4}, ids=IDS), {})


def test_a_run_that_has_no_batches_to_halve_fails_in_one_line_too(monkeypatch, tmp_path):
    def full(bench):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(classify, "measure", full)
    with pytest.raises(PrunelabError, match="does not hold the model and what this run computes"):
        runner.execute(Run("classify", "testbed", ids=IDS), {"results": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_hooks_come_out_although_memory_ended():
    model = load("digits_vit")[0]
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    x = torch.rand(4, 1, *model.patch_embed.img_size)
    want = model(x)

    def full(module, args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def end_in_the_last_block():
        with apply(registry.create("zero_tprune"), model, Budget(0.7)) as handle:
            hook = model.blocks[-1].register_forward_pre_hook(full)
            try:
                classify.one_pass(model, handle, x)
            finally:
                hook.remove()

    with pytest.raises(torch.cuda.OutOfMemoryError):
        end_in_the_last_block()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before
    assert model(x).equal(want)
