"""Metrics with their uncertainty. A metric in a record is {value, n, stderr[, samples]}. Imports no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def share(correct: Tensor) -> dict[str, Any]:
    """Percent of True in a bool vector [n], its binomial standard error, and the vector itself as hex bits."""
    n = correct.numel()
    p = correct.float().mean().item()
    bits = "".join("1" if c else "0" for c in correct.tolist())
    return {
        "value": round(100 * p, 4),
        "n": n,
        "stderr": round(100 * math.sqrt(p * (1 - p) / n), 4),
        "bits": f"{int('1' + bits, 2):x}",
    }


def mean(values: list[float]) -> dict[str, Any]:
    """Mean of values with its standard error and the values."""
    n = len(values)
    centre = sum(values) / n
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0
    return {"value": round(centre, 4), "n": n, "stderr": round(spread, 4), "samples": [round(v, 4) for v in values]}


def per_sample(metric: dict[str, Any]) -> list[float] | None:
    """The per-sample values behind a metric, in percent, where the record has them."""
    if "bits" in metric:
        return [100.0 * (bit == "1") for bit in f"{int(metric['bits'], 16):b}"[1:]]
    return metric.get("samples")


def paired_difference(metric: dict[str, Any], baseline: dict[str, Any]) -> tuple[float, float] | None:
    """Mean difference to the baseline over the same samples and the half width of its 95 % confidence interval."""
    left, right = per_sample(metric), per_sample(baseline)
    if left is None or right is None or len(left) != len(right):
        return None
    summary = mean([a - b for a, b in zip(left, right, strict=True)])
    return summary["value"], 1.96 * summary["stderr"]
