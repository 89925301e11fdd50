"""Losses of tokens as metrics: means over the tokens of sequences, and perplexities of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


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
