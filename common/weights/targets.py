"""What weight pruning speaks of: targets, what a target lets a method see, and what the method decided.

Shape letters here: T tokens of one calibration sequence, C channels a module reads, D width of the residual stream,
E experts, k experts a token is sent to.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.hadamard import turn

Unit = Literal[
    "linear", "heads", "channels", "experts", "layers", "sublayers", "tensor", "attention_output", "hidden", "stream"
]
Statistics = Mapping[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A part of a model whose units can be pruned.

    unit:   `linear` has single weights as units, `heads` key-value groups of attention (with plain multi-head
            attention these are the heads), `channels` intermediate channels of an MLP, `experts` and `layers` what
            they say, `sublayers` the attention or the MLP of a layer with its norm, `hidden` the channels of the
            residual stream, `stream` its directions behind the embedding, an attention or an MLP, in a basis of that
            place: the value `basis` [D, kept] of a decision, whose mask keeps the leading ones, `tensor` the entries of
            any other parameter, `attention_output` single query heads where the output projection reads them, which are
            silenced and never leave;
    name:   unique in the model, and the same in every model of its architecture;
    block:  index of the block it lies in, -1 outside of all;
    role:   its place in the block (`self_attn.q_proj`), `attention` or `mlp` for sublayers, the unit for other
            structures;
    shape:  shape of scores and mask: that of the weight, [out, in], or [units];
    size:   parameters one unit holds;
    span:   consecutive input channels one unit covers (head size times query heads of a group; 1 for channels); of a
            linear that reads heads, those of a head;
    source: targets of equal source read the same input;
    expert: index of the expert a `linear` target belongs to, -1 for none;
    least:  units the model cannot do without (of experts, as many as a token is sent to);
    read:   parameters that read one unit, which become zero where it is silenced rather than removed;
    component: of a model of several components, the one it lies in;
    part:   the attention, MLP or other part of its block that it lies in, if that holds linears: `self_attn`; empty for
            the norms between them and for what lies outside of blocks.
    """

    unit: Unit
    name: str
    block: int
    role: str
    shape: tuple[int, ...]
    size: int = 1
    span: int = 1
    source: str = ""
    expert: int = -1
    least: int = 1
    read: int = 0
    component: str = ""
    part: str = ""

    @property
    def units(self) -> int:
        """Number of units."""
        return math.prod(self.shape)

    @property
    def loose(self) -> bool:
        """Whether its units are single entries of a parameter, which become zero where they go."""
        return self.unit in ("linear", "tensor")

    @property
    def whole(self) -> bool:
        """Whether it is one unit, which stays as it is or leaves."""
        return self.unit in ("layers", "sublayers")

    @property
    def parameters(self) -> int:
        """Parameters of all units."""
        return self.units * self.size


@dataclass(frozen=True)
class Routing:
    """How one sequence went through a mixture of experts.

    residual [T, D] enters the mixture's norm, logits [T, E] are the router's, chosen [T, k] the experts of each token
    and gates [T, k] their final weights, routed [T, D] the weighted sum of what they gave (shared experts apart).
    computed: what an expert of these weights, [2I, D] and [D, I], gives for tokens [n, D]. among: the experts chosen
    [T, k] and their gates where only those numbered [K] are left.
    """

    residual: Tensor
    logits: Tensor
    chosen: Tensor
    gates: Tensor
    routed: Tensor
    expert: Callable[[int, Tensor], Tensor] = field(repr=False)
    computed: Callable[[Tensor, Tensor, Tensor], Tensor] | None = field(default=None, repr=False)
    among: Callable[[Tensor], tuple[Tensor, Tensor]] | None = field(default=None, repr=False)

    def outputs(self, index: int, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [n] sent to an expert, the slot [n] of each among its k choices, and the expert's unweighted outputs
        [n, D] for them; inputs [T, D] are the mixture's."""
        token, slot = torch.where(self.chosen == index)
        return token, slot, self.expert(index, inputs[token])


@dataclass(frozen=True)
class Observation:
    """One calibration sequence at one target.

    inputs [T, C]: what the target reads: the linear's input; for heads the output projection's, for channels the
    down projection's, for experts the mixture's normed input, for layers the block's. Linears of an expert read
    only the tokens sent to it, so that T may be 0; `rows` are then their places in the sequence. before and after
    [T, D]: the block's hidden states. tokens: the sequence itself, as it was given. weights as in `WeightSignals`.
    attend: see `attention`. count: see `frequencies`. read: see `given`. memo: one of this sequence at this block,
    from the first pass that measures the block to the last, for what must not change with the decisions between
    them.
    """

    inputs: Tensor
    weights: Mapping[str, Tensor]
    before: Tensor
    after: Tensor
    tokens: Tensor
    routing: Routing | None = None
    rows: Tensor | None = None
    attend: Callable[[], Tensor] | None = field(default=None, repr=False)
    count: Callable[[], Tensor] | None = field(default=None, repr=False)
    read: Callable[[], Mapping[str, Tensor]] | None = field(default=None, repr=False)
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def attention(self) -> Tensor:
        """Attention that each token of the sequence receives in this block, summed over queries and heads. It is
        computed when it is first read, once a sequence and pass for all targets of the block."""
        if self.attend is None:
            raise PrunelabError("these blocks show no attention; use a method that weighs no tokens by it")
        return self.attend()

    @property
    def received(self) -> Tensor:
        """That attention [T] of the inputs' tokens alone."""
        return self.attention if self.rows is None else self.attention[self.rows]

    @property
    def given(self) -> Mapping[str, Tensor]:
        """What each weight that reads the units of a structure is given [T, n], by role: columns are the weight's."""
        if self.read is None:
            raise PrunelabError("it is not known here what reads these units; use a method that needs no such inputs")
        return self.read()

    @property
    def frequencies(self) -> Tensor:
        """How often the calibration set holds each token of the sequence."""
        if self.count is None:
            raise PrunelabError("this calibration set is no text, whose tokens could be counted")
        return self.count()


@dataclass(frozen=True)
class Flow:
    """What a layer puts out for a batch, and the gradient or relevance that flows back to there: both
    [B, units, places]."""

    outputs: Tensor
    back: Tensor


class Accumulator(ABC):
    """A statistic that grows with every calibration sequence.

    shared: it reads `inputs` alone, so that targets of one source can share it.
    """

    shared: ClassVar[bool] = False

    @abstractmethod
    def update(self, observed: Any) -> None:
        """Take in one sequence: an `Observation`; or what flows back, a `Flow` or the gradient of the weight."""

    @abstractmethod
    def value(self) -> Tensor:
        """The statistic."""


@dataclass(frozen=True)
class WeightSignals:
    """What a target lets a method see.

    weights: the model's own tensors by role, to read and never to write: `weight` of a linear [out, in]; `q` `k` `v`
        `o` of heads; `gate` `up` `down` of channels (no `gate` in a plain MLP; where several layers make or read them,
        as in convolutional networks, also `up.0`, `down.0` and so on, one by one); `gate_up` [E, 2I, D], `down`
        [E, D, I] and `router` [E, D] of experts; `weight` of other tensors; biases, where there are any, as `o.bias`;
        of layers and sublayers every parameter under its path, as it is stored;
    statistics: by the names under which the method asked for them;
    base: the same tensors in the model before fine-tuning, where `prune` was given one;
    rng: draws that depend on the seed and the target alone;
    alive: mask of the units that earlier rounds have left, None in the first round.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics = field(default_factory=dict)
    base: Mapping[str, Tensor] | None = None
    rng: torch.Generator | None = None
    alive: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight of a linear or tensor target."""
        return self.weights["weight"]

    def without_gone(self, scores: Tensor) -> Tensor:
        """Scores of which those of units that earlier rounds took are the lowest there are, so that they go first."""
        return scores if self.alive is None else scores.masked_fill(~self.alive.to(scores.device), -torch.inf)

    def __getitem__(self, name: str) -> Tensor:
        """A statistic."""
        if name not in self.statistics:
            raise PrunelabError(f"the statistic '{name}' was not asked for; name it in statistics() or precompute()")
        return self.statistics[name]


@dataclass(frozen=True)
class Quantised:
    """A weight [R, C] as whole numbers: `scale * (codes - zero)`, with a scale and a zero for every `group` columns of
    a row.

    codes: [R, C] uint8, below 2^bits; scale, zero: [R, G] float32, G groups of columns the last maybe shorter.
    symmetric: zero follows from bits and is not stored. index: [C] int32, the group of every column where groups are
    not consecutive columns. turned: the codes are of the weight behind a Hadamard rotation of its columns, taken so
    many columns apart (`prunelab.common.weights.hadamard.turn`); 0 for none. Who computes with codes turns the inputs.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    symmetric: bool = False
    index: Tensor | None = None
    turned: int = 0

    def dense(self) -> Tensor:
        """The weight [R, C] that the codes stand for, in float32."""
        of_column = self.index
        if of_column is None:
            of_column = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group
        weight = self.scale[:, of_column] * (self.codes.float() - self.zero[:, of_column])
        return turn(weight, self.turned, back=True) if self.turned else weight

    @property
    def bytes(self) -> int:
        """What it takes: packed codes, a half-precision scale a group, a zero as wide as a code, and where groups are
        not consecutive columns the group of every column in 32 bits."""
        stored = self.bits * self.codes.numel() + 16 * self.scale.numel()
        stored += 0 if self.symmetric else self.bits * self.zero.numel()
        return math.ceil((stored + (0 if self.index is None else 32 * self.index.numel())) / 8)


@dataclass(frozen=True)
class Decision:
    """What becomes of a target: mask, True where a unit stays, and new values by the roles of `WeightSignals.weights`.

    values: of the unpruned size, the mask cuts them; a bias named there is created where the model has none.
    whole: the mask tells which changes of fine-tuning stay, and the values stand for all entries as they are.
    remove: units of a structure leave the model; otherwise what reads them is set to zero, which computes the same and
        leaves every shape as it is.
    code: the new weight of a linear as whole numbers, in place of a value.
    share: of experts [units], the one that stays which is used in the place of each, for those that stay their own
        number, and -1 where none is, so that what the expert gave is left out. The router keeps the rows of all.
    """

    mask: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)
    whole: bool = False
    remove: bool = True
    code: Quantised | None = None
    share: Tensor | None = None

    def like(self, weights: Mapping[str, Tensor]) -> Decision:
        """The decision for weights by role: scales of codes are stored in their dtype, and so the model has them."""
        if self.code is None:
            return self
        scale = self.code.scale.to(weights["weight"].dtype).float()
        return replace(self, code=replace(self.code, scale=scale))

    @cached_property
    def kept(self) -> int:
        """Number of units that stay."""
        return int(self.mask.sum())


class Candidates(Protocol):
    """Decisions on targets at several budgets, to be tried in any combination."""

    def decision(self, target: str, index: int) -> Decision:
        """The candidate of a target, by name, at its index-th budget."""

    def decisions(self, chosen: Mapping[str, int]) -> Iterable[tuple[Target, Decision]]:
        """One candidate of each target, for `Probe.trial`, read one by one."""


class Probe(Protocol):
    """The whole unpruned model, for methods that measure it before the calibration set streams through its blocks."""

    targets: Sequence[Target]
    samples: list[Any]
    corpora: Mapping[str, Any]  # by name, of items and sequences; see `prunelab.common.weights.corpora.Corpus`
    budget: Budget
    learned: Any  # the module of `WeightPruner.build`, and whether it was trained before
    trained: bool

    def signals(self, target: Target) -> WeightSignals:
        """What the method may see of a target before anything is measured, with the draws it will see later."""

    def statistics(
        self, wanted: Mapping[Unit, Mapping[str, Callable[[Target], Accumulator]]], corpus: str | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Statistics by target and name of the dense model's stream, asked for by unit and name; over all sequences or
        those of one corpus."""

    def gradients(
        self,
        factories: Mapping[str, Callable[[Target], Accumulator]],
        together: bool = False,
        corpus: str | None = None,
        batch: int = 1,
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Statistics by target and name of the loss gradients of each linear's weight, one backward pass for `batch`
        items of the calibration set, or of one corpus of it; `together` one for the mean of all their losses, which
        gives each gradient once and whole. Of heads and channels each projection has statistics of its own, `name.q`
        and so on: the factory gets the target with that role."""

    def relevance(
        self,
        factories: Mapping[str, Callable[[Target], Accumulator]],
        rule: Any = None,
        first: Any = None,
        start: Literal["one", "logit"] = "one",
        corpus: str | None = None,
        batch: int = 1,
    ) -> dict[str, dict[str, Tensor]]:
        """Statistics by target and name of what the units put out and of what flows back to there (`Flow`), one pass
        for `batch` labelled items: relevance by a `rule`, of the first layer by `first` (see
        `prunelab.common.weights.relevance`), or without one gradients of the cross entropy. Where several layers make
        a unit together, each has statistics of its own, `name.0` and so on."""

    def curvature(
        self, factories: Mapping[str, Callable[[Target], Accumulator]], corpus: str | None = None, batch: int = 1
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Statistics, as those of `gradients`, of the Hessian of the loss times its gradient, both of all items: how a
        weight moves the squared norm of the gradient. Each accumulator is told once."""

    def trial(self, decisions: Iterable[tuple[Target, Decision]]) -> AbstractContextManager[None]:
        """The model under these decisions for the length of a `with` block; then it is again what it was, to the bit.
        Decisions are taken from the iterator one by one; structures are silenced rather than removed, and experts
        cannot be tried. With a work folder what they change is kept on disk, and memory does not grow with depth."""

    def shelved(self, name: str, results: Iterable[tuple[str, Statistics]]) -> Mapping[str, Statistics]:
        """Tensors by target that are taken one target after the other: with a work folder they are written there under
        that name, and each is read when it is asked for."""

    def candidates(
        self,
        budgets: Mapping[str, Sequence[Budget]],
        solve: Callable[[Target, WeightSignals, Budget], Decision],
        statistics: Mapping[Unit, Mapping[str, Callable[[Target], Accumulator]]],
        onward: Mapping[str, int] | None = None,
        name: str = "candidates",
    ) -> Candidates:
        """What `solve` decides on every target at each of its budgets, block by block, from these statistics. The
        stream is the dense model's, or goes on through each target's `onward`-th candidate. Kept on disk where the run
        has a folder, under a name; a run that goes on takes up what is there."""

    def loss(self, sample: Any) -> Tensor:
        """The objective on one item of the calibration set, by default the model's own loss on one sequence."""

    def logits(self, sample: Tensor) -> Tensor:
        """The model's logits [T, V] on one sequence."""

    def final_state(self, sample: Tensor) -> Tensor:
        """The hidden state [T, D] of one sequence behind the last block and the final norm."""

    def hidden_states(self, sample: Tensor, normed: bool = True) -> Sequence[Tensor]:
        """The hidden states [T, D] of one sequence in front of every block, and behind the last one; these where
        `normed` behind the final norm."""

    def weights(self, target: Target) -> Mapping[str, Tensor]:
        """The target's tensors, to read; `trial` changes them."""
