"""The role of methods that leave out experts which a token chose, while the model runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.method import Method
from prunelab.common.core.plan import Site
from prunelab.common.core.signals import Signals


class ExpertSignals(Signals):
    """What a mixture layer lets a method see of the T = B N tokens of a pass, sample by sample.

    weights [T, k]: what the router gave each of a token's k experts, as the layer uses them; experts [T, k]: which they
    are. batch: B. valid [B, N] or None: tokens that are no padding. prefill: whether the pass began the text. Signals
    by name: `hidden` [T, D] that the experts read, `norms` [T] (their L1 norm), and `received` [T], the mean attention
    that a token of a prompt gets from itself and each later one, over heads, zero for padding.
    """

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Tensor]],
        *,
        weights: Tensor,
        experts: Tensor,
        prefill: bool,
        batch: int = 1,
        **rest: Any,
    ) -> None:
        super().__init__(sources, prunable=weights > float("-inf"), units=weights.shape[1], **rest)
        self.weights, self.experts, self.prefill, self.batch = weights, experts, prefill, batch


class ExpertPruner(Method):
    """Leaves out some of the experts that each token chose. The weights of the others grow so that their sum stays."""

    role: ClassVar[str] = "expert_pruner"

    @abstractmethod
    def requires(self, site: Site) -> frozenset[str]:
        """Names of the signals read at a layer."""

    @abstractmethod
    def plan(self, site: Site, signals: ExpertSignals, budget: Budget) -> Tensor:
        """Which experts stay, [T, k] bool. The budget is the share of all choices, or experts a token."""
