"""The contract of data selectors and of rankers, over every registered method and the reference methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.engine import applied, select
from prunelab.common.data_selection.gradients import Checkpoint
from prunelab.common.data_selection.losses import counted
from prunelab.common.data_selection.role import DataSelector
from tests.contract.references import invariant, language_model
from tests.contract.selector_references import SELECTORS, Occlusion, RewardedWords


def small(method: DataSelector) -> DataSelector:
    """A method that projects to thousands of dimensions, to as few as become a tiny model."""
    return replace(method, dimensions=64) if hasattr(method, "dimensions") else method  # type: ignore[type-var]


METHODS = [small(c()) for c in registry.load().values() if issubclass(c, DataSelector)] + list(SELECTORS)
BEFORE = [m for m in METHODS if m.when == "before"]
EACH = [m for m in METHODS if m.when == "each_batch"]
before = pytest.mark.parametrize("method", BEFORE, ids=lambda m: m.name)
each = pytest.mark.parametrize("method", EACH, ids=lambda m: m.name)

TEXTS = tuple(f"{a} {b} {c}" for a in ("red", "blue") for b in ("fox", "whale", "hen") for c in ("ran", "swam", "sat"))

LONG = tuple(" ".join([text] * 40) for text in TEXTS)  # for methods that leave short documents out


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [sum(word.encode()) % 60 + 1 for word in text.split()] * 2}


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(5, 3)


def services(method: DataSelector) -> dict[str, Any]:
    return {
        name: checkpoints(language_model()) if name == "checkpoints" else language_model(seed=7)
        for name in method.services
    }


def checkpoints(model: torch.nn.Module) -> list[Checkpoint]:
    """Two of a short training."""
    optimizer, found = torch.optim.AdamW(model.parameters(), 1e-2), []
    for step in range(2):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
        found.append(Checkpoint.of(model, optimizer, 1e-2 / (step + 1)))
    return found


def corpus(method: DataSelector) -> Any:
    """Texts, or samples with the grades that a method reads."""
    if "grades" not in method.requires():
        return TEXTS
    given = torch.randint(6, (len(TEXTS), 2), generator=torch.Generator().manual_seed(3)).double()
    return [tokenizer(text) | {"grades": row} for text, row in zip(TEXTS, given, strict=True)]


def chosen(method: DataSelector, budget: Budget, seed: int = 0) -> Any:
    """A choice from data of the shape that the method reads."""
    options: dict[str, Any] = {"services": services(method), "seed": seed, "batch": 5}
    if method.requires() == {"logits"}:
        rng = torch.Generator().manual_seed(1)
        data = [{"x": torch.randn(5, generator=rng), "labels": torch.tensor(i % 3)} for i in range(18)]
        return select(method, data, budget, model=classifier(), forward=lambda m, b: m(b["x"]), **options)
    if method.requires() - {"text"} or "tokens" in method.chooses:
        options |= {"model": language_model(), "tokenizer": tokenizer}
        if "gradients" in method.requires():
            options["target"] = TEXTS[:3]
        return select(method, corpus(method), budget, **options)
    return select(method, LONG, budget, target=LONG[:3], **options)


def amounts(method: DataSelector, ratio: float) -> Budget:
    return Budget((ratio,) * len(method.chooses)) if len(method.chooses) > 1 else Budget(ratio)


def batch() -> dict[str, torch.Tensor]:
    """Six answers to prompts of unlike lengths, padded on the right."""
    tokens = torch.randint(1, 61, (6, 12), generator=torch.Generator().manual_seed(2))
    places, prompt, length = torch.arange(12), torch.tensor([2, 3, 4, 2, 5, 3]), torch.tensor([12, 9, 12, 7, 10, 12])
    valid = places < length[:, None]
    labels = tokens.masked_fill((places < prompt[:, None]) | ~valid, -100)
    return {"input_ids": tokens, "attention_mask": valid.long(), "labels": labels}


# -- before training -------------------------------------------------------------------------------------------------


@before
@pytest.mark.parametrize("ratio", [0.5, 0.75, 1.0])
def test_budget_is_met_in_the_order_of_the_data(method, ratio):
    found = chosen(method, amounts(method, ratio))
    assert found.indices == sorted(set(found.indices)) and len(found) == len(list(found))
    with invariant("budget", method):
        samples, tokens = method.budgets(amounts(method, ratio))
        assert len(found) == samples.count(18)
        if found.plan.tokens is not None:
            labels = [sample["labels"] for sample in found]
            kept = sum(int(counted(row[None]).sum()) for row in labels)
            total = tokens.count((2 * 3 - 1) * len(found))
            floors = len(found) if "samples" in method.chooses else 1  # of each sample's own tokens, or of all
            assert total - floors < kept <= total


@before
def test_same_seed_same_choice(method):
    plans = [chosen(method, amounts(method, 0.5), seed=4) for _ in range(2)]
    assert plans[0].indices == plans[1].indices and len(str(plans[0]).splitlines()) >= 1


@before
def test_a_budget_of_another_shape_is_refused(method):
    with pytest.raises(PrunelabError, match="it takes"):
        chosen(method, Budget((0.5, 0.5, 0.5)))
    with pytest.raises(PrunelabError, match="would keep nothing"):
        chosen(method, amounts(method, 0.0))
    with pytest.raises(PrunelabError, match="before training"):
        applied(method, language_model(), 0.5).__enter__()


# -- each batch ------------------------------------------------------------------------------------------------------


@each
def test_what_stays_enters_the_loss_and_nothing_else(method):
    model = language_model().train()
    budget = amounts(method, 0.5) if method.chooses else Budget(1.0)
    with applied(method, model, budget, services=services(method)) as handle:
        loss = model(**batch()).loss
        loss.backward()
        report = handle.report()
    assert bool(torch.isfinite(loss)) and "batches    1" in report
    samples, _ = method.budgets(budget)
    assert handle.samples == 6 and handle.kept_samples == samples.count(6)
    assert 0 < int(handle.kept_tokens) <= int(handle.tokens) == int(counted(batch()["labels"]).sum())
    assert not model._forward_pre_hooks and not model._forward_hooks


@each
def test_all_data_is_the_plain_loss(method):
    model = language_model().train()
    plain = model(**batch()).loss
    with invariant("keep_all", method), applied(method, model, amounts(method, 1.0), services=services(method)):
        if method.chooses:
            assert torch.allclose(model(**batch()).loss, plain)
        else:
            assert not torch.allclose(model(**batch()).loss, plain), "weights count"


@each
def test_evaluation_and_generation_are_left_alone(method):
    model = language_model()
    plain = model(**batch()).loss
    with applied(method, model, amounts(method, 0.5) if method.chooses else 1.0, services=services(method)) as handle:
        assert torch.equal(model(**batch()).loss, plain)
        with torch.no_grad():
            assert torch.equal(model.train()(**batch()).loss, plain)
        assert model.training and handle.batches == 0
        with pytest.raises(PrunelabError, match="has seen no batch"):
            handle.report()


# -- rankers of other units ------------------------------------------------------------------------------------------


def test_context_tokens_are_ranked_by_what_their_loss_costs():
    def logits(tokens):  # the next token is the second one of the context, whatever else stands there
        return 9 * torch.nn.functional.one_hot(tokens[:, 1], 11).float()

    services = {"next_token_logits": logits, "replace": lambda t, rng: torch.randint(5, 11, t.shape, generator=rng)}
    tokens = torch.tensor([3, 1, 4, 2])
    plan = Occlusion(rounds=64).plan(tokens, Budget(1, "count"), services)
    assert plan.reduce.index.tolist() == [[1]]
    assert torch.equal(plan.reduce.index, Occlusion(rounds=64).plan(tokens, Budget(1, "count"), services).reduce.index)


def test_a_vocabulary_is_ranked_by_reward():
    plan = RewardedWords().plan(["a", "ccc", "bb"], Budget(0.67), {"reward": len})
    assert plan.reduce.index.tolist() == [[1, 2]]
