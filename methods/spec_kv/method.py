"""SpecKV and SpecPC (Galim, Ewer et al., ICLR 2026): a small draft model tells what of a prompt matters.

What will be asked of a prompt's entries is decided by queries that do not exist yet. A draft can guess them: SpecKV
lets it write ahead, and scores the target's entries by the queries of what it wrote; SpecPC reads off its attention
which tokens of the prompt the target needs to see at all. SpecKV-PC does the one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.core.plan import Gather, Plan, Site
from prunelab.common.kv_cache.role import CacheSignals, ReadsAhead, ShortensPrompt

Reduction = Literal["max", "mean"]


# -- SpecKV ----------------------------------------------------------------------------------------------------------


def asked_for(rows: Tensor, kernel_size: int, reduction: Reduction = "max", pooling: Reduction = "max") -> Tensor:
    """Scores [B, KV, N - W] of the entries before the window, from the attention [B, KV, G, W, N] of its W queries:
    reduced over queries and a group's heads, then pooled over `kernel_size` neighbours."""
    before = rows[..., : -rows.shape[3]]
    scores = before.amax((2, 3)) if reduction == "max" else before.mean((2, 3))
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return pool(scores, kernel_size, 1, kernel_size // 2)


@dataclass(frozen=True)
class SpecKV(ReadsAhead):
    """Scores a prompt's entries by the queries of what a draft writes behind it, and of its end (arXiv 2506.08373).

    The paper's sparse attention while reading is left out: it saves time where attention is a kernel of one's own, and
    changes what is read.

    Parameters
    ----------
    ahead : int
        Tokens the draft writes; the paper lets it write as many as the answer may have.
    window_size : int
        Last tokens that ask too, and always stay.
    kernel_size : int
        Odd width of the pooling.
    reduction : {"max", "mean"}
        Over queries and the heads of a group.
    pooling : {"max", "mean"}
        Over neighbours.
    """

    ahead: NonNegativeInt = 32
    window_size: PositiveInt = 32
    kernel_size: PositiveInt = 7
    reduction: Reduction = "max"
    pooling: Reduction = "max"

    name: ClassVar[str] = "spec_kv"
    services = ("draft",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise PrunelabError(f"{self.name} needs an odd kernel_size, not {self.kernel_size}")

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys"})

    def protected(self, capacity: int) -> tuple[int, int]:
        return 0, self.window_size

    def lookahead(self, tokens: Tensor, valid: Tensor | None, budget: Budget, services: Mapping[str, Any]) -> Tensor:
        if self.ahead == 0 or (budget.unit == "count" and tokens.shape[1] <= min(budget.amounts)):
            return tokens[:, :0]
        return services["draft"].continues(tokens, valid, self.ahead)

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        window = self.window_size + signals.ahead
        if window >= signals.units:
            return torch.zeros_like(signals.prunable, dtype=torch.float32)
        return F.pad(asked_for(signals.rows(window), self.kernel_size, self.reduction, self.pooling), (0, window))


# -- SpecPC ----------------------------------------------------------------------------------------------------------


def attended(
    window: Sequence[Tensor], later: Sequence[Sequence[Tensor]], weighted: bool, reduction: Reduction
) -> Tensor:
    """Scores [B, N] of the prompt's tokens, from a draft's attention.

    window: for each layer the rows [B, H, W, N] of the prompt's last tokens; with `weighted` they count from 0 for the
    first to 1 for the last. later: the rows [B, H, 1, N + s] of written tokens, by step and layer. Reduced over heads,
    queries, layers and steps alike; as released, `mean` is the sum.
    """
    total, queries = window[0].shape[-1], window[0].shape[2]
    ramp = torch.linspace(0, 1, queries, device=window[0].device) if weighted else window[0].new_ones(queries)
    rows = [row * ramp[:, None] for row in window] + [row[..., :total] for step in later for row in step]
    reduced = torch.stack([row.amax((1, 2)) if reduction == "max" else row.sum((1, 2)) for row in rows])
    return reduced.amax(0) if reduction == "max" else reduced.sum(0)


def smooth(scores: Tensor, kernel_size: int, pooling: Literal["max", "avg", "none"]) -> Tensor:
    """Scores [B, N] pooled over `kernel_size` neighbours; outside the prompt they are zero."""
    if pooling == "none":
        return scores
    padded = F.pad(scores, ((kernel_size - 1) // 2, kernel_size - 1 - (kernel_size - 1) // 2)).unsqueeze(1)
    return (F.max_pool1d if pooling == "max" else F.avg_pool1d)(padded, kernel_size, 1).squeeze(1)


def first_of_each(index: Tensor) -> Tensor:
    """The distinct values of index [n], in the order of their first appearance."""
    values, inverse = index.unique(return_inverse=True)
    positions = torch.full((len(values),), len(index), device=index.device)
    first = positions.scatter_reduce(0, inverse, torch.arange(len(index), device=index.device), "amin")
    return index[first.sort().values]


def chosen(scores: Tensor, capacity: int, window: int, neighbours: int) -> Tensor:
    """Positions [K] of the prompt, ascending, that the target reads: at most `capacity` of the N with scores [N].

    The last `window` first of all, then the best-scored ones in turn, each with `neighbours` around it.
    """
    total = len(scores)
    positions = torch.arange(total, device=scores.device)
    best = scores.topk(capacity).indices if capacity < total else positions
    if neighbours > 1:
        low = -((neighbours - 1) // 2)
        around = torch.arange(low, low + neighbours, device=scores.device)
        around = around[around.abs().argsort(stable=True)]  # the nearest first
        best = (best.unsqueeze(1) + around).clamp(0, total - 1).flatten()
    return first_of_each(torch.cat([positions[-window:], best]))[:capacity].sort().values


@dataclass(frozen=True)
class SpecPC(ShortensPrompt):
    """Leaves tokens out of the prompt by a draft's attention; the target reads the others alone (arXiv 2506.08373).

    Parameters
    ----------
    window_size : int
        Last tokens of the prompt whose attention counts, and which always stay.
    kernel_size : int
        Width of the smoothing.
    pooling : {"max", "avg", "none"}
        Smoothing of the scores.
    neighbours : int
        Tokens that come along with each, itself among them.
    steps : int
        Tokens that the draft writes and whose attention counts too.
    first_layer : int
        First layer of the draft that counts, from 0; of a draft with fewer layers the last one.
    weighted : bool
        Whether the window's tokens count the more the later they are.
    reduction : {"max", "mean"}
        Over heads, queries, layers and steps.
    """

    window_size: PositiveInt = 64
    kernel_size: PositiveInt = 32
    pooling: Literal["max", "avg", "none"] = "max"
    neighbours: NonNegativeInt = 32
    steps: PositiveInt = 1
    first_layer: NonNegativeInt = 8
    weighted: bool = True
    reduction: Reduction = "max"

    name: ClassVar[str] = "spec_pc"
    services = ("draft",)

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def shorten(
        self, tokens: Tensor, valid: Tensor | None, budget: Budget, services: Mapping[str, Any]
    ) -> Tensor | None:
        draft = services["draft"]
        if len(budget.amounts) != 1:
            raise PrunelabError(f"{self.name} shortens the prompt once for all layers; give one amount")
        lengths = (torch.ones_like(tokens) if valid is None else valid).sum(1).tolist()
        capacities = [budget.count(length) for length in lengths]
        if capacities == lengths:
            return None
        layer = min(self.first_layer, draft.model.config.num_hidden_layers - 1)
        window, later = draft.looks(tokens, valid, min(self.window_size, tokens.shape[1]), self.steps, layer)
        scores = smooth(attended(window, later, self.weighted, self.reduction), self.kernel_size, self.pooling)
        total, outputs = tokens.shape[1], max(capacities)
        results = []
        for score, length, capacity in zip(scores, lengths, capacities):  # samples keep different numbers
            if capacity < 1:
                raise PrunelabError(f"{self.name} would leave nothing of the prompt; raise the budget")
            kept = (
                total
                - length
                + chosen(score[total - length :], capacity, min(self.window_size, capacity), self.neighbours)
            )
            results.append(torch.cat([torch.arange(outputs - len(kept), device=kept.device), kept]))  # padding in front
        return torch.stack(results)

    def plan(self, site: Site, signals: CacheSignals, budget: Budget) -> Plan:
        everything = torch.arange(signals.units, device=signals.prunable.device)
        return Plan(Gather(everything.expand(*signals.prunable.shape[:2], -1)))


@dataclass(frozen=True)
class SpecKVPC(ShortensPrompt, SpecKV):
    """SpecPC down to `prompt` tokens, then SpecKV down to the budget (arXiv 2506.08373).

    The draft writes ahead behind the shortened prompt; the paper uses again what it wrote behind the whole one.

    Parameters
    ----------
    prompt : int
        Tokens that SpecPC leaves.
    smoothing, neighbours, first_layer : int
        SpecPC's `kernel_size`, `neighbours` and `first_layer`; the others are SpecKV's.
    """

    prompt: NonNegativeInt = 2048
    smoothing: PositiveInt = 32
    neighbours: NonNegativeInt = 32
    first_layer: NonNegativeInt = 8

    name: ClassVar[str] = "spec_kv_pc"

    def shorten(
        self, tokens: Tensor, valid: Tensor | None, budget: Budget, services: Mapping[str, Any]
    ) -> Tensor | None:
        pc = SpecPC(
            kernel_size=self.smoothing, neighbours=self.neighbours, steps=self.ahead, first_layer=self.first_layer
        )
        return pc.shorten(tokens, valid, Budget(self.prompt, "count"), services)
