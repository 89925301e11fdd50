"""What every adapter offers: hooks that carry out plans, and what a method may see of the tokens at hand."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site, unscaled
from prunelab.common.core.signals import Checks, Reading
from prunelab.common.tokens.adapters.passes import Application, P, Pass, Trace
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals, View


class Adapter(ABC, Generic[P]):
    """Applies token plans to one model family through hooks that come out again."""

    family: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    signals: ClassVar[Mapping[str, frozenset[str]]]  # what each kind of site can give
    rest: ClassVar[frozenset[str]] = frozenset({"drop"})
    positions: ClassVar[frozenset[str]] = frozenset({"original"})
    decodes: ClassVar[bool] = False  # whether it generates text, of which methods can be shown the steps
    gates: ClassVar[bool] = False  # whether attention can weigh tokens by a plan's gate
    eases: ClassVar[bool] = False  # whether layers can do less for visual tokens that stay
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
        result: P = self._own.running
        return result

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

    def seen(self, trace: Trace) -> list[tuple[Any, float]]:
        """Meta-device inputs like those that passed, and the share of each; none where their sizes are not known."""
        standard, total = self.example(), sum(trace.sizes.values())
        return [(standard.new_empty(1, *size), n / total) for size, n in trace.sizes.items()]

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
            mosaic=view.mosaic,
            order=view.order,
            pixels=view.pixels,
            pack=view.pack,
            modality=view.modality,
            packed=view.packed,
            groups=view.groups,
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
            decided = self._decide(application, site, x, view, within)
        except Exception:
            within.checks.read()  # a signal that is not finite explains what it led to
            raise
        within.shown.pop(site.layer, None)
        return decided

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
        if plan.groups is not None and site.where not in ("encoded", "projected"):
            raise PrunelabError(
                f"{method.name}: groups are of single images and videos, at `encoded` and `projected` alone"
            )
        if plan.gate is not None:  # it keeps its gradients
            plan = self.gated(plan, plan.gate) if training else replace(plan, gate=None)
        if site.where in ("encoded", "projected"):
            trace.decided(site, plan.reduce, len(x))
        if trace.measured is not None and site.where != "tower":  # of the encoder's tokens nothing is measured
            plan = replace(plan, reduce=plan.reduce.narrow(trace.measured.behind(site)), key_bias=None)
        return plan, signals

    def training(self, x: Tensor) -> bool:
        """Whether a pass on x learns: costs are counted as in use."""
        return self.model.training and torch.is_grad_enabled() and x.device.type != "meta"

    def gated(self, plan: Plan, gate: Tensor) -> Plan:
        """The plan while training: all units go on, and attention to each is weighed; where others would pass by a
        layer, so is what the layer changes of each."""
        if not self.gates:
            raise PrunelabError(f"{self.family} has no attention that weighs tokens by a gate; train on a hard plan")
        bias, carried = gate.float().clamp_min(torch.finfo(torch.float32).tiny).log(), self.running.tokens.bias
        every = torch.arange(gate.shape[1], device=gate.device).expand(len(gate), -1)
        return Plan(
            Gather(every, self.running.tokens.valid),
            rest=plan.rest,
            key_bias=bias if carried is None else bias + carried,
            gate=gate if plan.rest == "bypass" else None,
        )

    def check(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        """Refuse, before any work, a method whose sites, signals or `rest` this family cannot give."""
        info = self.info
        if method.observes():
            self.check_observed(method)
        if method.eases and not self.eases:
            raise PrunelabError(
                f"{method.name} lets a decoder's layers do less for visual tokens; {self.family} has none"
            )
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
            wanted = f"rest={plan.rest}, positions={plan.positions}" + (", a layout" if plan.layout is not None else "")
            raise PrunelabError(
                f"{self.family} cannot carry out a plan with {wanted}; it knows rest={'/'.join(sorted(self.rest))},"
                f" positions={'/'.join(sorted(self.positions))}"
            )
