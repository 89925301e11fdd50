"""The role of methods that prune tokens at sites of a network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.method import Method
from prunelab.common.core.plan import Effort, Gather, ModelInfo, Plan, Positions, Reduction, Rest, Site
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.signals import TokenSignals


class TokenPruner(Method):
    """Prunes tokens at sites of a network. Fill in `score`, or override `plan` where it does not fit.

    rest, positions: what becomes of the tokens that do not go on, and how those that do are numbered; see `Plan`.
    trims: once the prompt is read, caches of a language model's layers from this one on keep of it only what went
    through the last layer; None: each keeps what it worked on. A method sets them for its class, or makes them fields
    of its own.
    """

    role: ClassVar[str] = "token_pruner"
    ascending: ClassVar[bool] = True  # kept units come out in their original order
    adaptive: bool = False  # how many units stay depends on the input, the budget is an upper bound
    distils: ClassVar[bool] = False  # while the method is trained, its loss reads what the unpruned model says
    observes_prompt: ClassVar[bool] = False  # what `observes` names is shown of the prompt's last token, too
    eases: ClassVar[bool] = False  # layers of a decoder do less for tokens that stay: see `effort`
    rest: Rest = "drop"
    positions: Positions = "original"
    trims: int | None = None

    @abstractmethod
    def sites(self, info: ModelInfo) -> Sequence[Site]:
        """Where the method acts in a model of this size, in forward order."""

    @abstractmethod
    def requires(self, site: Site) -> frozenset[Signal]:
        """Names of the signals read at a site, and the `Reading`s of other layers. The adapter computes these and no
        others."""

    def beside(self, other: Method) -> str | None:
        if other.role == "cache_pruner" and self.rest == "defer":
            return f"{self.name} brings tokens back from the cache that {other.name} prunes; take rest='drop'"
        if other.role == "draft_decoder":
            return f"{other.name} verifies drafts against every token of the text, of which {self.name} leaves some out"
        return None

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        """Decide what goes on from here. `budget` is already the one of this site."""
        kept = signals.keep(budget, scores=self.score(site, signals))
        return Plan(self.merge(kept, signals), rest=self.rest, positions=self.positions)

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        """Importance [B, N] of every unit, larger is better. Values at protected units are ignored."""
        raise TypeError(f"{type(self).__name__} fills in neither score() nor plan()")

    def merge(self, kept: Gather, signals: TokenSignals) -> Reduction:
        """What becomes of the units not kept; by default nothing does."""
        return kept

    def refine(self, site: Site, hidden: Tensor, signals: TokenSignals, plan: Plan) -> Tensor:
        """What goes on, [B, K, D], before the model works on it; methods with learned layers change it here."""
        return hidden

    def effort(self, layer: int, info: ModelInfo, budget: Budget) -> Effort | None:
        """How much a layer of the decoder does for visual tokens that stay; None: all. Asked where `eases` is set."""
        return None

    def observes(self) -> frozenset[Reading]:
        """What the method reads of every step of decoding, of any layers; nothing by default."""
        return frozenset()

    def observe(self, signals: TokenSignals) -> None:
        """Look at a step of decoding, and leave in `signals.memory` what the next passes shall know. Where
        `observes_prompt` is set the pass over the prompt is the first: its last token writes the first new one.

        The units are all tokens [B, N] of the prompt, also those that left; of these, what is read is zero."""

    def warm_up(self) -> int:
        """How many prompts, each with what is written behind it, the method looks at before it prunes."""
        return 0

    def loss(self, outputs: Any, taught: Any, state: Mapping[str, Any], budget: Budget) -> Tensor:
        """The loss of one pass of a training with the method at work (`training.tokens`), by default the model's own.

        outputs: what the model gave, with its `loss`. taught: what the unpruned model gives of the same batch, None
        unless the method `distils`. state: what the sites left in `signals.state`.
        """
        loss: Tensor = outputs.loss
        return loss

    def family(self, level: float, sites: int, info: ModelInfo) -> Budget:
        """The method's budgets as one curve: level 1 keeps all, level 0 the least. Used to match costs."""
        return Budget(level)
