"""Where a run computes: which GPUs are its own, in which precision, and what the hardware says of itself.

Snakemake counts GPUs but does not say which one a job gets, and a process that is told nothing takes the first. So a
job claims its GPUs by locking one file for each; the kernel drops the locks when the process ends, however it ends.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import nn

from prunelab.common.core.errors import PrunelabError

WAIT = 2.0  # seconds between two looks for a free GPU
# What nvidia-smi is asked for, in MHz, under the names that records have.
CLOCKS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "sm_limit_mhz": "clocks.max.sm"}
M = TypeVar("M", bound=nn.Module)

_claimed = 0  # GPUs that this process holds


# -- GPUs of one's own -----------------------------------------------------------------------------------------------


def shown() -> dict[str, str]:
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES (a scheduler's choice, or all there
    are), each with what tells it from every other on this machine: in a cluster two jobs may both call theirs 0."""
    lines = [line.split(",") for line in _smi("--query-gpu=index,uuid") or []]
    ids = {index.strip(): uuid.strip() for index, uuid in lines}
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return {uuid: uuid for uuid in ids.values()}
    return {name: ids.get(name, name) for name in (part.strip() for part in visible.split(",")) if name}


@contextmanager
def claim(count: int, folder: Path | None = None) -> Iterator[list[str]]:
    """Keep `count` GPUs to this process while open: CUDA sees no others. Waits while too few are free; a machine
    without any gives none, and the run says what it makes of that. To be called before CUDA starts.

    folder: where the lock files lie (one folder a user below the system's for temporary files).
    """
    names = shown() if count else {}
    if not names:
        yield []
        return
    if len(names) < count:
        raise PrunelabError(
            f"this run takes {count} GPUs and {len(names)} can be seen here; raise CUDA_VISIBLE_DEVICES or the GPUs of"
            " the job, or lower gpus: in configs/models.yaml"
        )
    folder = folder or Path(tempfile.gettempdir()) / f"prunelab-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    visible = False
    while len(held := _locked(names, count, folder)) < count:
        _release(held)
        if not visible:
            print(f"waiting for {count} of the GPUs {', '.join(names)}", file=sys.stderr)
            visible = True
        time.sleep(WAIT)
    global _claimed
    before, _claimed = os.environ.get("CUDA_VISIBLE_DEVICES"), count
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
    try:
        yield list(held)
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        _claimed = 0
        _release(held)


def _locked(names: Mapping[str, str], count: int, folder: Path) -> dict[str, IO[str]]:
    """The first GPUs that nobody holds, at most `count`, with their open lock files."""
    import fcntl  # not on Windows, where the rest of this module serves as well

    held: dict[str, IO[str]] = {}
    for name, told_apart_by in names.items():
        if len(held) == count:
            break
        file = (folder / f"{re.sub('[^0-9A-Za-z-]', '_', told_apart_by)}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held[name] = file
        except BlockingIOError:
            file.close()
    return held


def _release(held: dict[str, IO[str]]) -> None:
    for file in held.values():
        file.close()


# -- device and precision of a run -----------------------------------------------------------------------------------


class _Used:
    """What the present run was seen to use."""

    device, dtype = "cpu", "float32"
    clocks: dict[str, int] | None = None


_used = _Used()


def begin() -> None:
    """Forget what the run before used."""
    global _used
    _used = _Used()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def of(scale: str) -> torch.device:
    """The GPU for runs at paper scale where there is one, else the CPU."""
    return torch.device("cuda" if scale == "paper" and torch.cuda.is_available() else "cpu")


def gpu() -> torch.device:
    """The CUDA GPU that a run is there to measure."""
    if not torch.cuda.is_available():
        raise PrunelabError("this row measures a CUDA GPU and none is here; run it with --profile configs/profiles/gpu")
    return torch.device("cuda")


def spread() -> dict[str, str]:
    """What a process that holds several GPUs tells `from_pretrained`: accelerate spreads the model over them."""
    return {"device_map": "auto"} if _claimed > 1 else {}


def place(model: M, device: torch.device, *, half: bool = False) -> M:
    """Move a model to where its run computes, and note where that is and in which precision.

    half: on a GPU use bfloat16 instead of float32. Checkpoints stored in 16 bits stay as they are, and so does a model
    that is spread over several GPUs.
    """
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(device)
    if half and device.type == "cuda" and _dtype(model) == torch.float32:
        lowered(model, torch.bfloat16)
    note(model)
    return model


def lowered(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model a precision, but for the frequencies of its rotary positions: in 16 bits they would turn far tokens
    by wrong angles, and transformers, too, loads them in float32."""
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.to(dtype)
    for name, buffer in frequencies.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, buffer)


def note(model: nn.Module) -> None:
    """Note where a model is and in which precision, for the run's record."""
    devices = sorted({str(p.device) for p in model.parameters() if p.device.type == "cuda"})
    if devices:
        names = [torch.cuda.get_device_name(name) for name in devices]
        _used.device = names[0] if len(names) == 1 else f"{len(names)} x {names[0]}"
    _used.dtype = str(_dtype(model)).removeprefix("torch.")


def read_clocks() -> None:
    """Note the clocks of the GPU; to be called right behind the timed work, while they are what they were in it."""
    values: list[str] | None = None
    if torch.cuda.is_available():
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        values = _smi(f"--query-gpu={','.join(CLOCKS.values())}", f"--id={uuid}")
    _used.clocks = None if values is None else _megahertz(values)


def median_seconds(work: Callable[[], Any], device: torch.device, *, warm_up: int, repeats: int) -> float:
    """Median time of some work by the clock, the GPU waited for; the GPU's clocks are read right behind it."""
    times = []
    for _ in range(warm_up + repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    read_clocks()
    return statistics.median(times[warm_up:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory() -> float:
    """GB (1e9 bytes) of the GPUs that this process sees, together; 0 where there is none."""
    if not torch.cuda.is_available():
        return 0.0
    return sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 1e9


def environment() -> dict[str, Any]:
    """Of a run that ended: `device`, `dtype` of its weights, `clocks` in MHz (null where nobody read them or they
    cannot be read), and `memory_gib`, the most that the GPU's allocator held at once (null on the CPU)."""
    memory = None
    if _used.device != "cpu":
        memory = round(sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**30, 3)
    return {"device": _used.device, "dtype": _used.dtype, "clocks": _used.clocks, "memory_gib": memory}


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _smi(*query: str) -> list[str] | None:
    """The lines nvidia-smi answers with, or None where it is not there or does not know."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines() if done.returncode == 0 else None


def _megahertz(lines: list[str]) -> dict[str, int] | None:
    """One line of nvidia-smi by the names that records have; None where a clock is not given."""
    values = [value.strip() for value in ",".join(lines[:1]).split(",")]
    return dict(zip(CLOCKS, map(int, values), strict=True)) if all(v.isdigit() for v in values) else None
