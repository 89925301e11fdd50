"""The implementations of the selective scan, and how many times faster than the plain recurrence each one is.

`python -m benchmarks.selective_scan [--lengths 197 1024 4096 16384] [--channels 384] [--states 16] [--batch 1]
[--rounds 7] [--threads 1] [--backward]`. The defaults are a scan of Vim-T, with softplus, skip and gate. In every round
all implementations run once, in turn; medians of the times, and of the ratios within a round, so that a drifting clock
cancels. The kernel takes part where there is a GPU and mamba-ssm. `--backward` times the gradients of all inputs too,
e.g. of a small model in training: `--batch 64 --channels 64 --states 8 --lengths 100 200 --backward`.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prunelab.common.backbones.scan import selective_scan


def inputs(batch: int, channels: int, states: int, length: int, device: str) -> dict[str, Tensor]:
    """A scan as Mamba initialises it: A = -1, ..., -N, step widths around 0.01."""
    activations, weights = (batch, channels, length), (batch, states, length)
    drawn = {name: torch.randn(activations, device=device) for name in ("u", "delta", "z")}
    drawn |= {name: torch.randn(weights, device=device) for name in ("B", "C")}
    rates = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    ones = torch.ones(channels, device=device)
    return drawn | {"A": rates, "D": ones, "delta_bias": -4.6 * ones}


def timed(arguments: dict[str, Tensor], implementation: str, backward: bool) -> float:
    """Seconds of one scan, and of its gradients."""
    cuda = arguments["u"].is_cuda
    leaves = {name: value.requires_grad_(backward) for name, value in arguments.items()}
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    y = selective_scan(**leaves, softplus=True, implementation=implementation)
    if backward:
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[197, 1024, 4096, 16384])
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backward", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ["reference", "chunked"]
    if device == "cuda" and importlib.util.find_spec("mamba_ssm"):
        names.append("kernel")

    table = Table(
        "length",
        "implementation",
        "ms",
        "times faster",
        title=f"{'forward and backward' if options.backward else 'forward'}, batch {options.batch}, "
        f"{options.channels} channels, {options.states} states, {device}, {options.threads} threads, "
        f"medians of {options.rounds} rounds",
    )
    for length in options.lengths:
        arguments = inputs(options.batch, options.channels, options.states, length, device)
        rounds = [{name: timed(arguments, name, options.backward) for name in names} for _ in range(options.rounds + 1)]
        for name in names:
            milliseconds = statistics.median(r[name] for r in rounds[1:]) * 1e3  # the first round warms up
            ratio = statistics.median(r["reference"] / r[name] for r in rounds[1:])
            table.add_row(str(length), name, f"{milliseconds:.2f}", f"{ratio:.1f}", end_section=name == names[-1])
    Console().print(table)


if __name__ == "__main__":
    main()
