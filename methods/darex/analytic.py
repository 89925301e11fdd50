"""DAREx's q from a bound on how far dropping deltas moves a layer's outputs, without validation data.

The bound holds with probability gamma; eta weighs its two terms. In half precision, as released, the residual flattens
early and the first tie of neighbouring grid points ends the search; in single precision it runs on to 0.998. The
rounding therefore decides q, and every step is kept as published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError

GRID, LAST = 0.001, 999  # q on the grid of thousandths, below 0.999


def phi(p: float) -> float:
    """(1 - 2p) / ln((1 - p) / p), the sub-Gaussian constant of a Bernoulli draw; 1/2 at its removable point."""
    return 0.5 if p == 0.5 else (1 - 2 * p) / math.log((1 - p) / p)


def analytic_q(influences: Tensor, p: float, eta: float, gamma: float = 0.95, stop: float = 0.8) -> Tensor:
    """q [out, 1] of every row of c_ij = delta_ij * mean input_j, [out, in] in float16 (a bias is one more input).

    Each row takes the last q of the grid whose residual is at most the least so far. A row is passed at the first
    residual that is not less than the least before it, and the grid ends when a share `stop` of the rows is.
    """
    if not 0 < p < 1 - GRID:
        raise PrunelabError(f"the analytic q needs a rate between 0 and {1 - GRID}, not {p:g}; keep more, or less")
    total, squares = influences.sum(1, keepdim=True), (influences**2).sum(1, keepdim=True)
    q = torch.full_like(total, 1 - p, dtype=torch.float32)
    least = torch.full_like(total, 10000)
    passed = torch.zeros_like(total, dtype=torch.bool)
    for step in range(int((1 - p) * 1000), LAST):
        value = step * GRID
        bias = (1 - (1 - p) / value) * total
        spread = eta**2 * phi(p) * squares / (4 * value**2) + math.log(2 / (1 - gamma))
        residual = (eta * bias + spread).abs()
        better, passed = residual <= least, passed | (residual >= least)
        least = torch.where(better, residual, least)
        q = torch.where(better, value, q)
        if float(passed.float().mean()) >= stop:
            break
    return q


def q_by_name(names: Sequence[str], layers: Mapping[str, float]) -> dict[str, float]:
    """The q of every tensor: a layer's own, a bias its layer's, all others the mean over layers."""
    mean = sum(layers.values()) / len(layers)
    return {name: layers.get(name, layers.get(name.removesuffix(".bias"), mean)) for name in names}
