"""The training loop: it may stop anywhere, goes on from its last checkpoint, and on the same machine with as many
threads ends with the same weights bit for bit.

By itself it runs on the CPU. Given an `accelerate.Accelerator` the same loop trains on its devices, in its precision;
each process then draws batches of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training.recipe import LOG, WEIGHTS, Recipe, plain, read_log

if TYPE_CHECKING:
    from rich.progress import Progress

CHECKPOINT = "checkpoint.pt"


class Job(Protocol):
    """What the loop trains. Its optimiser's groups hold `scale`, their learning rate as a share of the recipe's."""

    @property
    def name(self) -> str: ...

    def build(self) -> nn.Module:
        """The model, as it starts, drawn from torch's global generator where it is drawn."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer: ...

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        """Mean loss (a scalar) of one fresh batch. progress runs from 0 to 1 over the training."""

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Quality of a model in eval mode on held-out data; `quick` for the curve."""


class Trainable(Job, Protocol):
    """A job that leaves a trained model in a folder; a frozen dataclass, which is its own recipe.

    needs: distributions whose versions belong in the log. stored: in which type its weights are stored, None for their
    own. extras: further text files that belong to the model. settle: decides what the trained model alone can tell.
    """

    needs: ClassVar[tuple[str, ...]]
    stored: ClassVar[torch.dtype | None]

    def extras(self) -> Mapping[str, str]: ...

    def settle(self, model: nn.Module) -> None: ...


class Observer:
    """What joins a training: it is called around every step, and its state is kept in the checkpoints."""

    def before_step(self, step: int) -> None:
        """Ahead of the forward pass."""

    def after_backward(self, step: int) -> None:
        """Gradients are there, summed over processes and clipped; the weights have not moved."""

    def after_step(self, step: int) -> None:
        """The weights have moved."""

    def state(self) -> dict[str, Any]:
        """What the observer knows, as tensors and plain values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""


class Plain:
    """The part of `accelerate.Accelerator` that the loop uses, for one process on the CPU."""

    device = torch.device("cpu")
    is_main_process = True
    num_processes, process_index = 1, 0
    gradient_accumulation_steps = 1
    scaler = None

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        return objects

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def accumulate(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterator[nn.Parameter], limit: float) -> None:
        nn.utils.clip_grad_norm_(parameters, limit)

    def wait_for_everyone(self) -> None:
        pass


@dataclass(frozen=True)
class Training:
    """A training that has come to its end."""

    model: nn.Module
    seconds: float
    curve: list[dict[str, float]]


def fit(job: Trainable, out: Path, seed: int = 0, threads: int = 1, accelerator: Any = None) -> dict[str, Any]:
    """Train a testbed into the folder `out` and return the log that `training.json` holds.

    Called again after an interruption it goes on from the last checkpoint. A finished folder is left as it is.
    """
    if threads < 1:
        raise PrunelabError(f"cannot train with {threads} threads; give 1 or more")
    assert isinstance(job, Recipe)
    identity = {"testbed": job.name, "recipe": plain(asdict(job)), "seed": seed}
    _make(out)
    if (out / LOG).exists() and (out / WEIGHTS).exists():
        log = read_log(out)
        if {key: log.get(key) for key in identity} != identity:
            raise PrunelabError(f"{out} holds another finished training; choose an empty folder")
        return log
    training = run(job, job, out, identity, threads, accelerator=accelerator)
    header = identity | {"threads": threads, "seconds": training.seconds}
    log = _finish(job, job, training, out, header, write=accelerator is None or accelerator.is_main_process)
    return log


def run(
    job: Job,
    recipe: Recipe,
    folder: Path | None,
    identity: Mapping[str, Any],
    threads: int | None = None,
    observer: Observer | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> Training:
    """Train a job by a recipe, from its start or from the checkpoint in the folder.

    identity: what the checkpoint must agree in, `seed` among it. threads: None leaves torch's setting alone. The
    caller's global generator does not move.
    """
    if folder is not None:
        _make(folder)
    loop = _Loop(job, recipe, folder, dict(identity), observer or Observer(), accelerator or Plain(), progress)
    devices = [loop.runner.device] if loop.runner.device.type == "cuda" else []
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        with torch.random.fork_rng(devices=devices):
            return loop.go()
    finally:
        torch.set_num_threads(before)


@dataclass
class _Loop:
    job: Job
    recipe: Recipe
    folder: Path | None
    identity: dict[str, Any]
    observer: Observer
    runner: Any
    shown: bool

    def go(self) -> Training:
        seed = self.identity["seed"]
        torch.manual_seed(seed)
        model = self.job.build().train()
        model, optimizer = self.runner.prepare(model, self.job.optimizer(model))
        own = self.runner.unwrap_model(model)
        draws = torch.Generator().manual_seed(seed + self.runner.process_index)
        step, seconds, smooth, curve = 0, 0.0, torch.tensor(math.nan, dtype=torch.float64), []

        saved = None if self.folder is None else _read_checkpoint(self.folder, self.identity)
        if saved is not None:
            own.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            self.observer.restore(saved.get("observer", {}))
            if self.runner.scaler is not None:
                self.runner.scaler.load_state_dict(saved["scaler"])
            _set_random([saved, *saved.get("others", [])][self.runner.process_index], draws)
            step, seconds, curve = saved["step"], saved["seconds"], saved["curve"]
            smooth.fill_(saved["smooth"])
        smooth = smooth.to(self.runner.device)
        started = time.monotonic() - seconds

        with _progress(self.shown and self.runner.is_main_process) as progress:
            if step:
                progress.console.print(f"{self.job.name}: going on from step {step}")
            task = progress.add_task(self.job.name, total=self.recipe.steps, completed=step)
            while step < self.recipe.steps:
                loss = _step(self, model, optimizer, step, draws)
                smooth = loss if step == 0 else smooth + max(0.02, 1 / (step + 1)) * (loss - smooth)  # at first a mean
                step += 1
                progress.update(task, completed=step)
                due = step % self.recipe.check_every == 0 or step == self.recipe.steps
                kept = self.folder is not None and step % self.recipe.save_every == 0 and step < self.recipe.steps
                if (due or kept) and not math.isfinite(float(smooth)):
                    raise PrunelabError(f"{self.job.name}: the loss is no longer finite by step {step}; lower the rate")
                if due:
                    point = {"step": step, "loss": round(float(smooth), 4)}
                    point |= {key: round(value, 4) for key, value in evaluate(self.job, own, quick=True).items()}
                    curve.append(point | {"seconds": round(time.monotonic() - started, 1)})
                    progress.console.print("  ".join(f"{key} {value:g}" for key, value in curve[-1].items()))
                if kept:
                    state = {
                        "run": self.identity, "model": own.state_dict(), "optimizer": optimizer.state_dict(),
                        "step": step, "seconds": time.monotonic() - started, "smooth": float(smooth), "curve": curve,
                        "observer": self.observer.state(),
                    }  # fmt: skip
                    self.save(state, draws)
        return Training(own, round(time.monotonic() - started, 1), curve)

    def save(self, state: dict[str, Any], draws: torch.Generator) -> None:
        """Write a checkpoint; every process adds where its draws stand."""
        random = [_random(draws)]
        if self.runner.num_processes > 1:
            from accelerate.utils import gather_object  # type: ignore[import-untyped]

            random = gather_object(random)
        if self.runner.scaler is not None:
            state["scaler"] = self.runner.scaler.state_dict()
        if self.runner.is_main_process:
            assert self.folder is not None
            state |= random[0] | ({"others": random[1:]} if random[1:] else {})
            _replace(self.folder / CHECKPOINT, partial(torch.save, state))
        self.runner.wait_for_everyone()


def _step(loop: _Loop, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, draws: torch.Generator) -> Tensor:
    """One optimiser step; its loss as a double, which stays on the device until it is due."""
    runner, losses = loop.runner, []
    for group in optimizer.param_groups:
        group["lr"] = loop.recipe.rate * group["scale"] * loop.recipe.factor(step)
    loop.observer.before_step(step)
    optimizer.zero_grad()
    for _ in range(runner.gradient_accumulation_steps):
        with runner.accumulate(model):
            with runner.autocast():
                loss = loop.job.loss(model, step / loop.recipe.steps, draws)
            runner.backward(loss)
            losses.append(loss.detach().double())
    runner.clip_grad_norm_(model.parameters(), loop.recipe.clip)
    loop.observer.after_backward(step)
    optimizer.step()
    loop.observer.after_step(step)
    return torch.stack(losses).mean()


def _random(draws: torch.Generator) -> dict[str, Any]:
    """Where all generators of this process stand."""
    state = {"generator": draws.get_state(), "global_generator": torch.get_rng_state()}
    return state | ({"cuda_generator": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _set_random(state: Mapping[str, Any], draws: torch.Generator) -> None:
    draws.set_state(state["generator"])
    torch.set_rng_state(state["global_generator"])
    if "cuda_generator" in state:
        torch.cuda.set_rng_state(state["cuda_generator"])


def evaluate(job: Job, model: nn.Module, quick: bool = False) -> dict[str, float]:
    """The job's own test of a model, in eval mode and without gradients."""
    model.eval()
    with torch.no_grad():
        result = job.evaluate(model, quick)
    model.train()
    return result


def _finish(
    job: Trainable, recipe: Recipe, training: Training, out: Path, header: dict[str, Any], write: bool
) -> dict[str, Any]:
    """Test the model and write weights and log."""
    from safetensors.torch import save

    model = training.model
    job.settle(model)
    kept = {name: value.to(job.stored or value.dtype).contiguous() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)  # what is tested is what is stored
    weights = save(kept)
    log = header | {
        "steps": recipe.steps,
        "samples": recipe.steps * recipe.batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test": evaluate(job, model),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "versions": {name: version(name) for name in job.needs} | {"python": platform.python_version()},
        "curve": training.curve,
    }
    extras = job.extras()
    if extras:
        log["extras"] = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in extras.items()}
    if write:
        for name, text in extras.items():
            _replace(out / name, partial(Path.write_bytes, data=text.encode()))
        _replace(out / WEIGHTS, lambda path: path.write_bytes(weights))
        _replace(out / LOG, lambda path: path.write_text(_json(log)))
        (out / CHECKPOINT).unlink(missing_ok=True)
    return log


def _json(log: Mapping[str, Any]) -> str:
    """JSON with one line for each key, and one for each point of the curve: readable, and small in a diff."""
    curve = ",\n".join("    " + json.dumps(point) for point in log["curve"])
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in log.items() if key != "curve"]
    return "{\n" + ",\n".join([*lines, f'  "curve": [\n{curve}\n  ]']) + "\n}\n"


@contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True, quiet=not shown), disable=not shown) as bar:
        yield bar


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrunelabError(f"cannot write to {folder} ({error.strerror}); choose another folder") from None


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the file, then put it in place: an interruption leaves the old file or the new one, never half."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def _read_checkpoint(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        known = saved["run"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise PrunelabError(
            f"cannot read the checkpoint {path}; move it away, or choose an empty folder, to start again"
        ) from None
    if known != identity:
        raise PrunelabError(f"{path} belongs to a training with another recipe or seed; choose an empty folder")
    return saved
