"""LexLIP (Luo et al., ICCV 2023, arXiv 2302.02908): lexicon-bottlenecked language-image pre-training.

Texts and images are encoded as sparse vectors over a vocabulary, so that an inverted index can search them. Sparsity
comes from a ReLU and a penalty on how long posting lists become; of each vector the heaviest terms go into the index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.ranking.role import Ranker
from prunelab.common.training.distillation import flops

PADDED = -1e6  # added to logits of padding
Array = np.ndarray[Any, np.dtype[Any]]


# -- encoding --------------------------------------------------------------------------------------------------------


def pooled(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, V] of the words, the maximum over positions [B, L, V]; mask [B, L] is 0 at padding."""
    return (logits if mask is None else logits + PADDED * (1 - mask.to(logits.dtype))[..., None]).amax(-2)


def lexicon(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Lexicon vectors [B, V]: log(1 + ReLU of the largest logit) (section 3.1)."""
    return pooled(logits, mask).relu().log1p()


def bottleneck(logits: Tensor, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a weak decoder reads instead of the input [B, D]: the softmax of the largest logits over word embeddings
    [V, D], which learn nothing from it."""
    return pooled(logits, mask).softmax(-1) @ embeddings.detach()


# -- pre-training ----------------------------------------------------------------------------------------------------


def in_batch_contrast(text: Tensor, image: Tensor, temperature: float = 0.05) -> Tensor:
    """Symmetric cross-entropy of the pairs of a batch, for unit vectors [B, V]."""
    logits, own = text @ image.T / temperature, torch.arange(len(text), device=text.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def phase_one(text: Tensor, image: Tensor, temperature: float = 0.05, weight: float = 0.002) -> Tensor:
    """The contrastive part of the first phase, for lexicon vectors [B, V]: pairs of the batch, and the FLOPS of the
    unit vectors, weighed. The masked language losses of encoder and decoders are added to it with weight 1."""
    text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    return in_batch_contrast(text, image, temperature) + weight * (flops(text) + flops(image))


def against_queue(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.05) -> Tensor:
    """Cross-entropy of the pair of each query [B, V] and key [B, V] against a queue [V, Q]; the batch itself has no
    negatives."""
    logits = torch.cat([(query * key).sum(-1, keepdim=True), query @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def phase_two(
    text: Tensor, image: Tensor, momentum_text: Tensor, momentum_image: Tensor, text_queue: Tensor, image_queue: Tensor,
    temperature: float = 0.05, weight: float = 0.002,
) -> Tensor:  # fmt: skip
    """Momentum contrast of lexicon vectors [B, V] with those of the momentum encoders, and the FLOPS."""
    text, image, other_text, other_image = (
        F.normalize(vectors, dim=-1) for vectors in (text, image, momentum_text, momentum_image)
    )
    to_image = against_queue(text, other_image.detach(), image_queue, temperature)
    to_text = against_queue(image, other_text.detach(), text_queue, temperature)
    return (to_image + to_text) / 2 + weight * (flops(text) + flops(image))


def enqueued(queue: Tensor, keys: Tensor, pointer: int) -> tuple[Tensor, int]:
    """The queue [V, Q] with unit keys [B, V] written from the pointer on, and the next pointer. At its end what does
    not fit is lost, and the pointer starts anew (released)."""
    size, queue = queue.shape[1], queue.clone()
    keys = F.normalize(keys, dim=-1)[: size - pointer]
    queue[:, pointer : pointer + len(keys)] = keys.T
    following = pointer + len(keys)
    return queue, 0 if following >= size else following


@torch.no_grad()
def follow(momentum: nn.Module, model: nn.Module, share: float = 0.99) -> None:
    """The momentum encoder keeps that share of itself and takes the rest from the model."""
    for slow, fast in zip(momentum.parameters(), model.parameters(), strict=True):
        slow.mul_(share).add_(fast, alpha=1 - share)


# -- retrieval -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LexLIP(Ranker[Tensor]):
    """LexLIP (arXiv 2302.02908): the words of a lexicon vector [V], or of logits [L, V], by their weight. A budget says
    how many terms of a document go into the index, such as `Budget(64, "count")`; words of weight 0 never do."""

    name: ClassVar[str] = "lexlip"
    exempt = {"budget": "a word of weight 0 is never kept, so that a vector of few words keeps fewer than its budget"}

    def rank(self, units: Tensor, services: Mapping[str, Any] | None = None) -> Tensor:
        return units if units.dim() == 1 else lexicon(units)

    def order(self, units: Tensor, scores: Tensor) -> list[int]:
        best = super().order(units, scores)
        return best[: int((scores > 0).sum())]


class InvertedIndex:
    """Postings of lexicon vectors: for each word the documents that hold it, with their weights.

    Parameters
    ----------
    vectors
        Lexicon vectors [n, V], not scaled.
    budget
        Terms that stay of each.
    """

    def __init__(self, vectors: Tensor, budget: Budget) -> None:
        kept = _sparse(vectors, budget)
        self.documents, self.words = kept.shape
        self.postings = sparse.csr_array(kept.T)  # [V, n]

    @property
    def nbytes(self) -> int:
        """Bytes of the postings."""
        return int(self.postings.data.nbytes + self.postings.indices.nbytes + self.postings.indptr.nbytes)

    def search(self, queries: Tensor, best: int, budget: Budget = Budget(1.0)) -> tuple[Array, Array]:  # noqa: B008
        """The best documents [Q, k] for queries [Q, V] and their cosines [Q, k], the earlier of equal ones first;
        budget: terms of a query that are looked up."""
        if queries.shape[-1] != self.words:
            raise PrunelabError(f"queries have {queries.shape[-1]} words, and the index {self.words}")
        scores = np.asarray((_sparse(queries, budget) @ self.postings).toarray())
        order = np.argsort(-scores, axis=1, kind="stable")[:, : min(best, self.documents)]
        return order, np.take_along_axis(scores, order, 1)


def _sparse(vectors: Tensor, budget: Budget) -> sparse.csr_array:
    """The heaviest terms of vectors [n, V] under the budget, scaled to unit length as whole vectors."""
    unit = F.normalize(vectors.float(), dim=-1)
    count = budget.count(unit.shape[1])
    weights, words = unit.topk(count, -1)
    rows = np.repeat(np.arange(len(unit)), count)
    result = sparse.csr_array((weights.flatten().numpy(), (rows, words.flatten().numpy())), tuple(unit.shape))
    result.eliminate_zeros()
    return result


def recall(order: Array, wanted: Sequence[int], at: int) -> float:
    """Share of the queries whose document is among the first `at` of their order [Q, k]."""
    return float(np.mean([target in row[:at] for row, target in zip(order, wanted, strict=True)]))
