"""Attention signals from queries and keys, computed beside the model's own fused attention.

Each function does only the work its signal needs: one row costs N products, not N x N.
All take queries and keys [B, H, N, d] as attention uses them, `scale` included separately, and an optional
bias [B, N] over keys (-inf masks padding).
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Scaled attention logits [B, H, M, N] of M query rows."""
    heads = queries.shape[:2]
    out = ((queries * scale).flatten(0, 1) @ keys.flatten(0, 1).transpose(1, 2)).unflatten(0, heads)
    return out if bias is None else out + bias[:, None, None, :]


def weights(
    queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None, scratch: Tensor | None = None
) -> Tensor:
    """Attention [B, H, M, N] of M query rows; the softmax overwrites the logits, which halves the memory traffic.

    scratch: a flat buffer of at least that many elements to work in. Fresh memory of this size costs the system more
    time to hand out than the products take; the result then lives until the buffer is used again.
    """
    if scratch is None or bias is not None:
        scores = logits(queries, keys, scale, bias)
    else:
        batch, heads, rows, _ = queries.shape
        scores = scratch[: batch * heads * rows * keys.shape[2]].view(batch * heads, rows, keys.shape[2])
        torch.bmm((queries * scale).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out=scores)
        scores = scores.unflatten(0, (batch, heads))
    return torch.softmax(scores, -1, out=scores)


def row(queries: Tensor, keys: Tensor, scale: float, index: int, bias: Tensor | None = None) -> Tensor:
    """Attention [B, H, N] of the one query at `index`."""
    return weights(queries[:, :, index, None], keys, scale, bias).squeeze(2)


def received(attention: Tensor, valid: Tensor | None = None) -> Tensor:
    """Attention [B, H, N] each token receives: the column sums of attention [B, H, N, N] over valid rows."""
    if valid is not None:
        attention = attention * valid[:, None, :, None]
    return attention.sum(-2)
