"""What families share whose tokens flow as one sequence through a list of blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import refuse_checkpointing, refuse_tracing
from prunelab.common.core.plan import Gather, Plan, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.base import Adapter
from prunelab.common.tokens.adapters.passes import Application, Aside, P
from prunelab.common.tokens.signals import TokenSignals, View


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
        self.running.total = args[0].shape[1] if args else 0

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
        known = {name: getattr(running, name) for name in ("tokens", *names)}
        running.aside = Aside(x, plan.reduce, known, plan.gate)
        running.passed[site.layer] = plan.reduce
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
