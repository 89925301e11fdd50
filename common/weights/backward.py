"""A backward pass one block at a time, from what stood in front of each block.

Autograd keeps what every block computed until the gradients have come by. Here the pass forward keeps the states in
front of each block alone, on a shelf (a folder, for what does not fit in memory), and each block is run again when the
gradients reach it. What is held at once is then the work of one block on one sequence, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunelab.common.core.attention_interface import cache_in
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.checkpoints import Shelf


class Unchained(PrunelabError):
    """The gradients of this model flow otherwise than from block to block."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


def apart(adapter: WeightAdapter, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the model is one chain of blocks, in which each of these parameters belongs to one block alone."""
    if len(adapter.chains) != 1:
        return False
    owned = [id(parameter) for block in adapter.blocks for parameter in block.parameters()]
    return all(owned.count(id(parameter)) == 1 for parameter in parameters)


class Backward:
    """The gradients of `loss` for batches of items, block by block from the last to the first."""

    def __init__(
        self, adapter: WeightAdapter, loss: Callable[[Any], Tensor], batches: Sequence[Any], shelf: Shelf
    ) -> None:
        self.blocks, self.shelf = list(adapter.blocks), shelf
        self.calls: dict[tuple[int, ...], list[Call]] = {}  # by shape: what each block is given beside the states
        self.flowing = [self._forward(loss, number, batch) for number, batch in enumerate(batches)]

    def _forward(self, loss: Callable[[Any], Tensor], number: int, batch: Any) -> list[Tensor]:
        """The gradients [B, N, D] behind the last block, one for each time that the model is run for the batch."""
        ends: list[Tensor] = []
        place, behind = 0, torch.empty(0)

        def over(index: int, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def forward(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                nonlocal place, behind
                if index != place or (index and states is not behind):
                    raise Unchained("the states do not go from block to block as they are")
                if cache_in(kwargs) is not None:
                    raise Unchained("blocks write what they compute into a cache")
                if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
                    raise Unchained("blocks are given more than the states that gradients flow through")
                calls = self.calls.setdefault(tuple(states.shape), [])
                if len(calls) == index:
                    calls.append((args, kwargs))
                with torch.no_grad():
                    self.shelf.put(f"{number}|{len(ends)}|{index}", {"states": states})
                    behind = own(states, *args, **kwargs)
                place = (index + 1) % len(self.blocks)
                if place == 0:
                    behind = behind.requires_grad_()
                    ends.append(behind)
                return behind

            return forward

        with _forwards(self.blocks, over):
            loss(batch).backward()
        results = [torch.zeros_like(end) if end.grad is None else end.grad for end in ends]
        return results

    def through(self, index: int, done: Callable[[], None]) -> None:
        """Let the gradients flow back through a block; `done` is called for each batch, once its own are whole."""
        device = next(self.blocks[index].parameters()).device
        for number, flowing in enumerate(self.flowing):
            for call, gradient in enumerate(flowing):
                key = f"{number}|{call}|{index}"
                states = self.shelf.get(key)["states"].to(device).requires_grad_()
                self.shelf.drop(key)
                args, kwargs = self.calls[tuple(states.shape)][index]
                torch.autograd.backward(self.blocks[index](states, *args, **kwargs), gradient)
                assert states.grad is not None
                flowing[call] = states.grad
            done()


@contextmanager
def _forwards(
    blocks: Sequence[nn.Module], over: Callable[[int, Callable[..., Tensor]], Callable[..., Tensor]]
) -> Iterator[None]:
    """Blocks whose `forward` goes by another's inside the block; what an instance had of its own comes back."""
    own = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = over(index, block.forward)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if before is not None:
                block.forward = before
