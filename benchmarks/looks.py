"""Looks at the device: what makes Python wait for a value, or for a shape that depends on values."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_unique2", "unique_dim")


class Looks(TorchDispatchMode):
    """Counts, by operation, the looks of its `with` block. On a GPU each of them empties the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.found.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in NAMES or masked:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def a_token(model: Any, tokens: torch.Tensor) -> float:
    """Looks that `generate` takes for each token behind a prompt [B, N]."""
    counts = []
    for length in (4, 14):
        with torch.no_grad(), Looks() as looks:
            model.generate(tokens, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)
        counts.append(looks.total)
    return (counts[1] - counts[0]) / 10
