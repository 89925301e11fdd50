"""Optimal brain surgery on groups of a layer's inputs, as OSSCAR does it and Týr after it: groups leave in rounds, and
the others are solved for exactly. Shapes: weight [O, I] of O outputs and I inputs, the Hessian [I, I] of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

GONE, NOTHING = 1e20, 1e-12  # score of a group that has left; size of one that was never there


def split(count: int, rounds: int) -> list[int]:
    """`count` in at most so many parts, as even as can be, the larger ones first."""
    rounds = min(rounds, count)
    return [count // rounds + (place < count % rounds) for place in range(rounds)]


def group_scores(weight: Tensor, target: Tensor, inverse: Tensor, size: int, gradient: bool = True) -> Tensor:
    """What each group of inputs costs when it leaves [I / size]: the sum of W ((H^-1)_gg^-1 W / 2 + G), for the weight
    [I, O] as it is now, G = H W of the dense one and the inverse Hessian [I, I]."""
    if size == 1:
        scores = (weight * weight).sum(1) / (2 * inverse.diagonal().clamp_min(torch.finfo(weight.dtype).tiny))
    else:
        blocks = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, len(inverse), size)])
        ridge = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
        blocks = torch.where((blocks.diagonal(dim1=1, dim2=2) == 0).all(1)[:, None, None], ridge, blocks)
        held = torch.linalg.solve(blocks, weight.view(len(blocks), size, -1)).flatten(0, 1)
        scores = (weight * held).sum(1) / 2
    return (scores + (weight * target).sum(1) if gradient else scores).view(-1, size).sum(1)


def damped(hessian: Tensor, share: float) -> Tensor:
    """The Hessian [I, I] with so large a share of its mean diagonal added to it."""
    result = hessian.clone()
    result.diagonal().add_(share * hessian.diagonal().mean())
    return result


def inverted(hessian: Tensor) -> Tensor:
    """The inverse of a symmetric matrix, by its Cholesky factor where it has one."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    return torch.linalg.inv(hessian) if bool(failed) else torch.cholesky_inverse(factor)


def surgery(
    weight: Tensor,
    hessian: Tensor,
    size: int,
    stay: int,
    rounds: int,
    damping: float = 0.01,
    gradient: bool = True,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The groups of `size` inputs that stay [I / size] and the weight [O, I] that makes up for the others.

    hessian [I, I]: X^T X over all tokens; `inverse` that of the damped one, where it is known. In each of the rounds as
    many groups leave as will, the cheapest first; those that are zero already, as the inputs never used, are the first.
    As released, what stays then makes up for these by the inverse as it was with them in it, until others leave.
    """
    original = weight.to(torch.promote_types(weight.dtype, torch.float32)).T.contiguous().clone()
    original[hessian.diagonal() == 0] = 0
    groups = len(original) // size
    if stay >= groups:
        return torch.ones(groups, dtype=torch.bool, device=weight.device), original.T
    hessian = damped(hessian, damping)
    inverse = inverted(hessian) if inverse is None else inverse.clone()
    target, left = hessian @ original, original
    gone = left.view(groups, -1).abs().sum(1) <= NOTHING
    more = groups - stay - int(gone.sum())
    if more < groups - stay:
        silent = gone.repeat_interleave(size)
        inverse[silent], inverse[:, silent] = 0, 0
        left = inverse @ target
        if more <= 0:
            return ~gone, left.T
    turns = split(more, rounds)
    for turn, count in enumerate(turns, 1):
        chosen = (group_scores(left, target, inverse, size, gradient) + GONE * gone).argsort()[:count]
        gone[chosen] = True
        if turn == len(turns):  # nobody looks at what the others would make of it
            break
        out = (chosen.unsqueeze(1) * size + torch.arange(size, device=chosen.device)).flatten()
        columns = inverse[:, out]
        taken = torch.linalg.solve(columns[out], torch.cat([left[out], columns.T], 1))
        left.addmm_(columns, taken[:, : left.shape[1]], alpha=-1)
        inverse.addmm_(columns, taken[:, left.shape[1] :], alpha=-1)
        left[out], inverse[out], inverse[:, out] = 0, 0, 0
    return ~gone, solved(hessian, target, ~gone.repeat_interleave(size)).T


def solved(hessian: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """The weight [I, O] that is best where only the inputs `kept` [I] stay, of the damped Hessian and its product with
    the dense weight [I, O]."""
    result = torch.zeros_like(target)
    if bool(kept.any()):
        among = hessian[kept][:, kept]
        factor, failed = torch.linalg.cholesky_ex(among)
        right = target[kept]
        result[kept] = torch.linalg.solve(among, right) if bool(failed) else torch.cholesky_solve(right, factor)
    return result
