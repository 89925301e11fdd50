"""What every measurement starts from: the run's model, data and method by what identifies them, and how it is done."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.models import devices

S = TypeVar("S", bound="Seeded")
M = TypeVar("M", bound=Method)

# What puts a method of a role to work on a model: imported by name, so that a run's sources are those of its own wing.
ENGINES = {"token_pruner": "tokens.apply", "cache_pruner": "kv_cache.apply", "expert_pruner": "experts.apply"}


class Seeded(Protocol):
    """Settings of a task, all of which have a seed."""

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Bench(Generic[S]):
    """A run as its task sees it.

    ids: what names model and data exactly, by what they are for. settings: those of the task. config: folders and
    devices of this machine. chosen, options, spending: the method's name, hyper-parameters and budget, as papers write
    them; no name is the unpruned model.
    """

    scale: str
    ids: Mapping[str, Any]
    settings: S
    config: Mapping[str, Any] = field(default_factory=dict)
    chosen: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    spending: str | None = None

    @cached_property
    def device(self) -> torch.device:
        """Where the run computes."""
        return devices.of(self.scale)

    @property
    def seed(self) -> int:
        """Of what the method draws."""
        return self.settings.seed

    @property
    def budget(self) -> Budget:
        """What the method may keep; everything where the run names no budget."""
        return Budget(1.0) if self.spending is None else Budget.parse(self.spending)

    def method(self, *roles: Callable[..., M]) -> M | None:
        """The run's method, None where it has none; of one of these roles, given as their classes, where a task reads
        more of it than its role (any other leaves the wings alone that its method is not of)."""
        if self.chosen is None:
            return None
        made: Any = registry.create(self.chosen, **self.options)
        classes: tuple[Any, ...] = roles
        assert not roles or isinstance(made, classes)
        result: M = made
        return result

    def at_work(self, method: Method | None, model: nn.Module, **more: Any) -> AbstractContextManager[Any]:
        """The `with` block in which the method prunes what passes through the model under the run's budget, or the one
        given; nothing happens in it without a method."""
        if method is None:
            return nullcontext()
        engine = importlib.import_module(f"prunelab.common.{ENGINES[method.role]}")
        budget = more.pop("budget", None) or self.budget
        block: AbstractContextManager[Any] = engine.applied(method, model, budget, seed=self.seed, **more)
        return block


def finite(values: Tensor, check: str = "its weights and its input") -> Tensor:
    """A model's output as it is. Raises PrunelabError where it holds NaN or infinite values."""
    if not bool(torch.isfinite(values).all()):
        raise PrunelabError(f"the model's output holds NaN or infinite values; check {check}")
    return values
