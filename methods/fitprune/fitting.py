"""How a recipe is fitted: the largest alpha, found by bisection, by which the FLOPs of a few samples reach a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.costs.formulas import LLAVA_7B, Decoder
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.fitprune.method import contributions, deletable, text_behind

Sums = Mapping[int, tuple[Tensor, Tensor]]  # self- and cross-attention that a layer's image tokens receive, by layer


@dataclass(frozen=True)
class Fitting(TokenPruner):
    """Deletes in every layer what alpha lets go, and leaves in the handle's memory the sums of attention (`sums`) and
    how many were deleted (`deleted`), both by layer. What the last layer deletes nobody sees.

    Parameters
    ----------
    alpha : float
        The share of the unpruned model's attention that a layer may lose.
    sums : mapping
        That attention, from a run without.
    """

    alpha: float = 0.0
    sums: Sums = field(default_factory=dict, compare=False)

    name: ClassVar[str] = "fitprune while it is fitted"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "input") for layer in range(1, info.depth)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"attention"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        layer, image = site.layer - 1, signals.prunable
        own, cross = contributions(signals.attention, image, text_behind(image))
        result = signals.memory.setdefault("sums", {})
        result[layer] = tuple((received * image).sum(1) for received in (own, cross))
        gone = deletable(own, cross, image, self.alpha, self.sums[layer]) if self.sums else torch.zeros_like(image)
        signals.memory.setdefault("deleted", {})[layer] = int(gone[0].sum())
        return Plan(signals.keep(mask=~gone))


@dataclass(frozen=True)
class Trial:
    """One alpha: whether the budget was reached, and the recipe that it gives."""

    alpha: float
    reached: bool
    recipe: tuple[int, ...]


def tried(deleted: Tensor, alpha: float, saved: float, tokens: int, decoder: Decoder) -> Trial:
    """The recipe that is the mean, rounded down, of what samples delete [n, layers] under an alpha, up to the layer
    before which the FLOPs so far, with all that is left going on as it is, come down to 1 - saved of the whole."""
    d, m, layers = decoder.width, decoder.inner, deleted.shape[1]
    zero = torch.zeros(len(deleted), 1, dtype=torch.long)
    left = (tokens - torch.cat([zero, deleted.cumsum(1)], 1)).double()  # [n, layers + 1] before each layer, and behind
    attend, rest = 3 * left * d**2 + 2 * left**2 * d, left * d**2 + 3 * left * d * m
    whole = float((attend + rest)[0, 0]) * layers
    used = torch.cat([zero.double(), (attend[:, :-1] + rest[:, 1:]).cumsum(1)[:, :-1]], 1)  # before each layer
    ahead = torch.arange(layers - 1, -1, -1)
    cost = used + (attend + rest)[:, :-1] * (1 + ahead)
    enough = (cost.mean(0) <= whole * (1 - saved)).tolist()
    stop = enough.index(True) if True in enough else layers
    recipe = [int(total) // len(deleted) if layer < stop else 0 for layer, total in enumerate(deleted.sum(0))]
    return Trial(alpha, True in enough, tuple(recipe))


def search(
    deleted: Callable[[float], Tensor], saved: float, tokens: int, decoder: Decoder = LLAVA_7B, within: float = 0.01
) -> list[Trial]:
    """Bisection on alpha until its interval is no wider than `within`; the last trial's recipe is the authors' result,
    whether or not it reaches the budget. deleted: what samples delete [n, layers] under an alpha."""
    low, high, results = 0.0, 1.0, []
    while high - low > within + 1e-6:
        alpha = (low + high) / 2
        results.append(tried(deleted(alpha), alpha, saved, tokens, decoder))
        low, high = (low, alpha) if results[-1].reached else (alpha, high)
    return results


@torch.inference_mode()
def fit(
    model: nn.Module, prompts: Sequence[Mapping[str, Any]], saved: float, tokens: int, decoder: Decoder = LLAVA_7B
) -> tuple[int, ...]:
    """A recipe for `FitPrune(recipe)` that saves that share of the FLOPs for visual tokens, from a few prompts (the
    model's arguments, one sample each, with `tokens` image tokens). Of the recipes tried, that of the smallest alpha
    that reaches the budget; the authors take the last one tried."""
    if not prompts:
        raise PrunelabError("fitprune: a recipe is fitted on at least one prompt")

    def run(method: Fitting, prompt: Mapping[str, Any]) -> dict[str, Any]:
        with apply(method, model, 1.0) as handle:
            model(**prompt)
            return dict(handle.memory)

    sums = [run(Fitting(), prompt)["sums"] for prompt in prompts]

    def deleted(alpha: float) -> Tensor:
        runs = [run(Fitting(alpha, s), prompt)["deleted"] for s, prompt in zip(sums, prompts, strict=True)]
        return torch.tensor([[*(gone[layer] for layer in sorted(gone)), 0] for gone in runs])

    reached = [trial for trial in search(deleted, saved, tokens, decoder) if trial.reached]
    if not reached:
        raise PrunelabError(f"fitprune: no alpha saves {100 * saved:g} % with these prompts; ask for less")
    return min(reached, key=lambda trial: trial.alpha).recipe
