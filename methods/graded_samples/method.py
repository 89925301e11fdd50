"""Instructions chosen by grades that language models give them: Alpagasus, Deita and DS2.

All three grade every instruction with its answer. Alpagasus keeps the best; Deita multiplies complexity and quality and
keeps no near copies; DS2 first mends grades that disagree with those of similar samples, then prefers rare ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import PositiveInt, Share
from prunelab.common.core.plan import Gather
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.role import DataPlan, DataSelector, best_tokens

BLOCK = 512  # samples that are compared with the chosen ones at once


def spread_out(embeddings: Tensor, order: Tensor, count: int, limit: float = 0.9) -> Tensor:
    """The first `count` of an order [n] none of which is more than `limit` like an earlier one, by the cosine of
    embeddings [n, D] (Deita's filter); where there are not as many, the first of those passed over fill up."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    chosen: list[int] = []
    passed: list[int] = []
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        far = torch.ones(len(block), dtype=torch.bool)
        if chosen:
            far = ((unit[block] @ unit[torch.tensor(chosen)].T).amax(1) <= limit).cpu()
        close = (unit[block] @ unit[block].T > limit).cpu()
        for place, number in enumerate(block.tolist()):
            if len(chosen) == count:
                break
            if far[place]:
                chosen.append(number)
                far &= ~close[place]  # what is like it and comes later is passed over
            else:
                passed.append(number)
    return torch.tensor((chosen + passed)[:count])


def neighbours(embeddings: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest other samples [n, k] by cosine, and their cosines [n, k]."""
    unit, results, cosines = torch.nn.functional.normalize(embeddings.float(), dim=-1), [], []
    for start in range(0, len(unit), BLOCK):
        alike = unit[start : start + BLOCK] @ unit.T
        rows = torch.arange(start, min(start + BLOCK, len(unit)), device=unit.device)
        alike[rows - start, rows] = float("-inf")
        best = alike.topk(min(count, len(unit) - 1), -1)
        results.append(best.indices)
        cosines.append(best.values)
    return torch.cat(results), torch.cat(cosines)


def transition(
    grades: Tensor, near: Tensor, classes: int, steps: int = 1000, rate: float = 0.1
) -> tuple[Tensor, Tensor]:
    """How often each true grade is given as each [K, K], and how often it is true [K], from the given ones [n] and the
    two nearest samples [n, 2]: a sample and these are taken to have one true grade, so that how often they agree, two
    and three at a time, tells how reliable grades are (DS2, section 3)."""
    hot = torch.nn.functional.one_hot(grades, classes).double()
    first, second = hot[near[:, 0]], hot[near[:, 1]]
    seen = hot.mean(0), hot.T @ first / len(hot), torch.einsum("ni,nj,nk->ijk", hot, first, second) / len(hot)
    given = (2.0 * torch.eye(classes, dtype=torch.float64)).requires_grad_()
    true = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([given, true], rate)
    with torch.enable_grad():
        for _ in range(steps):
            rows, share = given.softmax(1), true.softmax(0)
            predictions = (
                share @ rows,
                torch.einsum("y,yi,yj->ij", share, rows, rows),
                torch.einsum("y,yi,yj,yk->ijk", share, rows, rows, rows),
            )
            loss = sum(((a - b) ** 2).sum() for a, b in zip(predictions, seen, strict=True))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
    return given.detach().softmax(1), true.detach().softmax(0)


def mended(grades: Tensor, near: Tensor, classes: int) -> Tensor:
    """Grades [n], those that are likely wrong replaced by the most frequent one of the nearest samples [n, k]: of each
    grade as many as the transition says, those first that fewest of their neighbours share."""
    rows, share = transition(grades, near[:, :2], classes)
    right = share * rows.diagonal() / (share @ rows).clamp_min(1e-12)  # how likely a given grade is true
    around = torch.nn.functional.one_hot(grades[near], classes).sum(1)
    agree, common = around.gather(1, grades[:, None]).squeeze(1), around.argmax(1)
    result = grades.clone()
    for grade in range(classes):
        places = (grades == grade).nonzero().squeeze(1)
        wrong = round(len(places) * (1 - float(right[grade])))
        doubtful = places[agree[places].argsort(stable=True)[:wrong]]
        result[doubtful] = common[doubtful]
    return result


@dataclass(frozen=True)
class GradedSamples(DataSelector):
    """Instructions chosen by grades: Alpagasus (arXiv 2307.08701), Deita (arXiv 2312.15685) and DS2 (arXiv 2410.10877);
    of the samples that stay, tokens drawn at random, as a paper of joint pruning sets them beside its own (arXiv
    2509.23873).

    Parameters
    ----------
    rule : {"alpagasus", "deita", "ds2"}
        The best grades, of equal ones at random; the best products of complexity and quality without near copies; the
        best mended grades, of equal ones those least like their neighbours.
    limit
        Deita's cosine, above which a sample counts as a copy.
    near
        Neighbours that mend a grade and tell how rare a sample is, in DS2.
    """

    rule: Literal["alpagasus", "deita", "ds2"] = "alpagasus"
    limit: Share = 0.9
    near: PositiveInt = 10

    name: ClassVar[str] = "graded_samples"
    chooses: ClassVar[tuple[Literal["samples", "tokens"], ...]] = ("samples", "tokens")

    @property
    def grading(self) -> tuple[str, ...]:
        """What graders are asked for, by their names in `common.data_selection.grades`."""
        return ("complexity", "quality") if self.rule == "deita" else ("accuracy",)

    def requires(self) -> frozenset[str]:
        return frozenset({"grades"} if self.rule == "alpagasus" else {"grades", "embedding"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        samples, tokens = self.budgets(budget)
        count, grades = samples.count(len(examples)), examples.grades.double()
        if self.rule == "deita":
            order = grades.prod(1).argsort(descending=True, stable=True)
            kept = spread_out(examples.embedding, order, count, self.limit)
        else:
            best, rare = grades[:, 0], torch.rand(len(grades), generator=examples.rng).double()
            if self.rule == "ds2":
                result, cosines = neighbours(examples.embedding, self.near)
                given = best.round().long()
                best, rare = mended(given, result, int(given.max()) + 1).double(), 1 - cosines.double().mean(1)
            kept = rare.argsort(descending=True, stable=True)
            kept = kept[best[kept].argsort(descending=True, stable=True)][:count]
        worth = torch.rand(examples.counted.shape, generator=examples.rng)
        return DataPlan(Gather(kept.sort().values[None]), best_tokens(worth, examples.counted, tokens))
