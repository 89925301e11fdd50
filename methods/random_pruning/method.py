"""Random pruning (Liu et al., ICLR 2022): train a network under a mask that was drawn by lot before the first step.

Which weights go is chance; how many of each layer is not. The share of a layer follows from its shape (uniform, ER,
ERK) or from what SNIP or GraSP would leave of it, whose choice of weights is then forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveShare
from prunelab.common.training.method import Batch, Training, TrainingMethod

Ratio = Literal["uniform", "uniform_plus", "er", "erk", "erk_plus", "snip", "grasp"]
Shape = Sequence[int]


def uniform_plus(sizes: Sequence[int], keep: float, last: float = 0.2) -> list[float]:
    """Densities with the first layer dense and, where less is kept elsewhere, the share `last` of the last layer. As
    released, what is left to keep is spread over the weights of all layers, these two included, so that a little less
    is kept than asked for."""
    if keep >= last:
        return [1.0, *[keep] * (len(sizes) - 1)]
    whole = sum(sizes)
    rest = (whole * keep - sizes[0] - last * sizes[-1]) / whole
    if rest <= 0:
        raise PrunelabError(f"random_pruning: the first and last layers alone are more than {keep:g}; keep more")
    return [1.0, *[rest] * (len(sizes) - 2), last]


def erdos_renyi(
    shapes: Sequence[Shape],
    keep: float,
    kernel: bool = True,
    power: NonNegativeFloat = 1.0,
    fixed: Mapping[int, float] = {},
) -> list[float]:
    """Densities in proportion to (the sum of a weight's dimensions over their product) to a power, of all dimensions
    or, without `kernel`, of outputs and inputs alone. Layers that would exceed 1 are dense, all of one proportion
    together, and the others share the rest. fixed: densities of layers that are given."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [(sum(s) / math.prod(s)) ** power for s in (shape if kernel else shape[:2] for shape in shapes)]
    results = dict(fixed)
    while len(results) < len(sizes):
        free = [i for i in range(len(sizes)) if i not in results]
        left = sum(keep * sizes[i] for i in free) - sum((results[i] - keep) * sizes[i] for i in results)
        scale = left / sum(raw[i] * sizes[i] for i in free)
        most = max(raw[i] for i in free)
        if scale <= 0:
            raise PrunelabError(f"random_pruning: the dense layers alone are more than {keep:g}; keep more")
        if scale * most <= 1:
            return [results[i] if i in results else scale * raw[i] for i in range(len(sizes))]
        results |= {i: 1.0 for i in free if raw[i] == most}
    return [results[i] for i in range(len(sizes))]


def left_of(scores: Sequence[Tensor], keep: float) -> list[float]:
    """Densities that are left where the int(n keep) largest scores of all layers stay, and what equals the last."""
    joined = torch.cat([s.flatten() for s in scores])
    count = int(len(joined) * keep)
    if count < 1:
        raise PrunelabError(f"random_pruning: {keep:g} of {len(joined)} weights is none; keep more")
    limit = joined.topk(count).values[-1]
    return [float((s >= limit).float().mean()) for s in scores]


def snip_scores(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """How much the loss depends on a mask on each weight, as a share of the whole (SNIP, arXiv 1810.02340)."""
    results = [(w * g).abs() for w, g in zip(weights, gradients, strict=True)]
    whole = torch.stack([s.sum() for s in results]).sum()
    return [s / whole for s in results]


def grasp_scores(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """What each weight does for the flow of gradients: w times the Hessian times the gradient (GraSP, arXiv
    2002.07376), larger is better. gradients must have a graph to the weights.

    # assumption: without the temperature of 200 by which GraSP divides logits.
    """
    flow = torch.stack([(g.detach() * g).sum() for g in gradients]).sum()
    return [w.detach() * h for w, h in zip(weights, torch.autograd.grad(flow, list(weights)), strict=True)]


def drawn(
    shapes: Sequence[Shape], densities: Sequence[float], rng: torch.Generator | None, least: bool = True
) -> list[Tensor]:
    """A mask for every layer, in order: each weight stays with its layer's probability. With `least` a layer of which
    nothing would stay keeps the weight that came closest, which the released code does not look after."""
    masks = []
    for shape, density in zip(shapes, densities, strict=True):
        lots = torch.rand(*shape, generator=rng)
        masks.append(lots < density)
        if least:
            masks[-1].view(-1)[lots.argmin()] = True
    return masks


@dataclass(frozen=True)
class RandomPruning(TrainingMethod):
    """Training under a random mask of layer-wise density (arXiv 2202.02643). The budget is the share of all weights.

    Parameters
    ----------
    ratio
        Densities: `uniform`, `uniform_plus` (dense first layer, a fifth of the last), `er` and `erk` by shape without
        and with the kernel's sizes, `erk_plus` with a fixed last layer, `snip` and `grasp` as these would leave.
    power
        Of the proportions in ER and ERK.
    last
        Density of the last layer: at least 0.2 in `uniform_plus`, 1 in `erk_plus`; None is these.
    reinitialise
        Criteria look at a network whose weights are drawn anew (Xavier), as released.
    """

    ratio: Ratio = "erk"
    power: NonNegativeFloat = 1.0
    last: PositiveShare | None = None
    reinitialise: bool = True

    name: ClassVar[str] = "random_pruning"
    exempt = {"budget": "layers have densities of their own, and each weight stays by lot"}

    def densities(self, shapes: Sequence[Shape], keep: float) -> list[float]:
        """The density of every layer, from shapes alone."""
        if self.ratio == "uniform":
            return [keep] * len(shapes)
        if self.ratio == "uniform_plus":
            sizes = [math.prod(shape) for shape in shapes]
            return uniform_plus(sizes, keep, 0.2 if self.last is None else self.last)
        fixed = {len(shapes) - 1: 1.0 if self.last is None else self.last} if self.ratio == "erk_plus" else {}
        return erdos_renyi(shapes, keep, self.ratio != "er", self.power, fixed)

    def start(self, training: Training) -> None:
        if len(training.budget.amounts) != 1 or training.budget.unit != "ratio":
            raise PrunelabError(f"random_pruning keeps one share of all weights, such as 0.2, not {training.budget}")
        if self.ratio not in ("snip", "grasp"):
            shapes = [training.original(target).shape for target in training.targets]
            self.mask(training, self.densities(shapes, training.budget.amounts[0]))

    def before_step(self, batch: Callable[[], Batch], training: Training) -> None:
        if training.step == 0 and self.ratio in ("snip", "grasp"):
            self.mask(training, self.measured(batch(), training))

    def mask(self, training: Training, densities: Sequence[float]) -> None:
        shapes = [training.original(target).shape for target in training.targets]
        for target, mask in zip(training.targets, drawn(shapes, densities, training.rng), strict=True):
            training.prune(target, training.adapter.view(target, mask))

    def measured(self, batch: Batch, training: Training) -> list[float]:
        """The densities that a criterion would leave, by one batch."""
        weights = [training.original(target) for target in training.targets]
        with as_it_was(training.model, weights), torch.enable_grad():
            for weight in weights if self.reinitialise else ():
                nn.init.xavier_normal_(weight, generator=training.rng)
            loss = training.objective(training.model, batch).loss
            gradients = torch.autograd.grad(loss, weights, create_graph=self.ratio == "grasp")
            scores = snip_scores if self.ratio == "snip" else grasp_scores
            return left_of([s.detach() for s in scores(weights, gradients)], training.budget.amounts[0])


@contextmanager
def as_it_was(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """A trial on the model, whose weights and running statistics then come back, and which may be frozen before."""
    kept = [(tensor, tensor.detach().clone()) for tensor in (*weights, *model.buffers())]
    learns = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        for weight, learn in zip(weights, learns, strict=True):
            weight.requires_grad_(learn)
