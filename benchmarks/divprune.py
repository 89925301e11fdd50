"""DivPrune's greedy picks with a running minimum, against the search among all pairs that the algorithm spells out.

`python -m benchmarks.divprune [--cases 576:56 2880:288 6272:627] [--width 4096] [--batch 1] [--rounds 5]
[--threads 1]`. A case is tokens:kept. Both take the same distances and must give the same picks; `end to end` adds the
distances, which are the same work for both. In every round each runs once, in turn; medians of the times and of the
ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prunelab.common.core.selection import cosine_distance, max_min_order


def straightforward(distance: Tensor, count: int) -> Tensor:
    """The same picks [count] for one image's distances [M, M], looking at all pairs of a token and a pick each time."""
    picks = [distance.topk(2, dim=0, largest=False).values[1].argmax()]
    while len(picks) < count:
        nearest = distance[torch.stack(picks)].min(0).values
        picks.append(nearest.argmax())
    return torch.stack(picks)


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds, and what was computed."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(tokens: int, kept: int, width: int, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of the distances and of both ways to pick, and the median ratios of a round: `picks`, given the
    distances, and `end_to_end`, with them."""
    x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(0))
    columns: dict[str, list[float]] = {n: [] for n in ("distances", "running", "plain", "picks", "end_to_end")}
    for _ in range(rounds):
        spent, distance = timed(lambda: cosine_distance(x))
        plain, wanted = timed(lambda d=distance: torch.stack([straightforward(image, kept) for image in d]))  # type: ignore[misc]
        running, result = timed(lambda d=distance: max_min_order(d, kept))  # type: ignore[misc]
        if not torch.equal(result, wanted):
            raise SystemExit("the two ways to pick differ")
        columns["distances"].append(spent)
        columns["running"].append(running)
        columns["plain"].append(plain)
        columns["picks"].append(plain / running)
        columns["end_to_end"].append((plain + spent) / (running + spent))
    return {name: statistics.median(values) for name, values in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["576:56", "2880:288", "6272:627"])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("tokens", "kept", "distances, ms", "running minimum, ms", "all pairs, ms", "ratio", "end to end")
    for case in options.cases:
        tokens, kept = map(int, case.split(":"))
        result = measure(tokens, kept, options.width, options.batch, options.rounds)
        times = [f"{1000 * result[name]:.1f}" for name in ("distances", "running", "plain")]
        table.add_row(str(tokens), str(kept), *times, f"{result['picks']:.1f}x", f"{result['end_to_end']:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
