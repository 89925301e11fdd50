"""GBLM-Pruner (Das et al., 2023): Wanda's criterion with a second term, the weight times the norm of its gradient.

The gradients are those of the dense model's loss on the calibration set, one backward pass a sequence, and are not
refreshed while pruning; the activation norms are, as in Wanda.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import PositiveFloat
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Accumulator, Probe, Statistics, Target, Unit, WeightSignals

Norm = Literal["l1", "l2"]


class GradientNorm(Accumulator):
    """Norm [out, in] over calibration sequences of a weight's gradient times `scale`; not divided by their number.

    half: keep it in float16 as released: L1 adds up in that precision, L2 is rounded once at the end.
    """

    def __init__(self, target: Target, norm: Norm, scale: float, half: bool) -> None:
        self.name = target.name
        self.norm = norm
        self.scale = scale
        self.half = half
        self.sum = torch.zeros(())

    def update(self, observed: Tensor) -> None:
        gradient = self.scale * observed.float()
        added = gradient.square() if self.norm == "l2" else gradient.abs().half() if self.half else gradient.abs()
        self.sum = self.sum.to(added) + added

    def value(self) -> Tensor:
        norm = self.sum.sqrt() if self.norm == "l2" else self.sum
        if not bool(norm.any()):  # an expert that no token reached: nothing is known of its weights
            norm = torch.ones_like(norm)
        norm = norm.half() if self.half else norm
        if not bool(torch.isfinite(norm).all()):
            raise PrunelabError(f"the gradient norms of {self.name} exceed float16; set half=False or a smaller scale")
        return norm


def importance(weight: Tensor, activation: Tensor | None, gradient: Tensor, inverse: bool = False) -> Tensor:
    """|W| ||X||_2 + |W| ||alpha G||_p, [out, in].

    activation [in] holds the squared norms of the input channels, or is None for the gradient term alone; gradient
    [out, in] the norms with alpha already in them. inverse divides by the gradient norm instead of adding its term.
    """
    weight, gradient = weight.float().abs(), gradient.float()
    if activation is None:
        return weight * gradient
    if inverse:
        return weight * activation.sqrt() / (gradient + 1e-8)
    return weight * activation.sqrt() + weight * gradient


@dataclass(frozen=True)
class GBLM(WeightPruner):
    """Unstructured or patterned pruning by weights, activations and gradients (arXiv 2311.04902).

    Activation norms sum over tokens and gradient norms over sequences, so that both counts change the balance.

    Parameters
    ----------
    norm
        Of the gradients over sequences.
    scale
        alpha, their weight.
    inverse
        Divide by the gradient norm.
    gradient_only
        Leave the activations out.
    half
        Keep gradient norms in float16, as released; it halves what the pass over the gradients holds, and rounds
        near-equal scores to ties.
    """

    norm: Norm = "l2"
    scale: PositiveFloat = 100.0
    inverse: bool = False
    gradient_only: bool = False
    half: bool = True

    name: ClassVar[str] = "gblm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inverse and self.gradient_only:
            raise PrunelabError("gblm: gradient_only has nothing to invert")

    def statistics(self, unit: Unit) -> Mapping[str, type[InputNorm]]:
        return {} if self.gradient_only else {"input_norm": InputNorm}

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        return probe.gradients({"gradient_norm": lambda t: GradientNorm(t, self.norm, self.scale, self.half)})

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        activation = None if self.gradient_only else signals["input_norm"]
        return importance(signals.weight, activation, signals["gradient_norm"], self.inverse)
