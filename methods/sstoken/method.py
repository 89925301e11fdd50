"""ssToken (Qin et al., ICLR 2026, arXiv 2510.18250): self-modulated and semantic-aware token selection for fine-tuning.

A response token is worth training on when its loss fell since an earlier model (the history model: by default the one
before fine-tuning), and when it attends to the prompt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import AnyInt, NonNegativeFloat, NonNegativeInt, Share
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.role import DataPlan, DataSelector, best_tokens


def retrospective_excess_loss(history: Tensor, current: Tensor) -> Tensor:
    """REL [n, N]: loss of the history model minus that of the model that is trained. Beware: Rho-1's excess loss has
    the other sign."""
    return history - current


def scaled(values: Tensor, responses: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Values [n, N] brought to [0, 1] within each sample's response; all of them 0 where they are equal."""
    low = values.masked_fill(~responses, float("inf")).amin(1, keepdim=True)
    high = values.masked_fill(~responses, float("-inf")).amax(1, keepdim=True)
    return ((values - low) / (high - low + epsilon)).masked_fill(~responses, 0)


def combined(rel: Tensor, attention: Tensor, responses: Tensor, gamma: float = 0.5, epsilon: float = 1e-8) -> Tensor:
    """Scores [n, N]: gamma of the scaled REL and the rest of the attention paid to the prompt [n, N]."""
    return gamma * scaled(rel, responses, epsilon) + (1 - gamma) * attention


@dataclass(frozen=True)
class SsToken(DataSelector):
    """ssToken (arXiv 2510.18250). A budget is the share of each response that stays, rounded up: 0.6 in the paper, 0.8
    for its largest model.

    Parameters
    ----------
    gamma
        Weight of the loss beside the attention. At 0 no history model is read, at 1 no attention.
    layer
        Whose attention is read, counted from the end where negative.
    epsilon
        Added to the range by which REL is divided.
    """

    gamma: Share = 0.5
    layer: AnyInt = -1
    epsilon: NonNegativeFloat = 1e-8

    name: ClassVar[str] = "sstoken"
    when: ClassVar[Literal["before", "each_batch"]] = "each_batch"
    chooses: ClassVar[tuple[Literal["samples", "tokens"], ...]] = ("tokens",)
    services: ClassVar[tuple[str, ...]] = ("history",)

    @property
    def attention_layer(self) -> int:  # type: ignore[override]
        return self.layer

    def requires(self) -> frozenset[str]:
        losses = ("loss", "history_loss") if self.gamma > 0 else ()
        return frozenset((*losses, "prompt_attention") if self.gamma < 1 else losses)

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        nothing = torch.zeros(examples.counted.shape, device=examples.counted.device)
        rel = retrospective_excess_loss(examples.history_loss, examples.loss) if self.gamma > 0 else nothing
        attention = examples.prompt_attention if self.gamma < 1 else nothing
        scores = combined(rel, attention, examples.counted, self.gamma, self.epsilon)
        return DataPlan(tokens=best_tokens(scores, examples.counted, self.budgets(budget)[1], up=True))


def draw(responses: Tensor, budget: Budget, seed: int = 42) -> Tensor:
    """Mask [n, N] of response tokens drawn at random from all samples together; the share is rounded down. Python's own
    generator draws, as the authors' does."""
    indices = responses.flatten().nonzero().squeeze(1)
    chosen = random.Random(seed).sample(range(len(indices)), budget.count(len(indices)))
    mask = torch.zeros(responses.numel(), dtype=torch.bool, device=responses.device)
    mask[indices[torch.tensor(chosen, dtype=torch.long, device=indices.device)]] = True
    return mask.view_as(responses)


@dataclass(frozen=True)
class RandomTokens(DataSelector):
    """The random control of ssToken (arXiv 2510.18250): tokens drawn once, before the training.

    Parameters
    ----------
    seed
        Of the draw.
    """

    seed: NonNegativeInt = 42

    name: ClassVar[str] = "random_tokens"
    chooses: ClassVar[tuple[Literal["samples", "tokens"], ...]] = ("tokens",)

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        return DataPlan(tokens=draw(examples.counted, self.budgets(budget)[1], self.seed))
