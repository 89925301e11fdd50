"""Attention signals from queries and keys, computed beside the model's own fused attention.

Each function does only the work its signal needs: one row costs N products, not N x N.
All take queries and keys [B, H, N, d] as attention uses them, `scale` included separately, and an optional
bias [B, N] over keys (-inf masks padding).
"""

from __future__ import annotations

from torch import Tensor


def logits(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Scaled attention logits [B, H, M, N] of M query rows."""
    out = (queries * scale) @ keys.transpose(-2, -1)
    return out if bias is None else out + bias[:, None, None, :]


def row(queries: Tensor, keys: Tensor, scale: float, index: int, bias: Tensor | None = None) -> Tensor:
    """Attention [B, H, N] of the one query at `index`."""
    return logits(queries[:, :, index, None], keys, scale, bias).softmax(-1).squeeze(2)


def received(attention: Tensor, valid: Tensor | None = None) -> Tensor:
    """Attention [B, H, N] each token receives: the column sums of attention [B, H, N, N] over valid rows."""
    if valid is not None:
        attention = attention * valid[:, None, :, None]
    return attention.sum(-2)
