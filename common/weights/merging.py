"""Experts that become one: how often each is used, how alike they are, their neurons brought into one order, and their
weighted mean.

Shape letters: E experts, T tokens, I neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from prunelab.common.weights.targets import Accumulator, Observation, Target

TINY = 1e-7  # beside the usage of a group, as M-SMoE's code divides


class Usage(Accumulator):
    """How often each expert [E] was chosen."""

    def __init__(self, target: Target) -> None:
        self.counts = torch.zeros(target.units, dtype=torch.float64)

    def update(self, observed: Observation) -> None:
        assert observed.routing is not None
        self.counts += chosen_counts(observed.routing.chosen, len(self.counts)).cpu()

    def value(self) -> Tensor:
        return self.counts.float()


class RouterGram(Accumulator):
    """Z^T Z [E, E] of the router's logits Z [T, E], before any softmax."""

    def __init__(self, target: Target) -> None:
        self.gram = torch.zeros(target.units, target.units, dtype=torch.float64)

    def update(self, observed: Observation) -> None:
        assert observed.routing is not None
        logits = observed.routing.logits.double()
        self.gram += (logits.T @ logits).cpu()

    def value(self) -> Tensor:
        return self.gram


def chosen_counts(chosen: Tensor, experts: int) -> Tensor:
    """How often each expert [E] is among the choices [T, k]."""
    return torch.bincount(chosen.flatten().long(), minlength=experts)


def alike(gram: Tensor) -> Tensor:
    """Cosines [E, E] of vectors with this Gram matrix, moved from [-1, 1] to [0, 1]."""
    norm = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return (gram / norm / norm[:, None] + 1) / 2


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """Gram matrix [E, E] of vectors that each part [E, ...] holds some entries of."""
    flat = [part.flatten(1).double() for part in vectors]
    return sum((part @ part.T for part in flat[1:]), flat[0] @ flat[0].T)


def aligned(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The order [I] of one expert's neurons in which they match another's best, by linear assignment on the sum of
    products of their weights, each part [I, n] (weight matching, Ainsworth et al., 2023)."""
    products = sum(a.double() @ b.double().T for a, b in zip(reference, other, strict=True))
    assert isinstance(products, Tensor)
    return torch.from_numpy(linear_sum_assignment(products.cpu().numpy(), maximize=True)[1])


def merged(part: Tensor, labels: Tensor, usage: Tensor) -> Tensor:
    """The experts [E, ...], each group of equal label [E] replaced by its mean weighted by usage [E]. A group that no
    token used counts its members alike."""
    out = part.clone()
    for label in labels.unique():
        members = (labels == label).nonzero().flatten().to(part.device)
        used = usage[members.to(usage.device)].to(part.device, torch.float32)
        if not float(used.sum()):
            used = torch.ones_like(used)
        share = (used / (used.sum() + TINY)).view(-1, *[1] * (part.dim() - 1))
        out[members] = (part[members].float() * share).sum(0).to(part.dtype)
    return out


def neurons(gate_up: Tensor, down: Tensor) -> list[Tensor]:
    """Parts [E, I, n] of experts by neuron, of their fused projections [E, 2I, D] and [E, D, I]."""
    gate, up = gate_up.chunk(2, 1)
    return [gate, up, down.transpose(1, 2)]


def in_one_order(gate_up: Tensor, down: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Fused projections with the neurons of each group's experts in the order of its first member's."""
    gate_up, down = gate_up.clone(), down.clone()
    parts = [part.float() for part in neurons(gate_up, down)]
    inner = down.shape[2]
    for label in labels.unique():
        first, *others = (labels == label).nonzero().flatten().tolist()
        for other in others:
            order = aligned([p[first] for p in parts], [p[other] for p in parts]).to(down.device)
            gate_up[other] = gate_up[other][torch.cat([order, inner + order])]
            down[other] = down[other][:, order]
    return gate_up, down
