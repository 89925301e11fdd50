"""How faithful importances of context tokens are: what is left of a prediction when embeddings are masked by them.

Soft normalised sufficiency and comprehensiveness (Zhao and Aletras, ACL 2023) as ReAGent (arXiv 2402.00794) computes
them. Shape letters: B draws, T tokens, D width of the embeddings, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def distance(p: Tensor, q: Tensor) -> Tensor:
    """D(p, q) of distributions [..., V]: the squared differences of their roots, summed, over the root of 2. The
    Hellinger distance would have the root of the sum (released)."""
    return (p.sqrt() - q.sqrt()).square().sum(-1) / 2**0.5


@dataclass(frozen=True)
class Faithfulness:
    """sufficiency: of the context masked by its importance; bare: of one without any embedding. normalised_*: what is
    compared between methods."""

    sufficiency: Tensor
    bare: Tensor
    comprehensiveness: Tensor

    @property
    def normalised_sufficiency(self) -> Tensor:
        """Soft-NS, at least 0."""
        return (self.sufficiency - self.bare).clamp_min(0) / (1 - self.bare)

    @property
    def normalised_comprehensiveness(self) -> Tensor:
        """Soft-NC."""
        return self.comprehensiveness / (1 - self.bare)


def faithfulness(
    embeddings: Tensor,
    importance: Tensor,
    probabilities: Callable[[Tensor], Tensor],
    original: Tensor,
    draws: Tensor,
) -> Faithfulness:
    """The measures of one context, the mean over draws.

    embeddings [T, D] and their importance [T]; `probabilities` gives the next token's distributions [B, V] from
    embeddings [B, T, D], and `original` [V] is that of the whole context. draws [B, T, D] are uniform: a feature stays
    where its draw is below the importance of its token (below the rest of it, for comprehensiveness), unscaled.
    """
    keep = importance[:, None]
    masked = [embeddings * (draws < share) for share in (keep, 1 - keep)]
    result = probabilities(torch.cat([*masked, torch.zeros_like(embeddings)[None]]))
    apart = distance(result, original)
    kept, dropped = apart[: len(draws)].mean(), apart[len(draws) : -1].mean()
    return Faithfulness(1 - kept, 1 - apart[-1], dropped)
