"""Hadamard matrices, and rotations by them: orthogonal, with entries of equal magnitude, so that no channel stays an
outlier.

Orders are m 2^k, where a matrix of order m is 1 or Paley's (1933): m - 1 a prime of the form 4 n + 3, or m / 2 - 1 one
of the form 4 n + 1. Widths of other forms are rotated in blocks of the largest order that divides them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError

DENSE = 64  # the largest power of 2 that is multiplied out


def prime(n: int) -> bool:
    """Whether a number is prime."""
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def paley(order: int) -> int:
    """1 or 2 where Paley's first or second construction gives a matrix of this order; 0 otherwise."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and prime(order - 1):
        return 1
    return 2 if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and prime(order // 2 - 1) else 0


@cache
def order(width: int) -> tuple[int, int]:
    """(m, 2^k) with m 2^k the largest order of a matrix known here that divides a width, and m as small as can be."""
    for result in (n for n in range(width, 0, -1) if width % n == 0):
        power = result & -result  # its largest power of 2
        while power:
            if result == power or paley(result // power):
                return result // power, power
            power //= 2
    return 1, 1


@cache
def core(order: int) -> Tensor:
    """Paley's matrix of this order, of ones and minus ones."""
    if order == 1:
        return torch.ones(1, 1)
    kind = paley(order)
    q = order - 1 if kind == 1 else order // 2 - 1
    character = torch.full((q,), -1.0)  # 1 at squares modulo q, 0 at 0
    character[(torch.arange(1, q) ** 2) % q] = 1
    character[0] = 0
    place = torch.arange(q)
    jacobsthal = character[(place[:, None] - place) % q]
    bordered = torch.zeros(q + 1, q + 1)
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, -1 if kind == 1 else 1, jacobsthal
    if kind == 1:
        return bordered + torch.eye(q + 1)
    ones, turned = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
    return torch.kron(bordered, ones) + torch.kron(torch.eye(q + 1), turned)


@cache
def sylvester(power: int) -> Tensor:
    """Sylvester's matrix of this order, a power of 2."""
    return torch.ones(1, 1) if power == 1 else torch.kron(sylvester(power // 2), torch.tensor([[1.0, 1], [1, -1]]))


def turn(x: Tensor, apart: int = 1, back: bool = False) -> Tensor:
    """x [..., C] times R, or R transposed: R is the Hadamard rotation of C / `apart` channels, each of which stands for
    `apart` consecutive ones.

    Raises PrunelabError where the width is odd: no matrix fits.
    """
    width = x.shape[-1] // apart
    part, power = order(width)
    if width > 1 and part * power == 1:
        raise PrunelabError(f"no Hadamard matrix fits a width of {width}; use a model of even widths, or no rotation")
    blocks = x.unflatten(-1, (width // (part * power), part, power, apart))
    first = core(part).to(x)
    blocks = torch.einsum("...pqr,ps->...sqr", blocks, first.T if back else first)
    step = 1
    while step < power:  # a few powers of 2 at a time
        factor = min(DENSE, power // step)
        split = blocks.unflatten(-2, (-1, factor, step))
        blocks = torch.einsum("...psr,pq->...qsr", split, sylvester(factor).to(x)).flatten(-4, -2)
        step *= factor
    return blocks.flatten(-4) / (part * power) ** 0.5


def hadamard(width: int) -> Tensor:
    """The rotation [C, C] by which `turn` multiplies."""
    return turn(torch.eye(width, dtype=torch.float64)).float()


def random_hadamard(width: int, rng: torch.Generator) -> Tensor:
    """A Hadamard rotation [C, C] behind random signs (QuaRot, arXiv 2404.00456)."""
    signs = torch.randint(2, (width, 1), generator=rng).double() * 2 - 1
    return (signs * turn(torch.eye(width, dtype=torch.float64))).float()
