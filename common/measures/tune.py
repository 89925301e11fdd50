"""A language model fine-tuned on what a data selector keeps, or by a training method: how well it then predicts
held-out text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunelab.common.core import files
from prunelab.common.data import tuning
from prunelab.common.data.tuning import Corpus, Piece
from prunelab.common.data_selection.engine import applied
from prunelab.common.data_selection.examples import collate
from prunelab.common.data_selection.losses import counted, token_loss
from prunelab.common.data_selection.ngrams import HashedNgrams, kl_reduction
from prunelab.common.data_selection.role import DataSelector
from prunelab.common.measures import fitting
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.measures.language import sizes, training
from prunelab.common.metrics.likelihood import exponential, per_token
from prunelab.common.models import devices, loading
from prunelab.common.training import engine
from prunelab.common.training.method import TrainingMethod
from prunelab.common.training.recipe import LinearRecipe

if TYPE_CHECKING:
    from prunelab.common.tasks.tune import Tune

# The models trained on clean samples by what decides them, so that a process which makes many runs trains each once.
_REFERENCES: dict[str, nn.Module] = {}


def measure(bench: Bench[Tune.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.tune`."""
    settings, ids = bench.settings, bench.ids
    model, tokenizer = loading.language(ids["model"], bench.config)
    devices.note(model)
    data = tuning.load(
        ids["data"], ids.get("among"), bench.config, tokenizer, length=settings.length, samples=settings.samples,
        prompt=settings.prompt, clean=settings.clean, held_out=settings.held_out,
    )  # fmt: skip
    method: Any = bench.method(DataSelector, TrainingMethod)
    whole: list[Any] = [sample.model_input() for sample in data.samples]
    kept: dict[str, Any] = {}
    tuned: nn.Module = model
    if method is None:
        tuned = _trained(bench, model, whole)
        kept = {"kl_reduction": {"value": 0.0}}  # all of it is no closer than a random choice of as much
    elif isinstance(method, TrainingMethod):
        teacher = {"teacher": copy.deepcopy(model)} if "teacher" in method.services else {}
        plan = engine.train(
            method, model, bench.budget, whole, _recipe(settings), services=teacher, seed=bench.seed, progress=False
        )
        kept = sizes(model, plan.report) | training(plan)
    elif method.when == "before":
        chosen, kept = _before(method, bench, model, data)
        tuned = _trained(bench, model, chosen)
    else:
        block = applied(method, model, bench.budget, services=_services(method, bench, model, data), seed=bench.seed)
        with block as handle:
            tuned = _trained(bench, model, whole)
        kept = fitting.chosen_each_batch(handle)
    loss = per_token(_predicted(tuned, data.held_out))
    return {"perplexity": exponential(loss), "loss": loss, **sizes(tuned), **kept}


def _services(method: DataSelector, bench: Bench[Tune.Settings], model: nn.Module, data: Corpus) -> dict[str, Any]:
    """The second models that the method names: the one trained on the clean sample, and the model as it is."""
    made = {}
    for name in method.services:
        made[name] = copy.deepcopy(model) if name == "history" else _reference(bench, model, data)
    return made


def _reference(bench: Bench[Tune.Settings], model: nn.Module, data: Corpus) -> nn.Module:
    key = files.digest([bench.ids, bench.settings.model_dump(mode="json"), bench.seed])
    if key not in _REFERENCES:
        clean = [sample.model_input() for sample in data.clean]
        _REFERENCES.clear()
        _REFERENCES[key] = _trained(bench, copy.deepcopy(model), clean).eval().requires_grad_(False)
    return _REFERENCES[key]


def _before(
    method: DataSelector, bench: Bench[Tune.Settings], model: nn.Module, data: Corpus
) -> tuple[Sequence[Any], dict[str, Any]]:
    """The samples that the method leaves for the training, what share of them and of their tokens that is, and how much
    nearer to the clean sample they are than a random choice."""
    settings, target = bench.settings, {"clean": data.clean}
    if "checkpoints" in method.services:
        whole = [sample.model_input() for sample in data.samples]
        block = fitting.warmed(method, model, whole, _recipe(settings), bench.seed, settings.rank, settings.alpha)
        with block as (learner, checkpoints):
            left, kept, chosen = fitting.chosen_before(
                method, data.samples, learner, bench.budget, bench.seed, services={"checkpoints": checkpoints},
                target=target,
            )  # fmt: skip
    else:
        services = {} if method.requires() == {"text"} else _services(method, bench, model, data)
        left, kept, chosen = fitting.chosen_before(
            method, data.samples, model, bench.budget, bench.seed, services=services, target=target
        )
    if chosen is not None:
        kept["kl_reduction"] = {"value": _reduction(data, chosen)}
    return left, kept


def _reduction(data: Corpus, chosen: Sequence[int]) -> float:
    """KL reduction of a choice, against the mean over ten random ones of equal size."""
    bags, texts = HashedNgrams(), [sample.text for sample in data.samples]
    target, own = bags.counts(s.text for s in data.clean), bags.counts(texts[i] for i in chosen)
    rng = torch.Generator().manual_seed(0)
    random = [torch.randperm(len(texts), generator=rng)[: len(chosen)].tolist() for _ in range(10)]
    each = [kl_reduction(target, own, bags.counts(texts[i] for i in drawn)) for drawn in random]
    return round(sum(each) / len(each), 4)


def _trained(bench: Bench[Tune.Settings], model: nn.Module, samples: Sequence[Mapping[str, Any]]) -> nn.Module:
    settings = bench.settings
    return fitting.trained(model, samples, _recipe(settings), bench.seed, settings.rank, settings.alpha)


def _recipe(settings: Tune.Settings) -> LinearRecipe:
    return LinearRecipe(
        steps=settings.steps, batch=settings.batch, rate=settings.rate, warmup=settings.warmup, decay=0.0,
        betas=(0.9, 0.999), check_every=max(1, settings.steps // fitting.POINTS),
    )  # fmt: skip


@torch.inference_mode()
def _predicted(model: nn.Module, samples: Sequence[Piece]) -> list[Tensor]:
    """Negative log likelihoods of the response tokens of every sample."""
    results = []
    for start in range(0, len(samples), 8):
        batch = collate([sample.model_input() for sample in samples[start : start + 8]])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        losses = finite(token_loss(model(**inputs, use_cache=False).logits.float(), batch["labels"]), "the rate")
        mask = counted(batch["labels"])
        results += [row[kept].double() for row, kept in zip(losses, mask, strict=True)]
    return results
