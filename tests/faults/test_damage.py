"""Damaged records and checkpoints are noticed, told in one line, and made good by the plain command.

Downloads that are cut or corrupt and a hub that does not answer: tests/unit/test_prefetch.py.
"""

from __future__ import annotations

import json

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import provenance
from prunelab.common.models import batching
from tests.faults.workflow import PAPERS, assert_part, assert_unharmed, idle, records


def test_damaged_records_are_set_aside_and_made_anew(project, undisturbed, finished):
    """Cut, emptied, garbled, altered, with another's content, without a checksum; and one that no run asks for."""
    paths = sorted((finished / "records").glob("*.json"))
    whole = paths[0].read_bytes()
    altered = json.loads(paths[3].read_text())
    altered["metrics"][next(iter(altered["metrics"]))]["value"] = 99.0
    bare = json.loads(paths[5].read_text())
    del bare["checksum"]
    harms = [whole[: len(whole) // 2], b"", bytes(range(256)), json.dumps(altered).encode(), whole, json.dumps(bare)]
    for path, harm in zip(paths, harms):
        path.write_bytes(harm if isinstance(harm, bytes) else harm.encode())
    beside = finished / "records" / f"{'0' * 20}-{'1' * 12}.json"
    beside.write_text("{}")
    output = project.run(finished)
    assert output.count("set aside the damaged record") == len(harms) + 1
    assert_unharmed(finished, undisturbed)
    idle(project, finished)


@pytest.mark.skipif(PAPERS != "all", reason="not every choice of papers reads a checkpoint")
@pytest.mark.parametrize("harm", ["cut", "exchanged", "missing"])
def test_a_damaged_checkpoint_fails_its_runs_alone_and_says_what_to_do(project, undisturbed, tmp_path, harm):
    weights = project.folder / "common" / "testbeds" / "weights"
    path = weights / "digits_vit" / "model.safetensors"
    whole = path.read_bytes()
    results = tmp_path / "results"
    try:
        if harm == "missing":
            path.unlink()
        else:
            other = (weights / "digits_vim" / "model.safetensors").read_bytes()
            path.write_bytes(whole[: len(whole) // 2] if harm == "cut" else other)
        output = project.fails(results)
        assert "digits_vit/model.safetensors are" in output
        assert "restore them or train" in output
        assert "Traceback" not in output
        assert_part(results, undisturbed)
        kinds = {record["run"]["task"] for record in records(results).values()}
        assert kinds == {record["run"]["task"] for record in records(undisturbed).values()} - {"classify"}
    finally:
        path.write_bytes(whole)
    project.run(results)
    assert_unharmed(results, undisturbed)


@pytest.mark.skipif(PAPERS != "all", reason="not every choice of papers reads a checkpoint")
def test_a_damaged_training_log_is_one_line_before_work(project, tmp_path):
    path = project.folder / "common" / "testbeds" / "weights" / "digits_vit" / "training.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        output = project.fails(tmp_path / "results")
        assert "training.json" in output
        assert "Traceback" not in output
    finally:
        path.write_bytes(whole)


def test_where_the_memory_of_a_gpu_ends_the_batch_halves_and_then_it_fails_in_one_line():
    """Simulated; what tasks make of it: tests/unit/test_batching.py."""
    tried = []

    def attempt(size: int, fits: int) -> int:
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return size

    assert batching.largest(lambda size: attempt(size, 3), 16, "an image") == (2, 2)
    assert tried == [16, 8, 4, 2]
    with pytest.raises(PrunelabError, match="the GPU's memory does not hold the model and an image") as caught:
        batching.largest(lambda size: attempt(size, 0), 4, "an image")
    assert "\n" not in str(caught.value)


def test_a_record_is_never_read_half_written(tmp_path):
    """What is cut at any byte is no record."""
    path = tmp_path / f"{'0' * 20}-{'1' * 12}.json"
    provenance.write(path, {"identity": "0" * 20, "sources": "1" * 12, "metrics": {"top1": {"value": 50.0}}})
    whole = path.read_bytes()
    assert provenance.read(path)["metrics"]["top1"]["value"] == 50.0
    for length in range(len(whole) - 1):  # the last byte is the line's end
        path.write_bytes(whole[:length])
        with pytest.raises(PrunelabError, match="damaged"):
            provenance.read(path)
