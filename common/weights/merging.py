"""Experts that become one: how often each is used, how alike they are, their neurons brought into one order, and their
weighted mean.

Shape letters: E experts, T tokens, I neurons of an expert.
"""

from __future__ import annotations

import warnings
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
    """Z^T Z [E, E] of the router's logits Z [T, E], before any softmax; centred: of what is left of them beside the
    mean of each column."""

    def __init__(self, target: Target, centred: bool = False) -> None:
        self.gram = torch.zeros(target.units, target.units, dtype=torch.float64)
        self.sum, self.tokens, self.centred = torch.zeros(target.units, dtype=torch.float64), 0, centred

    def update(self, observed: Observation) -> None:
        assert observed.routing is not None
        logits = observed.routing.logits.double()
        self.gram += (logits.T @ logits).cpu()
        self.sum += logits.sum(0).cpu()
        self.tokens += len(logits)

    def value(self) -> Tensor:
        return self.gram - self.centred * torch.outer(self.sum, self.sum) / max(self.tokens, 1)


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


def spectral_clusters(affinity: Tensor, groups: int, seed: int = 0) -> Tensor:
    """Labels [E] of exactly so many groups: k-means on the rows of the leading eigenvectors of the normalised affinity
    [E, E], each row over its norm (Ng, Jordan and Weiss, 2001). Where experts are too alike for that, the last ones
    of the largest groups stand alone."""
    from sklearn.cluster import KMeans

    affinity = affinity.double().clone().fill_diagonal_(0).clamp_min(0)
    root = affinity.sum(1).clamp_min(torch.finfo(affinity.dtype).tiny).rsqrt()
    vectors = torch.linalg.eigh(root[:, None] * affinity * root).eigenvectors[:, -groups:]
    rows = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(affinity.dtype).tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that rows coincide, which is seen to below
        result = KMeans(groups, n_init=10, random_state=seed).fit(rows.numpy()).labels_
    labels = torch.from_numpy(result).long().unique(return_inverse=True)[1]
    while int(labels.max()) + 1 < groups:
        largest = labels.bincount().argmax()
        labels[(labels == largest).nonzero()[-1]] = int(labels.max()) + 1
    return labels


def leaders(labels: Tensor, usage: Tensor) -> Tensor:
    """The most used member [E] of every expert's group, the first where several are."""
    result = torch.zeros_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        result[members] = members[usage[members].argmax()]
    return result


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


def in_one_order(gate_up: Tensor, down: Tensor, leader: Tensor) -> tuple[Tensor, Tensor]:
    """Fused projections with the neurons of every expert in the order of those of its leader [E]."""
    gate_up, down = gate_up.clone(), down.clone()
    parts = [part.float() for part in neurons(gate_up, down)]
    inner = down.shape[2]
    for expert, first in enumerate(leader.tolist()):
        if expert != first:
            order = aligned([p[first] for p in parts], [p[expert] for p in parts]).to(down.device)
            gate_up[expert] = gate_up[expert][torch.cat([order, inner + order])]
            down[expert] = down[expert][:, order]
    return gate_up, down
