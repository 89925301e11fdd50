"""What every adapter offers, and the record it keeps of what was pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import PrunelabError
from common.roles import TokenPruner
from common.types import Budget, ModelInfo, Plan, Site


@dataclass
class Trace:
    """What one application saw, summed over samples: the tokens every layer's attention and MLP worked on."""

    attention: list[float]
    mlp: list[float]
    samples: int = 0
    origins: list[tuple[Site, Tensor]] = field(default_factory=list)
    scoring_flops: int = 0
    counter: FlopCounterMode | None = None
    measured: Trace | None = None  # mean counts to cost at, for methods whose counts depend on the input

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


class Adapter(ABC):
    """Applies token plans to one model family through hooks that come out again."""

    family: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    signals: ClassVar[Mapping[str, frozenset[str]]]  # what each kind of site can give
    rest: ClassVar[frozenset[str]] = frozenset({"drop"})
    positions: ClassVar[frozenset[str]] = frozenset({"original"})

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def info(self) -> ModelInfo:
        """The model's sizes."""

    @abstractmethod
    def example(self) -> Tensor:
        """A meta-device input of batch 1, to count MACs with."""

    @abstractmethod
    def install(self, application: Application) -> Callable[[], None]:
        """Put the hooks in; the returned function takes every one of them out."""

    def check(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        """Refuse, before any work, a method whose sites or signals this family cannot give."""
        info = self.info
        for site in sites:
            if site.where not in self.signals:
                raise PrunelabError(
                    f"{method.name} prunes at '{site.where}', but {self.family} has only {', '.join(self.signals)}"
                )
            if not 0 <= site.layer < info.depth:
                raise PrunelabError(
                    f"{method.name} prunes at layer {site.layer}, but this model has layers 0 to {info.depth - 1};"
                    " set the method's layers"
                )
            missing = method.requires(site) - self.signals[site.where]
            if "cls_row" in method.requires(site) and not info.class_token:
                missing |= {"cls_row (this model has no class token)"}
            if missing:
                raise PrunelabError(f"{method.name} reads {', '.join(sorted(missing))}, not to be had at {site.where}")

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan this family cannot carry out."""
        if plan.rest not in self.rest or plan.positions not in self.positions or plan.layout is not None:
            asked = f"rest={plan.rest}, positions={plan.positions}" + (", a layout" if plan.layout is not None else "")
            raise PrunelabError(
                f"{self.family} cannot carry out a plan with {asked}; it knows rest={'/'.join(sorted(self.rest))},"
                f" positions={'/'.join(sorted(self.positions))}"
            )
