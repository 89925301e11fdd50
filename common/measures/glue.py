"""An encoder fine-tuned on each task of GLUE, and scored on its development set."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.catalogue import hub
from prunelab.common.data import glue
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.models import loading
from prunelab.common.training.recipe import LinearRecipe

if TYPE_CHECKING:
    from prunelab.common.tasks.glue import Glue, Name


def measure(bench: Bench[Glue.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.glue`."""
    from transformers import AutoTokenizer

    settings, ids = bench.settings, bench.ids
    place = hub.folder(ids.get("tokenizer", ids["model"]), "model", bench.config)
    tokenizer = loading.pretrained(AutoTokenizer, place)
    splits: dict[str, list[Encoded]] = {
        task: [
            _encoded(glue.load(ids["data"], bench.config, task, split), tokenizer, settings.length) for split in SPLITS
        ]
        for task in settings.tasks
    }
    scores: dict[str, list[float]] = {task: [] for task in settings.tasks}
    for run in range(settings.runs):
        seed = (bench.seed << 8) + run
        begin: dict[str, Tensor] = {}
        for task in track(settings.tasks, "fine-tuning", transient=True):
            model = loading.classifier(ids["model"], bench.config, glue.TASKS[task][1] or 1, seed)
            if task in settings.begun:
                model.load_state_dict(begin, strict=False)
            tuned(bench, model, tokenizer, task, splits[task], seed)
            scores[task].append(score(task, *predicted(bench, model, tokenizer, splits[task][1], settings.batch)))
            if task == "mnli" and settings.begun:  # all but the head, whose classes are other ones
                begin = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("classifier.")}
    protocol = f"median of {settings.runs} trainings, each of its best epoch by the loss on the development set"
    out: dict[str, Any] = {}
    for name, values in scores.items():
        out[name] = {"value": round(statistics.median(values), 4), "n": len(splits[name][1][0]), "protocol": protocol}
        if settings.runs > 1:
            out[name]["stderr"] = round(statistics.stdev(values) / math.sqrt(settings.runs), 4)
    average = statistics.mean(out[task]["value"] for task in settings.tasks)
    return {**out, "average": {"value": round(average, 4), "protocol": protocol}}


SPLITS = ("train", "validation")
Encoded = tuple[list[dict[str, Any]], Tensor]  # inputs, and labels [n]


def _encoded(split: glue.Split, tokenizer: Any, length: int) -> Encoded:
    texts, labels = split
    held = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=length)
    return [{key: held[key][i] for key in held} for i in range(len(texts))], torch.tensor(labels)


def tuned(
    bench: Bench[Glue.Settings], model: nn.Module, tokenizer: Any, task: Name, splits: list[Encoded], seed: int
) -> None:
    """Train the model in place, and leave it as it was after its best epoch."""
    settings, (inputs, labels) = bench.settings, splits[0]
    batch, rate = settings.batch_of.get(task, settings.batch), settings.rate_of.get(task, settings.rate)
    steps = math.ceil(len(inputs) / batch)
    recipe = LinearRecipe(
        steps=steps * settings.epochs, batch=batch, rate=rate, warmup=settings.warmup, decay=settings.decay,
        clip=settings.clip, betas=(0.9, 0.98),
    )  # fmt: skip
    model.to(bench.device)
    optimizer, rng = recipe.optimizer(model), torch.Generator().manual_seed(seed)
    best, kept = math.inf, {}
    with torch.random.fork_rng(devices=[bench.device] if bench.device.type == "cuda" else []):
        torch.manual_seed(seed)  # of dropout
        for epoch in range(settings.epochs):
            model.train()
            for step, rows in enumerate(torch.randperm(len(inputs), generator=rng).split(batch)):
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"] * recipe.factor(epoch * steps + step)
                optimizer.zero_grad()
                loss(_logits(bench, model, tokenizer, [inputs[i] for i in rows]), labels[rows], task).backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
            now = float(loss(*predicted(bench, model, tokenizer, splits[1], batch), task))
            if now < best:
                best, kept = now, {name: value.detach().clone() for name, value in model.state_dict().items()}
    finite(torch.tensor(best), "the rate")
    model.load_state_dict(kept)


def _logits(bench: Bench[Any], model: nn.Module, tokenizer: Any, inputs: list[dict[str, Any]]) -> Tensor:
    padded = tokenizer.pad(inputs, return_tensors="pt").to(bench.device)
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda"):
        logits: Tensor = model(**padded).logits
    return logits.float().cpu()


@torch.no_grad()
def predicted(bench: Bench[Any], model: nn.Module, tokenizer: Any, split: Encoded, batch: int) -> tuple[Tensor, Tensor]:
    """Logits [n, C] and labels [n]."""
    model.eval()
    inputs, labels = split
    parts = [_logits(bench, model, tokenizer, inputs[i : i + batch]) for i in range(0, len(inputs), batch)]
    return torch.cat(parts), labels


def loss(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """Cross-entropy, or the mean square of the error where the label is a number."""
    return F.cross_entropy(logits, labels.long()) if glue.TASKS[task][1] else F.mse_loss(logits[:, 0], labels)


def score(task: str, logits: Tensor, labels: Tensor) -> float:
    """In percent: accuracy, Matthews correlation (CoLA), or the correlation of ranks (STS-B); 0 where the guesses are
    constant, and have none."""
    if task == "stsb":
        value = float(stats.spearmanr(logits[:, 0].numpy(), labels.numpy()).statistic)
        return 0.0 if math.isnan(value) else 100 * value
    guess, truth = logits.argmax(-1), labels.long()
    if task == "cola":
        pairs = torch.stack([guess, truth]).double()
        centred = pairs - pairs.mean(1, keepdim=True)
        spread = float(centred.square().sum(1).prod().sqrt())
        return 100 * float((centred[0] * centred[1]).sum()) / spread if spread else 0.0
    return 100 * float((guess == truth).double().mean())
