"""Throughput: what is timed, in which precision and batch, and what the record says of it. A CPU stands in for the
GPU, whose clock and allocator nothing here depends on."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import provenance, runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import latency
from prunelab.common.models import devices
from prunelab.common.tokens.adapters.deformable_encoder import DeformableEncoder

ARCHITECTURE = {
    "library": "timm",
    "name": "deit_tiny_patch16_224",
    "arguments": {"img_size": 32, "patch_size": 8, "depth": 3, "num_classes": 5},
}
CPU = torch.device("cpu")


def run(method=None, budget=None, **settings) -> Run:
    options = {"layers": (1, 2)} if method in ("zero_tprune", "random_drop") else {}
    return Run("latency", "paper", method, options, budget, {"batch": 8, **settings}, {"model": ARCHITECTURE})


def timed(asked, repeats=3):
    devices.begin()
    return latency.timed(runner.bench(asked, {}), CPU, 1, repeats)


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        *[(None, None), ("zero_tprune", "0.7"), ("tome", "0.9"), ("tome", "0.8cost"), ("ats", "0.7")],
        ("random_drop", "0.7"),
    ],
)
def test_the_published_architecture_is_timed_in_bfloat16(method, budget):
    found = timed(run(method, budget, against_dense=True))
    assert found["images_per_second"]["value"] > 0
    assert found["images_per_second"]["n"] == 3
    assert found["speedup"]["value"] > 0
    assert found["batch"]["value"] == 8
    assert "random weights in bfloat16; batches of 8; median of 3" in found["images_per_second"]["protocol"]
    assert "memory_gib" not in found, "a CPU has no allocator to ask"
    assert devices.environment()["dtype"] == "bfloat16"
    assert ("budget" in found) == (method is not None)


def test_the_median_of_thirty_after_ten():
    calls = []
    seconds = devices.median_seconds(lambda: calls.append(1), CPU, warm_up=latency.WARM_UP, repeats=latency.REPEATS)
    assert len(calls) == 40
    assert latency.REPEATS >= 30
    assert 0 <= seconds < 0.1


def test_slow_runs_do_not_move_the_median(monkeypatch):
    ticks = iter([0.0, 9.0, 10.0, 11.0, 20.0, 21.0, 30.0, 99.0])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(ticks))
    assert devices.median_seconds(lambda: None, CPU, warm_up=1, repeats=3) == 1.0


def test_the_batch_halves_to_what_memory_holds_and_the_record_says_so(monkeypatch):
    seen = []
    make = latency.loading.initialised

    def cramped(entry, device):
        model = make(entry, device)

        def hook(module, args):
            seen.append(len(args[0]))
            if len(args[0]) > 3 and args[0].device.type != "meta":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        model.blocks[1].register_forward_pre_hook(hook)
        return model

    monkeypatch.setattr(latency.loading, "initialised", cramped)
    found = timed(run("tome", "0.9", against_dense=True))
    assert found["batch"]["value"] == 2
    assert "batches of 2, as 8 do not fit" in found["speedup"]["protocol"]
    assert {8, 4, 2} <= set(seen)


def test_without_a_gpu_it_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(PrunelabError, match="none is here"):
        runner.measure(run(), {})


def test_a_weight_pruner_is_refused():
    with pytest.raises(PrunelabError, match="wanda is a weight_pruner"):
        timed(run("wanda", "0.5"))


def test_a_record_carries_device_precision_clocks_and_memory(monkeypatch, tmp_path):
    """Through the runner, on a GPU that is a pretence: what it says of itself is what the record holds."""
    monkeypatch.setattr(latency, "measure", lambda bench: latency.timed(bench, CPU, 0, 1))
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(devices.torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(devices.torch.cuda, "current_device", lambda: 0)
    properties = type("Properties", (), {"uuid": "1f"})
    monkeypatch.setattr(devices.torch.cuda, "get_device_properties", lambda *_: properties)
    asked = []
    monkeypatch.setattr(devices, "_smi", lambda *query: asked.append(query) or ["1410, 1593, 1980"])
    path = runner.execute(run(), {"results": str(tmp_path)})
    environment = provenance.read(path)["environment"]
    assert environment["clocks"] == {"sm_mhz": 1410, "memory_mhz": 1593, "sm_limit_mhz": 1980}
    assert any("--id=GPU-1f" in query for query in asked), "of this GPU, and not of the first of the machine"
    assert environment["dtype"] == "bfloat16"
    assert environment["device"] == "cpu"
    assert environment["memory_gib"] is None


def test_what_a_run_used_is_forgotten_by_the_next():
    timed(run())
    devices.begin()
    assert devices.environment() == {"device": "cpu", "dtype": "float32", "clocks": None, "memory_gib": None}


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_methods_with_learned_parts_are_timed_with_untrained_ones(backbone, monkeypatch):
    """Of a detector, whose first stage scores tokens."""
    monkeypatch.setattr(DeformableEncoder, "example", lambda self: torch.zeros(1, 3, 64, 96))
    sizes = {
        "num_labels": 5, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 20, "two_stage": True,
        "two_stage_num_proposals": 20, "with_box_refine": True, "encoder_attention_heads": 4, "encoder_ffn_dim": 32,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 32,
    }  # fmt: skip
    swin = {"model_type": "swin", "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
    swin["out_features"] = ["stage2", "stage3", "stage4"]
    own = {"use_pretrained_backbone": False}
    if backbone == "swin":
        own = {"use_timm_backbone": False, "backbone": None, "backbone_config": swin}
    detector = {"library": "transformers", "name": "DeformableDetrForObjectDetection", "arguments": {**sizes, **own}}
    asked = Run("latency", "paper", "sparse_detr", {}, "0.3", {"batch": 1}, {"model": detector})
    devices.begin()
    assert latency.timed(runner.bench(asked, {}), CPU, 0, 1)["images_per_second"]["value"] >= 0
