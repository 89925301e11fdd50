"""Measurements on the whole unpruned model, for methods that decide on the ground of all of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.accumulators import Accumulators, Factories, Wanted
from prunelab.common.weights.adapters.base import View, WeightAdapter
from prunelab.common.weights.backward import Backward, Unchained, apart
from prunelab.common.weights.calibration import Stream, finite, tapped
from prunelab.common.weights.checkpoints import Shelf, Work
from prunelab.common.weights.corpora import Corpus, Labelled, loss_of
from prunelab.common.weights.plan import packed, unpacked
from prunelab.common.weights.prefixes import Prefixes
from prunelab.common.weights.relevance import Rule, Start, flowed_back
from prunelab.common.weights.targets import Accumulator, Decision, Flow, Statistics, Target, Unit, WeightSignals

_NUMBERS = count()  # tell apart changes that are not compared


class ModelProbe:
    """See `prunelab.common.weights.targets.Probe`."""

    def __init__(
        self,
        adapter: WeightAdapter,
        targets: Sequence[Target],
        samples: Sequence[Tensor] | Mapping[str, Sequence[Any]],
        budget: Budget = Budget(1.0),  # noqa: B008  frozen
        signals: Callable[[Target], WeightSignals] | None = None,
        *,
        corpora: Mapping[str, Corpus] | None = None,
        objective: Callable[[Sequence[Any]], Tensor] | None = None,
        work: Work | None = None,
        learned: nn.Module | None = None,
        trained: bool = False,
    ) -> None:
        self.adapter = adapter
        self.targets = targets
        self.streams = samples if isinstance(samples, Mapping) else {"": samples}
        self.samples: list[Any] = [sample for part in self.streams.values() for sample in part]
        self.corpora = {"": Corpus(tuple(self.samples))} if corpora is None else corpora
        self.budget = budget
        self.learned, self.trained = learned, trained
        self._signals = signals
        self._loss = loss_of(adapter, None, adapter.model) if objective is None else objective
        self._work = Work(None) if work is None else work
        self._tried: dict[int, tuple[Hashable, ...]] | None = None  # what a trial changes, by block
        self._once: int | None = None  # the first block that a trial changes as no other will
        self._prefixes = Prefixes(adapter, self.samples)
        self._asked = 0  # how often for gradients

    def signals(self, target: Target) -> WeightSignals:
        return WeightSignals(self.weights(target)) if self._signals is None else self._signals(target)

    def weights(self, target: Target) -> Mapping[str, Tensor]:
        return self.adapter.weights(target)

    @contextmanager
    def trial(self, decisions: Iterable[tuple[Target, Decision]]) -> Iterator[None]:
        if self._tried is not None:
            raise PrunelabError("one trial at a time: leave that `with` block first")
        undo: list[Callable[[], None]] = []
        dense = None if self._work.folder is None else self._work.shelf("dense")
        self._tried, self._once = {}, None
        try:
            for target, decision in decisions:
                undo.append(self.adapter.attempt(target, decision, dense))
                change = bool(decision.kept) if target.whole and not decision.values else next(_NUMBERS)
                if not isinstance(change, bool):
                    self._once = target.block if self._once is None else min(self._once, target.block)
                if change is not True:
                    self._tried[target.block] = (*self._tried.get(target.block, ()), (target.name, change))
            yield
        finally:
            for back in reversed(undo):
                back()
            self._tried = None

    def shelved(self, name: str, results: Iterable[tuple[str, Statistics]]) -> Mapping[str, Statistics]:
        shelf, kept = self._work.shelf(name), {}
        for target, tensors in results:
            shelf.put(target, tensors)
            kept[target] = shelf.lazily(target, next(self.adapter.model.parameters()).device)
        return kept

    @torch.no_grad()
    def candidates(
        self,
        budgets: Mapping[str, Sequence[Budget]],
        solve: Callable[[Target, WeightSignals, Budget], Decision],
        statistics: Mapping[Unit, Factories],
        onward: Mapping[str, int] | None = None,
        name: str = "candidates",
    ) -> StoredCandidates:
        result = StoredCandidates(self._work.shelf(name), {t.name: t for t in self.targets})
        for chain in self.adapter.chains:
            stream = Stream(self.adapter, self.streams[chain.component], chain=chain)
            for block in range(chain.start, chain.stop):
                targets = [t for t in self.targets if t.block == block and t.name in budgets]
                accumulators = Accumulators(Wanted(statistics), targets)
                stream.through(block, accumulators.taps(self.adapter), accumulators.visit, keep=onward is None)
                for target in targets:
                    known = self.signals(target)
                    known = replace(known, statistics={**known.statistics, **accumulators.values(target)})
                    result.add(target, budgets[target.name], partial(solve, target, known))
                if onward is not None:
                    chosen = [(t, result.decision(t.name, onward[t.name])) for t in targets if t.name in onward]
                    with self.trial(chosen):
                        stream.through(block)
        return result

    @torch.no_grad()
    def loss(self, sample: Any) -> Tensor:
        return self._loss([sample])

    @torch.no_grad()
    def logits(self, sample: Tensor) -> Tensor:
        with self._run(sample):
            logits: Tensor = self.adapter.run(sample).logits
        return logits.flatten(0, -2)

    @torch.no_grad()
    def final_state(self, sample: Tensor) -> Tensor:
        last = self.adapter.norm or self.adapter.prefix(len(self.adapter.blocks) - 1)
        with self._run(sample), tapped(self.adapter.model, [last]) as seen:
            self.adapter.run(sample)
        state: Tensor = seen[last][1]
        return state.flatten(0, -2)

    def _run(self, sample: Any) -> AbstractContextManager[None]:
        """Around one run: under a trial it takes up what an earlier one had in common with it."""
        return nullcontext() if self._tried is None else self._prefixes.reused(sample, self._tried, self._once)

    @torch.no_grad()
    def statistics(self, wanted: Mapping[Unit, Factories], corpus: str | None = None) -> dict[str, dict[str, Tensor]]:
        results: dict[str, dict[str, Tensor]] = {}
        for chain in self.adapter.chains:
            samples = self.streams[chain.component] if corpus is None else self._corpus(corpus).sequences
            stream = Stream(self.adapter, samples, chain=chain)
            for block in range(chain.start, chain.stop):
                targets = [target for target in self.targets if target.block == block]
                accumulators = Accumulators(Wanted(wanted), targets)
                stream.through(block, accumulators.taps(self.adapter), accumulators.visit)
                results |= {target.name: accumulators.values(target) for target in targets}
        return results

    def _corpus(self, name: str) -> Corpus:
        if name not in self.corpora:
            given = ", ".join(repr(known) for known in self.corpora) or "none"
            raise PrunelabError(f"the calibration set has no corpus '{name}'; it has {given}")
        return self.corpora[name]

    @torch.no_grad()
    def hidden_states(self, sample: Tensor, normed: bool = True) -> list[Tensor]:
        blocks = [self.adapter.prefix(block) for block in range(len(self.adapter.blocks))]
        last = self.adapter.norm if normed and self.adapter.norm else blocks[-1]
        with tapped(self.adapter.model, [*blocks, last]) as seen:
            self.adapter.run(sample)
        states = [*(seen[block][0][0] for block in blocks), seen[last][1]]
        return [state.flatten(0, -2) for state in states]

    def _items(self, corpus: str | None) -> Sequence[Any]:
        if corpus is not None:
            return self._corpus(corpus).items
        return [item for part in self.corpora.values() for item in part.items]

    def gradients(
        self,
        factories: Mapping[str, Callable[[Target], Accumulator]],
        together: bool = False,
        corpus: str | None = None,
        batch: int = 1,
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """With a folder the gradients flow one block at a time, and what was made of them is written a block at a time:
        no more is held for a deep model than for a flat one."""
        items = self._items(corpus)
        size = max(len(items) if together else batch, 1)
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        holders = [p for target in self.targets for p, _ in self.adapter.holders(target).values()]
        if self._work.folder is not None and apart(self.adapter, holders):
            with suppress(Unchained):
                return self._by_block(factories, batches)
        made, by_parameter, read = self._readers(factories, self.targets)
        with _only_these_learn(self.adapter.model, set(by_parameter)), torch.enable_grad():
            # Each gradient is dropped as soon as it was read, so that one parameter's is held at a time.
            handles = [parameter.register_post_accumulate_grad_hook(read) for parameter in by_parameter]
            try:
                for items in batches:
                    self._loss(items).backward()
            finally:
                for handle in handles:
                    handle.remove()
        return {name: {key: a.value() for key, a in accumulators.items()} for name, accumulators in made.items()}

    def curvature(
        self, factories: Mapping[str, Callable[[Target], Accumulator]], corpus: str | None = None, batch: int = 1
    ) -> Mapping[str, Mapping[str, Tensor]]:
        items = self._items(corpus)
        batches = [items[start : start + batch] for start in range(0, len(items), batch)]
        made, by_parameter, read = self._readers(factories, self.targets)
        parameters = list(by_parameter)
        flow = [torch.zeros_like(parameter) for parameter in parameters]
        turned = [torch.zeros_like(parameter) for parameter in parameters]

        def add(sums: Sequence[Tensor], results: Sequence[Tensor | None], share: float) -> None:
            for one, other in zip(sums, results, strict=True):
                if other is not None:
                    one.add_(other.detach(), alpha=share)

        # Attention's fast kernels cannot be derived twice.
        with _only_these_learn(self.adapter.model, {*parameters}), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for part in batches:
                add(flow, torch.autograd.grad(self._loss(part), parameters, allow_unused=True), len(part) / len(items))
            for part in batches:
                grads = torch.autograd.grad(self._loss(part), parameters, create_graph=True, allow_unused=True)
                along = torch.stack([(g * f).sum() for g, f in zip(grads, flow, strict=True) if g is not None]).sum()
                add(turned, torch.autograd.grad(along, parameters, allow_unused=True), len(part) / len(items))
            for parameter, product in zip(parameters, turned, strict=True):
                parameter.grad = product
                read(parameter)
        return {name: {key: a.value() for key, a in accumulators.items()} for name, accumulators in made.items()}

    def _by_block(self, factories: Mapping[str, Callable[[Target], Accumulator]], batches: Sequence[Any]) -> Any:
        """See `Backward`."""
        result, states = self._work.shelf(f"gradients_{self._asked}"), self._work.shelf("states")
        self._asked += 1
        device = next(self.adapter.model.parameters()).device
        learning = {p for target in self.targets for p, _ in self.adapter.holders(target).values()}
        with _only_these_learn(self.adapter.model, learning), torch.enable_grad():
            backward = Backward(self.adapter, self._loss, batches, states)
            for index in reversed(range(len(self.adapter.blocks))):
                targets = [target for target in self.targets if target.block == index]
                made, by_parameter, read = self._readers(factories, targets)

                def done(parameters: Sequence[nn.Parameter] = list(by_parameter), read: Any = read) -> None:
                    for parameter in parameters:
                        if parameter.grad is not None:
                            read(parameter)

                backward.through(index, done)
                for name, accumulators in made.items():
                    result.put(name, {key: a.value() for key, a in accumulators.items()})
                    accumulators.clear()
        return {target.name: result.lazily(target.name, device) for target in self.targets if target.name in result}

    def _readers(
        self, factories: Mapping[str, Callable[[Target], Accumulator]], targets: Sequence[Target]
    ) -> tuple[dict[str, dict[str, Accumulator]], Any, Callable[[Tensor], None]]:
        """What accumulates for each target, whom a parameter tells of its gradient, and what does so and drops it."""
        made: dict[str, dict[str, Accumulator]] = defaultdict(dict)
        by_parameter: dict[nn.Parameter, list[tuple[str, View, list[Accumulator]]]] = defaultdict(list)
        for target in targets:
            for role, (parameter, view) in self.adapter.holders(target).items():
                member = target if target.loose else replace(target, role=role)
                own = {name: factory(member) for name, factory in factories.items()}
                by_parameter[parameter].append((target.name, view, list(own.values())))
                made[target.name] |= {name if target.loose else f"{name}.{role}": a for name, a in own.items()}

        def read(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
            if not finite(parameter.grad):
                name = by_parameter[parameter][0][0]
                raise PrunelabError(f"the gradient of {name} holds NaN or infinite values; use a wider dtype")
            for _, view, accumulators in by_parameter[parameter]:
                for accumulator in accumulators:
                    accumulator.update(view(parameter.grad))
            parameter.grad = None

        return made, by_parameter, read

    def relevance(
        self,
        factories: Mapping[str, Callable[[Target], Accumulator]],
        rule: Rule | None = None,
        first: Rule | None = None,
        start: Start = "one",
        corpus: str | None = None,
        batch: int = 1,
    ) -> dict[str, dict[str, Tensor]]:
        items, graph = self._items(corpus), self.adapter.graph()
        if graph is None or not all(isinstance(item, Labelled) for item in items):
            raise PrunelabError("what flows back starts at labels; give pairs of inputs and labels to calibrate with")
        made: dict[str, list[tuple[str, dict[str, Accumulator]]]] = {
            target.name: [
                (path, {f"{name}.{i}": factory(target) for name, factory in factories.items()})
                for i, path in enumerate(self.adapter.makers(target))
            ]
            for target in self.targets
        }
        for start_at in range(0, len(items), batch):
            part = items[start_at : start_at + batch]
            inputs, labels = torch.stack([i.inputs for i in part]), torch.stack([i.label for i in part])
            inputs = inputs.to(next(self.adapter.model.parameters()).dtype)
            flows = flowed_back(self.adapter.model, graph, inputs, labels.to(inputs.device), rule, first, start)
            for path, accumulators in (layer for layers in made.values() for layer in layers):
                outputs, back = (tensor.flatten(2) if tensor.dim() > 2 else tensor[..., None] for tensor in flows[path])
                for accumulator in accumulators.values():
                    accumulator.update(Flow(outputs, back))
        return {
            name: {key: a.value() for _, accumulators in layers for key, a in accumulators.items()}
            for name, layers in made.items()
        }


class StoredCandidates:
    """See `prunelab.common.weights.targets.Candidates`. Each decision is packed and, with a folder, on disk."""

    def __init__(self, shelf: Shelf, targets: Mapping[str, Target]) -> None:
        self.shelf, self.targets = shelf, targets
        self.levels: dict[str, Sequence[Budget]] = {}

    def add(self, target: Target, budgets: Sequence[Budget], solve: Callable[[Budget], Decision]) -> None:
        """Decide at every budget, where an earlier run has not."""
        self.levels[target.name] = budgets
        for index, budget in enumerate(budgets):
            key = f"{target.name}|{index}|{budget}"
            if key not in self.shelf:
                self.shelf.put(key, packed(solve(budget)))

    def decision(self, target: str, index: int) -> Decision:
        key = f"{target}|{index}|{self.levels[target][index]}"
        return unpacked(self.targets[target], self.shelf.get(key))

    def decisions(self, chosen: Mapping[str, int]) -> Iterator[tuple[Target, Decision]]:
        for name, index in chosen.items():
            yield self.targets[name], self.decision(name, index)


@contextmanager
def _only_these_learn(model: nn.Module, parameters: set[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone; the model's own settings and gradients come back at the end."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise PrunelabError("weights made under torch.inference_mode have no gradients; load the model outside of it")
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
        parameter.requires_grad_(parameter in parameters)
    try:
        yield
    finally:
        for parameter, learns, gradient in before:
            parameter.requires_grad_(learns)
            parameter.grad = gradient
