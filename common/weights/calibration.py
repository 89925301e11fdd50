"""The calibration set on its way through a model, one block and one sequence at a time.

Hidden states are computed once up to the first block and then replaced block by block, so that memory holds the
weights, one state a token of the calibration set, and the activations of one block for one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import Chain, Tap, WeightAdapter
from prunelab.common.weights.targets import Observation, Target

Visit = Callable[[Callable[[Target], Observation]], None]


def windows(tokens: Tensor, length: int, samples: int, seed: int = 0) -> Tensor:
    """Random windows [samples, length] of a long text's token ids [n], as calibration sets are drawn."""
    if tokens.dim() != 1 or length < 1 or samples < 1:
        raise PrunelabError("windows are drawn from a vector of token ids, at least one of at least one token")
    if len(tokens) < length:
        raise PrunelabError(
            f"the calibration text has {len(tokens)} tokens, fewer than one sequence of {length}; give more text"
        )
    draws = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (samples,), generator=draws)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


class Stream:
    """Hidden states of every calibration sequence in front of the next block."""

    def __init__(
        self,
        adapter: WeightAdapter,
        samples: Sequence[Any],
        hidden: Sequence[Tensor] = (),
        chain: Chain | None = None,
    ) -> None:
        self.adapter = adapter
        self.chain = adapter.chains[0] if chain is None else chain
        self.samples = samples
        self.calls: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # by length: what each block is given
        self.hidden = list(hidden)
        self.memos: list[dict[str, Tensor]] = [{} for _ in samples]  # of the block at hand
        own = self.chain.adapter
        for sample in samples:
            if own.call(sample) not in self.calls:
                states, calls = _record(own, sample, len(own.blocks))
                self.calls[own.call(sample)] = calls
            elif len(self.hidden) < len(samples):
                states, _ = _record(own, sample, 1)
            else:
                continue
            if len(self.hidden) < len(samples):
                self.hidden.append(states)

    def through(self, block: int, taps: Sequence[str] = (), visit: Visit | None = None, keep: bool = True) -> None:
        """Send every sequence through a block. `visit` is called a sequence, with a function that observes targets;
        with `keep` the hidden states move on to the next block."""
        module, place = self.adapter.blocks[block], block - self.chain.start
        with tapped(module, taps) as seen:
            for i, sample in enumerate(self.samples):
                before = self.hidden[i]
                args, kwargs = self.calls[self.chain.adapter.call(sample)][place]
                after = module(before, *args, **kwargs)
                if not all(finite(leaf) for leaf in tree_leaves(after) if isinstance(leaf, Tensor)):
                    raise PrunelabError(
                        f"{self._culprit(block, i)} gives NaN or infinite activations on calibration sequence {i};"
                        " check the weights, or use a wider dtype"
                    )
                if visit is not None:
                    given = dict(seen)
                    own: dict[str, Any] = {
                        "attend": cache(
                            partial(self.adapter.received, block, partial(module, before, *args, **kwargs))
                        ),
                        "count": partial(self.counted, sample) if isinstance(sample, Tensor) else None,
                        "memo": self.memos[i],
                    }
                    visit(lambda t: replace(self.adapter.observe(t, given, before, after, sample), **own))  # noqa: B023
                seen.clear()
                if keep:
                    self.hidden[i], self.memos[i] = after, {}

    @cached_property
    def _frequencies(self) -> Tensor:
        return torch.cat(list(self.samples)).bincount()

    def counted(self, sample: Tensor) -> Tensor:
        """How often the calibration set holds each token of a sequence [T]."""
        if sample.is_floating_point():
            raise PrunelabError("this calibration set is no text, whose tokens could be counted")
        return self._frequencies[sample]

    def _culprit(self, block: int, sequence: int) -> str:
        """The first module that gives a sequence values that are not finite, found by running the block again."""
        if not finite(self.hidden[sequence]):
            return "what comes before the first block"
        module, prefix, results = self.adapter.blocks[block], self.adapter.prefix(block), list[str]()

        def note(path: str) -> Callable[..., None]:
            def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if not all(finite(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
                    results.append(path)

            return look

        handles = [part.register_forward_hook(note(path)) for path, part in module.named_modules()]
        try:
            call = self.chain.adapter.call(self.samples[sequence])
            args, kwargs = self.calls[call][block - self.chain.start]
            module(self.hidden[sequence], *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return ".".join(filter(None, (prefix, *results[:1])))


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, without a copy and without a sum that half precision could not hold."""
    if values.numel() == 0 or not values.is_floating_point():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in values.aminmax())  # extremes carry NaN


@contextmanager
def tapped(block: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tap]]:
    """What the modules at `paths` got and gave in the block's last call."""
    seen: dict[str, Tap] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen[path] = (args, output)

        return keep

    handles = [block.get_submodule(path).register_forward_hook(hook(path)) for path in dict.fromkeys(paths)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A function in place of a module's forward, and of what wraps it: accelerate's hooks, or a trial's."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


class _Recorded(Exception):
    """The last wanted block was reached."""


def _record(adapter: WeightAdapter, sample: Tensor, blocks: int) -> tuple[Tensor, list[Any]]:
    """The hidden states in front of the first block, and what the first `blocks` blocks are given beside them. The
    blocks themselves are passed over."""
    states: list[Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        states.append(hidden)
        calls.append((args, kwargs))
        if len(calls) == blocks:
            raise _Recorded
        return hidden

    with ExitStack() as stack:
        for block in adapter.blocks[:blocks]:
            stack.enter_context(standing_in(block, forward))
        try:
            adapter.run(sample)
        except _Recorded:
            return states[0], calls
    raise PrunelabError("the model's forward did not reach its blocks; this adapter does not fit the model")
