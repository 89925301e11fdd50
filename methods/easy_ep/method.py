"""EASY-EP (Dong et al., 2025): of a mixture of experts keep those that matter on a few demonstrations of a domain.

One forward pass over the demonstrations scores every routed expert by how strong its weighted output is and by how much
the tokens it serves are changed by their experts; the best M of every layer stay, and the router chooses among these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Observation, Routing, Target, Unit, WeightSignals

Importance = Literal["output", "gate", "frequency"]


def output_norms(routing: Routing, inputs: Tensor) -> Tensor:
    """||e_i(x_t)||_2 of every chosen expert [T, k], before its gate weighs it. inputs [T, D] are the mixture's."""
    norms = torch.zeros(routing.chosen.shape, device=inputs.device)
    for index in routing.chosen.unique().tolist():
        token, slot, outputs = routing.outputs(index, inputs)
        norms[token, slot] = outputs.float().norm(dim=-1)
    return norms


def similarity(before: Tensor, after: Tensor) -> Tensor:
    """Cosine [...] of two residual streams [..., D], in float32."""
    return torch.cosine_similarity(before.float(), after.float(), dim=-1)


def contribution(similarity: Tensor) -> Tensor:
    """s_t = 1 - cos(h_t, h_t + routed output), never negative (as released): how much its experts change a token."""
    return (1 - similarity).clamp_min(0)


def expert_scores(chosen: Tensor, terms: Tensor, experts: int) -> Tensor:
    """I_i [experts]: the terms [T, k] of all tokens, summed by the expert that was chosen [T, k]."""
    scores = torch.zeros(experts, device=terms.device)
    return scores.index_add_(0, chosen.flatten().long(), terms.flatten().float())


def longest(lengths: Sequence[int], most: int) -> list[int]:
    """The places of the `most` longest demonstrations, the earlier first where lengths are equal."""
    return sorted(range(len(lengths)), key=lambda place: -lengths[place])[:most]


def mix(scores: Tensor) -> Tensor:
    """Scores [experts] of several domains [domains, experts] together, each first divided by its sum."""
    return (scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)).sum(0)


class DomainScores(Accumulator):
    """Expert scores [domains, E] over the demonstrations."""

    def __init__(self, target: Target, method: EasyEP) -> None:
        self.target, self.method = target, method
        self.scores: list[Tensor] = []
        self.lengths: list[int] = []

    def update(self, observed: Observation) -> None:
        assert observed.routing is not None
        terms = self.method.terms(observed.routing, observed.inputs)
        self.scores.append(expert_scores(observed.routing.chosen, terms, self.target.units))
        self.lengths.append(len(observed.inputs))

    def value(self) -> Tensor:
        counts = self.method.domains or (len(self.scores),)
        if sum(counts) != len(self.scores):
            raise PrunelabError(
                f"easy_ep's domains {counts} count {sum(counts)} demonstrations, and the calibration set has"
                f" {len(self.scores)}; give one number a domain, in the order of the set"
            )
        domains, start = [], 0
        for count in counts:
            scores = torch.stack(self.scores[start : start + count])
            if self.method.longest:
                scores = scores[longest(self.lengths[start : start + count], self.method.longest)]
            domains.append(scores.sum(0))
            start += count
        return torch.stack(domains)


@dataclass(frozen=True)
class EasyEP(WeightPruner):
    """Keeps the experts that a domain needs, the same number in every layer (arXiv 2504.06792).

    Calibrate on prompts of the domain with the model's own answers (25 in the paper); other text does much worse.

    Parameters
    ----------
    importance
        c_it of an expert and token: gate times output norm (`output`), the gate alone, or 1 (`frequency`).
    tokens
        Weigh tokens by their contribution s_t. Without it `gate` and `frequency` are the paper's baselines.
    domains
        Number of demonstrations of each domain, in order, to prune for several at once.
    longest
        Only so many demonstrations count, the longest of each domain; the release takes 25 by their characters.
    reroute
        Tokens are sent among the experts that stay. Otherwise the router chooses among all, and what experts that left
        would have given is left out (the paper's appendix F.3).
    """

    importance: Importance = "output"
    tokens: bool = True
    domains: tuple[PositiveInt, ...] = ()
    longest: NonNegativeInt = 0
    reroute: bool = True

    name: ClassVar[str] = "easy_ep"

    @property
    def sequential(self) -> bool:
        return False

    @property
    def units(self) -> Sequence[Unit]:
        return ("experts",)

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"scores": lambda target: DomainScores(target, self)}

    def terms(self, routing: Routing, inputs: Tensor) -> Tensor:
        """c_it * s_t of every token and chosen expert, [T, k]."""
        if self.importance == "frequency":
            terms = torch.ones(routing.chosen.shape, device=inputs.device)
        else:
            terms = routing.gates.float()
        if self.importance == "output":
            terms = terms * output_norms(routing, inputs)
        if self.tokens:
            # Shared experts are left out of the state after.
            moved = contribution(similarity(routing.residual, routing.residual + routing.routed))
            terms = terms * moved.unsqueeze(-1)
        return terms

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return mix(signals["scores"])

    def stand_ins(self, target: Target, mask: Tensor) -> Tensor | None:
        return None if self.reroute else torch.arange(len(mask), device=mask.device).masked_fill(~mask, -1)
