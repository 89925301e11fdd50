"""What every adapter offers: hooks that carry out plans, and the record of what was pruned."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import padded_first, refuse_checkpointing, refuse_tracing
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site, take, unscaled
from prunelab.common.core.signals import Checks, Reading
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals, View


class Trace:
    """What one application saw, summed over samples: the tokens every layer's attention and MLP worked on.

    Threads add to it together. Counts that stand on a device stay there until the trace is read.
    """

    def __init__(self, depth: int, measured: Trace | None = None) -> None:
        self.samples = 0
        self.sizes: dict[tuple[int, ...], int] = {}  # samples by the size of their images, where that may vary
        self.kept: list[tuple[Site, Tensor]] = []  # of the last batch
        self.attribution: Any = None  # how the last batch's tokens came from patches, where a family keeps that
        self.scoring_flops = 0
        self.counter: FlopCounterMode | None = None
        self.measured = measured  # mean counts to cost at, for methods whose counts depend on the input
        self._counts: dict[str, list[Any]] = {part: [0.0] * depth for part in ("attention", "mlp")}
        self._images: dict[int, tuple[Any, int]] = {}  # outputs of plans for single images, and images, by site
        self._lock = threading.Lock()

    @classmethod
    def of(cls, tokens: Sequence[float]) -> Trace:
        """Of one sample that has so many tokens in each layer."""
        trace = cls(len(tokens))
        trace.samples, trace._counts = 1, {part: list(tokens) for part in ("attention", "mlp")}
        return trace

    def add(self, part: str, layer: int, tokens: int | Tensor) -> None:
        """So many tokens went through the `attention` or `mlp` of a layer."""
        with self._lock:
            self._counts[part][layer] = self._counts[part][layer] + tokens

    def decided(self, site: Site, reduce: Gather | Mix, images: int) -> None:
        """A plan for images by themselves."""
        outputs: Any = images * reduce.outputs if reduce.valid is None else reduce.valid.sum()
        with self._lock:
            before, seen = self._images.get(site.index, (0, 0))
            self._images[site.index] = (before + outputs, seen + images)

    def saw(self, size: tuple[int, ...] | None, samples: int) -> None:
        """So many samples were images of that size (channels, height, width)."""
        if size is not None:
            with self._lock:
                self.sizes[size] = self.sizes.get(size, 0) + samples

    def begin(self, samples: int) -> None:
        """A batch of so many samples enters the model."""
        with self._lock:
            self.samples += samples

    def mark(self) -> Callable[[], None]:
        """What takes back all that is counted from here on."""
        counts, samples = {part: list(layers) for part, layers in self._counts.items()}, self.samples

        def undo() -> None:
            with self._lock:
                self._counts, self.samples = counts, samples

        return undo

    @property
    def attention(self) -> list[float]:
        return [float(tokens) for tokens in self._counts["attention"]]

    @property
    def mlp(self) -> list[float]:
        return [float(tokens) for tokens in self._counts["mlp"]]

    def behind(self, site: Site) -> int:
        """Mean number of tokens behind a site, of one image where its plans are for images."""
        if site.index in self._images:
            outputs, images = self._images[site.index]
            return max(1, round(float(outputs) / images))
        if site.where == "after_attention":
            total = self.mlp[site.layer]
        else:
            layer = site.layer + (site.where == "block_output")
            total = self.attention[layer] if layer < len(self.attention) else self.mlp[-1]
        return max(1, round(total / self.samples))

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Books the FLOPs of its body as the method's own, while a counter runs."""
        before = self.counter.get_total_flops() if self.counter else 0
        yield
        if self.counter:
            self.scoring_flops += self.counter.get_total_flops() - before


@dataclass(frozen=True)
class Application:
    """One method at work on one model: what the adapter's hooks need to know."""

    method: TokenPruner
    budget: Budget
    sites: Sequence[Site]
    trace: Trace
    rng: Callable[[torch.device], torch.Generator | None]
    services: Mapping[str, Any]
    parts: nn.Module | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    def readings(self, where: str) -> dict[int, set[str]]:
        """What is read of other layers there: names by layer."""
        found: dict[int, set[str]] = {}
        for site in self.sites:
            for reading in self.method.requires(site):
                if isinstance(reading, Reading) and reading.where == where:
                    found.setdefault(reading.layer, set()).add(reading.name)
        return found


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens at hand: of each its size, its bias as a key, whether it counts, and which of the
    full sequence it is."""

    sizes: Tensor | None = None  # [B, N], None while all are 1
    bias: Tensor | None = None  # [B, N] added to attention logits
    valid: Tensor | None = None  # [B, N] bool, None while nothing is padded
    origin: Tensor | None = None  # [B, N] index of each token in the full sequence, None until one was taken away
    mixed: bool = False  # from here on tokens have no single index

    def attention_bias(self) -> Tensor | None:
        """The bias over keys with padding masked out."""
        if self.valid is None:
            return self.bias
        base = torch.zeros_like(self.valid, dtype=torch.float32) if self.bias is None else self.bias
        return base.masked_fill(~self.valid, float("-inf"))

    def indices(self, like: Tensor) -> Tensor | None:
        """[B, N] index in the full sequence of each token of like [B, N, ...]; None once tokens were mixed."""
        if self.mixed or self.origin is not None:
            return self.origin
        return torch.arange(like.shape[1], device=like.device).expand(like.shape[0], -1)

    def count(self, x: Tensor) -> int | Tensor:
        """How many of the tokens x [B, N, ...] count, over all samples."""
        valid = None if x.device.type == "meta" else self.valid
        return x.shape[0] * x.shape[1] if valid is None else valid.sum()

    def reduce(self, plan: Plan, x: Tensor) -> Tokens:
        """What is known after a plan for the tokens x [B, N, ...]."""
        with unscaled(x):
            return self._reduce(plan, x)

    def _reduce(self, plan: Plan, x: Tensor) -> Tokens:
        if isinstance(plan.reduce, Gather):
            move = plan.reduce.apply
            sizes = None if self.sizes is None else move(self.sizes)
            bias = None if self.bias is None else move(self.bias)
            indices = self.indices(x)
            origin, mixed = None if indices is None else move(indices), self.mixed
        else:
            # A unit that several outputs use is shared among them by weight, so that sizes always add up.
            source, weight = plan.reduce.source, plan.reduce.weight.float().abs()
            full = weight.new_ones(x.shape[:2]) if self.sizes is None else self.sizes
            used = torch.zeros_like(full).scatter_add(1, source, weight)
            shares = weight / used.gather(1, source).clamp_min(torch.finfo(torch.float32).tiny)
            sizes = replace(plan.reduce, weight=shares).apply(full.unsqueeze(-1)).squeeze(-1)
            bias, origin, mixed = None, None, True
        bias = bias if plan.key_bias is None else plan.key_bias
        return Tokens(sizes, bias, plan.reduce.valid, origin, mixed)

    def kept(self) -> Tensor | None:
        """[B, N] index of each token in the full sequence, -1 for padding; None once tokens were mixed."""
        if self.origin is None or self.valid is None:
            return self.origin
        return self.origin.masked_fill(~self.valid, -1)


@dataclass
class Seen:
    """What is kept of a layer for `Reading`s at later sites: its tokens as they were, tensors by name, and which of
    them the tokens at hand are (None: all, in order)."""

    tokens: Tokens
    kept: dict[str, Tensor] = field(default_factory=dict)
    index: Tensor | None = None  # [B, N now]
    mixed: bool = False

    def follow(self, reduce: Gather | Mix) -> None:
        """The tokens at hand are reduced."""
        if isinstance(reduce, Mix):
            self.mixed = True
        else:
            self.index = reduce.index if self.index is None else self.index.gather(1, reduce.index)

    def now(self, value: Tensor, name: str) -> Tensor:
        """The layer's signal `name`, of the tokens at hand alone."""
        if self.mixed:
            raise PrunelabError(f"'{name}' of an earlier layer cannot be read once tokens were merged")
        index = self.index
        if index is None:
            return value
        if name == "hidden":
            return take(value, index)
        if value.dim() == 4 and name != "attention":
            return take(value, index.unsqueeze(1).expand(-1, value.shape[1], -1))
        for _ in range(value.dim() - 2):
            index = index.unsqueeze(1)
        return value.gather(-1, index.expand(*value.shape[:-1], -1))


@dataclass
class Pass:
    """One forward pass: all that its hooks leave for each other. Every thread has its own, copies of a model have none.

    state: what the method leaves for its later sites. kept: see `Handle.kept`. checks: what is looked at when the pass
    ends. decoding: whether its tokens follow a cached prompt. seen: layers that later sites read.
    aside: what waits behind a layer that it passes by.
    """

    tokens: Tokens = field(default_factory=Tokens)
    checks: Checks = field(default_factory=Checks)
    decoding: bool = False
    seen: dict[int, Seen] = field(default_factory=dict)
    aside: Any = None
    state: dict[str, Any] = field(default_factory=dict)
    kept: list[tuple[Site, Tensor]] = field(default_factory=list)


P = TypeVar("P", bound=Pass)


def write_back(hidden: Tensor, updated: Tensor, index: Tensor, kept: Tensor | None) -> Tensor:
    """hidden [B, N, D] with updated [B, K, D] at the places index [B, K], except where `kept` is False."""
    if kept is None:
        return hidden.scatter(1, index.unsqueeze(-1).expand_as(updated), updated)
    spare = torch.cat([hidden, hidden[:, :1]], 1)  # entries that do not count are written beside the sequence
    index = index.masked_fill(~kept, hidden.shape[1])
    return spare.scatter(1, index.unsqueeze(-1).expand_as(updated), updated)[:, :-1]


@dataclass(frozen=True)
class Aside:
    """Tokens x [B, N, D] as they were before a layer that only some of them go through, and what was known of all."""

    x: Tensor
    reduce: Gather
    known: dict[str, Any]

    def joined(self, updated: Tensor) -> Tensor:
        """With those that went through the layer, [B, K, D]."""
        return write_back(self.x, updated, self.reduce.index, self.reduce.valid)


class Adapter(ABC, Generic[P]):
    """Applies token plans to one model family through hooks that come out again."""

    family: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    signals: ClassVar[Mapping[str, frozenset[str]]]  # what each kind of site can give
    rest: ClassVar[frozenset[str]] = frozenset({"drop"})
    positions: ClassVar[frozenset[str]] = frozenset({"original"})
    decodes: ClassVar[bool] = False  # whether it generates text, of which methods can be shown the steps
    gates: ClassVar[bool] = False  # whether attention can weigh tokens by a plan's gate
    embeddings: ClassVar[bool] = False  # whether what enters the first layer can be read later

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._own = threading.local()  # what each thread that runs the model has for itself
        self.pending = Checks()  # of steps of decoding

    @abstractmethod
    def started(self) -> P:
        """The state of a forward pass that begins now."""

    @property
    def running(self) -> P:
        """The forward pass of this thread that is at work, or was last."""
        if not hasattr(self._own, "running"):
            self._own.running = self.started()
        found: P = self._own.running
        return found

    @running.setter
    def running(self, new: P) -> None:
        self._own.running = new

    @property
    @abstractmethod
    def info(self) -> ModelInfo:
        """The model's sizes."""

    @abstractmethod
    def example(self) -> Any:
        """A meta-device input of batch 1, to count MACs with; see `prunelab.common.costs.meter.on_meta`."""

    @abstractmethod
    def install(self, application: Application) -> Callable[[], None]:
        """Put the hooks in; the returned function takes every one of them out."""

    @abstractmethod
    def view(self, site: Site, x: Tensor) -> View:
        """The tokens x [B, N, D] at a site, and how each of its signals is computed."""

    def read(self, site: Site, x: Tensor, reading: Reading) -> Tensor:
        """A reading that `readable` finds no fault with, of the tokens x [B, N, D] at hand at a site."""
        raise NotImplementedError

    def readable(self, site: Site, reading: Reading) -> str | None:
        """Why a reading cannot be had at a site of this very model; None where it can."""
        return f"{self.family} gives signals of the site's own layer alone"

    def signals_of(
        self,
        application: Application,
        site: Site,
        x: Tensor,
        view: View | None = None,
        within: Pass | None = None,
        training: bool = False,
    ) -> TokenSignals:
        """What the method may see of the tokens x [B, N, D] at a site."""
        within = self.running if within is None else within
        view, required = self.view(site, x) if view is None else view, application.method.requires(site)
        read = partial(self.read, site, x) if view.other is None else view.other
        return TokenSignals(
            {**{r: partial(read, r) for r in required if isinstance(r, Reading)}, **view.sources},
            prunable=view.prunable,
            units=view.units,
            valid=view.valid,
            indices=view.indices,
            grids=view.grids,
            modality=view.modality,
            packed=view.packed,
            info=self.info if view.info is None else view.info,
            rng=application.rng(x.device),
            required=required,
            services=application.services,
            parts=application.parts,
            state=within.state,
            checks=within.checks,
            memory=application.memory,
            training=training,
        )

    def exactly(self, application: Application, x: Tensor) -> AbstractContextManager[Any]:
        """Scores are compared in the dtypes that they have; what is learned runs under autocast, as the model does."""
        return unscaled(x) if application.parts is None else nullcontext()

    def decide(
        self,
        application: Application,
        site: Site,
        x: Tensor,
        view: View | None = None,
        within: Pass | None = None,
    ) -> tuple[Plan, TokenSignals]:
        """The method's plan for the tokens x [B, N, D] at a site, and the signals it was made from."""
        within = self.running if within is None else within
        try:
            return self._decide(application, site, x, view, within)
        except Exception:
            within.checks.read()  # a signal that is not finite explains what it led to
            raise

    def _decide(
        self, application: Application, site: Site, x: Tensor, view: View | None, within: Pass
    ) -> tuple[Plan, TokenSignals]:
        trace, method, training = application.trace, application.method, self.training(x)
        with trace.scoring(), torch.no_grad(), self.exactly(application, x):
            signals = self.signals_of(application, site, x, view, within, training)
            plan = method.plan(site, signals, application.budget.at(site.index))
            self.check_plan(plan)
            if plan.rest != method.rest:
                raise PrunelabError(
                    f"{self.family} cannot carry out a plan with rest={plan.rest} of {method.name}, whose own is"
                    f" {method.rest}; let the method's `rest` say it"
                )
        if plan.gate is not None:  # it keeps its gradients
            plan = self.gated(plan, plan.gate) if training else replace(plan, gate=None)
        if site.where in ("encoded", "projected"):
            trace.decided(site, plan.reduce, len(x))
        if trace.measured is not None:
            plan = replace(plan, reduce=plan.reduce.narrow(trace.measured.behind(site)), key_bias=None)
        return plan, signals

    def training(self, x: Tensor) -> bool:
        """Whether a pass on x learns: costs are counted as in use."""
        return self.model.training and torch.is_grad_enabled() and x.device.type != "meta"

    def gated(self, plan: Plan, gate: Tensor) -> Plan:
        """The plan while training: all units go on, and attention to each is weighed."""
        if not self.gates:
            raise PrunelabError(f"{self.family} has no attention that weighs tokens by a gate; train on a hard plan")
        bias, carried = gate.float().clamp_min(torch.finfo(torch.float32).tiny).log(), self.running.tokens.bias
        every = torch.arange(gate.shape[1], device=gate.device).expand(len(gate), -1)
        return Plan(
            Gather(every, self.running.tokens.valid),
            rest=plan.rest,
            key_bias=bias if carried is None else bias + carried,
        )

    def check(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        """Refuse, before any work, a method whose sites, signals or `rest` this family cannot give."""
        info = self.info
        if method.observes():
            self.check_observed(method)
        if method.rest not in self.rest:
            raise PrunelabError(
                f"{method.name} needs a model whose tokens can {method.rest}, those of {self.family} can only"
                f" {' or '.join(sorted(self.rest))}"
            )
        for site in sites:
            if site.where not in self.signals:
                raise PrunelabError(
                    f"{method.name} prunes at '{site.where}', but {self.family} has only {', '.join(self.signals)}"
                )
            if site.where != "tower" and not 0 <= site.layer < info.depth:
                raise PrunelabError(
                    f"{method.name} prunes at layer {site.layer}, but this model has layers 0 to {info.depth - 1};"
                    " set the method's layers"
                )
            required = method.requires(site)
            for reading in sorted((r for r in required if isinstance(r, Reading)), key=str):
                if reason := self.readable(site, reading):
                    raise PrunelabError(f"{method.name} reads {reading} at {site.where}, not to be had: {reason}")
            missing = {name for name in required if isinstance(name, str)} - self.gives(site)
            if missing:
                why = "; this model has no class token" if "cls_row" in missing and not info.class_token else ""
                raise PrunelabError(
                    f"{method.name} reads {', '.join(sorted(missing))}, not to be had at {site.where}{why}"
                )

    def check_observed(self, method: TokenPruner) -> None:
        """Refuse a method that reads of decoding what this family cannot give."""
        if not self.decodes:
            raise PrunelabError(f"{method.name} observes decoding, and {self.family} generates nothing")
        for reading in method.observes():
            if reading.name != "last_row" or reading.where != "layer" or not 0 <= reading.layer < self.info.depth:
                raise PrunelabError(
                    f"{method.name} observes {reading}; of decoding, last_row of layers 0 to"
                    f" {self.info.depth - 1} is shown"
                )

    def gives(self, site: Site) -> frozenset[str]:
        """The signals of one site of this very model."""
        return self.signals[site.where] - (frozenset() if self.info.class_token else {"cls_row"})

    def cache_bytes(self, tokens: Sequence[float]) -> int | None:
        """Bytes a sample's key-value cache takes when its layers hold that many tokens; None without a cache."""
        return None

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan this family cannot carry out."""
        if plan.rest not in self.rest or plan.positions not in self.positions or plan.layout is not None:
            asked = f"rest={plan.rest}, positions={plan.positions}" + (", a layout" if plan.layout is not None else "")
            raise PrunelabError(
                f"{self.family} cannot carry out a plan with {asked}; it knows rest={'/'.join(sorted(self.rest))},"
                f" positions={'/'.join(sorted(self.positions))}"
            )


def padding_in_front(plan: Plan) -> Plan:
    """See `padded_first`; the outputs' bias goes with them."""
    valid, bias = plan.reduce.valid, plan.key_bias
    if valid is not None and bias is not None:
        bias = bias.gather(1, valid.int().argsort(dim=1, stable=True))
    return replace(plan, reduce=padded_first(plan.reduce), key_bias=bias)


def padding_behind(plan: Plan) -> Plan:
    """The same with what does not count behind, for prompts that are padded there."""
    reduce, bias = plan.reduce, plan.key_bias
    if reduce.valid is None:
        return plan
    order = (~reduce.valid).int().argsort(dim=1, stable=True)
    valid, bias = reduce.valid.gather(1, order), None if bias is None else bias.gather(1, order)
    if isinstance(reduce, Gather):
        return replace(plan, reduce=Gather(reduce.index.gather(1, order), valid), key_bias=bias)
    target = order.argsort(1).gather(1, reduce.target)
    return replace(plan, reduce=replace(reduce, target=target, valid=valid), key_bias=bias)


class SequenceAdapter(Adapter[P]):
    """A family whose tokens flow as one sequence [B, N, D] through a list of blocks."""

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """The blocks, in forward order."""

    @abstractmethod
    def sources(self, site: Site, x: Tensor) -> Mapping[str, Callable[[], Tensor]]:
        """How each signal of a site is computed, by name; see `TokenSignals`."""

    def earlier(self, site: Site, reading: Reading, names: frozenset[str]) -> str | None:
        """Why a reading of an earlier layer of the model itself cannot be had, where it gives those names."""
        if reading.name not in names:
            return f"{self.family} gives {', '.join(sorted(names))} of other layers"
        last = site.layer - (site.where == "input")
        if reading.name == "hidden" and site.where == "after_attention":
            last -= 1
        if reading.layer == -1 and reading.name == "hidden" and self.embeddings and last >= 0:
            return None
        if not 0 <= reading.layer <= last:
            return f"layers 0 to {last} have run there" if last >= 0 else "no layer has run there"
        return None

    def begin(self, module: nn.Module, args: Any) -> None:
        """Hook before the first block: a new forward pass starts."""
        refuse_checkpointing(self.model)
        refuse_tracing()
        self.running = self.started()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook behind the last block: the pass is looked at. Steps of decoding are only at the end of the block."""
        if self.running.decoding:
            self.pending.include(self.running.checks)
        else:
            self.running.checks.read()

    def count(self, application: Application, layer: int, part: str) -> Callable[..., None]:
        """Hook before a layer's `attention` or `mlp`: counts the tokens that each works on."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if layer == 0 and part == "attention":
                application.trace.begin(args[0].shape[0])
            application.trace.add(part, layer, self.running.tokens.count(args[0]))

        return hook

    def reduce(self, application: Application, site: Site, x: Tensor) -> Tensor:
        """Carry out the method's plan on the tokens x [B, N, D]."""
        plan, signals = self.decide(application, site, x)
        self.follow(application, site, plan, x)
        return application.method.refine(site, plan.reduce.apply(x), signals, plan)

    def follow(self, application: Application, site: Site, plan: Plan, x: Tensor) -> None:
        """Bring what is known of the tokens up to date with a plan for x [B, N, D], and note what was kept."""
        self.running.tokens = self.running.tokens.reduce(plan, x)
        for seen in self.running.seen.values():
            seen.follow(plan.reduce)
        self.note(application, site, self.running.tokens.kept())

    def show(self, application: Application, prunable: Tensor, row: Callable[[int], Tensor]) -> None:
        """Let the method observe a step of decoding behind a prompt whose tokens are prunable [B, N], for `row`: the
        newest token's attention [B, H, N] in a layer."""
        readings = application.method.observes()
        if not readings:
            return
        with application.trace.scoring(), torch.no_grad():
            signals = TokenSignals(
                {reading: partial(row, reading.layer) for reading in readings},
                prunable=prunable,
                units=prunable.shape[1],
                info=self.info,
                required=readings,
                services=application.services,
                parts=application.parts,
                memory=application.memory,
                checks=self.running.checks,
            )
            application.method.observe(signals)

    def set_aside(self, application: Application, site: Site, plan: Plan, x: Tensor, *names: str) -> None:
        """The rest of the tokens x [B, N, D] passes by the next layer; `names` are what the pass knows of all of them
        and is known again by `together`."""
        if not isinstance(plan.reduce, Gather) or plan.positions != "original":
            raise PrunelabError(
                f"{application.method.name}: tokens that pass by a layer come back as they were; keep"
                " others as they are, with positions='original'"
            )
        running = self.running
        running.aside = Aside(x, plan.reduce, {name: getattr(running, name) for name in ("tokens", *names)})
        running.tokens = running.tokens.reduce(plan, x)
        self.note(application, site, running.tokens.kept())

    def together(self, x: Tensor) -> Tensor:
        """Behind the layer: all tokens again, of which x [B, K, D] went through it."""
        running, aside = self.running, self.running.aside
        running.aside = None
        for name, value in aside.known.items():
            setattr(running, name, value)
        joined: Tensor = aside.joined(x)
        return joined

    def note(self, application: Application, site: Site, kept: Tensor | None) -> None:
        """Record the indices kept at a site, for `handle.kept()`; None where tokens have no single one."""
        if site.index == 0:
            application.trace.kept = self.running.kept = []
        if kept is not None:
            self.running.kept.append((site, kept))

    def view(self, site: Site, x: Tensor) -> View:
        tokens, special = self.running.tokens, self.info.special
        prunable = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        prunable[:, :special] = False
        if tokens.valid is not None:
            prunable &= tokens.valid
        common: dict[str, Callable[[], Tensor]] = {
            "hidden": lambda: x,
            "sizes": lambda: torch.ones_like(prunable, dtype=torch.float32) if tokens.sizes is None else tokens.sizes,
        }
        return View(
            {**common, **self.sources(site, x)},
            prunable,
            units=x.shape[1] - special,
            valid=tokens.valid,
            indices=tokens.indices(x),
            grids=self.grids(),
        )

    def grids(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the input's patch grid."""
        grid = self.info.grid
        return () if grid is None else ((grid[0], grid[1]),)
