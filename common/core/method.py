"""A pruning method of any role: a frozen dataclass whose fields are its hyper-parameters."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from prunelab.common.core import options
from prunelab.common.core.plan import ModelInfo


class Method(ABC):
    """A pruning method of any role.

    name: registry name. exempt: contract invariants that the faithful method breaks, each with the reason; the
    contract suite asserts that they really fail. services: names of second models the method needs, handed to
    `apply(..., services=...)`.
    """

    name: ClassVar[str]
    role: ClassVar[str]
    exempt: ClassVar[Mapping[str, str]] = {}
    services: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Raise PrunelabError where a hyper-parameter is not what its field may be (`core.options`). What a method
        checks besides, of fields that depend on each other, it checks after this."""
        options.check(self)

    def build(self, info: ModelInfo) -> nn.Module | None:
        """The method's learned parts for a model of this size, or None. Trained by the paper's own rule and handed to
        `apply(..., parts=...)`, which makes them part of the model for the length of its block."""
        return None

    def beside(self, other: Method) -> str | None:
        """Why this method has no meaning on a model that runs another one of another role, or None where it has."""
        return None
