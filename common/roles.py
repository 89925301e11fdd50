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

from common import attention, masks, selection, text, trees
from common.errors import PrunelabError
from common.targets import Accumulator, Decision, Kind, Probe, Statistics, Target, WeightSignals
from common.text import Background, Similarity
from common.trees import Accepted, DraftTree
from common.types import Budget, Gather, ModelInfo, Plan, Reduction, Rest, Site


class Signals:
    """What a site lets a method see. Every signal is computed when it is first read, and only if it was required.

    Always at hand: `prunable` [B, N] bool (False for class, register and padding tokens), `units` (how many are
    prunable, the same for all samples unless `valid` says otherwise), `valid` [B, N] bool or None (False marks
    padding), `places` [B, N] of the units in the full sequence (None once units were mixed), `grids` (height and width
    of every feature map of the unpruned input, or of each crop or frame of an image or video), `modality` (what the
    prunable units of a language model show: `image`, `video`, or None where it is both or neither), `packed` (how many
    tokens a decoder would read of the units of a `projected` site, newlines apart; elsewhere `units`), `rng` for
    methods that draw, `info` of the model, `services` and `parts` handed to `apply`, and `carry`, a dictionary that
    lives for one forward pass: what the method leaves for its later sites.

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
        modality: str | None = None,
        packed: int | None = None,
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
        self.modality = modality
        self.packed = units if packed is None else packed
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


class CacheSignals(Signals):
    """What a layer of a decoder lets a cache pruner see: N entries a key-value head, the newest M of them just added.

    Signals by name: `queries` [B, H, M, d] of the forward pass at hand, `keys` / `values` [B, KV, N, d] of the cache as
    attention uses them, `hidden` [B, M, D] that entered the layer's attention, `outputs` [B, H, M, d] of its heads
    (not before it attends), `received` [B, KV, N] (`accumulated` with all weights 1). What shall read rows requires
    `queries` and `keys`.

    places [B, KV, N]: number of each entry's token among the sample's own; valid [B, KV, N] or None: entries that
    count. prompt [B]: tokens each sample began with, which ratios count from. marks: tensors [B, KV, N] by name that
    the method leaves at a layer; they follow the entries from step to step, new entries bring zeros. carry: what the
    method leaves for all layers while the cache lives. prefill: whether the cache was empty before this pass. ahead:
    entries at the end that a draft wrote, which never stay. asking [B, M]: queries that are no padding, None where
    all count.
    """

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Tensor]],
        *,
        scale: float,
        places: Tensor,
        prompt: Tensor,
        marks: dict[str, Tensor],
        prefill: bool,
        ahead: int = 0,
        asking: Tensor | None = None,
        valid: Tensor | None = None,
        required: frozenset[str] | None = None,
        **rest: Any,
    ) -> None:
        prunable = torch.ones_like(places, dtype=torch.bool) if valid is None else valid
        if required and "received" in required:
            required |= {"queries", "keys"}
        rest |= {"required": required}
        super().__init__(sources, prunable=prunable, units=places.shape[-1], places=places, valid=valid, **rest)
        self.scale, self.prompt, self.marks, self.prefill, self.ahead = scale, prompt, marks, prefill, ahead
        self.asking = asking

    def rows(self, last: int) -> Tensor:
        """Causal attention [B, KV, G, W, N] of the last `last` queries, by key-value head and group."""
        queries = self.queries[:, :, -last:]
        if last > queries.shape[2]:
            raise PrunelabError(f"the pass brought {queries.shape[2]} queries, not the {last} whose attention is read")
        return attention.causal_rows(queries, self.keys, self.scale, self.valid_for_rows())

    def accumulated(self, weights: Tensor | None = None) -> Tensor:
        """Attention [B, KV, N] that the entries receive from the pass's queries, weighted by weights [M]; summed over
        the query heads of a group."""
        return attention.accumulated(self.queries, self.keys, self.scale, weights, self.valid_for_rows(), self.asking)

    def valid_for_rows(self) -> Tensor | None:
        """The entries that queries see: what a draft wrote is seen, though it never stays."""
        if self.valid is None or not self.ahead:
            return self.valid
        seen = self.valid.clone()
        seen[..., -self.ahead :] = True
        return seen


class CachePruner(Method):
    """Prunes entries of a key-value cache, per layer and key-value head. Fill in `score`, or override what does not
    fit. The budget counts entries of one head; ratios count from the prompt.

    when: after the pass that fills the empty cache (`prefill`), after each later one (`decode`), or `both`.
    storage: `bitmap` keeps entries that are `settled` as bitmaps and nonzero numbers.
    """

    role: ClassVar[str] = "cache_pruner"
    when: ClassVar[Literal["prefill", "decode", "both"]] = "prefill"
    storage: ClassVar[Literal["dense", "bitmap"]] = "dense"

    @abstractmethod
    def requires(self, site: Site) -> frozenset[str]:
        """Names of the signals read at a layer."""

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        """Importance [B, KV, N] of every cache entry, larger is better."""
        raise TypeError(f"{type(self).__name__} fills in neither score() nor plan()")

    def spared(self, capacity: int) -> tuple[int, int]:
        """How many of the first and of the last tokens always stay, where a head keeps `capacity` entries."""
        return 0, 0

    def plan(self, site: Site, signals: CacheSignals, budget: Budget) -> Plan:
        """Entries that stay, [B, KV, K] in original order."""
        return Plan(self.select(self.score(site, signals), signals, budget))

    def capacity(self, signals: CacheSignals, budget: Budget) -> list[int]:
        """Entries a head of each sample may keep; the whole of the prompt stands for no limit."""
        whole = budget.amounts == ((0,) if budget.unit == "removed" else (1,)) and budget.unit != "count"
        if whole or budget.unit == "count":
            return [1 << 30 if whole else int(budget.amounts[0])] * len(signals.prompt)
        return [budget.count(n) for n in signals.prompt.tolist()]

    def select(self, scores: Tensor, signals: CacheSignals, budget: Budget) -> Gather:
        """The spared and the best-scored entries of each head under the budget, in original order."""
        assert signals.places is not None
        counts = torch.tensor(self.capacity(signals, budget), device=scores.device)
        available = signals.prunable.sum(-1)  # [B, KV]
        sink, window = (
            torch.tensor(part, device=scores.device).view(-1, 1, 1)
            for part in zip(*(self.spared(n) for n in counts.tolist()))
        )
        least = (sink + window).squeeze(-1)
        if bool(((counts.unsqueeze(1) < available) & (counts.unsqueeze(1) < least)).any()):
            raise PrunelabError(
                f"a cache of {int(counts.min())} entries cannot hold the {int(least.max())} first and last tokens that"
                f" {self.name} always keeps; raise the budget or lower its sink or window"
            )
        newest = signals.places.masked_fill(~signals.prunable, -1).amax(-1, keepdim=True)
        kept = (signals.places < sink) | (signals.places > newest - window)
        ranked = scores.float().masked_fill(kept, float("inf")).masked_fill(~signals.prunable, float("-inf"))
        counts = counts.unsqueeze(1).clamp(max=available)
        best = selection.keep_first(selection.descending(ranked).flatten(0, 1), counts.flatten())
        shape = (*scores.shape[:2], -1)
        return Gather(best.index.view(shape), None if best.valid is None else best.valid.view(shape))

    def thin(
        self, site: Site, keys: Tensor, values: Tensor, signals: CacheSignals, budget: Budget
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, KV, N, d] with zeros where single numbers are pruned."""
        return keys, values

    def settled(self, entries: int) -> int:
        """How many of the first of so many entries `thin` will never change again."""
        return 0

    def attend(self, site: Site, signals: CacheSignals, budget: Budget) -> Tensor | None:
        """The heads' outputs [B, H, M, d], for methods that change attention itself; None leaves it to the model's."""
        return None

    def lookahead(self, tokens: Tensor, valid: Tensor | None, budget: Budget, services: Mapping[str, Any]) -> Tensor:
        """Tokens [B, A] that may follow the prompt [B, N]; the target reads them for their queries alone."""
        return tokens[:, :0]

    def shorten(
        self, tokens: Tensor, valid: Tensor | None, budget: Budget, services: Mapping[str, Any]
    ) -> Tensor | None:
        """Places [B, K] of the prompt tokens [B, N] that the target reads at all, closed up; None: all."""
        return None


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


class DraftDecoder(Method):
    """Drafts a tree of tokens, keeps the part the target model confirms, and learns from what it saw.

    `common.decoding` runs it on a model. A state outlives a prompt: what was learned from one serves the next.
    """

    role: ClassVar[str] = "draft_decoder"

    @abstractmethod
    def start(self, vocabulary: int, **services: Any) -> Any:
        """A fresh decoding state for a target of that many tokens, on the default device; `services` by name."""

    @abstractmethod
    def draft(self, state: Any, tokens: Tensor, budget: Budget) -> DraftTree:
        """A tree that may follow the tokens [N]; the budget counts its nodes."""

    def accept(self, tree: DraftTree, logits: Tensor, rng: torch.Generator | None = None) -> Accepted:
        """What the target's logits [T + 1, V] (row 0: behind the last accepted token) confirm: the longest greedy
        match, or with `rng` a lossless sample."""
        return trees.greedy(tree, logits) if rng is None else trees.sample(tree, logits, rng)

    def observe(self, state: Any, tokens: Tensor, logits: Tensor) -> None:
        """Learn from tokens [T] and the logits [T, V] that followed them."""


class ConstrainedSampler(Method):
    """Samples the next token under a constraint that is costly to check."""

    role: ClassVar[str] = "constrained_sampler"

    @property
    def proper(self) -> bool:
        """Whether weights are proper: with p = softmax(logits), E[exp(log_weight) 1[token = x]] = p(x) 1[allows(x)] for
        every token x. Their mean is then the mass that the constraint leaves, and texts can be weighed by them."""
        return False

    @abstractmethod
    def sample(
        self, logits: Tensor, allows: Callable[[int], bool], budget: Budget, rng: torch.Generator | None = None
    ) -> tuple[int, float]:
        """A token that `allows` accepts and its log importance weight, from logits [V].

        budget: calls of the constraint, out of the V that a full mask takes. A dead end, where no allowed token is
        found, is the token -1 with the weight -inf.
        """


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
