"""What token pruners of a deformable encoder share: the learned token scorer and the decoder's attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError


class TokenScorer(nn.Module):
    """Logits of tokens worth updating (Sparse DETR, section 3.3; Focus-DETR): half of the channels speak of the token
    itself, half of all tokens that are scored together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.rank = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, n]. The common half is the mean over all n tokens, padding included (as released)."""
        local, common = self.embed(x).chunk(2, -1)
        common = common.mean(1, keepdim=True).expand_as(local)
        return self.rank(torch.cat([local, common], -1)).squeeze(-1)


@contextmanager
def decoder_attention(model: nn.Module, queries: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the block, the list receives for every decoder layer that runs where its last `queries` queries sample the
    encoder's tokens, locations [B, Q, H, L, P, 2] as shares of each level, and with which weights [B, Q, H, L, P].
    Queries before those are denoising copies."""
    results: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        locations, weights = args[4], args[5]
        results.append((locations[:, -queries:].detach(), weights[:, -queries:].detach()))

    sampling = [m.get_submodule("encoder_attn.attn") for m in model.modules() if hasattr(m, "encoder_attn")]
    if not sampling:
        raise PrunelabError(f"{type(model).__name__} has no decoder with deformable attention to learn from")
    handles = [m.register_forward_pre_hook(hook) for m in sampling]
    try:
        yield results
    finally:
        for handle in handles:
            handle.remove()


def attention_map(locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """How much attention every token received, [B, N], of locations and weights as `decoder_attention` gives them.

    Each sample is shared among the four tokens around it. Tokens lie at whole numbers here, as in Sparse DETR's code,
    half a token off from where the attention itself samples.
    """
    levels = []
    for level, (height, width) in enumerate(shapes):
        x, y = (locations[:, :, :, level] * locations.new_tensor([width, height])).unbind(-1)  # [B, Q, H, P]
        received = locations.new_zeros(locations.shape[0], height * width)
        for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
            column, row = x.floor() + right, y.floor() + below
            share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * weights[:, :, :, level]
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row * width + column).long().masked_fill(~inside, 0)
            received.scatter_add_(1, index.flatten(1), share.masked_fill(~inside, 0.0).flatten(1))
        levels.append(received)
    return torch.cat(levels, 1)
