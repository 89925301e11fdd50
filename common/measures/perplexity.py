"""Perplexity and next-token accuracy of a language model, pruned or not, on held-out text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common import weights
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import texts
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.measures.language import experts_run, sizes, without_experts
from prunelab.common.metrics.likelihood import exponential, per_token
from prunelab.common.models import batching, devices, loading
from prunelab.common.weights import WeightPlan
from prunelab.common.weights.role import WeightPruner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prunelab.common.tasks.perplexity import Perplexity

# Measures of unpruned models by what decides them, so that a process which makes many runs takes them once.
_UNPRUNED: dict[str, dict[str, dict[str, Any]]] = {}


def measure(bench: Bench[Perplexity.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.perplexity`."""
    length, samples, ids = bench.settings.length, bench.settings.samples, bench.ids
    model, tokenizer = loading.language(ids["model"], bench.config)
    context = model.config.max_position_embeddings
    if not 2 <= length <= context:
        raise PrunelabError(f"a length of {length} tokens does not fit this model; give 2 to {context}")
    test = texts.sequences(ids["data"], bench.config, tokenizer, length, samples)
    model = devices.place(model, bench.device, half=True)
    key = files.digest([ids["model"], ids["data"], length, samples, str(bench.device)])
    if key not in _UNPRUNED:
        _UNPRUNED[key] = predicted(model, test)
    dense, out, calibrated = _UNPRUNED[key], sizes(model), ""
    results = {name: dict(metric) for name, metric in dense.items()}
    method = bench.method(WeightPruner)
    if method is not None:
        plan, calibrated = prune(bench, method, model, tokenizer)
        out = sizes(model, plan.report)
    pruned = method is not None or bench.settings.experts is not None
    if pruned:
        with without_experts(bench, model) as handle:
            results = predicted(model, test)
        out |= experts_run(model, handle)
    whole = "join" in ids["data"]
    conditions = f"{len(test)} sequences of {'' if whole else 'up to '}{length} tokens ({ids['data']['loader']})"
    for name, metric in results.items():
        unpruned = f"unpruned {dense[name]['value']:.4g}" if pruned else ""
        metric["protocol"] = "; ".join(part for part in (conditions, calibrated, unpruned) if part)
    return {**results, "tokens": {"value": sum(len(tokens) - 1 for tokens in test)}, **out}


def prune(
    bench: Bench[Any],
    method: WeightPruner,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int | None = None,
) -> tuple[WeightPlan, str]:
    """Where a method meets a language model: it stays pruned by it from here on. What was decided, and how it was
    calibrated, in words: on `calibration` sequences of the settings' `length`, or of the one given."""
    ids, calibration, protocol = bench.ids, None, "no calibration"
    if method.calibrated:
        count, length = bench.settings.calibration, length or bench.settings.length
        if length is None:
            raise PrunelabError(f"{method.name} calibrates; set the `length` of its sequences in tokens")
        drawn = texts.windows(ids["calibration"], bench.config, tokenizer, length, count, bench.seed)
        calibration = [tokens.to(model.device) for tokens in drawn]
        protocol = f"calibrated on {count} of {length} tokens ({ids['calibration']['loader']})"
    base = None
    if method.needs_base:
        if "base" not in ids:
            raise PrunelabError(f"{method.name} needs the model before fine-tuning; name it as base in models.yaml")
        base = loading.language(ids["base"], bench.config)[0].to(model.device, model.dtype)
    plan = weights.prune(method, model, bench.budget, calibration, base=base, seed=bench.seed, progress=False)
    return plan, protocol


def predicted(model: nn.Module, test: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """`perplexity`, `loss` and `accuracy` of a model on sequences of token ids, [T] each, and the `seconds` it took."""
    device, start = next(model.parameters()).device, time.perf_counter()
    losses, right = [], []
    with torch.inference_mode():
        for tokens in track(test, "predicting", transient=True):
            ids = tokens.to(device)
            (nll, correct), _ = batching.largest(lambda _, ids=ids: predict(model, ids), 1, f"{len(ids)} tokens")  # type: ignore[misc]
            losses.append(nll.double().cpu())
            right.append(correct.double().cpu())
    loss = per_token(losses)
    return {
        "perplexity": exponential(loss),
        "loss": loss,
        "accuracy": per_token([100 * share for share in right]),
        "seconds": {"value": round(time.perf_counter() - start, 3)},  # values came to the CPU, so that all is done
    }


def predict(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood [T - 1] in nats of every token behind the first of a sequence [T], and whether it is the
    one that the model thinks likeliest."""
    logits = model(tokens.unsqueeze(0), use_cache=False).logits[0, :-1].float()
    nll = F.cross_entropy(logits, tokens[1:], reduction="none")
    return finite(nll, "its weights and how it was pruned"), logits.argmax(-1) == tokens[1:]
