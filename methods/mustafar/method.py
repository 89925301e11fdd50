"""Mustafar (Joo et al., NeurIPS 2025): unstructured sparsity inside the vectors of a key-value cache.

No token goes. Of every key and value vector before a window of the last tokens only the entries of largest magnitude
stay, and what is left is stored as bitmaps and numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, Share
from prunelab.common.core.plan import Site
from prunelab.common.kv_cache.role import CacheSignals, ThinsVectors


def largest(x: Tensor, sparsity: float, released: bool = True) -> Tensor:
    """Mask [..., d] of the entries of largest magnitude in each vector of x [..., d].

    What is at least as large as the k-th smallest stays, with k the share `sparsity` of d, rounded down, and at least
    1: as released, the k-th itself stays too, so that one less than k goes (d = 128 at 0.7 keeps 40, which is 31 %).
    """
    size = x.shape[-1]
    k = int(round(sparsity * size, 6)) + (0 if released else 1)
    if k > size:
        return torch.zeros_like(x, dtype=torch.bool)
    magnitude = x.abs()
    return magnitude >= magnitude.float().kthvalue(max(1, k), -1, keepdim=True).values


def per_token(x: Tensor, sparsity: float, released: bool = True) -> Tensor:
    """x [B, H, T, d] with the smallest entries of each token's vector at zero."""
    return x.masked_fill(~largest(x, sparsity, released), 0)


def per_channel(x: Tensor, sparsity: float, group: int, released: bool = True) -> Tensor:
    """x [B, H, T, d] with the smallest of each channel's entries at zero, among every `group` consecutive tokens; the
    tokens behind the last whole group stay."""
    whole = x.shape[2] // group * group
    tiles = x[:, :, :whole].unflatten(2, (-1, group)).transpose(-1, -2)  # [B, H, T / group, d, group]
    kept = largest(tiles, sparsity, released).transpose(-1, -2).flatten(2, 3)
    return torch.cat([x[:, :, :whole].masked_fill(~kept, 0), x[:, :, whole:]], 2)


def output_aware(x: Tensor, received: Tensor, sparsity: float, real: Tensor | None = None) -> Tensor:
    """Values x [B, H, T, d] with each channel's smallest entries at zero, by magnitude times the attention [B, H,
    T] that their token received: of T tokens, or of those that are `real` [B, H, T], T (1 - sparsity) stay, rounded
    down."""
    worth = x.float().abs() * received.float().unsqueeze(-1)
    real = torch.ones_like(received, dtype=torch.bool) if real is None else real
    worth = worth.masked_fill(~real.unsqueeze(-1), -1)
    stays = (real.sum(-1) * (1 - sparsity) + 1e-6).long()
    rank = worth.argsort(dim=2, descending=True, stable=True).argsort(2)
    return x.masked_fill(rank >= stays[..., None, None], 0)


@dataclass(frozen=True)
class Mustafar(ThinsVectors):
    """Magnitude pruning of keys and values, each token once, when it leaves the last ones (arXiv 2505.22913).

    The budget is the share of the entries of a vector that stays. A token is pruned behind the step in which it leaves
    the window: that step still sees it whole.

    Parameters
    ----------
    keys, values : float, optional
        The share that goes of the one or the other, in place of the budget.
    window_size : int
        Last tokens that stay as they are.
    value_groups : {"token", "channel"}
        Whether the entries of one vector are compared, or those of one channel over `window_size` tokens.
    value_scores : {"magnitude", "output"}
        With groups of channels, `output` weighs the prompt's values by the attention that its last `window_size` tokens
        pay them, and compares each channel over the whole prompt; values of later tokens stay.
        # assumption: the release scores these with sums that it forgets in every step, so that chance decides.
    released : bool
        Whether one entry less goes, as in the released code; see `largest`.
    resting : bool
        Whether what is pruned becomes bitmaps only when the cache rests: behind a prompt, at a report and at the end of
        the block. Single tokens are then written into dense vectors with zeros, as fast as without pruning; else each
        of them unpacks one layer after the other, and no two are dense at once.
    """

    keys: Share | None = None
    values: Share | None = None
    window_size: NonNegativeInt = 32
    value_groups: Literal["token", "channel"] = "token"
    value_scores: Literal["magnitude", "output"] = "magnitude"
    released: bool = True
    resting: bool = True

    name: ClassVar[str] = "mustafar"
    when = "both"
    exempt = {"budget": "every entry stays, with fewer numbers"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_groups == "channel" and self.window_size < 1:
            raise PrunelabError("mustafar: with groups of channels the window must be at least 1")
        if self.value_scores == "output" and self.value_groups != "channel":
            raise PrunelabError("mustafar: values are scored by the output in groups of channels; say value_groups")

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys"} if self.value_scores == "output" else ())

    def frozen(self, entries: int) -> int:
        done = max(entries - self.window_size, 0)
        by_token = self.value_groups == "token" or self.value_scores == "output"
        return done if by_token else done // self.window_size * self.window_size

    def thin(
        self, site: Site, keys: Tensor, values: Tensor, added: int, budget: Budget, signals: CacheSignals | None = None
    ) -> None:
        if budget.unit != "ratio":
            raise PrunelabError(f"mustafar keeps a share of every vector, not {budget}; give a ratio")
        dense = 1 - budget.amounts[0]
        sparse_keys, sparse_values = (dense if given is None else given for given in (self.keys, self.values))
        if self.value_scores == "output" and signals is not None and signals.prefill:
            values.copy_(output_aware(values, self.received(signals), sparse_values, signals.valid))
        end = max(keys.shape[2] - self.window_size, 0)
        start = max(end - added, 0)  # what is before it was pruned when it left the window
        if start == end:
            return
        left = keys[:, :, start:end]
        if self.value_groups == "token" and sparse_keys == sparse_values and keys.shape == values.shape:
            both = per_token(torch.stack([left, values[:, :, start:end]]), sparse_keys, self.released)
            left.copy_(both[0])
            values[:, :, start:end].copy_(both[1])
            return
        left.copy_(per_token(left, sparse_keys, self.released))
        if self.value_scores == "output":
            return
        if self.value_groups == "token":
            left = values[:, :, start:end]
            left.copy_(per_token(left, sparse_values, self.released))
        else:
            start = start // self.window_size * self.window_size  # the group that may now be whole
            left = values[:, :, start:end]
            left.copy_(per_channel(left, sparse_values, self.window_size, self.released))

    def received(self, signals: CacheSignals) -> Tensor:
        """Attention [B, KV, T] that the last tokens of the prompt pay, summed over them and the heads of a group."""
        last = min(self.window_size, signals.queries.shape[2])
        rows = signals.rows(last)
        if signals.asking is not None:
            rows = rows * signals.asking[:, None, None, -last:, None]
        return rows.sum((2, 3))
