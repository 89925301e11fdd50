"""A minimal data selector or ranker for each mechanism of the two roles, so that each is exercised before its first
paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.role import DataPlan, DataSelector, best_samples, best_tokens
from prunelab.common.ranking.role import Ranker
from prunelab.common.ranking.text import words


@dataclass(frozen=True)
class ImportanceResampling(DataSelector):
    """Draws documents by how much likelier their words are in the target than in the corpus."""

    buckets: int = 64
    name: ClassVar[str] = "reference_resampling"

    def requires(self) -> frozenset[str]:
        return frozenset({"text"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        assert examples.target is not None
        gain = (self.frequencies(examples.target.text) / self.frequencies(examples.text)).log()
        weights = torch.stack([(self.counts(text) * gain).sum() for text in examples.text])
        noise = -torch.empty(len(weights), dtype=torch.float64).exponential_(generator=examples.rng).log()
        return DataPlan(best_samples(weights + noise, self.budgets(budget)[0]))

    def counts(self, text: str) -> Tensor:
        found = torch.zeros(self.buckets, dtype=torch.float64)
        for word, times in Counter(words(text)).items():
            found[sum(word.encode()) % self.buckets] += times
        return found

    def frequencies(self, texts: Iterable[str]) -> Tensor:
        total = sum((self.counts(text) for text in texts), torch.ones(self.buckets, dtype=torch.float64))
        return total / total.sum()


@dataclass(frozen=True)
class ErrorNorm(DataSelector):
    """Keeps the samples of a classification that the model is most wrong about."""

    name: ClassVar[str] = "reference_error_norm"

    def requires(self) -> frozenset[str]:
        return frozenset({"logits"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        assert examples.labels is not None
        answers = torch.nn.functional.one_hot(examples.labels, examples.logits.shape[-1])
        errors = (examples.logits.softmax(-1) - answers).norm(dim=-1)
        return DataPlan(best_samples(errors, self.budgets(budget)[0]))


@dataclass(frozen=True)
class ExcessLoss(DataSelector):
    """Before training, the tokens of the corpus that the model finds hardest beside a reference model."""

    name: ClassVar[str] = "reference_excess_loss"
    chooses: ClassVar[tuple[str, ...]] = ("tokens",)
    services: ClassVar[tuple[str, ...]] = ("reference",)

    def requires(self) -> frozenset[str]:
        return frozenset({"loss", "reference_loss"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        excess = examples.loss - examples.reference_loss
        return DataPlan(tokens=best_tokens(excess, examples.counted, self.budgets(budget)[1], pooled=True))


@dataclass(frozen=True)
class SamplesThenTokens(DataSelector):
    """In each batch the samples of highest entropy, and of these the tokens of lowest loss."""

    name: ClassVar[str] = "reference_samples_then_tokens"
    when: ClassVar[str] = "each_batch"
    chooses: ClassVar[tuple[str, ...]] = ("samples", "tokens")

    def requires(self) -> frozenset[str]:
        return frozenset({"loss", "entropy"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        samples, tokens = self.budgets(budget)
        entropy = examples.entropy.sum(1) / examples.lengths.clamp_min(1)
        return DataPlan(best_samples(entropy, samples), best_tokens(-examples.loss, examples.counted, tokens))


@dataclass(frozen=True)
class ProgressAndPrompt(DataSelector):
    """In each batch the tokens whose loss fell most since an earlier model, or that look at the prompt."""

    name: ClassVar[str] = "reference_progress_and_prompt"
    when: ClassVar[str] = "each_batch"
    chooses: ClassVar[tuple[str, ...]] = ("tokens",)
    services: ClassVar[tuple[str, ...]] = ("history",)

    def requires(self) -> frozenset[str]:
        return frozenset({"loss", "history_loss", "prompt_attention"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        scores = (examples.history_loss - examples.loss).sigmoid() + examples.prompt_attention
        return DataPlan(tokens=best_tokens(scores, examples.counted, self.budgets(budget)[1], up=True))


@dataclass(frozen=True)
class SurpriseWeights(DataSelector):
    """In each batch tokens count the more the less a reference model expected them; none is dropped."""

    name: ClassVar[str] = "reference_surprise_weights"
    when: ClassVar[str] = "each_batch"
    chooses: ClassVar[tuple[str, ...]] = ()
    services: ClassVar[tuple[str, ...]] = ("reference",)

    def requires(self) -> frozenset[str]:
        return frozenset({"reference_loss"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        self.budgets(budget)
        surprise = (1 - (-examples.reference_loss).exp()) * examples.counted
        return DataPlan(weight=surprise * examples.lengths[:, None] / surprise.sum(1, keepdim=True))


@dataclass(frozen=True)
class RandomSamples(DataSelector):
    """In each batch some samples at random; reads no signal."""

    name: ClassVar[str] = "reference_random_samples"
    when: ClassVar[str] = "each_batch"

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        kept = self.budgets(budget)[0].count(len(examples))
        order = torch.randperm(len(examples), generator=examples.rng)
        return DataPlan(Gather(order[:kept].sort().values[None]))


@dataclass(frozen=True)
class Occlusion(Ranker[Tensor]):
    """Context tokens [n] by how far the target's probability falls where others stand in their place."""

    rounds: int = 8
    ratio: float = 0.3
    seed: int = 0
    name: ClassVar[str] = "reference_occlusion"
    services: ClassVar[tuple[str, ...]] = ("next_token_logits", "replace")

    def rank(self, units: Tensor, services: Mapping[str, Any] | None = None) -> Tensor:
        assert services is not None
        rng = torch.Generator().manual_seed(self.seed)
        before = services["next_token_logits"](units[None]).softmax(-1)[0]
        target = before.argmax()
        masks = torch.rand(self.rounds, len(units), generator=rng) < self.ratio
        replaced = torch.where(masks, services["replace"](units.expand(self.rounds, -1), rng), units)
        fall = before[target] - services["next_token_logits"](replaced).softmax(-1)[:, target]
        return (torch.where(masks, fall[:, None], -fall[:, None])).mean(0)


@dataclass(frozen=True)
class RewardedWords(Ranker[list[str]]):
    """Words of a vocabulary by the reward of a prompt that holds one of them alone."""

    name: ClassVar[str] = "reference_rewarded_words"
    services: ClassVar[tuple[str, ...]] = ("reward",)

    def rank(self, units: list[str], services: Mapping[str, Any] | None = None) -> Tensor:
        assert services is not None
        return torch.tensor([float(services["reward"](word)) for word in units])


SELECTORS: tuple[DataSelector, ...] = (
    ImportanceResampling(), ErrorNorm(), ExcessLoss(), SamplesThenTokens(), ProgressAndPrompt(), SurpriseWeights(),
    RandomSamples(),
)  # fmt: skip
