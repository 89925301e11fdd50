"""Metrics with their uncertainty. A metric in a record is {value, n, stderr[, samples]}. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def over_seeds(results: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The metrics of one run under several seeds as one: means of their values and, sample by sample, of what is behind
    them, so that they pair up with those of other runs. What is no number is the first's."""
    merged: dict[str, dict[str, Any]] = {}
    for name, first in results[0].items():
        values = [
            result[name]["value"] for result in results if isinstance(result.get(name, {}).get("value"), int | float)
        ]
        if len(values) < len(results):
            merged[name] = dict(first)
            continue
        protocol = "; ".join(part for part in (first.get("protocol", ""), f"mean over {len(results)} seeds") if part)
        merged[name] = {**first, "value": round(sum(values) / len(values), 9), "protocol": protocol}
        samples = [per_sample(result[name]) for result in results]
        if all(s is not None and len(s) == len(samples[0] or ()) for s in samples):
            merged[name].pop("bits", None)
            summary = mean([sum(column) / len(column) for column in zip(*(s or () for s in samples), strict=True)])
            merged[name] |= {key: summary[key] for key in ("n", "stderr", "samples")}
    return merged


def paired_difference(metric: dict[str, Any], baseline: dict[str, Any]) -> tuple[float, float] | None:
    """Mean difference to the baseline over the same samples and the half width of its 95 % confidence interval."""
    left, right = per_sample(metric), per_sample(baseline)
    if left is None or right is None or len(left) != len(right):
        return None
    summary = mean([a - b for a, b in zip(left, right, strict=True)])
    return summary["value"], 1.96 * summary["stderr"]
