"""Attention signals from queries and keys, computed beside the model's own fused attention.

Each function does only the work its signal needs: one row costs N products, not N x N.
All take queries and keys [B, H, N, d] as attention uses them, `scale` included separately, and an optional
bias [B, N] over keys (-inf masks padding).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def logits(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Scaled attention logits [B, H, M, N] of M query rows; bias: [B, N] of keys, or of the whole."""
    heads = queries.shape[:2]
    out = ((queries * scale).flatten(0, 1) @ keys.flatten(0, 1).transpose(1, 2)).unflatten(0, heads)
    if bias is None:
        return out
    return out + (bias if bias.dim() == 4 else bias[:, None, None, :])


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


def neighbours(rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """Which units [..., N, N] lie in a square of `window` rows and columns around each, by their places [..., N]."""
    reach = (window - 1) // 2
    far = [(x.unsqueeze(-1) - x.unsqueeze(-2)).abs() for x in (rows, columns)]
    return (far[0] <= reach) & (far[1] <= reach)


BLOCK = 1 << 21  # attention weights held at once while rows are summed


def received(rows: Callable[[int, int], Tensor], shape: tuple[int, int, int], valid: Tensor | None = None) -> Tensor:
    """Attention [B, H, N] each token receives: the column sums over the valid rows, [B, N] bool.

    rows(start, stop) gives attention [B, H, stop - start, N] of some query rows, out of N for the shape (B, H, N). They
    are asked for a block at a time, so that a long sequence's never stand in memory together.
    """
    batch, heads, total = shape
    size = max(1, min(total, BLOCK // max(1, batch * heads * total)))
    out: Tensor | None = None
    for start in range(0, total, size):
        part = rows(start, min(start + size, total))
        if valid is not None:
            part = part * valid[:, None, start : start + size, None]
        summed = part.sum(-2)
        out = summed if out is None else out + summed
    assert out is not None
    return out


def grouped(heads: Tensor, key_heads: int) -> Tensor:
    """[B, H, ...] of query heads -> [B, KV, H / KV, ...]: each with the others that share its key-value head."""
    return heads.unflatten(1, (key_heads, heads.shape[1] // key_heads))


def causal_rows(
    queries: Tensor, keys: Tensor, scale: float, valid: Tensor | None = None, offset: int | None = None
) -> Tensor:
    """Causal attention [B, KV, G, M, N] in float32 of M query rows, whose heads share KV key-value heads.

    queries [B, H, M, d] stand at the key places `offset` to `offset + M - 1` (the last ones by default) of keys
    [B, KV, N, d]. valid [B, KV, N] bool marks the keys that count; every query sees itself, so that the rows of padding
    are finite too.
    """
    rows, total = queries.shape[2], keys.shape[2]
    offset = total - rows if offset is None else offset
    if rows == 1 and valid is None and offset + 1 == total:  # a decoding step: nothing to hide
        heads = (*keys.shape[:2], queries.shape[1] // keys.shape[1])
        scores = torch.bmm(queries.reshape(heads[0] * heads[1], heads[2], -1) * scale, keys.flatten(0, 1).mT).float()
        return torch.softmax(scores, -1, out=scores).view(*heads, 1, total)
    group = grouped(queries, keys.shape[1])  # [B, KV, G, M, d]
    scores = (group.flatten(2, 3) * scale) @ keys.transpose(2, 3)
    scores = scores.unflatten(2, group.shape[2:4]).float()
    if rows > 1 or offset + rows < total:
        scores[..., offset:] += torch.full((rows, total - offset), float("-inf"), device=keys.device).triu(1)
    if valid is not None:
        own = torch.arange(offset, offset + rows, device=keys.device).unsqueeze(1)
        own = own == torch.arange(total, device=keys.device)  # [M, N]
        scores = scores.masked_fill(~(valid[:, :, None, None] | own), float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def accumulated(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    asking: Tensor | None = None,
) -> Tensor:
    """Attention [B, KV, N] that each key receives: summed over the queries, causal, and over the heads of its group.

    queries [B, H, M, d] are the last M places of keys [B, KV, N, d]. weights [M] weigh the queries (queries of weight
    zero cost nothing), asking [B, M] bool leaves those of padding out, valid [B, KV, N] marks the keys that count.
    The rows are computed a block of queries at a time and never stand in memory together.
    """
    (batch, heads, rows, _), total = queries.shape, keys.shape[2]
    if rows == 1 and weights is None and asking is None:
        return causal_rows(queries, keys, scale, valid).squeeze(3).sum(2)
    out = torch.zeros(*keys.shape[:3], device=keys.device)
    share = torch.ones(rows, device=keys.device) if weights is None else weights.float()
    size = max(1, min(rows, BLOCK // max(1, batch * heads * total)))
    for start in range(0, rows, size):
        part = share[start : start + size]
        if size < rows and not bool(part.any()):  # blocks alone are worth a look
            continue
        offset = total - rows + start
        seen = offset + len(part)  # keys behind the block are invisible to it
        attention = causal_rows(
            queries[:, :, start : start + size], keys[:, :, :seen], scale, None if valid is None else valid[..., :seen]
        )
        row_weights = part if asking is None else part * asking[:, None, None, start : start + size]
        out[..., :seen] += (row_weights.expand(*attention.shape[:4]).unsqueeze(-2) @ attention).sum((2, 3))
    return out
