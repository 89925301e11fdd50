"""A language model fine-tuned on instructions, all of them or what a data selector keeps, pruned before, after or while
it learns: by its scores on the tasks of lm-evaluation-harness (the extra `evaluation`) and its perplexity."""

from __future__ import annotations

import copy
import importlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import instructions, texts
from prunelab.common.data_selection import grades
from prunelab.common.data_selection.engine import applied
from prunelab.common.data_selection.role import DataSelector
from prunelab.common.measures import fitting, perplexity, task_examples, zero_shot
from prunelab.common.measures.bench import Bench
from prunelab.common.measures.language import sizes, training
from prunelab.common.models import devices, loading
from prunelab.common.training.method import TrainingMethod
from prunelab.common.training.recipe import Recipe
from prunelab.common.weights.role import WeightPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.finetune import Finetune

ASKED = 8  # questions that the harness asks together


def measure(bench: Bench[Finetune.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.finetune`."""
    settings = bench.settings
    if settings.tasks:
        zero_shot.harness()  # before anything is loaded
    method: Any = bench.method(DataSelector, WeightPruner, TrainingMethod)
    services = () if method is None else getattr(method, "services", ())
    if unknown := set(services) - {"history", "teacher", "reference", "checkpoints"}:
        raise PrunelabError(f"{bench.chosen} asks for a second model, {min(unknown)}, that this task does not train")
    if "reference" in services and settings.reference is None:
        raise PrunelabError(
            f"{bench.chosen} asks for a reference model; say under the setting 'reference' on how many instructions it"
            " is fine-tuned"
        )
    if "checkpoints" in services and settings.target is None:
        raise PrunelabError(
            f"{bench.chosen} measures the influence of samples; say under the setting 'target' on how many examples of"
            " each task"
        )
    if isinstance(method, TrainingMethod) and not settings.epochs:
        raise PrunelabError(f"{bench.chosen} prunes while a model trains, and 0 epochs train nothing; give some")
    if settings.base_bits == 8 and not isinstance(method, TrainingMethod):
        raise PrunelabError(f"{bench.chosen or 'plain training'} has no factors above weights of eight bits; say 16")
    model, tokenizer = loading.language(bench.ids["model"], bench.config)
    held_out = {  # read before anything is trained, as what follows
        metric: texts.sequences(bench.ids[name], bench.config, tokenizer, settings.text_length)
        for name, metric in (("text", "perplexity"), ("second_text", "second_perplexity"))
        if name in bench.ids
    }
    whole: list[Any] = []
    pieces: list[Any] = []
    if settings.epochs:
        pieces = instructions.load(bench.ids["data"], bench.config, tokenizer, settings.length)[: settings.limited]
        whole = [piece.model_input() for piece in pieces]
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    model = devices.place(model, bench.device, half=True)
    if settings.epochs and model.dtype == torch.float16:
        model = model.to(torch.bfloat16)  # whose range needs no scaling of the loss
    if settings.untie:
        untie(model)
    seconds = {name: copy.deepcopy(model) for name in services if name != "checkpoints"}
    if "reference" in services:
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(bench.seed))
        drawn = sorted(order[: settings.reference].tolist())
        seconds["reference"] = _trained(bench, seconds["reference"], [whole[i] for i in drawn]).requires_grad_(False)
    given = _grades(bench, method, pieces) if getattr(method, "grading", ()) and pieces else None
    results: dict[str, Any] = {}
    if isinstance(method, WeightPruner):
        if settings.order == "train, prune":
            model = _trained(bench, model, whole)
        plan, _ = perplexity.prune(bench, method, model, tokenizer, settings.calibration_length)
        if settings.order == "prune, train":
            model = _trained(bench, model, whole)
        results = sizes(model, plan.report)
    elif isinstance(method, TrainingMethod):
        engine = importlib.import_module("prunelab.common.training.engine")  # by name, see `by_role`
        plan = engine.train(
            method, model, bench.budget, whole, _recipe(settings, len(whole)), services=seconds, seed=bench.seed,
            accelerator=_accelerator(bench), eight=settings.base_bits == 8, progress=False,
        )  # fmt: skip
        results = sizes(model, plan.report) | training(plan)
    elif method is None or not whole:
        model = _trained(bench, model, whole)
    elif method.when == "before" and "checkpoints" in services:
        assert settings.target is not None
        target = task_examples.examples(bench, tokenizer, settings.target, settings.length)
        block = fitting.warmed(
            method, model, whole, _recipe(settings, len(whole)), bench.seed, settings.rank, settings.alpha,
            _accelerator(bench), settings.dropout,
        )  # fmt: skip
        with block as (learner, points):
            seconds["checkpoints"] = points
            whole, results, _ = fitting.chosen_before(
                method, pieces, learner, bench.budget, bench.seed, services=seconds, target=target
            )
        model = _trained(bench, model, whole)
    elif method.when == "before":
        whole, results, _ = fitting.chosen_before(
            method, pieces, model, bench.budget, bench.seed, services=seconds, target={}, grades=given
        )
        model = _trained(bench, model, whole)
    else:
        with applied(method, model, bench.budget, services=seconds, seed=bench.seed) as handle:
            model = _trained(bench, model, whole)
        results = fitting.chosen_each_batch(handle)
    if bench.device.type == "cuda":
        results["memory_gb"] = {"value": round(torch.cuda.max_memory_allocated(bench.device) / 1e9, 3)}
    for metric, text in held_out.items():
        results[metric] = perplexity.predicted(model, text)["perplexity"]
    scored = zero_shot.scored(bench, model, tokenizer, batch=ASKED) if settings.tasks else {}
    if settings.against is not None and "average" in scored:
        mean = scored["average"]
        scored["gain"] = {**mean, "value": round(100 * (mean["value"] / settings.against - 1), 4)}
        if "stderr" in mean:
            scored["gain"]["stderr"] = round(100 * mean["stderr"] / settings.against, 4)
    return {**scored, **results}


def _grades(bench: Bench[Finetune.Settings], method: Any, pieces: list[Any]) -> torch.Tensor:
    """What the graders give the instructions [n, G], one grader after the other in memory."""
    results = []
    for kind, name in zip(method.grading, ("grader", "second_grader"), strict=False):
        if name not in bench.ids:
            raise PrunelabError(f"{bench.chosen} asks for grades of {kind}; name a model under the setting '{name}'")
        model, tokenizer = loading.language(bench.ids[name], bench.config)
        model = devices.place(model, bench.device, half=True)
        pairs = [(piece.question, piece.text) for piece in pieces]
        results.append(grades.grades(model, tokenizer, kind, pairs, length=bench.settings.length))
        del model
    return torch.stack(results, 1)


def untie(model: Any) -> None:
    """Give the output layer a weight of its own."""
    layer = model.get_output_embeddings()
    if layer.weight is model.get_input_embeddings().weight:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _trained(bench: Bench[Finetune.Settings], model: Any, samples: list[Any]) -> Any:
    """The model after its training; as it was where there is nothing to train on."""
    settings = bench.settings
    if not samples:
        return model
    return fitting.trained(
        model, samples, _recipe(settings, len(samples)), bench.seed, settings.rank, settings.alpha,
        _accelerator(bench), progress=True, dropout=settings.dropout,
    )  # fmt: skip


def _recipe(settings: Finetune.Settings, samples: int) -> Recipe:
    steps = max(1, math.ceil(settings.epochs * samples / settings.batch))
    return Recipe(
        steps=steps, batch=settings.together or settings.batch, rate=settings.rate, warmup=settings.warmup, decay=0.0,
        betas=(0.9, 0.999), clip=settings.clip, check_every=max(1, steps // fitting.POINTS),
    )  # fmt: skip


def _accelerator(bench: Bench[Finetune.Settings]) -> Any:
    """What adds up the gradients of a batch's parts, and trains on a GPU; None where nothing is to be added there."""
    parts = bench.settings.batch // (bench.settings.together or bench.settings.batch)
    cpu = bench.device.type != "cuda"
    if cpu and parts == 1:
        return None
    from accelerate import Accelerator  # type: ignore[import-untyped]

    return Accelerator(cpu=cpu, gradient_accumulation_steps=parts)
