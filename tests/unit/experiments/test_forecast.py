"""What runs at paper scale will take, from shapes: hours, memory, files, and what fits into a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunelab.common.catalogue import lookup, sizes
from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import forecast, planning, plans, schema
from prunelab.common.experiments.run import Run
from prunelab.common.measures import sizing

H200 = forecast.gpu("h200")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> plans.Plan:
    results = str(tmp_path_factory.mktemp("results"))
    return plans.made(lookup.settings({"papers": "wanda,hiprune,lexrank,zero_tprune", "results": results}))


def run(model: str, task: str = "perplexity", data: str = "wikitext2", **settings: Any) -> Run:
    found = planning.resolve(
        task, "paper", lookup.settings({"scale": "paper"}), schema.Configuration(), model=model, data=data,
        settings=settings,
    )  # fmt: skip
    assert isinstance(found, Run)
    return found


@pytest.mark.parametrize("name", ["deit_small", "llava_1_5_7b", "mixtral_8x7b"])
def test_the_lock_says_what_the_meta_device_counts(name: str) -> None:
    assert sizes.of(name) == sizing.count(name)


def test_sizes_of_a_model_the_lock_lacks_come_from_its_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_lock", lambda: {"llama2_7b": {"of": "another", "parameters": 1.0}})
    judged = sizes.of("llama2_7b")
    assert judged is not None and not judged.exact and judged.gbytes == lookup.model("llama2_7b")["paper"]["gb"]


def test_perplexity_is_two_operations_a_parameter_and_token() -> None:
    told = forecast.of(run("llama2_7b", length=2048, samples=100, calibration=0), H200)
    known = sizes.of("llama2_7b")
    assert known is not None and told.hours is not None
    seconds = 2 * known.parameters * 100 * 2048 / (989e12 * forecast.COMPUTED)
    assert told.hours * 3600 == pytest.approx(forecast.BEGUN + known.gbytes / forecast.LOADED + seconds)
    assert told.gpus == 1 and known.gbytes < told.memory < 1.5 * known.gbytes
    small = forecast.of(run("llama2_7b", length=2048, samples=100, calibration=0), forecast.gpu("rtx3090"))
    assert small.hours is not None and small.hours > 2 * told.hours


def test_a_model_larger_than_a_gpu_takes_several_and_one_that_cannot_fit_is_refused() -> None:
    big = run("llama2_70b", length=2048, samples=1)
    assert forecast.of(big, H200).gpus == 2 and forecast.of(big, forecast.gpu("rtx4090")).gpus >= 6
    with pytest.raises(PrunelabError, match=r"takes 13\d GB for weights and cache, and its GPUs have 80 GB"):
        forecast.check_fits(big, 80)
    forecast.check_fits(big, 160)


def test_weights_are_pruned_on_one_gpu_which_must_hold_them_all() -> None:
    pruned = replace(run("llama2_70b", length=2048, samples=1), method="wanda", budget="0.5")
    told = forecast.of(pruned, H200)
    assert told.gpus == 1 and told.memory > H200.gb
    with pytest.raises(PrunelabError, match="its GPU has 80 GB; weights are pruned on one GPU"):
        forecast.check_fits(pruned, 80)


def test_no_run_that_prunes_weights_takes_several_gpus(plan: plans.Plan) -> None:
    waiting = [run for _, lacks, _ in forecast.Outlook(plan, H200).waiting for run in lacks]
    gpus = {made.gpus for made in waiting if made.method and registry.entry(made.method).role == "weight_pruner"}
    assert gpus <= {1}


def test_records_of_such_a_gpu_correct_what_is_foretold(tmp_path: Path) -> None:
    one, other = (run("llama2_7b", length=length, samples=10) for length in (1024, 2048))
    plain = forecast.of(one, H200).hours
    assert plain is not None
    folder = tmp_path / "records"
    folder.mkdir()
    record = {"environment": {"device": "NVIDIA H200"}, "timing": {"seconds": 2 * 3600 * plain}}
    (folder / f"{one.identity}-any.json").write_text(json.dumps(record))
    found = forecast.corrections([one, other], tmp_path, H200)
    assert found == {"perplexity": pytest.approx(2)}
    corrected, before = forecast.of(other, H200, found).hours, forecast.of(other, H200).hours
    assert corrected is not None and before is not None and corrected == pytest.approx(2 * before)
    assert forecast.corrections([one], tmp_path, forecast.gpu("a100")) == {}


def test_an_outlook_counts_each_run_once_and_fills_a_time_with_cheap_numbers(plan: plans.Plan) -> None:
    outlook = forecast.Outlook(plan, H200)
    whole = outlook.total([lacks for _, lacks, _ in outlook.waiting])
    assert (
        whole["runs"] == len({run.identity for _, lacks, _ in outlook.waiting for run in lacks}) < whole["numbers"]
        and whole["gated"]
    )
    hours = whole["gpu_hours"] / 4
    fits = outlook.fitting(hours)
    part = outlook.total([lacks for _, lacks, _ in fits])
    assert 0 < part["gpu_hours"] <= hours + 0.01 and part["gpus"] == 1
    assert part["numbers"] > whole["numbers"] / 4, "cheap numbers come first"
    assert not outlook.total([lacks for _, lacks, _ in outlook.fitting(0)])["gpu_hours"]


def test_a_number_that_waits_tells_its_command_and_one_that_is_exact_does_not(plan: plans.Plan) -> None:
    outlook = forecast.Outlook(plan, H200)
    cells = {slug: plan.cells(slug) for slug in plan.slugs}
    told = next(text for cell in cells["wanda"] if (text := outlook.note("wanda", cell)))
    assert "python -m prunelab run wanda" in told and "GPU hours (H200)" in told and "licence" in told
    exact = [cell for cell in cells["zero_tprune"] if cell.status == "analytic"]
    assert exact and not any(outlook.note("zero_tprune", cell) for cell in exact)


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(PrunelabError, match="h300"):
        forecast.gpu("h300")


def test_a_second_model_that_looks_at_frames_counts_and_a_lent_processor_does_not() -> None:
    settings = {"tasks": ["videomme"], "frames": 96}
    ids = {"model": {"hub": "x"}, "processor": {"hub": "y"}}
    names = (("model", "llava_video_7b"), ("model", "llava_onevision_7b"))
    one = Run("visual_tasks", "paper", "quota", {}, "12544count", settings, ids, (), "", names, 1)
    alone = forecast.of(one, H200)
    assert alone.hours is not None and alone.memory < 2 * 16.1 * forecast.AROUND
    looks = {**ids, "frame_scores": {"hub": "z"}}
    names = (*names, ("model", "qwen2_vl_2b"))
    scored = forecast.of(replace(one, ids=looks, names=names), H200)
    second = sizes.of("qwen2_vl_2b")
    assert second is not None and scored.hours is not None
    macs = 2700 * 96 * (1e9 * second.input_gmacs + second.active * (second.input_tokens + forecast.ASKED))
    busy = 2 * macs / (H200.tflops * 1e12 * forecast.COMPUTED) + second.gbytes / forecast.LOADED
    assert scored.hours - alone.hours == pytest.approx(busy / 3600, rel=0.05)
    longer = forecast.of(replace(one, settings={**settings, "hourly": 64, "decouple": True}), H200)
    assert longer.hours is not None and longer.hours > alone.hours
