"""Points in the plane in two or four classes, as "Pruning by Explaining" draws them: two circles, two half moons, four
arms of a spiral.

Numbers come from NumPy's old generator (`RandomState`), whose draws are the same in every release.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError

Set = Literal["circle", "moon", "mult"]

CLASSES = {"circle": 2, "moon": 2, "mult": 4}
PER_CLASS = 1000  # training points
NOISE = 0.1  # standard deviation of circles and moons
FACTOR = 0.3  # radius of the inner circle as a share of the outer one's
WOBBLE = 0.2  # standard deviation of a spiral point's angle, in radians
TURN = 4.0  # radians from one arm to the next, and along an arm


def spirals(per_class: int, draws: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Points [4 n, 2] of four arms, arm by arm, and their labels [4 n]."""
    share = np.arange(per_class) / max(per_class - 1, 1)
    points = []
    for arm in range(CLASSES["mult"]):
        angle = TURN * arm + TURN * share + WOBBLE * draws.standard_normal(per_class)
        points.append(np.stack([share * np.sin(angle), share * np.cos(angle)], 1))
    return np.concatenate(points), np.repeat(np.arange(CLASSES["mult"]), per_class)


def drawn(name: Set, per_class: int, seed: int, blur: float = 0.0) -> tuple[Tensor, Tensor]:
    """Points [N, 2] float32 and labels [N] of a set, so many of each class.

    blur: standard deviation of further noise. It comes from the generator as the spirals left it, and for the other
    sets, which have one of their own, from a fresh one of the same seed.
    """
    from sklearn.datasets import make_circles, make_moons

    if name not in get_args(Set) or per_class < 1:
        raise PrunelabError(f"points are drawn of {', '.join(get_args(Set))}, at least one a class; not '{name}'")
    draws = np.random.RandomState(seed)
    if name == "mult":
        points, labels = spirals(per_class, draws)
    elif name == "circle":
        points, labels = make_circles(2 * per_class, noise=NOISE, factor=FACTOR, random_state=seed)
    else:
        points, labels = make_moons(2 * per_class, noise=NOISE, random_state=seed)
    if blur:
        points = points + draws.normal(0.0, blur, points.shape)
    return torch.from_numpy(points).float(), torch.from_numpy(labels).long()


@cache
def training(name: Set) -> tuple[Tensor, Tensor]:
    """The training set: the authors' own for the circles; the other two they drew without a seed, so that these are
    further draws of the same law."""
    return drawn(name, PER_CLASS, 0)
