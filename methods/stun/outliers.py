"""Stage two of STUN: Wanda's score under OWL's allocation (Yin et al., ICML 2024), by which blocks whose weights have
many outliers keep more of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.statistics import InputNorm, TokenCount
from prunelab.common.weights.targets import Probe, Target, WeightSignals


def importance(weight: Tensor, norms: Tensor) -> Tensor:
    """Wanda's |W_ij| * ||X_j||_2; norms [in] are squared."""
    return weight.abs().float() * norms.sqrt()


def outlier_share(scores: Sequence[Tensor], times: float) -> float:
    """Share of a block's weights whose score exceeds so many times the block's mean (OWL's layerwise outlier share)."""
    weights = sum(score.numel() for score in scores)
    limit = times * sum(float(score.sum(dtype=torch.float64)) for score in scores) / weights
    return sum(int((score > limit).sum()) for score in scores) / weights


def block_ratios(shares: Tensor, sizes: Tensor, keep: float, spread: float) -> Tensor:
    """Share of weights every block keeps [L]: more where outliers are, over a range of 2 * spread, `keep` on average.

    Blocks count by their sizes [L], where the release counts all alike, so that the total is met also after stage one.
    # assumption: the range narrows where a block would keep all its weights or less than half of `keep`; the release
    # prunes 1 % in the first case and everything in the second.
    """
    lift = shares.double() - shares.min()
    lift = 2 * spread * lift / lift.max().clamp_min(torch.finfo(lift.dtype).tiny)
    lift = lift - (lift * sizes).sum() / sizes.sum()
    room = torch.stack([(1 - keep) / lift.max(), keep / 2 / -lift.min()])  # infinite or NaN where nothing is lifted
    return keep + room.nan_to_num(1.0).clamp(max=1).min() * lift


def owl_budgets(linears: Sequence[tuple[Target, WeightSignals]], keep: float, spread: float) -> dict[str, Budget]:
    """The budget of every linear from the outlier share its block was precomputed to have."""
    blocks = [list(group) for _, group in groupby(linears, key=lambda pair: pair[0].block)]
    shares = torch.stack([group[0][1]["outliers"].cpu() for group in blocks])
    sizes = torch.tensor([sum(target.units for target, _ in group) for group in blocks])
    ratios = block_ratios(shares, sizes, keep, spread).tolist()
    return {t.name: Budget(round(ratio, 12)) for group, ratio in zip(blocks, ratios, strict=True) for t, _ in group}


def outlier_shares(probe: Probe, linears: Sequence[Target], times: float) -> dict[str, dict[str, Tensor]]:
    """By linear the outlier share of its block, from the dense model's stream."""
    norms = probe.statistics({"linear": {"norm": InputNorm, "tokens": TokenCount}})
    results: dict[str, dict[str, Tensor]] = {}
    for _, block in groupby(linears, key=lambda target: target.block):
        targets = list(block)
        # Of an expert that no token reached nothing is known, outliers neither.
        seen = [t for t in targets if int(norms[t.name]["tokens"]) > 0]
        scores = [importance(probe.weights(t)["weight"], norms[t.name]["norm"]) for t in seen]
        share = torch.tensor(outlier_share(scores, times))
        results |= {target.name: {"outliers": share} for target in targets}
    return results


def one_ratio(budget: Budget, name: str) -> float:
    """The single ratio that is to stay."""
    if budget.unit != "ratio" or len(budget.amounts) != 1:
        raise PrunelabError(f"{name} spreads one ratio over the model, not {budget}; write it as 0.6")
    return budget.amounts[0]
