"""The survey's contrast settings: pairs of choices that it compares with all else equal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contrast:
    """Two ways to do one thing. version: of the preprint that first compares them. named: whether its abstract names
    them; the others are as the literature has them, since the body was not readable here."""

    name: str
    first: str
    second: str
    version: int = 1
    named: bool = False


CONTRASTS = (
    Contrast("granularity", "unstructured", "structured", named=True),
    Contrast("schedule", "one-shot", "iterative", named=True),
    Contrast("data", "data-free", "data-driven", named=True),
    Contrast("weights", "initialised", "pre-trained", named=True),
    Contrast("retraining", "from scratch", "fine-tuned"),
    Contrast("task", "original", "transfer"),
    Contrast("decision", "static", "dynamic"),
    Contrast("allocation", "layer-wise", "global", version=2),
)


def contrasts() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}: how many pairs each version compares."""
    return {
        f"abstract/v{version}/contrast settings": {"value": float(sum(c.version <= version for c in CONTRASTS))}
        for version in (1, 2)
    }
