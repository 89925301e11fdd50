"""Batches as large as the memory allows: halve where it ends, down to one sample, and go on from there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError

T = TypeVar("T")


def largest(attempt: Callable[[int], T], batch: int, what: str) -> tuple[T, int]:
    """`attempt(size)` with the first size of batch, batch / 2, ..., 1 that fits the memory of the GPU, and that size.

    what: one sample in words, for the PrunelabError where not even a single one fits.
    """
    size = batch
    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError:
            pass  # left before the next attempt: the exception holds on to the tensors of the one that failed
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1:
            raise too_small(what)
        size //= 2


def too_small(what: str) -> PrunelabError:
    """The error of a GPU whose memory does not hold the model and `what`."""
    return PrunelabError(
        f"the GPU's memory does not hold the model and {what}; free it of other programs, or use a larger GPU, or"
        " several (gpus: in configs/models.yaml)"
    )


class Slices:
    """Computes whole batches in slices that fit the memory.

    The slice that did not fit is all that is computed again, in halves, and the size found stays for what follows:
    nothing is known of what the next batch leaves free, but it is as large as this one.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.size: int | None = None  # None until memory ended once

    def __call__(self, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`step` of the samples x [B, ...], which must treat each on its own: [B, ...], whatever the slices were."""
        done: list[Tensor] = []
        while len(x):
            limit = min(self.size or len(x), len(x))
            part, size = largest(lambda count, rest=x: step(rest[:count]), limit, self.what)  # type: ignore[misc]
            if size < limit:
                self.size = size
            done.append(part)
            x = x[size:]
        return torch.cat(done)
