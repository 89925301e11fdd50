"""Focus-DETR's learned parts: the foreground scorer with top-down modulation, and the dual attention of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab.common.core.errors import PrunelabError
from prunelab.common.tokens.detr import TokenScorer


class DualAttention(nn.Module):
    """Ordinary self-attention among the object tokens of a layer, before its deformable attention (section 3.3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens and positions [B, k, D] -> [B, k, D]. Nothing is masked, also not the tokens of padding."""
        placed = tokens + positions
        return self.norm(tokens + self.attention(placed, placed, tokens, need_weights=False)[0])


@dataclass(frozen=True)
class Scored:
    """Foreground logits [B, N] of one forward pass, with their gradients, and the shapes (h, w) of its levels."""

    logits: Tensor
    shapes: tuple[tuple[int, int], ...]


class FocusParts(nn.Module):
    """Scorer, modulation factors `alpha` [levels - 1] (the first belongs to the second-coarsest level), and one dual
    attention a layer. While training, `scored` holds what `foreground_loss` needs of the last forward pass."""

    def __init__(self, width: int, heads: int, layers: int, levels: int) -> None:
        super().__init__()
        self.scorer = TokenScorer(width)
        self.alpha = nn.Parameter(torch.empty(levels - 1).uniform_(-0.3, 0.3))
        self.dual = nn.ModuleList(DualAttention(width, heads) for _ in range(layers))
        self.scored: Scored | None = None
        for value in self.parameters():
            if value.dim() > 1:
                nn.init.xavier_uniform_(value)

    def forward(self, memory: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Foreground logits [B, N] of memory [B, N, D], whose levels are flattened finest first.

        Equation 4: the score of a level, enlarged, modulates the features of the next finer one before those are
        scored in turn.
        """
        if len(shapes) != len(self.alpha) + 1:
            raise PrunelabError(f"focus_detr: parts made for {len(self.alpha) + 1} levels met {len(shapes)}")
        levels = list(memory.split([height * width for height, width in shapes], 1))
        scores = [self.scorer(levels[-1])]
        for i, alpha in enumerate(self.alpha):
            coarse, fine = shapes[-1 - i], shapes[-2 - i]
            above = functional.interpolate(scores[0].view(-1, 1, *coarse), fine, mode="bilinear", align_corners=True)
            level = levels[-2 - i]
            scores.insert(0, self.scorer(level + level * above.flatten(1).unsqueeze(-1) * alpha))
        logits = torch.cat(scores, 1)
        self.scored = Scored(logits, tuple(shapes)) if self.training else None
        return logits
