"""Which GPUs a job takes, and where and in which precision models go."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.models import devices, loading

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}


@pytest.fixture(autouse=True)
def two(monkeypatch):
    """A machine with two GPUs, as nvidia-smi tells of them."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "WAIT", 0.02)
    monkeypatch.setattr(devices, "_smi", lambda *query: ["0, GPU-aa", "1, GPU-bb"])


def test_jobs_side_by_side_get_a_gpu_each(tmp_path, monkeypatch):
    with devices.claim(1, tmp_path) as first:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aa"
        with monkeypatch.context() as another_job:
            another_job.delenv("CUDA_VISIBLE_DEVICES")
            with devices.claim(1, tmp_path) as second:
                assert (first, second) == (["GPU-aa"], ["GPU-bb"])
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    with devices.claim(1, tmp_path) as again:
        assert again == ["GPU-aa"]


def test_several_are_taken_at_once_or_not_at_all(tmp_path):
    with devices.claim(2, tmp_path) as both:
        assert both == ["GPU-aa", "GPU-bb"]
        assert devices.spread() == {"device_map": "auto"}
    assert devices.spread() == {}
    with pytest.raises(PrunelabError, match="takes 3 GPUs and 2 can be seen"), devices.claim(3, tmp_path):
        pass


def test_a_scheduler_s_choice_is_kept_to_and_told_apart_by_the_hardware(tmp_path, monkeypatch):
    """Two jobs of a cluster may both see theirs as number 0."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with devices.claim(1, tmp_path) as first:
        monkeypatch.setattr(devices, "_smi", lambda *query: ["0, GPU-bb"])
        with devices.claim(1, tmp_path) as second:
            assert (first, second) == (["0"], ["0"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["GPU-aa.lock", "GPU-bb.lock"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize("told", ["", None])
def test_a_machine_without_gpus_gives_none(tmp_path, monkeypatch, told):
    if told is None:
        monkeypatch.setattr(devices, "_smi", lambda *query: None)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    with devices.claim(1, tmp_path) as none:
        assert none == []
    with devices.claim(0, tmp_path) as none:
        assert none == []
    assert not list(tmp_path.iterdir())


def test_nvidia_smi_that_is_missing_or_fails_says_nothing(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices._smi("--query-gpu=uuid") is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert devices._smi("--query-gpu=uuid") is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU-aa\necho GPU-bb\n")
    assert devices._smi("--query-gpu=uuid") == ["GPU-aa", "GPU-bb"]


@pytest.mark.parametrize(
    ("lines", "clocks"),
    [
        (["1410, 1593, 1980"], {"sm_mhz": 1410, "memory_mhz": 1593, "sm_limit_mhz": 1980}),
        (["[N/A], 1593, 1980"], None),
        ([], None),
    ],
)
def test_clocks_are_numbers_or_nothing(lines, clocks):
    assert devices._megahertz(lines) == clocks


HOLD = """
import sys, time
from pathlib import Path
from prunelab.common.models import devices
with devices.claim(1, Path(sys.argv[1])) as mine:
    print(*mine, flush=True)
    time.sleep(60)
"""


def test_a_killed_job_leaves_its_gpu_to_the_one_that_waits(tmp_path):
    """Across processes: the second waits for the only GPU, and gets it when the first is killed."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PATH": ""}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, **options) as first:
        assert first.stdout.readline() == "0\n"
        with subprocess.Popen(command, **options) as second:
            assert "waiting for 1 of the GPUs 0" in second.stderr.readline()
            assert second.poll() is None
            first.kill()
            assert second.stdout.readline() == "0\n"
            second.kill()


def test_the_process_takes_as_many_as_its_largest_run():
    small, large = Run("perplexity", "paper"), Run("perplexity", "paper", gpus=2)
    assert runner.gpus_needed([small, large]) == 2
    assert runner.gpus_needed([small]) == 1
    assert runner.gpus_needed([Run("perplexity", "testbed", gpus=2)]) == 0
    assert small.identity == large.identity, "how many GPUs hold it decides nothing of the outcome"


def test_the_cpu_keeps_a_model_as_it_is():
    model = torch.nn.Linear(2, 2)
    devices.begin()
    assert devices.place(model, torch.device("cpu"), half=True).weight.dtype == torch.float32
    assert devices.environment()["dtype"] == "float32"
    devices.place(model.half(), torch.device("cpu"), half=True)
    assert devices.environment()["dtype"] == "float16"


def test_only_runs_at_paper_scale_go_to_a_gpu(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    assert [devices.of(scale).type for scale in ("paper", "assets", "testbed", "")] == ["cuda", "cpu", "cpu", "cpu"]
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    assert devices.of("paper").type == "cpu"


def test_a_job_with_several_gpus_spreads_its_model(tmp_path, monkeypatch):
    told = []
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")

    def made(*_, **options):
        told.append(options)
        return (torch.nn.Identity(), {"missing_keys": []}) if "output_loading_info" in options else None

    monkeypatch.setattr(loading, "pretrained", made)
    for count in (1, 2):
        with devices.claim(count, tmp_path / "locks"):
            loading.language({"assets": "tiny"}, {"assets": str(tmp_path)})
    assert [options.get("device_map") for options in told] == [None, None, "auto", None], "tokenizers are not spread"


def test_a_model_that_accelerate_has_spread_stays_where_it_is(tmp_path):
    """With one layer on the disk, as a second device that is always there."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    plain.save_pretrained(tmp_path / "model")
    parts = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    ]
    places = {part: "disk" if part == "model.layers.1" else "cpu" for part in parts}
    options = {"dtype": "auto", "device_map": places, "offload_folder": tmp_path / "offloaded"}
    spread = loading.pretrained(LlamaForCausalLM, tmp_path / "model", **options).eval()
    placed = devices.place(spread, torch.device("cpu"), half=True)
    assert placed.hf_device_map == places
    ids = torch.arange(8)[None]
    assert placed(ids).logits.equal(plain(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_lowered_model_is_what_transformers_loads_in_that_precision(dtype, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    devices.lowered(model, dtype)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert not torch.equal(model(ids).logits, model.to(dtype)(ids).logits)  # which rounds the rotations as well
