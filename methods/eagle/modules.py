"""The learned part of EAGLE: a decoder layer that goes on from the target's own features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = tuple[Tensor, Tensor]  # keys and values [H, n, d]


def inner_width(width: int) -> int:
    """Llama's: two thirds of four times the width, up to the next 256."""
    return -(-(8 * width // 3) // 256) * 256


def rotated(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions [M] on x [H, M, d], halves against halves; of an odd d the last channel stays."""
    half = x.shape[-1] // 2
    angle = positions.unsqueeze(-1) * base ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Attention(nn.Module):
    """Causal attention with rotary positions, over what a cache holds and what is read now."""

    def __init__(self, width: int, heads: int, base: float) -> None:
        super().__init__()
        self.heads, self.base = heads, base
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        def split(name: str) -> Tensor:
            return self.get_submodule(name)(x).unflatten(-1, (self.heads, -1)).transpose(0, 1)

        query, keys = (rotated(split(name), positions, self.base) for name in ("q_proj", "k_proj"))
        values = split("v_proj")
        if cache is not None:
            keys, values = torch.cat([cache[0], keys], 1), torch.cat([cache[1], values], 1)
        out = F.scaled_dot_product_attention(query, keys, values, seen)
        return self.get_submodule("o_proj")(out.transpose(0, 1).flatten(1)), (keys, values)


class GatedMLP(nn.Module):
    """Llama's: SiLU of one projection times another."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer of Llama without the norm before its attention (released)."""

    def __init__(self, width: int, heads: int, inner: int, base: float, eps: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, base)
        self.mlp = GatedMLP(width, inner)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        update, cache = self.self_attn(x, positions, seen, cache)
        x = x + update
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class DraftHead(nn.Module):
    """Predicts the target's next feature from a feature and the token that came behind it. Names are those of the
    published checkpoints; the embedding is a copy of the target's."""

    def __init__(self, width: int, vocabulary: int, heads: int, inner: int, base: float, eps: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width, heads, inner, base, eps)])
        self.fc = nn.Linear(2 * width, width)

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        positions: Tensor,
        seen: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Cache]:
        """Features [M, D] behind the tokens [M] that follow the features [M, D], and the cache with these M entries.

        seen: [M, n + M] bool of the entries each may attend to, without it those up to its own.
        """
        if seen is None:
            held = 0 if cache is None else cache[0].shape[1]
            seen = torch.ones(len(tokens), held + len(tokens), dtype=torch.bool, device=tokens.device).tril(held)
        x = self.fc(torch.cat([self.embed_tokens(tokens).to(features.dtype), features], -1))
        for layer in self.layers:
            x, cache = layer(x, positions, seen, cache)
        assert cache is not None
        return x, cache


def loss(predicted: Tensor, features: Tensor, output: nn.Module, weight: float = 0.1) -> Tensor:
    """Of features [M, D] predicted for the target's [M, D]: smooth L1, and `weight` times the cross-entropy of the
    words that both make through the target's output layer (EAGLE, section 3.2)."""
    words = F.cross_entropy(output(predicted), output(features).softmax(-1))
    return F.smooth_l1_loss(predicted, features) + weight * words
