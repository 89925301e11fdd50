"""Perplexity and next-token accuracy of a language model, pruned or not, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from prunelab.common.experiments.run import Run
from prunelab.common.models import batching, devices, loading
from prunelab.common.weights import WeightReport
from prunelab.common.weights.role import WeightPruner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION = 32  # sequences

# Measures of unpruned models by what decides them, so that a process which makes many runs takes them once.
_UNPRUNED: dict[str, dict[str, dict[str, Any]]] = {}


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics: `perplexity`; `loss`, its logarithm, in nats a token; `accuracy`, percent of next tokens that are the
    likeliest one; each with standard error and values by sequence, and with what it depends on in words (`protocol`,
    the unpruned model's value included); `tokens`, how many were predicted; and what `sizes` finds.

    Settings: `length` of the sequences in tokens, which the papers differ in and perplexity depends on; `samples`, how
    many of them (all there are); `calibration`, how many to calibrate with, of the same length; `seed`. The run's
    identity names the calibration set, and the model before fine-tuning for methods that prune what that changed.
    """
    device = devices.of(run.scale)
    length, samples = int(run.settings["length"]), run.settings.get("samples")
    model, tokenizer = loading.language(run.ids["model"], config)
    context = model.config.max_position_embeddings
    if not 2 <= length <= context:
        raise PrunelabError(f"a length of {length} tokens does not fit this model; give 2 to {context}")
    test = texts.sequences(run.ids["data"], config, tokenizer, length, samples)
    model = devices.place(model, device, half=True)
    key = files.digest([run.ids["model"], run.ids["data"], length, samples, str(device)])
    if key not in _UNPRUNED:
        _UNPRUNED[key] = measure(model, test)
    dense, out, calibrated = _UNPRUNED[key], sizes(model), ""
    found = {name: dict(metric) for name, metric in dense.items()}
    if run.method is not None:
        report, calibrated = prune(run, config, model, tokenizer)
        found, out = measure(model, test), sizes(model, report)
    whole = "join" in run.ids["data"]
    conditions = f"{len(test)} sequences of {'' if whole else 'up to '}{length} tokens ({run.ids['data']['loader']})"
    for name, metric in found.items():
        unpruned = f"unpruned {dense[name]['value']:.4g}" if run.method else ""
        metric["protocol"] = "; ".join(part for part in (conditions, calibrated, unpruned) if part)
    return {**found, "tokens": {"value": sum(len(tokens) - 1 for tokens in test)}, **out}


def prune(
    run: Run, config: Mapping[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[WeightReport, str]:
    """Where a method meets a language model: it stays pruned by it from here on. What became of its weights, and how
    it was calibrated, in words."""
    method = registry.create(str(run.method), **run.options)
    if not isinstance(method, WeightPruner):
        raise PrunelabError(f"perplexity is measured under weight pruners; {method.name} is a {method.role}")
    seed, calibration, told = int(run.settings.get("seed", 0)), None, "no calibration"
    if reads_text(method):
        count, length = int(run.settings.get("calibration", CALIBRATION)), int(run.settings["length"])
        drawn = texts.windows(run.ids["calibration"], config, tokenizer, length, count, seed)
        calibration = [tokens.to(model.device) for tokens in drawn]
        told = f"calibrated on {count} of {length} tokens ({run.ids['calibration']['loader']})"
    base = None
    if method.needs_base:
        if "base" not in run.ids:
            raise PrunelabError(f"{method.name} needs the model before fine-tuning; name it as base in loading.yaml")
        base = loading.language(run.ids["base"], config)[0].to(model.device, model.dtype)
    budget = Budget.parse(str(run.budget))
    plan = weights.prune(method, model, budget, calibration, base=base, seed=seed, progress=False)
    return plan.report, told


def reads_text(method: WeightPruner) -> bool:
    """Whether the method measures anything on a calibration set."""
    precomputes = type(method).precompute is not WeightPruner.precompute
    return precomputes or any(method.statistics(unit) for unit in method.units)


def sizes(model: nn.Module, report: WeightReport | None = None) -> dict[str, Any]:
    """`gparameters` that the model holds and `nonzero_gparameters` among them, in G (1e9); after pruning also
    `saving` and `nonzero_saving`, the percent of all parameters that are gone, or gone or zero, and `sparsity`, the
    percent of the prunable ones that are gone, zero, or again what they were before fine-tuning."""
    held = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    out = {"gparameters": held / 1e9, "nonzero_gparameters": nonzero / 1e9}
    if report is not None:
        dense = report.dense_parameters
        out |= {"saving": 100 * (1 - held / dense), "nonzero_saving": 100 * (1 - nonzero / dense)}
        out["sparsity"] = 100 * report.sparsity
    return {name: {"value": round(value, 9 if name.endswith("gparameters") else 3)} for name, value in out.items()}


def measure(model: nn.Module, test: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
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
    if not bool(torch.isfinite(nll).all()):
        raise PrunelabError("the model's output holds NaN or infinite values; check its weights and how it was pruned")
    return nll, logits.argmax(-1) == tokens[1:]


def per_token(values: Sequence[Tensor]) -> dict[str, Any]:
    """Mean over the tokens of all sequences (a list of [T]), with its standard error over sequences, that of a ratio
    of two sums.

    `samples` has one number a sequence: the mean, and what the sequence adds to it by its own mean and length. Their
    mean is the value and their standard error its own, so that differences between models pair up.
    """
    n = len(values)
    totals, counts = torch.stack([v.sum() for v in values]), torch.tensor([float(len(v)) for v in values])
    centre = totals.sum() / counts.sum()
    samples = centre + (totals - centre * counts) / counts.mean()
    stderr = float(samples.std()) / math.sqrt(n) if n > 1 else 0.0
    each = [round(v, 6) for v in samples.tolist()]
    return {"value": round(float(centre), 6), "n": n, "stderr": round(stderr, 6), "samples": each}


def exponential(loss: Mapping[str, Any]) -> dict[str, Any]:
    """The perplexity of a mean loss in nats; its samples and error are the loss's to first order."""
    value = math.exp(loss["value"])
    samples = [round(value * (1 + sample - loss["value"]), 4) for sample in loss["samples"]]
    return {"value": round(value, 4), "n": loss["n"], "stderr": round(value * loss["stderr"], 4), "samples": samples}
