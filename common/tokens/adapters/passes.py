"""What an adapter's hooks leave for each other, of one application of a method, of one forward pass, and of the tokens
at hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import padded_first
from prunelab.common.core.plan import Gather, Mix, Plan, Site, take, unscaled
from prunelab.common.core.signals import Checks, Reading
from prunelab.common.tokens.role import TokenPruner

# What a decoder layer's two sublayers read, behind their norms, and what they add to the stream, before they do.
SUBLAYERS = frozenset({"attention_input", "attention_output", "mlp_input", "mlp_output"})


class Trace:
    """What one application saw, summed over samples: the tokens every layer's attention and MLP worked on.

    Threads add to it together. Counts that stand on a device stay there until the trace is read.
    """

    def __init__(self, depth: int, measured: Trace | None = None) -> None:
        self.samples = 0
        self.sizes: dict[tuple[Any, ...], int] = {}  # samples by the size of their images, where that may vary
        self.inputs: dict[tuple[Any, ...], Any] = {}  # what else a family knows of such images
        self.kept: list[tuple[Site, Tensor]] = []  # of the last batch
        self.attribution: Any = None  # how the last batch's tokens came from patches, where a family keeps that
        self.scoring_flops = 0
        self.counter: FlopCounterMode | None = None
        self.measured = measured  # mean counts to cost at, for methods whose counts depend on the input
        self._counts: dict[str, list[Any]] = {part: [0.0] * depth for part in ("attention", "mlp")}
        self._text: Any = 0  # tokens of text
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

    def saw(self, size: tuple[Any, ...] | None, samples: int, images: Any = None) -> None:
        """So many samples were images of that size (channels, height, width; a family with `images` has its own)."""
        if size is not None:
            with self._lock:
                self.sizes[size] = self.sizes.get(size, 0) + samples
                self.inputs.setdefault(size, images)

    def read(self, text: int | Tensor) -> None:
        """So many tokens of text were read, of all samples together."""
        with self._lock:
            self._text = self._text + text

    @property
    def text(self) -> int:
        """Tokens of text, a mean over the samples."""
        return max(1, round(self.texts / self.samples)) if self.samples else 0

    @property
    def texts(self) -> float:
        """Tokens of text, of all samples together."""
        return float(self._text)

    def begin(self, samples: int) -> None:
        """A batch of so many samples enters the model."""
        with self._lock:
            self.samples += samples

    def mark(self) -> Callable[..., None]:
        """What makes all that is counted from here on count to a share, by default not at all."""
        counts, samples = {part: list(layers) for part, layers in self._counts.items()}, self.samples
        text, sizes = self._text, dict(self.sizes)

        def weigh(share: float = 0.0) -> None:
            with self._lock:
                now, added, read, shown = self._counts, self.samples - samples, self._text - text, self.sizes
                self._counts, self.samples, self._text, self.sizes = counts, samples, text, sizes
                if share:
                    self.samples, self._text = samples + round(share * added), text + share * read
                    self.sizes = {k: sizes.get(k, 0) + round(share * (n - sizes.get(k, 0))) for k, n in shown.items()}
                    self._counts = {
                        part: [old + share * (new - old) for old, new in zip(counts[part], now[part], strict=True)]
                        for part in counts
                    }

        return weigh

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
        results: dict[int, set[str]] = {}
        for site in self.sites:
            for reading in self.method.requires(site):
                if isinstance(reading, Reading) and reading.where == where:
                    results.setdefault(reading.layer, set()).add(reading.name)
        return results


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
        if name == "hidden" or name in SUBLAYERS:
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
    aside: what waits behind a layer that it passes by. passed: by layer that some tokens passed by, those that went
    through. total: tokens before anything was pruned, where the family
    counts them. shown: what a layer hands to its own site, until that has its plan.
    """

    tokens: Tokens = field(default_factory=Tokens)
    checks: Checks = field(default_factory=Checks)
    decoding: bool = False
    seen: dict[int, Seen] = field(default_factory=dict)
    aside: Any = None
    passed: dict[int, Gather] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    kept: list[tuple[Site, Tensor]] = field(default_factory=list)
    total: int = 0
    shown: dict[int, Tensor] = field(default_factory=dict)


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
    """Tokens x [B, N, D] as they were before a layer that only some of them go through, and what was known of all.
    gate [B, N]: while training all go through, and this share of what the layer changes goes on."""

    x: Tensor
    reduce: Gather
    known: dict[str, Any]
    gate: Tensor | None = None

    def joined(self, updated: Tensor) -> Tensor:
        """With those that went through the layer, [B, K, D]."""
        whole = write_back(self.x, updated, self.reduce.index, self.reduce.valid)
        return whole if self.gate is None else torch.lerp(self.x, whole, self.gate.unsqueeze(-1).to(whole.dtype))


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
