"""PRIOR (Chen et al., 2025, arXiv 2505.08971): caption tokens that need the image count more in pre-training. A
reconstruction.

A language model that sees captions alone says how likely a token is without the image. The less likely, the larger the
token's weight in the next-token loss of the vision-language model; weights of a caption have the mean 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeFloat
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.role import DataPlan, DataSelector


def token_weights(probability: Tensor, captions: Tensor, alpha: float = 1.0) -> Tensor:
    """k w_i / sum of w_j over the caption [n, N], with w = (1 - P_r)^alpha of the reference's probability of every
    token [n, N], and k the caption's tokens; 0 outside of captions [n, N]."""
    weight = (1 - probability).clamp_min(0).pow(alpha) * captions
    # assumption: a caption that the reference knows by heart counts as in the plain loss.
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, captions.to(weight.dtype))
    total = weight.sum(1, keepdim=True)
    return weight * captions.sum(1, keepdim=True) / torch.where(total > 0, total, 1)


@dataclass(frozen=True)
class Prior(DataSelector):
    """PRIOR (arXiv 2505.08971): weighs the tokens of every caption, and drops none; its budget is 1.0. The service
    `reference` is the language model of captions; it is shown no image, and has the tokenizer of the model that is
    trained.

    Parameters
    ----------
    alpha
        Exponent of the weights.
    """

    alpha: NonNegativeFloat = 1.0

    name: ClassVar[str] = "prior_vlp"
    when: ClassVar[Literal["before", "each_batch"]] = "each_batch"
    chooses: ClassVar[tuple[Literal["samples", "tokens"], ...]] = ()
    services: ClassVar[tuple[str, ...]] = ("reference",)

    def requires(self) -> frozenset[str]:
        return frozenset({"reference_loss"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        self.budgets(budget)
        probability = (-examples.reference_loss.float()).exp()
        return DataPlan(weight=token_weights(probability, examples.counted, self.alpha))
