"""Terms of a loss that papers share, beside cross entropy."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0, counted: Tensor | None = None) -> Tensor:
    """T^2 times the mean Kullback-Leibler divergence of the student's distribution from the teacher's, for logits
    [..., V] of both (Hinton, Vinyals & Dean, arXiv 1503.02531).

    counted [...] bool: places that enter the mean, None for all.
    """
    target = F.log_softmax(teacher.detach() / temperature, -1)
    own = F.log_softmax(student / temperature, -1)
    each = F.kl_div(own, target, log_target=True, reduction="none").sum(-1)
    if counted is None:
        return temperature**2 * each.mean()
    return temperature**2 * (each * counted).sum() / counted.sum().clamp_min(1)


def flops(vectors: Tensor) -> Tensor:
    """How dense the inverted index of vectors [B, V] would be: the sum of squared mean activations, which is the
    expected number of products of one look-up (Paria et al., arXiv 2004.05665)."""
    return vectors.abs().mean(0).square().sum()
