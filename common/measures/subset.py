"""A classifier trained on the samples that a data selector keeps, with or without a teacher trained on all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits
from prunelab.common.data_selection.engine import select
from prunelab.common.data_selection.role import DataSelector
from prunelab.common.measures.bench import Bench
from prunelab.common.metrics import uncertainty
from prunelab.common.training.distillation import distillation

if TYPE_CHECKING:
    from prunelab.common.tasks.subset import Subset


def measure(bench: Bench[Subset.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.subset`."""
    settings = bench.settings
    if not 0 <= settings.alpha <= 1 or settings.students < 1:
        raise PrunelabError("alpha weighs the teacher's term and lies in [0, 1]; and there is at least one student")
    images, labels = digits.digits("train")
    test, answers = digits.digits("test")
    images, test = images.flatten(1), test.flatten(1)
    method, kept = bench.method(DataSelector), torch.arange(len(labels))
    if method is not None:
        early, correct = _scored(images, labels, settings)
        samples = [{"x": x, "labels": y} for x, y in zip(images, labels, strict=True)]
        chosen = select(
            method, samples, bench.budget, model=early, services={"correct": correct},
            forward=lambda model, batch: model(batch["x"]), seed=bench.seed, batch=256,
        )  # fmt: skip
        kept = torch.tensor(chosen.indices)
    teacher = _trained(images, labels, settings, seed=1000) if settings.alpha else None
    each = []
    for student in range(settings.students):
        model = _trained(images[kept], labels[kept], settings, bench.seed + student, teacher)
        with torch.no_grad():
            each.append((model(test).argmax(-1) == answers).double())
    counts = torch.bincount(labels[kept], minlength=int(labels.max()) + 1)
    return {
        "top1": uncertainty.mean((100 * torch.stack(each).mean(0)).tolist()),
        "samples": {"value": round(100 * len(kept) / len(labels), 3)},
        "fewest": {"value": int(counts.min())},
    }


def _network(settings: Subset.Settings, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, settings.width), nn.ReLU(), nn.Linear(settings.width, 10))


def _trained(
    images: Tensor, labels: Tensor, settings: Subset.Settings, seed: int, teacher: nn.Module | None = None,
    steps: int | None = None, watch: Any = None,
) -> nn.Module:  # fmt: skip
    """A network after its training on images [n, 64]; watch(model, step) looks on."""
    model, rng = _network(settings, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate)
    for step in range(settings.steps if steps is None else steps):
        batch = torch.randint(len(labels), (settings.batch,), generator=rng)
        logits = model(images[batch])
        loss = F.cross_entropy(logits, labels[batch])
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(images[batch])
            loss = (1 - settings.alpha) * loss + settings.alpha * distillation(logits, wanted, settings.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch is not None:
            watch(model, step)
    return model


def _scored(images: Tensor, labels: Tensor, settings: Subset.Settings) -> tuple[nn.Module, Tensor]:
    """A network early in its training, and which samples another one had right after each epoch [E, n]."""
    correct: list[Tensor] = []
    epoch = max(1, len(labels) // settings.batch)

    def watch(model: nn.Module, step: int) -> None:
        if (step + 1) % epoch == 0:
            with torch.no_grad():
                correct.append(model(images).argmax(-1) == labels)

    early = _trained(images, labels, settings, seed=2000, steps=settings.early)
    _trained(images, labels, settings, seed=2001, steps=max(settings.steps, epoch), watch=watch)
    return early, torch.stack(correct)
