"""VLA-Pruner (Liu et al., 2025): a policy's image tokens matter for reading the instruction or for writing the action.

Unit: an image token of the decoder's sequence. What the last control steps' actions looked at stands for what this
one's will; the best tokens of either kind are joined, and of these the most diverse stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site, take
from prunelab.common.core.selection import cosine_distance, descending, max_min_order
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

INPUTS = Reading("hidden", -1)  # the decoder's input embeddings


def text_relevance(rows: Tensor, first: int = 1, last: int = 1) -> Tensor:
    """Mean [B, N] over heads and rows of the attention [B, H, R, N] of the text behind the picture, without its `first`
    and `last` rows; samples with less text have rows of zeros in front."""
    rows = rows.mean(1)
    number = (rows.sum(-1) > 0).cumsum(1)  # of each row among those that count, from 1
    counts = (number > first) & (torch.arange(rows.shape[1], device=rows.device) < rows.shape[1] - last)
    return (rows * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True).clamp_min(1)


def temporal_guide(history: Tensor, gamma: float = 0.8, heaviest: str = "oldest", rounded: bool = True) -> Tensor:
    """What the coming action is expected to look at, [B, M], of the last steps' attention [w, B, M], oldest first.

    The paper sums gamma^i S_{t-i}, i = 1 .. w: the newest is heaviest. The released code gives weight 1 to the oldest.
    The guide is a share of its sum; `rounded` to bfloat16.
    """
    ages = range(len(history)) if heaviest == "oldest" else reversed(range(len(history)))
    weights = torch.tensor([gamma**i for i in ages], device=history.device)
    guide = (weights[:, None, None] * history).sum(0)
    guide = guide / guide.sum(-1, keepdim=True).clamp_min(torch.finfo(guide.dtype).tiny)
    return guide.bfloat16().float() if rounded else guide


def combined(current: Tensor, guide: Tensor, counts: Tensor) -> Tensor:
    """The union [B, M] of the best `counts` [B, 1] tokens by prefill relevance and as many by the guide, as a mask."""
    return (descending(current).argsort(-1) < counts) | (descending(guide).argsort(-1) < counts)


def filtered(union: Tensor, features: Tensor, counts: Tensor, most: int) -> Tensor:
    """`most` tokens [B, most] of the union [B, M], of which the first `counts` [B, 1] of each sample stay: as the
    greedy max-min rule on the cosine distance of features [B, M, D] picks them, in order where there are no more."""
    indices = (~union).int().argsort(dim=-1, stable=True)[:, : 2 * most]  # ascending: two sets have no more
    real = union.gather(1, indices)
    picks = max_min_order(cosine_distance(take(features, indices)), most, real)
    every = torch.arange(most, device=picks.device).expand_as(picks)
    return indices.gather(1, torch.where(real.sum(1, keepdim=True) <= counts, every, picks))


@dataclass(frozen=True)
class VLAPruner(TokenPruner):
    """VLA-Pruner (arXiv 2511.16449): keeps the image tokens that matter for the prompt or, as the last control steps
    say, for the action.

    The budget is what is left of a prompt's image tokens: 0.5, 0.25 or 0.125. A control step is one prompt and what is
    generated behind it. `handle.reset()` begins an episode.

    Parameters
    ----------
    layer : int
        K, from 0: tokens leave before this layer, by the attention of the one before it.
    action_layer : int
        The layer, from 0, whose rows of the action's tokens are remembered.
    window : int
        w, how many control steps are remembered; nothing is pruned before there are as many. 0: no action relevance,
        the best by prefill relevance stay.
    gamma : float
        Decay of the steps' weights.
    heaviest : {"oldest", "newest"}
        Which step has the largest weight: the oldest, as released, or the newest, as written.
    rounded : bool
        Whether the guide is rounded to bfloat16, as released.
    rows : {"all", "last", "text"}
        Whose attention is prefill relevance: every token's, the last one's as in FastV, or the text's behind the image.
    skip : tuple of int
        How many rows of the text do not count, first and last ones (`text`).
    positions : str
        The kept tokens keep their numbers, as released, or are numbered anew.
    """

    layer: PositiveInt = 3
    action_layer: NonNegativeInt = 15
    window: NonNegativeInt = 3
    gamma: PositiveFloat = 0.8
    heaviest: Literal["oldest", "newest"] = "oldest"
    rounded: bool = True
    rows: Literal["all", "last", "text"] = "all"
    skip: tuple[NonNegativeInt, NonNegativeInt] = (1, 1)
    positions: Positions = "original"

    name: ClassVar[str] = "vla_pruner"
    observes_prompt = True  # its last token writes the action's first
    exempt = {"budget": "nothing is pruned before as many control steps are remembered as the window has"}

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """Costs are those of the steps that were seen, the first of which are not pruned."""
        return self.window > 0

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(self.layer, "input")]

    @property
    def attention(self) -> Signal:
        """The signal that prefill relevance is made of."""
        text = Reading("attention", self.layer - 1, rows="text")
        return {"all": "received", "last": "last_row", "text": text}[self.rows]  # type: ignore[return-value]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({self.attention, INPUTS}) if self.window else frozenset({self.attention})

    def warm_up(self) -> int:
        return self.window

    def observes(self) -> frozenset[Reading]:
        return frozenset({Reading("last_row", self.action_layer)} if self.window else ())

    def observe(self, signals: TokenSignals) -> None:
        """Another token of the action: its attention to the image, mean over heads."""
        row, memory = signals.at(Reading("last_row", self.action_layer)).float().mean(1), signals.memory
        if row.shape != memory["prompt"]:
            raise PrunelabError(f"{self.name}: a control step out of order; finish one before the next prompt")
        memory["step"].append(row.gather(1, memory["visual"]) * memory["real"])

    def remembered(self, memory: dict[str, Any], signals: TokenSignals, visual: Tensor, real: Tensor) -> list[Tensor]:
        """The last steps' attention to the image tokens [B, M], oldest first, with the one that has just ended; a new
        one begins, for `visual` [B, M], of which some are not `real`."""
        history: list[Tensor] = memory.get("history", [])
        if memory.get("step"):
            history = [*history, torch.stack(memory["step"]).mean(0)][-self.window :]
        if history and history[-1].shape != visual.shape:
            was, now = (
                f"{batch} prompts of {tokens} image tokens" for batch, tokens in (history[-1].shape, real.shape)
            )
            raise PrunelabError(
                f"{self.name} remembers {was}, and now come {now}; call handle.reset() at every episode"
            )
        memory |= {"history": history, "step": [], "visual": visual, "real": real, "prompt": signals.prunable.shape}
        return history

    def relevance(self, signals: TokenSignals) -> Tensor:
        """Prefill relevance [B, N] of every token."""
        if self.rows == "text":
            return text_relevance(signals.at(self.attention).float(), *self.skip)  # type: ignore[arg-type]
        if self.rows == "last":
            return signals.last_row.float().mean(1)
        valid, total = signals.valid, signals.prunable.shape[1]
        return signals.received.float().mean(1) / (total if valid is None else valid.sum(1, keepdim=True))

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        current = self.relevance(signals)
        if not self.window:
            return Plan(signals.keep(budget, scores=current), positions=self.positions)
        visual = signals.candidates()
        real = signals.prunable.gather(1, visual)
        history = self.remembered(signals.memory, signals, visual, real)
        if len(history) < self.window:
            return Plan(signals.keep(Budget(1.0), scores=current), positions=self.positions)
        kept = [budget.count(n) for n in signals.available()]
        counts = torch.tensor(kept, device=visual.device).unsqueeze(1)
        guide = temporal_guide(torch.stack(history), self.gamma, self.heaviest, self.rounded)
        seen, guide = (scores.masked_fill(~real, float("-inf")) for scores in (current.gather(1, visual), guide))
        union = combined(seen, guide, counts) & real
        order = filtered(union, take(signals.at(INPUTS), visual), counts, max(kept))
        return Plan(signals.keep(kept, order=visual.gather(1, order)), positions=self.positions)
