"""Numbers that no run makes alone: the mean, difference, ratio or saving of what several runs make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunelab.common.experiments.run import Run

FINITE = "results that are finite, and to divide by one that is not zero"
Read = Callable[[Run, str], tuple[float, float | None]]  # a run's metric: its value and standard error


@dataclass(frozen=True)
class Derived:
    """What is made of several results, each a run with its metric, or derived itself.

    how: `mean`, or of two `difference` (the first less the second), `ratio` (the first by the second), `share` (that in
    percent) or `saving` (what the second lacks of the first, in percent)."""

    how: str
    of: tuple[Derived | tuple[Run, str], ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every run that it takes, each once."""
        found = [run for part in self.of for run in (part.runs if isinstance(part, Derived) else part[:1])]
        return tuple({run.address: run for run in found}.values())

    @property
    def needs(self) -> str:
        """What is not at hand here, in words, of all its runs."""
        return "; ".join(dict.fromkeys(run.needs for run in self.runs if run.needs))

    @property
    def stand_in(self) -> bool:
        """Whether a run of it reads a folder of the user's in the place of a repository."""
        return any(run.stand_in for run in self.runs)

    @property
    def words(self) -> str:
        """What it is, in words."""
        names = {"difference": "the difference", "ratio": "the ratio", "share": "the share in percent"}
        names |= {"saving": "the saving in percent"}
        return f"{names.get(self.how, 'the mean')} of {len(self.leaves())} results"

    def leaves(self) -> list[tuple[Run, str]]:
        """Runs with their metrics, one for each result."""
        return [leaf for part in self.of for leaf in (part.leaves() if isinstance(part, Derived) else [part])]

    def value(self, read: Read) -> tuple[float, float | None]:
        """The value, and its standard error where each result has one. Runs are taken to be independent, which makes
        the error of a difference over the same samples too large; metrics of one run as if they erred together."""
        leaves = {(run.address, metric): read(run, metric) for run, metric in self.leaves()}
        result, slopes = self._slopes({leaf: value for leaf, (value, _) in leaves.items()})
        by_run: dict[str, float] = {}
        for leaf, (_, error) in leaves.items():
            if error is None:
                return result, None
            by_run[leaf[0]] = by_run.get(leaf[0], 0.0) + abs(slopes[leaf]) * error
        return result, math.hypot(*by_run.values())

    def _slopes(self, values: Mapping[tuple[str, str], float]) -> tuple[float, dict[tuple[str, str], float]]:
        """The value, and how much it changes with each result, by address and metric."""
        made = []
        for part in self.of:
            leaf = ("", "") if isinstance(part, Derived) else (part[0].address, part[1])
            made.append(part._slopes(values) if isinstance(part, Derived) else (values[leaf], {leaf: 1.0}))
        value, outer = combined(self.how, [part for part, _ in made])
        slopes: dict[tuple[str, str], float] = {}
        for weight, (_, inner) in zip(outer, made, strict=True):
            for leaf, slope in inner.items():
                slopes[leaf] = slopes.get(leaf, 0.0) + weight * slope
        return value, slopes

    def stored(self, name: Callable[[Run], str]) -> dict[str, Any]:
        """In plain values, runs by what `name` calls them."""
        parts = [part.stored(name) if isinstance(part, Derived) else [name(part[0]), part[1]] for part in self.of]
        return {"how": self.how, "of": parts}

    @classmethod
    def read(cls, content: dict[str, Any], run: Callable[[str], Run]) -> Derived:
        """As `stored` wrote it."""
        return cls(
            content["how"],
            tuple(cls.read(p, run) if isinstance(p, dict) else (run(p[0]), p[1]) for p in content["of"]),
        )


def combined(how: str, values: Sequence[float]) -> tuple[float, list[float]]:
    """What values make, and how much it changes with each of them."""
    if how == "mean":
        return sum(values) / len(values), [1 / len(values)] * len(values)
    first, second = values
    if how == "difference":
        return first - second, [1.0, -1.0]
    above, by = (second, first) if how == "saving" else (first, second)
    if by == 0:
        return math.nan, [math.nan, math.nan]
    ratio, slopes = above / by, (1 / by, -above / by**2)
    if how == "saving":
        return 100 * (1 - ratio), [-100 * slopes[1], -100 * slopes[0]]
    scale = 100 if how == "share" else 1
    return scale * ratio, [scale * slope for slope in slopes]


def behind(entry: Run | Derived | str | None) -> Iterator[Run]:
    """The runs that make a number at a scale."""
    if isinstance(entry, Run):
        yield entry
    elif isinstance(entry, Derived):
        yield from entry.runs
