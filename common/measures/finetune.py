"""A language model fine-tuned on instructions, all of them or what a data selector keeps, by its scores on the tasks of
lm-evaluation-harness (the extra `evaluation`)."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import instructions
from prunelab.common.data_selection.engine import applied
from prunelab.common.data_selection.role import DataSelector
from prunelab.common.measures import fitting, zero_shot
from prunelab.common.measures.bench import Bench
from prunelab.common.models import devices, loading
from prunelab.common.training.recipe import Recipe

if TYPE_CHECKING:
    from prunelab.common.tasks.finetune import Finetune

ASKED = 8  # questions that the harness asks together


def measure(bench: Bench[Finetune.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.finetune`."""
    zero_shot.harness()  # before anything is loaded
    settings = bench.settings
    method = bench.method(DataSelector)
    services = () if method is None else method.services
    if unknown := set(services) - {"history"}:
        raise PrunelabError(f"{bench.chosen} asks for a second model, {min(unknown)}, that this task does not train")
    model, tokenizer = loading.language(bench.ids["model"], bench.config)
    model = devices.place(model, bench.device, half=True)
    kept: dict[str, Any] = {}
    if settings.epochs:
        pieces = instructions.load(bench.ids["data"], bench.config, tokenizer, settings.length)[: settings.limited]
        seconds = {name: copy.deepcopy(model) for name in services}
        whole: list[Any] = [piece.model_input() for piece in pieces]
        if method is None:
            model = _trained(bench, model, whole)
        elif method.when == "before":
            whole, kept, _ = fitting.chosen_before(
                method, pieces, model, bench.budget, bench.seed, services=seconds, target=()
            )
            model = _trained(bench, model, whole)
        else:
            with applied(method, model, bench.budget, services=seconds, seed=bench.seed) as handle:
                model = _trained(bench, model, whole)
            kept = fitting.chosen_each_batch(handle)
    return {**zero_shot.scored(bench, model, tokenizer, batch=ASKED), **kept}


def _trained(bench: Bench[Finetune.Settings], model: nn.Module, samples: list[Any]) -> nn.Module:
    settings = bench.settings
    steps = max(1, math.ceil(settings.epochs * len(samples) / settings.batch))
    recipe = Recipe(
        steps=steps, batch=settings.batch, rate=settings.rate, warmup=settings.warmup, decay=0.0, betas=(0.9, 0.999),
        check_every=steps,
    )  # fmt: skip
    accelerator = None
    if bench.device.type == "cuda":
        from accelerate import Accelerator  # type: ignore[import-untyped]

        accelerator = Accelerator()
    return fitting.trained(
        model, samples, recipe, bench.seed, settings.rank, settings.alpha, accelerator, progress=True
    )
