"""What a testbed is, and the one training loop that all of them share.

A testbed is a frozen dataclass whose fields are its recipe. Training writes to a folder of its own: a checkpoint
while it runs, `model.safetensors` and `training.json` when it is done.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError

if TYPE_CHECKING:
    from rich.progress import Progress

WEIGHTS, LOG, CHECKPOINT = "model.safetensors", "training.json", "checkpoint.pt"


@dataclass(frozen=True)
class Testbed(ABC):
    """A small model that we trained ourselves, on data that ships inside our dependencies.

    steps, batch: optimiser steps, and samples in each. rate: peak learning rate of AdamW, reached after the share
    `warmup` of the steps and then lowered to zero along a cosine. decay: weight decay of matrices. clip: largest norm
    of the gradient. check_every, save_every: steps between entries of the curve, and between checkpoints.
    """

    steps: int
    batch: int
    rate: float
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.05
    clip: float = 1.0
    check_every: int = 100
    save_every: int = 50

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("torch",)  # distributions whose versions belong in the log

    @abstractmethod
    def build(self) -> nn.Module:
        """The model with initial weights drawn from torch's global generator."""

    @abstractmethod
    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        """Mean loss (a scalar) of one fresh batch. progress runs from 0 to 1 over the training."""

    @abstractmethod
    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Quality of a model in eval mode on held-out data, and on how many samples; `quick` for the curve."""

    def extras(self) -> Mapping[str, str]:
        """Further text files that belong to the trained model, by name: a language model's tokenizer."""
        return {}

    def factor(self, step: int) -> float:
        """Learning rate of a step (counted from 0), as a share of the peak."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def scale(self, parameter: str) -> float:
        """Learning rate of a parameter, by its name in the model, as a share of the others'."""
        return 1.0

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW; biases, norms and position tables do not decay."""
        spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            decay = self.decay if parameter.dim() > 1 and name not in spared else 0.0
            groups.setdefault((self.scale(name), decay), []).append(parameter)
        return torch.optim.AdamW(
            [{"params": members, "scale": scale, "weight_decay": decay} for (scale, decay), members in groups.items()],
            lr=self.rate,
            betas=self.betas,
        )


def fit(testbed: Testbed, out: Path, seed: int = 0, threads: int = 1) -> dict[str, Any]:
    """Train a testbed into the folder `out` and return the log that `training.json` holds.

    Called again after an interruption it goes on from the last checkpoint and, on the same machine with as many
    threads, ends with the same weights bit for bit. A finished folder is left as it is.
    """
    if threads < 1:
        raise PrunelabError(f"cannot train with {threads} threads; give 1 or more")
    run = {"testbed": testbed.name, "recipe": plain(asdict(testbed)), "seed": seed}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrunelabError(f"cannot write to {out} ({error.strerror}); choose another folder") from None
    if (out / LOG).exists() and (out / WEIGHTS).exists():
        done = read_log(out)
        if {key: done.get(key) for key in run} != run:
            raise PrunelabError(f"{out} holds another finished training; choose an empty folder")
        return done
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            return _fit(testbed, out, run, threads)
    finally:
        torch.set_num_threads(before)


def _fit(testbed: Testbed, out: Path, run: dict[str, Any], threads: int) -> dict[str, Any]:
    torch.manual_seed(run["seed"])
    model = testbed.build().train()
    optimizer = testbed.optimizer(model)
    generator = torch.Generator().manual_seed(run["seed"])
    step, seconds, smooth, curve = 0, 0.0, math.nan, []

    saved = _read_checkpoint(out, run)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        torch.set_rng_state(saved["global_generator"])
        step, seconds, smooth, curve = saved["step"], saved["seconds"], saved["smooth"], saved["curve"]
    started = time.monotonic() - seconds

    with _progress() as progress:
        if step:
            progress.console.print(f"{testbed.name}: going on from step {step}")
        task = progress.add_task(testbed.name, total=testbed.steps, completed=step)
        while step < testbed.steps:
            loss = _step(testbed, model, optimizer, step, generator)
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            step += 1
            progress.update(task, completed=step)
            if step % testbed.check_every == 0 or step == testbed.steps:
                point = {"step": step, "loss": round(smooth, 4)}
                point |= {key: round(value, 4) for key, value in _evaluate(testbed, model, quick=True).items()}
                curve.append(point | {"seconds": round(time.monotonic() - started, 1)})
                progress.console.print("  ".join(f"{key} {value:g}" for key, value in curve[-1].items()))
            if step % testbed.save_every == 0 and step < testbed.steps:
                state = {
                    "run": run, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(), "global_generator": torch.get_rng_state(),
                    "step": step, "seconds": time.monotonic() - started, "smooth": smooth, "curve": curve,
                }  # fmt: skip
                _replace(out / CHECKPOINT, partial(torch.save, state))
    done = run | {"threads": threads, "seconds": round(time.monotonic() - started, 1)}
    return _finish(testbed, model, out, done, curve)


def _step(
    testbed: Testbed, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, draws: torch.Generator
) -> float:
    """One optimiser step; its loss."""
    for group in optimizer.param_groups:
        group["lr"] = testbed.rate * group["scale"] * testbed.factor(step)
    loss = testbed.loss(model, step / testbed.steps, draws)
    if not bool(loss.isfinite()):
        raise PrunelabError(f"{testbed.name}: the loss is no longer finite at step {step}; lower the rate")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), testbed.clip)
    optimizer.step()
    return loss.item()


def _finish(
    testbed: Testbed, model: nn.Module, out: Path, run: dict[str, Any], curve: list[dict[str, float]]
) -> dict[str, Any]:
    """Test the model and write weights and log."""
    from safetensors.torch import save

    weights = save({name: value.contiguous() for name, value in model.state_dict().items()})
    log = run | {
        "steps": testbed.steps,
        "samples": testbed.steps * testbed.batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test": _evaluate(testbed, model),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "versions": {name: version(name) for name in testbed.needs} | {"python": platform.python_version()},
        "curve": curve,
    }
    extras = testbed.extras()
    if extras:
        log["extras"] = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in extras.items()}
    for name, text in extras.items():
        _replace(out / name, partial(Path.write_bytes, data=text.encode()))
    _replace(out / WEIGHTS, lambda path: path.write_bytes(weights))
    _replace(out / LOG, lambda path: path.write_text(_json(log)))
    (out / CHECKPOINT).unlink(missing_ok=True)
    return log


def _progress() -> Progress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _json(log: Mapping[str, Any]) -> str:
    """JSON with one line for each key, and one for each point of the curve: readable, and small in a diff."""
    curve = ",\n".join("    " + json.dumps(point) for point in log["curve"])
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in log.items() if key != "curve"]
    return "{\n" + ",\n".join([*lines, f'  "curve": [\n{curve}\n  ]']) + "\n}\n"


def _evaluate(testbed: Testbed, model: nn.Module, quick: bool = False) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        result = testbed.evaluate(model, quick)
    model.train()
    return result


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the file, then put it in place: an interruption leaves the old file or the new one, never half."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def _read_checkpoint(out: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        known = saved["run"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise PrunelabError(f"cannot read the checkpoint {path}; delete it to start again") from None
    if known != run:
        raise PrunelabError(f"{path} belongs to a training with another recipe or seed; choose an empty folder")
    return saved


def plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))


def read_log(folder: Path) -> dict[str, Any]:
    """The training log of a folder."""
    try:
        log = json.loads((folder / LOG).read_text())
    except OSError:
        raise PrunelabError(f"there is no {LOG} in {folder}; train the testbed into it first") from None
    except ValueError:
        log = None
    if not isinstance(log, dict) or not {"testbed", "recipe", "sha256"} <= log.keys():
        raise PrunelabError(f"{folder / LOG} is not a training log; restore it or train again")
    return log


def read_extra(folder: Path, name: str) -> str:
    """One of a testbed's further files, checked against the log of its training."""
    wanted = read_log(folder).get("extras", {}).get(name)
    try:
        data = (folder / name).read_bytes()
    except OSError:
        data = b""
    if wanted is None or hashlib.sha256(data).hexdigest() != wanted:
        raise PrunelabError(f"{folder / name} is missing or not the one of {LOG}; restore it or train again")
    return data.decode()
