"""Perplexity and next-token accuracy of a language model, pruned or not, on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common import weights
from prunelab.common.core import files, registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import texts
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.metrics.likelihood import exponential, per_token
from prunelab.common.models import batching, devices, loading
from prunelab.common.weights import WeightReport
from prunelab.common.weights.role import WeightPruner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prunelab.common.experts.apply import ExpertHandle
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
    found = {name: dict(metric) for name, metric in dense.items()}
    method = bench.method(WeightPruner)
    if method is not None:
        report, calibrated = prune(bench, method, model, tokenizer)
        out = sizes(model, report)
    pruned = method is not None or bench.settings.experts is not None
    if pruned:
        with without_experts(bench, model) as handle:
            found = predicted(model, test)
        out |= experts_run(model, handle)
    whole = "join" in ids["data"]
    conditions = f"{len(test)} sequences of {'' if whole else 'up to '}{length} tokens ({ids['data']['loader']})"
    for name, metric in found.items():
        unpruned = f"unpruned {dense[name]['value']:.4g}" if pruned else ""
        metric["protocol"] = "; ".join(part for part in (conditions, calibrated, unpruned) if part)
    return {**found, "tokens": {"value": sum(len(tokens) - 1 for tokens in test)}, **out}


def prune(
    bench: Bench[Any], method: WeightPruner, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[WeightReport, str]:
    """Where a method meets a language model: it stays pruned by it from here on. What became of its weights, and how
    it was calibrated, in words. The settings are those of `Calibrated`."""
    ids, calibration, told = bench.ids, None, "no calibration"
    if method.calibrated:
        count, length = bench.settings.calibration, bench.settings.length
        if length is None:
            raise PrunelabError(f"{method.name} calibrates; set the `length` of its sequences in tokens")
        drawn = texts.windows(ids["calibration"], bench.config, tokenizer, length, count, bench.seed)
        calibration = [tokens.to(model.device) for tokens in drawn]
        told = f"calibrated on {count} of {length} tokens ({ids['calibration']['loader']})"
    base = None
    if method.needs_base:
        if "base" not in ids:
            raise PrunelabError(f"{method.name} needs the model before fine-tuning; name it as base in models.yaml")
        base = loading.language(ids["base"], bench.config)[0].to(model.device, model.dtype)
    plan = weights.prune(method, model, bench.budget, calibration, base=base, seed=bench.seed, progress=False)
    return plan.report, told


def without_experts(bench: Bench[Any], model: nn.Module) -> AbstractContextManager[Any]:
    """The `with` block in which the method of the setting `experts` leaves out experts; nothing happens without one."""
    given = bench.settings.experts
    if given is None:
        return nullcontext()
    method = registry.create(given.method, **given.options)
    return bench.at_work(method, model, budget=Budget.parse(given.budget))


def experts_run(model: nn.Module, handle: ExpertHandle | None) -> dict[str, Any]:
    """What such a method left out: `experts_run`, the percent of the choices that ran, and `activated_saving`, that of
    the parameters which a token uses otherwise (all but the experts that it was not sent to), of which
    `activated_gparameters` are left."""
    if handle is None:
        return {}
    report = handle.report()
    sizes = [(b.experts.gate_up_proj.numel() + b.experts.down_proj.numel(), len(b.experts.down_proj))
             for b in handle.blocks.values()]  # fmt: skip
    held = sum(p.numel() for p in model.parameters())
    used = held - sum(size * (1 - k / n) for (size, n), k in zip(sizes, report.chosen, strict=True))
    left = sum(size / n * (k - ran) for (size, n), k, ran in zip(sizes, report.chosen, report.run, strict=True))
    figures = {"experts_run": 100 * report.ratio, "activated_saving": 100 * left / used}
    found = {name: {"value": round(value, 3)} for name, value in figures.items()}
    return found | {"activated_gparameters": {"value": round((used - left) / 1e9, 9)}}


def sizes(model: nn.Module, report: WeightReport | None = None) -> dict[str, Any]:
    """`gparameters` that the model holds and `nonzero_gparameters` among them, in G (1e9); after pruning also
    `saving` and `nonzero_saving`, the percent of all parameters that are gone, or gone or zero, and `sparsity`, the
    percent of the prunable ones that are gone, zero, or again what they were before fine-tuning. `weight_gbytes` are
    what the weights take, `weight_saving` the percent that is saved, and `bits` what a prunable one that is left takes
    where some became codes."""
    held = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    stored = sum(p.numel() * p.element_size() for p in model.parameters()) if report is None else report.bytes
    out = {"gparameters": held / 1e9, "nonzero_gparameters": nonzero / 1e9, "weight_gbytes": stored / 1e9}
    if report is not None:
        dense = report.dense_parameters
        out |= {"saving": 100 * (1 - held / dense), "nonzero_saving": 100 * (1 - nonzero / dense)}
        out |= {"sparsity": 100 * report.sparsity, "weight_saving": 100 * (1 - report.bytes / report.dense_bytes)}
        out |= {"bits": report.bits} if report.bits else {}
    billions = ("gparameters", "nonzero_gparameters", "weight_gbytes")
    return {name: {"value": round(value, 9 if name in billions else 3)} for name, value in out.items()}


def predicted(model: nn.Module, test: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """`perplexity`, `loss` and `accuracy` of a model on sequences of token ids, [T] each."""
    device = next(model.parameters()).device
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
    }


def predict(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood [T - 1] in nats of every token behind the first of a sequence [T], and whether it is the
    one that the model thinks likeliest."""
    logits = model(tokens.unsqueeze(0), use_cache=False).logits[0, :-1].float()
    nll = F.cross_entropy(logits, tokens[1:], reduction="none")
    return finite(nll, "its weights and how it was pruned"), logits.argmax(-1) == tokens[1:]
