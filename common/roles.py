"""The seven roles. A method is a frozen dataclass whose fields are its hyper-parameters; its constructor only stores.

One sentence holds for all of them: score units, plan under a budget, apply to a model. The roles differ in what
a unit is. Methods read signals, return plans, and never meet a model; adapters do the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from common import masks, selection, text
from common.errors import PrunelabError
from common.targets import Accumulator, Decision, Kind, Probe, Statistics, Target, WeightSignals
from common.text import Background, Similarity
from common.types import Budget, Gather, ModelInfo, Plan, Reduction, Rest, Site


class Signals:
    """What a site lets a method see. Every signal is computed when it is first read, and only if it was required.

    Always at hand: `prunable` [B, N] bool (False for class, register and padding tokens), `units` (how many are
    prunable, the same for all samples unless `valid` says otherwise), `valid` [B, N] bool or None (False marks
    padding), `places` [B, N] of the units in the full sequence (None once units were mixed), `grids` (height and
    width of every feature map of the unpruned input), `rng` for methods that draw, `info` of the model, `services`
    and `parts` handed to `apply`, and `carry`, a dictionary that lives for one forward pass: what the method leaves
    for its later sites.

    Signals by name: `hidden` [B, N, D], `queries` / `keys` / `values` [B, H, N, d] (keys as attention uses them),
    `attention_logits` [B, H, N, N] (scaled, with biases; padding columns at -inf), `attention` (their softmax),
    `cls_row` [B, H, N] (attention of the class token), `last_row` (of the last token), `received` [B, H, N]
    (column sums of attention), `sizes` [B, N] (original units each unit stands for). Some families have more: `scans`
    [B, S, N, E] (a vision Mamba's scan outputs in token order), `class_confidence` [B, N, C] (a segmenter's head),
    `positions`, `memory`, `class_logits` ... (a deformable encoder's); each adapter says what it gives.
    """

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Tensor]],
        *,
        prunable: Tensor,
        units: int,
        info: ModelInfo,
        valid: Tensor | None = None,
        rng: torch.Generator | None = None,
        required: frozenset[str] | None = None,
        services: Mapping[str, Any] | None = None,
        parts: nn.Module | None = None,
        places: Tensor | None = None,
        grids: Sequence[tuple[int, int]] = (),
        carry: dict[str, Any] | None = None,
    ) -> None:
        self._sources = dict(sources)
        self._required = frozenset(sources) if required is None else required
        self.prunable = prunable
        self.units = units
        self.info = info
        self.valid = valid
        self.rng = rng
        self.services = services or {}
        self.parts: Any = parts
        self.places = places
        self.grids = tuple(grids)
        self.carry: dict[str, Any] = {} if carry is None else carry
        missing = self._required - set(self._sources)
        if missing:
            raise PrunelabError(f"this site cannot give the signals {', '.join(sorted(missing))} that the method reads")

    def one_length(self, method: str) -> None:
        """Refuse padded samples, for methods that are defined on one length only."""
        if self.valid is not None:
            raise PrunelabError(f"{method} works on samples of one length only; run padded samples one by one")

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_") or name not in self._sources or name not in self._required:
            raise AttributeError(f"signal '{name}' was not required at this site; name it in requires()")
        value = self._sources[name]()
        if value.device.type != "meta" and not _bounded(value, name):
            raise PrunelabError(f"the signal '{name}' holds NaN or infinite values; check the input and the weights")
        setattr(self, name, value)
        return value


def _bounded(value: Tensor, name: str) -> bool:
    """No NaN and no infinity, in one pass (extremes carry NaN); logits may be -inf where a column is masked."""
    if value.numel() == 0:
        return True
    low, high = value.aminmax()
    return bool(high < float("inf")) and (name == "attention_logits" or bool(low > float("-inf")))


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

    def build(self, info: ModelInfo) -> nn.Module | None:
        """The method's learned parts for a model of this size, or None. Trained by the paper's own rule and handed to
        `apply(..., parts=...)`, which makes them part of the model for the length of its block."""
        return None


class TokenPruner(Method):
    """Prunes tokens at sites of a network. Fill in `score`, or override `plan` where it does not fit."""

    role: ClassVar[str] = "token_pruner"
    ascending: ClassVar[bool] = True  # kept units come out in their original order
    adaptive: ClassVar[bool] = False  # how many units stay depends on the input, the budget is an upper bound

    @abstractmethod
    def sites(self, info: ModelInfo) -> Sequence[Site]:
        """Where the method acts in a model of this size, in forward order."""

    @abstractmethod
    def requires(self, site: Site) -> frozenset[str]:
        """Names of the signals read at a site. The adapter computes these and no others."""

    def fate(self) -> Rest:
        """What becomes of the units that do not go on: the `rest` of every plan."""
        return "drop"

    def plan(self, site: Site, signals: Signals, budget: Budget) -> Plan:
        """Decide what goes on from here. `budget` is already the one of this site."""
        kept = self.select(self.score(site, signals), signals, budget)
        return Plan(self.merge(kept, signals), rest=self.fate())

    def score(self, site: Site, signals: Signals) -> Tensor:
        """Importance [B, N] of every unit, larger is better. Values at protected units are ignored."""
        raise TypeError(f"{type(self).__name__} fills in neither score() nor plan()")

    def select(self, scores: Tensor, signals: Signals, budget: Budget) -> Gather:
        """The best-scored units under the budget and every protected one, in original order."""
        return selection.top_k_units(scores, signals.prunable, signals.units, budget, signals.valid)

    def merge(self, kept: Gather, signals: Signals) -> Reduction:
        """What becomes of the units not kept; by default nothing does."""
        return kept

    def refine(self, site: Site, hidden: Tensor, signals: Signals, plan: Plan) -> Tensor:
        """What goes on, [B, K, D], before the model works on it; methods with learned layers change it here."""
        return hidden

    def family(self, level: float, sites: int, info: ModelInfo) -> Budget:
        """The method's budgets as one curve: level 1 keeps all, level 0 the least. Used to match costs."""
        return Budget(level)


class CachePruner(Method):
    """Prunes entries of a key-value cache, per layer and head."""

    role: ClassVar[str] = "cache_pruner"
    when: ClassVar[str] = "prefill"  # prefill | decode | both

    @abstractmethod
    def requires(self, site: Site) -> frozenset[str]:
        """Names of the signals read at a layer."""

    @abstractmethod
    def score(self, site: Site, signals: Signals) -> Tensor:
        """Importance [B, H, N] of every cache entry; H counts key-value heads."""

    def plan(self, site: Site, signals: Signals, budget: Budget) -> Plan:
        """Entries that stay, [B, H, K] in original order."""
        scores = self.score(site, signals)
        index, valid = selection.top_k(scores, budget.count(scores.shape[-1]))
        return Plan(Gather(index, valid))

    def compress(self, keys: Tensor, values: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Apply the plan to [B, H, N, d] keys and values. Methods that thin entries out override this."""
        return plan.reduce.apply(keys), plan.reduce.apply(values)


class WeightPruner(Method):
    """Prunes weights, heads, channels, experts or layers: calibrate, score, allocate, mask, update.

    A `sequential` method decides block by block on a stream the earlier, pruned blocks gave: `solve` is its heart.
    Any other scores every target on the dense model's stream first and then decides on all together: `select`.
    """

    role: ClassVar[str] = "weight_pruner"
    needs_base: ClassVar[bool] = False  # prunes what fine-tuning changed, and reads the model before it

    @property
    def sequential(self) -> bool:
        """Whether blocks are decided one after the other."""
        return True

    def kinds(self) -> Sequence[Kind]:
        """What the method prunes."""
        return ("linear",)

    def covers(self, target: Target) -> bool:
        """Whether the method touches a target of its kinds."""
        return True

    def statistics(self, kind: Kind) -> Mapping[str, Callable[[Target], Accumulator]]:
        """What is accumulated over the calibration set at each target of a kind, by name."""
        return {}

    def survey(self, probe: Probe) -> Mapping[str, Statistics]:
        """Further statistics, by target and name, measured once on the whole dense model (gradients, losses)."""
        return {}

    @abstractmethod
    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """Importance of every unit, of the target's shape, larger is better."""

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        """The budget of every target; by default the same for all, or one amount a block. The signals of a sequential
        method hold what `survey` found, the others' everything."""
        return [budget.at(target.block) for target in targets]

    def mask(self, target: Target, scores: Tensor, budget: Budget) -> Tensor:
        """Mask of what stays, of the target's shape: by default the best of each row, or the best structures."""
        return masks.per_row(scores, budget)

    def update(self, target: Target, signals: WeightSignals, mask: Tensor) -> Mapping[str, Tensor]:
        """New values by role, for methods that make up for what was taken away."""
        return {}

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        """A sequential method's decision on one target. Methods that choose and update at once override this."""
        scores = self.score(target, signals)
        masks.refuse_nan(scores, target.name)
        mask = self.mask(target, scores, budget)
        return Decision(mask, self.update(target, signals, mask))

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        """The masks of all targets at once. Methods that compare scores across targets override this; layers are
        compared by default."""
        if all(target.kind == "layers" for target in targets):
            return list(masks.per_row(torch.cat(list(scores)), budget).split(1))
        budgets = self.allocate(targets, signals, budget)
        return [self.mask(t, s, b) for t, s, b in zip(targets, scores, budgets, strict=True)]


@dataclass(frozen=True)
class DraftTree:
    """Draft tokens [T] with the index of each one's parent [T], -1 for children of the last accepted token.
    Parents come before their children."""

    tokens: Tensor
    parents: Tensor


@dataclass(frozen=True)
class Accepted:
    """Tokens [A] to emit and the draft nodes [A - 1] (or fewer) whose cache entries stay."""

    tokens: Tensor
    nodes: Tensor


class DraftDecoder(Method):
    """Drafts a tree of tokens, keeps the part the target model confirms, and learns from what it saw."""

    role: ClassVar[str] = "draft_decoder"

    @abstractmethod
    def start(self, vocabulary: int) -> Any:
        """A fresh decoding state."""

    @abstractmethod
    def draft(self, state: Any, tokens: Tensor, budget: Budget) -> DraftTree:
        """A tree of at most `budget` nodes that may follow the tokens [N]."""

    @abstractmethod
    def accept(self, tree: DraftTree, logits: Tensor, rng: torch.Generator | None = None) -> Accepted:
        """What the target's logits [T + 1, V] (row 0: after the last accepted token) confirm."""

    def observe(self, state: Any, tokens: Tensor, logits: Tensor) -> None:
        """Learn from tokens [T] and the logits [T, V] that followed them."""


class ConstrainedSampler(Method):
    """Samples the next token under a constraint that is costly to check."""

    role: ClassVar[str] = "constrained_sampler"

    @abstractmethod
    def sample(
        self, logits: Tensor, allows: Callable[[int], bool], budget: Budget, rng: torch.Generator | None = None
    ) -> tuple[int, float]:
        """A token that `allows` accepts and its log importance weight; `budget` counts constraint calls."""


class SampleSelector(Method):
    """Chooses training samples or training tokens."""

    role: ClassVar[str] = "sample_selector"

    @abstractmethod
    def score(self, features: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Importance [n] of every sample from its features [n, D]."""

    def plan(self, features: Tensor, budget: Budget, rng: torch.Generator | None = None) -> Plan:
        """Samples that stay, [1, K] in original order."""
        scores = self.score(features, rng).unsqueeze(0)
        index, valid = selection.top_k(scores, budget.count(scores.shape[-1]))
        return Plan(Gather(index, valid))


@dataclass(frozen=True)
class Passage:
    """Sentences to rank: their texts, the document each belongs to and its place there.

    document and position are [n] tuples; a single list of sentences is one document in reading order. background
    is the corpus that idf comes from, for methods that weigh words; see `FeatureRanker` where it is None.
    """

    sentences: tuple[str, ...]
    document: tuple[int, ...] = field(default=())
    position: tuple[int, ...] = field(default=())
    background: Background | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.sentences or not any(s.strip() for s in self.sentences):
            raise PrunelabError("there is no sentence to rank; give at least one that is not empty")
        if not self.document:
            object.__setattr__(self, "document", (0,) * len(self.sentences))
        if not self.position:
            seen: dict[int, int] = {}
            places = []
            for document in self.document:
                places.append(seen.get(document, 0))
                seen[document] = places[-1] + 1
            object.__setattr__(self, "position", tuple(places))
        if not len(self.sentences) == len(self.document) == len(self.position):
            raise PrunelabError("sentences, document and position differ in length; give one entry a sentence")

    @classmethod
    def of(cls, documents: Sequence[Sequence[str]], background: Background | None = None) -> Passage:
        """A cluster of documents, each a list of sentences."""
        return cls(
            tuple(s for d in documents for s in d),
            tuple(i for i, d in enumerate(documents) for _ in d),
            tuple(j for d in documents for j, _ in enumerate(d)),
            background,
        )

    @cached_property
    def words(self) -> list[list[str]]:
        """The words of each sentence."""
        return [text.words(s) for s in self.sentences]


class Ranker(Method):
    """Ranks sentences, prompt tokens or vocabulary entries, and keeps the best under a budget."""

    role: ClassVar[str] = "ranker"

    @abstractmethod
    def rank(self, passage: Passage) -> Tensor:
        """Scores [n], larger is better."""

    def order(self, passage: Passage) -> list[int]:
        """Units from the best to the worst, ties to the earlier one. What is left out here is never chosen."""
        return selection.descending(self.rank(passage)).tolist()

    def redundant(self, passage: Passage) -> Callable[[int, list[int]], bool] | None:
        """Tells whether a unit repeats those already taken; None where the method does not ask."""
        return None

    def plan(self, passage: Passage, budget: Budget) -> Plan:
        """Units that stay, [1, K] in original order: best first while the budget lasts."""
        sizes = selection.text_sizes(passage.sentences, budget.unit)
        chosen = selection.fill(self.order(passage), sizes, budget, self.redundant(passage))
        return Plan(Gather(torch.tensor([sorted(chosen)], dtype=torch.long)))

    def summarise(self, sentences: Sequence[str] | Passage, budget: Budget) -> list[str]:
        """The sentences that `plan` keeps, in document order."""
        if isinstance(sentences, str):
            raise PrunelabError("summarise takes a list of sentences; split the text with common.text.sentences first")
        passage = sentences if isinstance(sentences, Passage) else Passage(tuple(sentences))
        return [passage.sentences[i] for i in self.plan(passage, budget).reduce.index[0].tolist()]  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True)
class FeatureRanker(Ranker):
    """Sentence extraction in MEAD's frame: a salience feature, Position, a length cut-off and a re-ranker.

    weight, position: weights of the salience feature and of Position, both scaled to [0, 1] over the passage.
        With position=0 the salience itself is the score.
    min_words: LengthCutoff; sentences with fewer words are never chosen (unless all are that short).
    max_cosine: a sentence whose cosine with one already chosen exceeds it is skipped; None chooses all.
    without_background: idf for a passage that brings no background corpus: `sentences` counts each of its
        sentences as a document, `uniform` gives every word the weight 1, `error` refuses.
    """

    weight: float = 1.0
    position: float = 0.0
    min_words: int = 0
    max_cosine: float | None = None
    without_background: Literal["sentences", "uniform", "error"] = "sentences"

    @classmethod
    def mead(cls, weight: float = 1.0, **options: Any) -> Self:
        """With MEAD's policy: Position 1, LengthCutoff 9, and the re-ranker at cosine 0.5."""
        return cls(**{"weight": weight, "position": 1.0, "min_words": 9, "max_cosine": 0.5, **options})

    @abstractmethod
    def salience(self, passage: Passage) -> Tensor:
        """The feature [n] that the method contributes, larger is better."""

    def rank(self, passage: Passage) -> Tensor:
        salience = self.salience(passage)
        if self.position == 0:
            return salience
        features = [(self.weight, salience), (self.position, selection.leading(passage.document, passage.position))]
        return sum((w * selection.min_max(f) for w, f in features), torch.zeros(()))

    def order(self, passage: Passage) -> list[int]:
        lengths = [len(w) for w in passage.words]
        scores = self.rank(passage)
        scores = (scores / scores.abs().max().clamp_min(1e-300)).round(decimals=9)  # closer ones are ties
        order: list[int] = selection.descending(scores).tolist()
        order = [i for i in order if lengths[i]] + [i for i in order if not lengths[i]]  # wordless sentences last
        return [i for i in order if lengths[i] >= self.min_words] or order

    def redundant(self, passage: Passage) -> Callable[[int, list[int]], bool] | None:
        if self.max_cosine is None:
            return None
        similarity, limit = self.similarity(passage), self.max_cosine
        return lambda unit, taken: bool(taken) and bool((similarity.cosines(unit, taken) > limit).any())

    def similarity(self, passage: Passage) -> Similarity:
        """The idf-modified cosine of the passage's sentences, as a linear operator."""
        counts, vocabulary = text.term_counts(passage.words)
        return Similarity.of(counts, self.idf(passage, vocabulary))

    def idf(self, passage: Passage, vocabulary: Sequence[str]) -> text.Array:
        """Weights [V] of the words, from the passage's background corpus or as `without_background` says."""
        if passage.background is not None:
            return passage.background.idf(vocabulary)
        if self.without_background == "error":
            raise PrunelabError("idf needs a background corpus; set Passage.background, or without_background")
        if self.without_background == "uniform":
            return np.ones(len(vocabulary))
        return Background.of(w for w in passage.words if w).idf(vocabulary) if vocabulary else np.ones(0)
