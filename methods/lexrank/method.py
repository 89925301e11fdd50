"""LexRank (Erkan & Radev, JAIR 22, 2004): sentences that many salient sentences resemble are salient.

Sentences are the nodes of a graph, their idf-modified cosine is the edge (section 3), and salience is centrality in
it: the degree (section 3.1), LexRank on the thresholded graph (section 3.2), or on the weighted one (section 3.3).
A summary takes the most central sentences, in the paper's experiments within the frame of MEAD (section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import FiniteFloat, PositiveFloat, Share
from prunelab.common.ranking.sentences import FeatureRanker, Passage
from prunelab.common.ranking.text import Array


class Graph(Protocol):
    """A symmetric matrix [n, n] that can be applied to a vector: dense, sparse, or never formed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __matmul__(self, v: Array, /) -> Array: ...


# -- scoring ---------------------------------------------------------------------------------------------------------


def degree_centrality(graph: Graph) -> Tensor:
    """Links [n] of each sentence, the one to itself included (section 3.1)."""
    return torch.from_numpy(np.asarray(graph @ np.ones(graph.shape[0])))


def lexrank(graph: Graph, jump: float = 0.15, epsilon: float = 1e-8, iterations: int = 1000) -> Tensor:
    """Stationary distribution [n] of a walk that follows an edge, or jumps anywhere with probability `jump`.

    p(u) = jump / n + (1 - jump) * sum over neighbours v of w(u, v) / degree(v) * p(v), where degree(v) is the sum of
    v's weights, its self link included; by the power method from the uniform distribution until the L2 change is
    at most `epsilon` (Algorithm 2). Without a jump (0) scores of a disconnected graph depend on the start.
    """
    sentences = graph.shape[0]
    degree = degree_centrality(graph).numpy()

    def step(p: Tensor) -> Tensor:
        return jump / sentences + (1 - jump) * torch.from_numpy(np.asarray(graph @ (p.numpy() / degree)))

    uniform = torch.full((sentences,), 1 / sentences, dtype=torch.float64)
    return selection.power_iteration(step, uniform, iterations, epsilon)


# -- the method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LexRank(FeatureRanker):
    """LexRank (JAIR 22, 2004, pages 457-479; arXiv 1109.2128) on the graph of cosines above 0.1, the setting that the
    paper recommends; others through the options.

    `LexRank.mead(weight)` adds Position, the length cut-off and the re-ranker of the paper's experiments.

    Parameters
    ----------
    centrality
        `lexrank` walks the graph of edges above `threshold`, `continuous` the complete graph weighted by cosine,
        `degree` counts the edges above `threshold`.
    threshold
        Cosine above which two sentences are linked.
    jump
        Probability of jumping to any sentence.
    epsilon
        L2 change at which the power method stops.
    weight, position, min_words, max_cosine, without_background
        The frame that the scores are used in, see `FeatureRanker`.
    """

    centrality: Literal["lexrank", "continuous", "degree"] = "lexrank"
    threshold: FiniteFloat = 0.1
    # assumption: Table 2 is headed by a damping factor of 0.85, which only fits as the share of followed edges.
    jump: Share = 0.15
    epsilon: PositiveFloat = 1e-8  # assumption: the paper leaves the tolerance open

    name: ClassVar[str] = "lexrank"

    def salience(self, passage: Passage) -> Tensor:
        if self.centrality not in ("lexrank", "continuous", "degree"):
            raise PrunelabError(f"lexrank has no centrality '{self.centrality}'; use lexrank, continuous or degree")
        if not (0 <= self.jump <= 1 and 0 <= self.threshold < 1 and self.epsilon > 0):
            raise PrunelabError(
                "lexrank needs a jump from 0 to 1, a threshold from 0 to below 1 and an epsilon above 0"
            )
        similarity = self.similarity(passage)
        if self.centrality == "continuous":
            return lexrank(similarity, self.jump, self.epsilon)
        graph = similarity.graph(self.threshold)
        if self.centrality == "degree":
            return degree_centrality(graph)
        return lexrank(graph, self.jump, self.epsilon)
