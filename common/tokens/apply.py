"""Token pruners at work on a running model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import claimed, refuse_chunks, replaced
from prunelab.common.core.learned import PARTS, fitting
from prunelab.common.core.plan import Report, Site
from prunelab.common.costs.meter import flops, on_meta
from prunelab.common.costs.meter import macs as macs_of
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.base import Adapter
from prunelab.common.tokens.adapters.passes import Application, Trace
from prunelab.common.tokens.role import TokenPruner

STAGES = {"tower": 0, "encoded": 1, "projected": 2, "packed": 3}  # what comes before the layers


class Handle:
    """A method at work on a model. `report()` may be read inside the `with` block or after it."""

    def __init__(self, adapter: Adapter[Any], application: Application) -> None:
        self.adapter = adapter
        self.application = application
        self._remove: Callable[[], None] | None = None

    def start(self) -> None:
        """Put the hooks in."""
        self._remove = self.adapter.install(self.application)

    def stop(self) -> None:
        """Take every hook out; harmless where none is in."""
        remove, self._remove = self._remove, None
        if remove is not None:
            remove()

    @property
    def memory(self) -> dict[str, Any]:
        """What the method remembers from one forward pass to the next."""
        return self.application.memory

    @property
    def state(self) -> dict[str, Any]:
        """What the method's sites left for each other in the last forward pass."""
        return self.adapter.running.state

    def reset(self) -> None:
        """Forget it, as before a new episode."""
        self.application.memory.clear()

    @property
    def computed(self) -> float:
        """Share of the tokens in front of the first layer that the layers worked on, a mean over them and over all that
        passed so far; 1 where nothing passed."""
        counts = [float(count) for count in self.application.trace.attention]
        return sum(counts) / len(counts) / counts[0] if counts[0] else 1.0

    def kept(self) -> list[tuple[Site, Tensor]]:
        """For the last batch: at each site the indices [B, K] in the full sequence of the tokens that went on
        (-1 marks padding). Sites behind a merge are left out, since their tokens have no single one."""
        return list(self.application.trace.kept)

    def macs(self, example: Any = None) -> float:
        """MACs of one sample, scoring included; see `report`."""
        return sum(self._measure(given)[0] * share for given, share in self._examples(example))

    def report(self, example: Any = None, dense: float | None = None) -> Report:
        """Tokens a layer and MACs a sample. Needs no forward pass, except for methods whose counts depend on the
        input, which are costed at the mean counts seen so far. MACs are of inputs as they were seen: of the sizes of
        their images, and of text of their mean length. `example` replaces these, or the model's standard input; dense:
        MACs of the unpruned model where they are known."""
        seen = self.application.trace
        examples = self._examples(example)
        costs = [
            (self._measure(given), self._dense(given) if dense is None else dense, share) for given, share in examples
        ]
        meter = costs[0][0][1]
        counted = seen if seen.samples else meter
        n = counted.samples
        return Report(
            tokens=tuple((a / n, m / n) for a, m in zip(counted.attention, counted.mlp, strict=True)),
            macs=sum(macs * share for (macs, _), _, share in costs),
            scoring_macs=sum(meter.scoring_flops / 2 * share for (_, meter), _, share in costs),
            dense_macs=sum(unpruned * share for _, unpruned, share in costs),
            samples=seen.samples,
            cache_bytes=self.adapter.cache_bytes([a / n for a in counted.attention]),
            standard=bool(seen.samples) and example is None and not self.adapter.seen(seen),
        )

    def _dense(self, example: Any) -> float:
        return self._unhooked(lambda: macs_of(self.adapter.model, example))

    def _examples(self, given: Any) -> list[tuple[Any, float]]:
        """Inputs to count MACs with, and the share of each: the one given, else such as were seen, else the model's
        standard input."""
        if self.application.method.adaptive and not self.application.trace.samples:
            name = self.application.method.name
            raise PrunelabError(f"{name} keeps as many tokens as the input asks for; run the model first")
        trace = self.application.trace
        if given is not None:
            return [(given.to("meta"), 1.0)]
        if len(trace.sizes) > 1 and self.application.method.adaptive:
            raise PrunelabError(
                f"{self.application.method.name} keeps as many tokens as the input asks for, and the inputs had unlike"
                " sizes; report each size by itself"
            )
        return self.adapter.seen(trace) or [(self.adapter.example(), 1.0)]

    def _measure(self, example: Any) -> tuple[float, Trace]:
        """MACs on the meta device and the trace of that pass, with hooks of its own in place of the handle's."""
        seen, model = self.application.trace, self.adapter.model
        meter = Trace(self.adapter.info.depth, measured=seen if self.application.method.adaptive else None)

        def count() -> float:
            attached = self._attach()
            remove = self.adapter.install(replace(self.application, trace=meter, memory={}))
            try:
                return flops(lambda: on_meta(model, example), meter) / 2
            finally:
                remove()
                attached()

        return self._unhooked(count), meter

    def _attach(self) -> Callable[[], None]:
        """The method's learned parts on the model, where they are not (behind the block). Returns what undoes it."""
        parts, model = self.application.parts, self.adapter.model
        own = getattr(model, PARTS, None)
        if parts is None or own is parts:
            return lambda: None
        model.add_module(PARTS, parts)

        def detach() -> None:
            if own is None:
                model._modules.pop(PARTS, None)
            else:
                model.add_module(PARTS, own)

        return detach

    def _unhooked(self, count: Callable[[], float]) -> float:
        active = self._remove is not None
        self.stop()
        try:
            return count()
        finally:
            if active:
                self.start()


def _seeded(seed: int) -> Callable[[torch.device], torch.Generator | None]:
    generators: dict[torch.device, torch.Generator] = {}

    def rng(device: torch.device) -> torch.Generator | None:
        if device.type == "meta":
            return None
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        return generators[device]

    return rng


def check(method: TokenPruner, model: nn.Module) -> tuple[Adapter, list[Site]]:
    """The model's adapter and the method's sites there. Raises PrunelabError where the method cannot run on it."""
    adapter = adapter_for(model)
    sites = [replace(site, index=i) for i, site in enumerate(method.sites(adapter.info))]
    for before, site in pairwise(sites):
        late = (STAGES.get(before.where, 4), before.layer) > (STAGES.get(site.where, 4), site.layer)
        if late or (
            before.layer,
            before.where,
        ) == (site.layer, site.where):
            order = f"layer {site.layer} behind layer {before.layer}"
            raise PrunelabError(f"{method.name} names {order}; name each once, in ascending order")
    adapter.check(method, sites)
    return adapter, sites


@contextmanager
def applied(
    method: TokenPruner,
    model: nn.Module,
    budget: Budget | float,
    *,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int = 0,
) -> Iterator[Handle]:
    """Prune the tokens of every forward pass inside the block; see `prunelab.apply`."""
    with claimed(method, model, services):
        handle = _handle(method, model, budget, services or {}, parts, seed)
        own = getattr(model, PARTS, None)
        restore = _in_one_piece(method, model)
        handle.start()
        try:
            if parts is not None:
                model.add_module(PARTS, parts)
            yield handle
            handle.adapter.pending.read()
        finally:
            handle.stop()
            restore()
            if own is not None:
                model.add_module(PARTS, own)
            else:
                model._modules.pop(PARTS, None)


def _in_one_piece(method: TokenPruner, model: Any) -> Callable[[], None]:
    """Let the model's `generate`, where it has one, read prompts in one piece. Returns what undoes it."""
    if not hasattr(model, "generate"):
        return lambda: None
    own = model.generate

    @functools.wraps(own)
    def generate(*args: Any, **options: Any) -> Any:
        refuse_chunks(method.name, model, options)
        return own(*args, **options)

    return replaced(model, "generate", generate)


def _handle(
    method: TokenPruner,
    model: nn.Module,
    budget: Budget | float,
    services: Mapping[str, Any],
    parts: nn.Module | None,
    seed: int,
) -> Handle:
    """The method on the model's adapter, once everything is known to fit."""
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    adapter, sites = check(method, model)
    info = adapter.info
    used = fitting(method, info, parts, getattr(model, PARTS, None))
    for site in sites:
        budget.at(site.index)
    if len(budget.amounts) > max(1, len(sites)):
        raise PrunelabError(f"the budget names {len(budget.amounts)} amounts but {method.name} has {len(sites)} sites")
    return Handle(adapter, Application(method, budget, sites, Trace(info.depth), _seeded(seed), services, used))
