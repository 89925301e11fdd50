"""`digits_qa`, fine-tuned on questions with a token pruner at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.data import pictures, questions
from prunelab.common.data.questions import IDS
from prunelab.common.testbeds.digits_qa import FULL, QUICK, TEST_SEED, DigitsQA, answers
from prunelab.common.testbeds.tuned import Tuned


@dataclass(frozen=True)
class DigitsQATuned(Tuned):
    """Questions of all forms in turn, each about a picture of its own. What is learned is the answer and the end behind
    it, the latter at a tenth of the weight, as in the training behind the weights.

    ends: whether the answer stands behind the question, without which its end cannot be learned. A method that reads
    the attention of the text would choose by it.
    """

    steps: int = 300
    batch: int = 20
    check_every: int = 75
    rate: float = 1e-3
    decay: float = 0.0

    needs: ClassVar[tuple[str, ...]] = DigitsQA.needs
    ends: ClassVar[bool] = True

    def extras(self) -> dict[str, str]:
        return dict(self.base().extras())

    def batch_of(self, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of the model for questions with their answers, and what comes next [B, 2] at the last places."""
        facts = pictures.pictures("train", self.batch, generator, deformed=True)
        forms = list(questions.FORMS["picture"])
        samples = [questions.ask("picture", form, facts, generator) for form in forms]
        row = torch.arange(self.batch)
        words, answer = (torch.stack(part)[row % len(forms), row] for part in zip(*samples, strict=True))
        tokens = questions.prompt("picture", words)
        if self.ends:
            tokens = torch.cat([tokens, answer.unsqueeze(1)], 1)
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": facts.pixels}
        return given, torch.stack([answer, torch.full_like(answer, IDS[questions.END])], 1)[:, : 1 + self.ends]

    def passing(self, generator: torch.Generator) -> Callable[[nn.Module], Any]:
        given, wanted = self.batch_of(generator)

        def outputs(model: nn.Module) -> Any:
            logits = model(**given, use_cache=False, logits_to_keep=wanted.shape[1]).logits.float()
            each = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(0)
            return SimpleNamespace(loss=each[0] + 0.1 * each[1:].sum(), logits=logits)

        return outputs

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Accuracy on held-out digits without pruning, and under each budget."""
        samples = questions.draw("picture", "test", QUICK if quick else FULL, TEST_SEED)
        results = {"accuracy": right(model, samples)}
        for budget in self.budgets:
            with self.pruned(model, budget):
                results[f"accuracy_{budget}"] = right(model, samples)
        return results if quick else results | {"questions": len(samples)}


@dataclass(frozen=True)
class DigitsQAM3(DigitsQATuned):
    """By M3's rule: every batch is read at all five scales, the whole model learns, the loss is their mean. A picture
    of 9 x 9 cells is read as it is and as means of 2, 3, 4 and 9 cells squared; squares of 2 and 4 leave the last row
    and column out, as the released pooling does."""

    method: str = "m3()"
    budget: str = "81count; 16count; 9count; 4count; 1count"

    name: ClassVar[str] = "digits_qa_m3"

    def base(self) -> DigitsQA:
        return DigitsQA()


def right(model: nn.Module, samples: list[questions.Sample]) -> float:
    """The share of questions whose answer is the likeliest next word."""
    predictions = answers(model, samples)
    return sum(a == sample.answer for a, sample in zip(predictions, samples, strict=True)) / len(samples)
