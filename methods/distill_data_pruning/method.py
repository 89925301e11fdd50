"""Distilling the knowledge in data pruning (Ben-Baruch et al., ICML 2025, arXiv 2403.07854). A reconstruction.

A student is trained on a part of the data, with a term that holds it to a teacher that was trained on all of them. With
that term a random part is as good as one that a score chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.role import DataPlan, DataSelector, best_samples

Score = Literal["error_norm", "forgetting", "random"]


def error_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """EL2N [n]: L2 norm of the probabilities minus the answer, for logits [n, C] early in a training; of several models
    [M, n, C] their mean (Paul et al., NeurIPS 2021)."""
    answers = F.one_hot(labels, logits.shape[-1])
    norms = (logits.softmax(-1) - answers).norm(dim=-1)
    return norms if norms.dim() == 1 else norms.mean(0)


def forgetting(correct: Tensor) -> Tensor:
    """How often each sample [n] was forgotten: right after one epoch and wrong after the next, in `correct` [E, n].
    What was never right counts as the most forgotten (Toneva et al., ICLR 2019)."""
    events = (correct[:-1] & ~correct[1:]).sum(0).double()
    return torch.where(correct.any(0), events, float(len(correct)))


def per_class(scores: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """The samples [K], ascending, of largest scores [n] when each class keeps its share of them; of a number what the
    classes leave over goes to the largest scores of all."""
    kept = budget.count(len(scores))
    mask = torch.zeros(len(scores), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero().squeeze(1)
        order = scores[places].argsort(descending=True, stable=True)
        mask[places[order[: kept * len(places) // len(scores)]]] = True
    rest = scores.masked_fill(mask, float("-inf")).argsort(descending=True, stable=True)
    mask[rest[: kept - int(mask.sum())]] = True
    return mask.nonzero().squeeze(1)


def distilled(
    logits: Tensor, labels: Tensor, teacher: Tensor, alpha: float, temperature: float = 4.0, squared: bool = True
) -> Tensor:
    """(1 - alpha) cross entropy + alpha T^2 KL(teacher || student) at temperature T, for logits [B, C]; squared:
    whether the factor T^2 stands there."""
    # assumption: temperature 4 and the factor T^2, as Hinton et al. have them; no source gives the paper's.
    target = (teacher.detach() / temperature).log_softmax(-1)
    apart = F.kl_div((logits / temperature).log_softmax(-1), target, log_target=True, reduction="batchmean")
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * (temperature**2 if squared else 1) * apart


@dataclass(frozen=True)
class DataPruning(DataSelector):
    """The scores that "Distilling the knowledge in data pruning" (arXiv 2403.07854) compares: the hardest samples stay.

    Parameters
    ----------
    score : {"error_norm", "forgetting", "random"}
        Error norm of the model that is given, which should be early in its training; forgetting events, from the
        service `correct` [E, n], which samples were right after each epoch; or at random.
    balanced
        Whether every class keeps the same share.
    """

    score: Score = "error_norm"
    balanced: bool = False

    name: ClassVar[str] = "distill_data_pruning"

    def requires(self) -> frozenset[str]:
        return frozenset({"logits"} if self.score == "error_norm" else ())

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        budget = self.budgets(budget)[0]
        scores = self.scores(examples)
        if not self.balanced:
            return DataPlan(best_samples(scores, budget))
        if examples.labels is None or examples.labels.dim() != 1:
            raise PrunelabError("only samples with one label each can be balanced by class; give `labels` [n]")
        return DataPlan(Gather(per_class(scores, examples.labels, budget)[None]))

    def scores(self, examples: Examples) -> Tensor:
        """Scores [n]; the largest stay."""
        if self.score == "random":
            return torch.rand(len(examples), generator=examples.rng)
        if self.score == "forgetting":
            correct = examples.services.get("correct")
            if correct is None or correct.shape[1] != len(examples):
                raise PrunelabError(
                    "forgetting needs services={'correct': ...}, which samples were right after each epoch, [E, n]"
                )
            return forgetting(correct.bool())
        if examples.labels is None or examples.labels.dim() != 1:
            raise PrunelabError("the error norm is of a classification; give every sample one of the `labels`")
        return error_norm(examples.logits, examples.labels)
