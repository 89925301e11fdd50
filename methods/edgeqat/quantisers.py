"""EdgeQAT's activation quantisers, and the attention that they lie in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core import attention
from prunelab.common.core.attention_interface import Recorder
from prunelab.common.training.parametrizations import straight_through


class ActivationQuantised(nn.Module):
    """Activations rounded to `bits` bits at a learned step size and a learned zero point (LSQ+, arXiv 2004.09576).

    Both start from the first tensor that comes, which also decides for good whether codes are signed: whether it has a
    value below -1e-5. As released the zero point, which counts steps, starts from a tenth of a difference in the
    tensor's own unit.
    """

    signed: Tensor
    started: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.ones(1))
        self.zero = nn.Parameter(torch.zeros(1))
        self.register_buffer("signed", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("started", torch.zeros(1, dtype=torch.bool))

    def ends(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest code."""
        half, full = 2.0 ** (self.bits - 1), 2.0**self.bits
        signed = self.signed.to(self.step.dtype)
        return -half * signed, full - 1 - half * signed

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Let step size, zero point and sign follow from the first tensor."""
        fresh = ~self.started
        self.signed.copy_(torch.where(fresh, x.min() < -1e-5, self.signed))
        low, high = self.ends()
        step = 2 * x.abs().mean() / high.sqrt()
        self.step.copy_(torch.where(fresh, step, self.step))
        self.zero.copy_(torch.where(fresh, 0.9 * self.zero + 0.1 * (x.min() - step * low), self.zero))
        self.started.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        self.start(x.detach())
        low, high = self.ends()
        share = 1 / torch.sqrt(x.numel() * high)  # of the gradients
        step = straight_through(self.step, self.step * share)
        zero = straight_through(self.zero, self.zero * share)
        zero = straight_through(zero.round(), zero)
        scaled = x / step + zero
        codes = straight_through(scaled.round(), scaled).clamp(low, high)
        return (codes - zero) * step


@dataclass
class Tokens:
    """Which tokens of the pass at hand are of few bits: their places [K], of the last layer that has said; None before
    any has. The layers of one model share it."""

    low: Tensor | None = field(default=None)


def low_bit_tokens(first_column: Tensor, share: float) -> Tensor:
    """Places [int(share L)], by rising score, of the tokens that attend least to the first: the logits [B, H, L] of
    every token towards it, summed over heads and averaged over samples. One set serves the whole batch."""
    scores = first_column.mean(0).sum(0)
    return scores.topk(int(len(scores) * share), largest=False).indices


class TokenQuantised(nn.Module):
    """Activations at many bits, and at few those of the tokens that matter less. dim: that of the tokens. first: the
    first layer's, ahead of which no layer has said which tokens these are."""

    def __init__(self, tokens: Tokens, high: int, low: int, dim: int = 1, first: bool = False) -> None:
        super().__init__()
        self.tokens, self.dim, self.first = tokens, dim, first
        self.high, self.low = ActivationQuantised(high), ActivationQuantised(low)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.tokens.low = None
        out = self.high(x)
        if self.tokens.low is None or not len(self.tokens.low):
            return out
        return out.index_copy(self.dim, self.tokens.low, self.low(x.index_select(self.dim, self.tokens.low)))


class QuantisedAttention(nn.Module):
    """Attention on quantised queries, keys, values and maps; it says which tokens are of few bits from here on, and
    keeps what the losses read of its last pass while training."""

    def __init__(self, tokens: Tokens, high: int, low: int, share: float) -> None:
        super().__init__()
        self.tokens, self.share = tokens, share
        self.queries, self.keys, self.values = (TokenQuantised(tokens, high, low, 2) for _ in range(3))
        self.maps = ActivationQuantised(high)
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None  # queries, keys, logits
        self.teacher: Recorder | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """The heads' outputs [B, M, H, d], of queries [B, H, M, d] and keys and values [B, KV, N, d]."""
        query, key = self.queries(query), self.keys(key)
        recorder = Recorder(causal=True)
        recorder.see(query, key, mask, scale)
        logits = attention.logits(query, recorder.keys, scale)
        if self.share > 0:
            self.tokens.low = low_bit_tokens(logits[..., 0].detach(), self.share)
        value = self.values(value).repeat_interleave(query.shape[1] // key.shape[1], 1)
        if self.training:
            self.seen = (query, recorder.keys, logits)
        return (self.maps(recorder.weights()) @ value).transpose(1, 2).contiguous()

    def forget(self) -> None:
        """Let go of what the losses have read."""
        self.seen = None


# -- losses ----------------------------------------------------------------------------------------------------------


def entropy(queries: Tensor, keys: Tensor) -> Tensor:
    """Sum of ln(1 + variance over a head's channels) of queries and keys [B, H, L, d], a stand-in for the entropy of
    Gaussians (one layer's term)."""
    return torch.log1p(queries.var(-1)).sum() + torch.log1p(keys.var(-1)).sum()


def likeness(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over samples and heads of the cosine of two attention maps [B, H, L, L] (one layer's term)."""
    return torch.cosine_similarity(student.flatten(2), teacher.flatten(2), dim=-1).sum()


def entropy_loss(terms: Any, weight: float = 0.5) -> Tensor:
    """-`weight` ln of the layers' terms together."""
    return -weight * torch.log(torch.stack(list(terms)).sum())


def distribution_loss(terms: Any, weight: float = 1.0, sign: float = 1.0) -> Tensor:
    """ln of the layers' terms together. As released it is added, so that less of it is less alike; sign -1 turns that
    round."""
    return sign * weight * torch.log(torch.stack(list(terms)).sum())


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the divergence from the teacher's distribution, summed over tokens and averaged over samples."""
    own, other = student / temperature, teacher / temperature
    divergence = nn.functional.kl_div(own.log_softmax(-1), other.softmax(-1), reduction="batchmean")
    return math.pow(temperature, 2) * divergence
