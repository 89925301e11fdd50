"""Token Transforming (Zeng et al., 2025), a reconstruction: token reduction as a many-to-many matrix, Y = W X.

The paper's abstract fixes the form: M < N tokens Y come out of N tokens X through one matrix. Pruning is the case of
one-hot rows, merging that of rows with disjoint support; here every token may contribute to every output. How W is
built could not be read and no code was released, so everything below the form is marked `assumption:`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeInt, PositiveFloat
from prunelab.common.core.plan import Mix, ModelInfo, Plan, Site, take
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Softmax = Literal["tokens", "anchors"]


# -- the matrix ------------------------------------------------------------------------------------------------------


def cosine(anchors: Tensor, tokens: Tensor) -> Tensor:
    """Cosine similarity [B, K, N] of features [B, K, D] and [B, N, D], in float32."""
    return normalize(anchors.float(), dim=-1) @ normalize(tokens.float(), dim=-1).transpose(1, 2)


def transforming_matrix(
    similarity: Tensor, temperature: float, softmax: Softmax = "tokens", sizes: Tensor | None = None
) -> Tensor:
    """The row-stochastic matrix W [B, K, N] of similarity [B, K, N], -inf where a token and an anchor may not meet.

    `tokens`: every anchor shares its attention among the tokens; it turns into pruning as the temperature goes to 0.
    `anchors`: every token shares itself among the anchors, then rows are scaled to sum to 1; it turns into merging with
    the nearest anchor. Both turn into plain averaging as the temperature goes to infinity. A token counts as often as
    sizes [B, N] says. Rows and columns that may meet nothing are NaN.
    """
    logits = torch.where(similarity.isneginf(), similarity, similarity / temperature)
    shares = logits.softmax(-1 if softmax == "tokens" else 1)
    if softmax == "anchors":
        shares = shares.masked_fill(similarity.isneginf(), 0)
    shares = shares if sizes is None else shares * sizes.unsqueeze(1)
    return shares / shares.sum(-1, keepdim=True)


def mass(matrix: Tensor, sizes: Tensor) -> Tensor:
    """Sizes [B, K] of the outputs: each token's size [B, N] is shared among the outputs in proportion to its column of
    W [B, K, N]. Nothing is lost or counted twice; a token that no output uses is gone."""
    shares = matrix / matrix.sum(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return (shares @ sizes.unsqueeze(-1)).squeeze(-1)


def expand(reduced: Tensor, matrix: Tensor, inverse: Literal["transpose", "pseudo-inverse"] = "transpose") -> Tensor:
    """Outputs [B, K, D] back on N places [B, N, D], for heads that need every place.

    `transpose` gives each place the mean of the outputs its token went into, by its column of W [B, K, N], and zero
    where it went into none; `pseudo-inverse` gives the smallest tokens that W maps to the outputs.
    """
    # assumption: the dense-prediction form of the paper could not be read; these are the two natural readings
    if inverse == "pseudo-inverse":
        return (torch.linalg.pinv(matrix) @ reduced.float()).to(reduced.dtype)
    columns = matrix / matrix.sum(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return (columns.transpose(1, 2) @ reduced.float()).to(reduced.dtype)


# -- the method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenTransforming(TokenPruner):
    """A reconstruction of Token Transforming (arXiv 2506.05709): the most informative tokens are anchors, and every
    output is an average of all patches around its anchor. Class and register tokens go on unchanged.

    Parameters
    ----------
    layers : tuple of int
        0-based blocks with a transform behind them.
    temperature, softmax : float, {"tokens", "anchors"}
        See `transforming_matrix`.
    informative : {"class_attention", "received_attention"}
        Anchors are the patches that the class token attends to most, or, for models without one, those that receive
        most attention.
    feature : {"keys", "hidden"}
        What is compared by cosine.
    proportional : bool
        Outputs stand for as many tokens as their `mass`, weigh that much in later transforms, and attract attention in
        proportion (log size on the logits, as in ToMe).
    """

    layers: tuple[NonNegativeInt, ...] = (
        2,
        5,
        8,
    )  # assumption: those of the methods it is compared with
    temperature: PositiveFloat = 0.02  # assumption: see the README for what it changes
    softmax: Softmax = "anchors"  # assumption: both readings fit the abstract; this one loses no token
    informative: Literal["class_attention", "received_attention"] = "class_attention"  # assumption
    feature: Literal["keys", "hidden"] = "keys"  # assumption
    proportional: bool = False  # assumption

    name: ClassVar[str] = "token_transforming"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "block_output") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"cls_row" if self.informative == "class_attention" else "received", self.feature})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        """How informative a token is [B, N]: attention from the class token or from all tokens, mean over heads."""
        attention = signals.cls_row if self.informative == "class_attention" else signals.received
        return attention.float().mean(1)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        """Anchors, the matrix around them, and what its outputs weigh."""
        anchors = signals.keep(budget, scores=self.score(site, signals))
        prunable, features = signals.prunable, self.features(signals)
        ones = torch.ones_like(prunable, dtype=torch.float32)
        sizes = signals.state.get("mass", ones) if self.proportional else None  # [B, N]

        moving = take(prunable, anchors.index)  # [B, K]: rows of patches, not of tokens that stay as they are
        moving = moving if anchors.valid is None else moving & anchors.valid
        # Where all patches of a sample stay there is nothing to transform.
        moving = moving & (moving.sum(1) < prunable.sum(1)).unsqueeze(1)
        meet = moving.unsqueeze(2) & prunable.unsqueeze(1)  # [B, K, N]
        similarity = cosine(take(features, anchors.index), features).masked_fill(~meet, float("-inf"))
        matrix = transforming_matrix(similarity, self.temperature, self.softmax, sizes)
        matrix = torch.where(moving.unsqueeze(2), matrix, anchors.matrix(prunable.shape[1]))

        mix = replace(Mix.from_matrix(matrix), valid=anchors.valid)
        if sizes is None:
            return Plan(mix)
        signals.state["mass"] = mass(matrix, sizes)
        return Plan(mix, key_bias=signals.state["mass"].clamp_min(torch.finfo(torch.float32).tiny).log())

    def features(self, signals: TokenSignals) -> Tensor:
        """Features [B, N, D] that are compared; the keys of all heads side by side."""
        return signals.hidden if self.feature == "hidden" else signals.keys.transpose(1, 2).flatten(2)
