"""Perplexity and next-token accuracy of a language model, pruned or not, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from common import models, registry, weights
from common.data import texts
from common.errors import PrunelabError
from common.papers import Run
from common.roles import WeightPruner
from common.types import Budget

CALIBRATION = 32  # sequences


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics: `perplexity`; `loss`, its logarithm, in nats a token; `accuracy`, percent of next tokens that are the
    likeliest one; all with standard errors over sequences and the latter two with their values by sequence; `tokens`,
    how many were predicted.

    Settings: `length` of the sequences in tokens, which the papers differ in and perplexity depends on; `samples`, how
    many of them (all there are); `calibration`, how many to calibrate with, of the same length; `seed`.
    """
    device = "cuda" if run.scale == "paper" and torch.cuda.is_available() else "cpu"
    length, samples = int(run.settings["length"]), run.settings.get("samples")
    model, tokenizer = models.language(run.ids["model"], config)
    context = model.config.max_position_embeddings
    if not 2 <= length <= context:
        raise PrunelabError(f"a length of {length} tokens does not fit this model; give 2 to {context}")
    test = texts.sequences(run.ids["data"], config, tokenizer, length, samples)
    model = model.to(device)
    if run.method is not None:
        count = int(run.settings.get("calibration", CALIBRATION))
        calibration = texts.sequences(run.ids["data"], config, tokenizer, length, count, "train")
        prune(run, model, [tokens.to(device) for tokens in calibration])
    losses, right = [], []
    with torch.inference_mode():
        for tokens in track(test, "predicting", transient=True):
            nll, correct = predict(model, tokens.to(device))
            losses.append(nll.double().cpu())
            right.append(correct.double().cpu())
    loss, accuracy = per_token(losses), per_token([100 * share for share in right])
    perplexity = math.exp(loss["value"])
    return {
        "perplexity": {
            "value": round(perplexity, 4), "n": loss["n"], "stderr": round(perplexity * loss["stderr"], 4)
        },
        "loss": loss,
        "accuracy": accuracy,
        "tokens": {"value": sum(map(len, losses))},
    }  # fmt: skip


def prune(run: Run, model: nn.Module, calibration: Sequence[Tensor]) -> None:
    """Where a method meets the model: it stays pruned by it from here on."""
    method = registry.create(str(run.method), **run.options)
    if not isinstance(method, WeightPruner):
        raise PrunelabError(f"perplexity is measured under weight pruners; {method.name} is a {method.role}")
    seed = int(run.settings.get("seed", 0))
    weights.prune(method, model, Budget.parse(str(run.budget)), calibration, seed=seed, progress=False)


def predict(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood [T - 1] in nats of every token behind the first of a sequence [T], and whether it is the
    one that the model thinks likeliest."""
    logits = model(tokens.unsqueeze(0), use_cache=False).logits[0, :-1].float()
    nll = F.cross_entropy(logits, tokens[1:], reduction="none")
    if not bool(torch.isfinite(nll).all()):
        raise PrunelabError("the model's output holds NaN or infinite values; check its weights and how it was pruned")
    return nll, logits.argmax(-1) == tokens[1:]


def per_token(values: Sequence[Tensor]) -> dict[str, Any]:
    """Mean over the tokens of all sequences (a list of [T]), its standard error over sequences as that of a ratio of
    two sums, and the mean of each sequence."""
    n = len(values)
    totals, counts = torch.stack([v.sum() for v in values]), torch.tensor([float(len(v)) for v in values])
    centre = totals.sum() / counts.sum()
    spread = float((totals - centre * counts).std() / counts.mean()) / math.sqrt(n) if n > 1 else 0.0
    samples = [round(value, 4) for value in (totals / counts).tolist()]
    return {"value": round(float(centre), 6), "n": n, "stderr": round(spread, 6), "samples": samples}
