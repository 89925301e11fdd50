"""How good generated images are: how far their statistics lie from those of real ones, and whether they show what was
asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError


def frechet_distance(result: Tensor, real: Tensor) -> float:
    """Fréchet distance of two sets of features [n, d] and [m, d], taken as Gaussians: the squared distance of their
    means and tr(A + B - 2 (A B)^1/2) of their covariances (Heusel et al., NeurIPS 2017)."""
    if min(len(result), len(real)) < 2:
        raise PrunelabError("a Fréchet distance takes two images or more on each side")
    a, b = result.double(), real.double()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    one, two = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())
    # The eigenvalues of A B are those of B^1/2 A B^1/2, which is symmetric.
    values, vectors = torch.linalg.eigh(two)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    roots = torch.linalg.eigvalsh(root @ one @ root).clamp_min(0).sqrt().sum()
    return float(apart + one.trace() + two.trace() - 2 * roots)


@cache
def recogniser() -> Callable[[Tensor], Tensor]:
    """What names digits [n, 1, 8, 8] from -1 to 1: a support vector machine on scikit-learn's training digits, which
    names 98 of 100 test digits rightly."""
    from sklearn.svm import SVC

    from prunelab.common.data import digits

    images, labels = digits.digits("train")
    machine = SVC(gamma=0.01).fit((4 * images.flatten(1)).numpy(), labels.numpy())

    def named(pictures: Tensor) -> Tensor:
        pixels = ((pictures.flatten(1).float().cpu() + 1) / 2).clamp(0, 1)
        return torch.from_numpy(np.asarray(machine.predict((4 * pixels).numpy())))

    return named
