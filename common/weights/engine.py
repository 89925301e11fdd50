"""One run of a weight-pruning method on a model: the two orders of work, and the steps they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import masks
from prunelab.common.weights.accumulators import Accumulators
from prunelab.common.weights.adapters.base import Chain, WeightAdapter
from prunelab.common.weights.calibration import Stream
from prunelab.common.weights.checkpoints import Work
from prunelab.common.weights.corpora import Corpus
from prunelab.common.weights.plan import Tally, WeightPlan, bits, packed, unbits
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.quantisation import MOST
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Decision, Statistics, Target, WeightSignals

SCORES = ""  # name of a target's scores among its statistics, one that no statistic has


@dataclass(frozen=True)
class Engine:
    """What is pruned by what, from what. Targets that leave with a structure around them leave the list as well.

    samples: of each chain of blocks by its component. alive: masks of what earlier rounds left, by target. final: in
    rounds before the last what goes is silenced, and stays where it is. learned: see `Probe`. worth: scores of layers
    and sublayers by name, of a run that decides at the end.
    """

    method: WeightPruner
    adapter: WeightAdapter
    targets: list[Target]
    budget: Budget
    samples: Mapping[str, list[Any]]
    corpora: Mapping[str, Corpus]
    objective: Callable[[Sequence[Any]], Tensor]
    base: WeightAdapter | None
    seed: int
    work: Work
    progress: bool
    learned: nn.Module | None = None
    trained: bool = False
    alive: Mapping[str, Tensor] = field(default_factory=dict)
    final: bool = True
    tally: Tally = field(default_factory=Tally)
    worth: dict[str, float] = field(default_factory=dict)

    def go(self) -> None:
        """Prune the model."""
        precomputed = self.precompute()
        with torch.no_grad():
            if self.method.sequential:
                self.block_by_block(precomputed)
            else:
                self.all_at_once(precomputed)

    def block_by_block(self, precomputed: Mapping[str, Statistics]) -> None:
        """Measure a block on the stream that the pruned blocks before it gave, decide, and send the stream on."""
        budgets = self.budgets(precomputed)
        depth, done = len(self.adapter.blocks), 0
        while done < depth and self.work.was_decided(done):
            for targets in self.steps(done):
                for target, decision in WeightPlan({}, targets, self.work.plan).decisions():
                    self.write(target, decision)
            done += 1
        for chain, block, stream in self.walk(done):
            tensors: dict[str, Tensor] = {}
            for targets in self.steps(block):
                accumulators = self.measure(stream, block, targets, keep=False)
                for target in targets:
                    signals = self.signals(target, {**precomputed.get(target.name, {}), **accumulators.values(target)})
                    tensors |= self.carry_out(target, self.method.solve(target, signals, budgets[target.name]))
            self.work.decided(block, tensors)
            if chain is not None and stream is not None and block < chain.stop - 1:
                stream.through(block)
                self.work.moved(block + 1, stream.hidden)

    def all_at_once(self, precomputed: Mapping[str, Statistics]) -> None:
        """Measure and score every block on the dense stream, decide on all, and then prune them."""
        evidence = self.evidence(precomputed)
        chosen = self.select(evidence)
        for block in [*range(len(self.adapter.blocks)), -1]:
            tensors: dict[str, Tensor] = {}
            for target in self.at(block):
                signals = self.signals(target, evidence[target.name])
                mask = unbits(chosen[target.name], target.shape).to(self.device)
                share = self.method.stand_ins(target, mask)
                decision = Decision(mask, self.method.update(target, signals, mask), share=share)
                tensors |= self.carry_out(target, decision)
            self.work.decided(block, tensors)

    # -- steps of a run that decides block by block ------------------------------------------------------------------

    def steps(self, block: int) -> Iterator[list[Target]]:
        """The targets of a block in the order they are decided: its structures, and when these are gone (by the time
        the next step is asked for) the weights that were left, which are then measured without them, all at once or in
        turn."""
        weights = [target for target in self.at(block) if target.loose]
        structures = [target for target in self.at(block) if not target.loose]
        chained = [target for target in structures if target.unit == "stream"]  # each is measured behind the one before
        yield from ([target] for target in chained)
        structures = [target for target in structures if target.unit != "stream"]
        if structures:
            yield structures
        if structures and weights:
            left = {target.name for unit in ("linear", "tensor") for target in self.adapter.targets(unit)}
            lost = {target.name for target in weights} - left
            self.targets[:] = [target for target in self.targets if target.name not in lost]
            weights = [target for target in weights if target.name in left]
        if not self.method.in_turn:
            yield from [weights] if weights else []
            return
        turns: dict[str, list[Target]] = {}
        for target in weights:  # experts of a block take each turn together
            turns.setdefault((target.source or target.name).replace(f".{target.expert}.", "."), []).append(target)
        yield from turns.values()

    def budgets(self, precomputed: Mapping[str, Statistics]) -> dict[str, Budget]:
        """The budget of every target."""
        known = [self.signals(target, precomputed.get(target.name, {})) for target in self.targets]
        amounts = self.method.allocate(self.targets, known, self.budget)
        check_budgets(self.targets, amounts)
        return {target.name: amount for target, amount in zip(self.targets, amounts, strict=True)}

    # -- steps of a run that decides at the end ----------------------------------------------------------------------

    def evidence(self, precomputed: Mapping[str, Statistics]) -> dict[str, Mapping[str, Tensor]]:
        """By target its statistics, and its scores under SCORES."""
        evidence: dict[str, Mapping[str, Tensor]] = {}
        depth, done = len(self.adapter.blocks), 0
        while done < depth and (result := self.work.recalled(f"{done:04d}", self.device)) is not None:
            evidence |= result
            done += 1
        for chain, block, stream in self.walk(done):
            accumulators = self.measure(stream, block, self.at(block), keep=True)
            measured: dict[str, Mapping[str, Tensor]] = {}
            for target in self.at(block):
                seen = {**precomputed.get(target.name, {}), **accumulators.values(target)}
                signals = self.signals(target, seen)
                scores = self.method.score(target, signals)
                masks.refuse_nan(scores, target.name)
                kept = {} if self.method.forgets else seen
                measured[target.name] = {**kept, SCORES: signals.without_gone(scores)}
            evidence |= self.work.measured(f"{block:04d}", measured, self.device)
            if chain is not None and stream is not None and block < chain.stop - 1:
                self.work.moved(block + 1, stream.hidden)
        return evidence

    def select(self, evidence: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The masks by target as bits, all checked before any of them is used."""
        signals = [self.signals(target, evidence[target.name]) for target in self.targets]
        scores = Scores([evidence[target.name] for target in self.targets])
        self.worth.update({t.name: float(s) for t, s in zip(self.targets, scores, strict=True) if t.whole})
        chosen: dict[str, Tensor] = {}
        alive = [False, False]  # whether there are whole layers or sublayers, and whether any stays
        for target, mask in zip(
            self.targets, self.method.select(self.targets, signals, scores, self.budget), strict=True
        ):
            self.check(target, Decision(mask, share=self.method.stand_ins(target, mask)))
            chosen[target.name] = bits(mask)
            alive = [alive[0] or target.whole, alive[1] or (target.whole and bool(mask.any()))]
        if alive == [True, False]:
            raise PrunelabError(f"{self.method.name} would remove all {self.targets[0].unit}; keep more")
        return chosen

    # -- shared steps ------------------------------------------------------------------------------------------------

    def precompute(self) -> Mapping[str, Statistics]:
        """What the method measures on the whole dense model."""
        if (result := self.work.recalled("precompute", self.device)) is not None:
            if self.learned is not None and not self.trained:
                self.learned.load_state_dict(self.work.shelf("learned").get("state"))
            return result
        probe = ModelProbe(
            self.adapter, self.targets, self.samples, self.budget, lambda t: self.signals(t, {}),
            corpora=self.corpora, objective=self.objective, work=self.work, learned=self.learned, trained=self.trained,
        )  # fmt: skip
        with torch.inference_mode(False), torch.enable_grad():
            precomputed = self.method.precompute(probe)
        if self.learned is not None and not self.trained:
            self.work.shelf("learned").put("state", self.learned.state_dict())
        return self.work.measured("precompute", precomputed, self.device) if precomputed else {}

    @property
    def device(self) -> torch.device:
        return next(self.adapter.model.parameters()).device

    def at(self, block: int) -> list[Target]:
        """The targets of a block, or those outside of all blocks (-1)."""
        return [target for target in self.targets if target.block == block]

    def walk(self, done: int) -> Iterator[tuple[Chain | None, int, Stream | None]]:
        """The blocks from `done` on, chain by chain, with the stream in front of each, and at last what lies outside of
        all blocks (-1)."""
        steps: list[tuple[Chain | None, int]] = [
            (chain, block) for chain in self.adapter.chains for block in range(max(done, chain.start), chain.stop)
        ]
        current, stream = None, None
        for chain, block in track([*steps, (None, -1)], self.method.name, disable=not self.progress):
            if chain is not current:
                current, stream = chain, None if chain is None else self.stream(chain, block)
            yield chain, block, stream

    def signals(self, target: Target, statistics: Statistics) -> WeightSignals:
        """What the method may see of a target. Its draws depend on the seed and its name alone."""
        draws = hashlib.sha256(f"{self.seed}|{target.name}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(draws[:7], "big"))
        base = None if self.base is None else self.base.weights(target)
        return WeightSignals(self.adapter.weights(target), statistics, base, rng, self.alive.get(target.name))

    def stream(self, chain: Chain, block: int) -> Stream | None:
        """The calibration set in front of a block, or None where nothing is measured on it. States kept by an earlier
        run are taken up; the blocks behind the last of them are run again, pruned where they already are."""
        calibrated = any(self.method.statistics(unit) for unit in self.method.units)
        if not calibrated or not self.method.measures(chain.component):
            return None
        start = block
        while start > chain.start and not self.work.has_hidden(start):
            start -= 1
        stream = Stream(self.adapter, self.samples[chain.component], self.work.hidden(start, self.device), chain)
        for passed in range(start, block):
            stream.through(passed)
        return stream

    def measure(self, stream: Stream | None, block: int, targets: Sequence[Target], keep: bool) -> Accumulators:
        """The statistics of targets of a block over the calibration set."""
        accumulators = Accumulators(self.method, targets)
        if stream is not None and block >= 0 and (accumulators.owned or keep):
            stream.through(block, accumulators.taps(self.adapter), accumulators.visit, keep)
        return accumulators

    def check(self, target: Target, decision: Decision) -> None:
        """Refuse a decision that leaves a target empty or that the model cannot carry."""
        if decision.mask.shape != target.shape or decision.mask.dtype != torch.bool:
            raise TypeError(f"{self.method.name} gives {target.name} a mask that is not bool {target.shape}")
        if not target.whole and target.unit != "tensor" and decision.kept == 0:
            units = {"linear": "weights"}.get(target.unit, target.unit)
            raise PrunelabError(f"{self.method.name} would remove all {units} of {target.name}; keep more")
        if not all(bool(torch.isfinite(value).all()) for value in decision.values.values()):
            raise PrunelabError(f"{self.method.name} gives {target.name} NaN or infinite values; use a wider dtype")
        self.adapter.check(target, decision)

    def carry_out(self, target: Target, decision: Decision) -> dict[str, Tensor]:
        """Prune the target, and return the decision as it is kept."""
        decision = decision if self.final else replace(decision, remove=False)
        self.check(target, decision)
        decision = decision.like(self.adapter.weights(target))
        kept = packed(decision)
        self.write(target, decision)
        return _flat({target.name: kept})

    def write(self, target: Target, decision: Decision) -> None:
        """Prune the target, and count what that did."""
        self.tally.write(self.adapter, target, decision)


class Scores(Sequence[Tensor]):
    """The scores of targets, each read from its evidence when it is asked for."""

    def __init__(self, evidence: Sequence[Mapping[str, Tensor]]) -> None:
        self.evidence = evidence

    def __len__(self) -> int:
        return len(self.evidence)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Scores(self.evidence[place])
        return self.evidence[place][SCORES]


def check_budgets(targets: Sequence[Target], budgets: Sequence[Budget]) -> None:
    """Refuse budgets that leave nothing, or patterns that do not divide a row."""
    for target, budget in zip(targets, budgets, strict=True):
        if budget.unit == "pattern" and target.unit != "linear":
            raise PrunelabError(f"the pattern {budget} is for single weights, and {target.name} has {target.unit}")
        if target.whole or target.unit == "tensor":
            continue
        if budget.unit == "bits":
            if target.unit != "linear" or budget.amounts[0] not in range(1, MOST + 1):
                raise PrunelabError(f"{target.name}: linears become codes of 1 to {MOST} whole bits, not {budget}")
            continue
        try:
            gone = budget.pruned(target.shape[-1])
        except PrunelabError as error:
            raise PrunelabError(f"{target.name}: {error}") from None
        if gone >= target.shape[-1]:
            raise PrunelabError(f"the budget {budget} would remove everything in {target.name}; keep more")


def _flat(nested: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by `target|name`, as files hold them."""
    return {f"{target}|{name}": tensor for target, tensors in nested.items() for name, tensor in tensors.items()}
