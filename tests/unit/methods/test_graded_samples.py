"""Graded samples: near copies, the reliability of grades, what mends them, and how graders are asked."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.engine import select
from prunelab.common.data_selection.grades import GRADINGS, grades
from prunelab.methods.graded_samples.method import (
    BLOCK,
    GradedSamples,
    mended,
    neighbours,
    spread_out,
    transition,
)
from tests.contract.references import language_model

T = torch.tensor


def test_near_copies_are_passed_over_and_fill_up_at_last():
    embeddings = T([[1.0, 0.0], [2.0, 0.01], [0.0, 1.0], [0.01, 3.0], [-1.0, 0.0]])
    order = T([1, 0, 3, 2, 4])
    assert spread_out(embeddings, order, 3).tolist() == [1, 3, 4]
    assert spread_out(embeddings, order, 5).tolist() == [1, 3, 4, 0, 2]
    assert spread_out(embeddings, order, 2, limit=1.0).tolist() == [1, 0]


def test_blocks_of_samples_choose_as_one_after_the_other_would():
    rng = torch.Generator().manual_seed(0)
    embeddings, count = torch.randn(2 * BLOCK + 9, 3, generator=rng), 40
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    chosen: list[int] = []
    for number in range(len(unit)):
        if len(chosen) < count and all(float(unit[number] @ unit[other]) <= 0.95 for other in chosen):
            chosen.append(number)
    assert spread_out(embeddings, torch.arange(len(unit)), len(chosen), 0.95).tolist() == chosen


def test_neighbours_are_the_nearest_others():
    embeddings = T([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    found, cosines = neighbours(embeddings, 1)
    assert found.flatten().tolist() == [1, 0, 3, 2] and (cosines > 0.99).all()


def graded(n=6000, seed=0):
    """Samples in three clusters of one true grade each, a fifth of the first graded as the second."""
    rng = torch.Generator().manual_seed(seed)
    true = torch.randint(3, (n,), generator=rng)
    wrong = (true == 0) & (torch.rand(n, generator=rng) < 0.2)
    given = torch.where(wrong, 1, true)
    members = [(true == grade).nonzero().squeeze(1) for grade in range(3)]
    near = torch.stack([members[g][torch.randint(len(members[g]), (5,), generator=rng)] for g in true.tolist()])
    return true, given, near


def test_agreement_of_neighbours_tells_how_reliable_grades_are():
    _, given, near = graded()
    rows, share = transition(given, near[:, :2], 3)
    assert torch.allclose(rows, T([[0.8, 0.2, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64), atol=0.05)
    assert torch.allclose(share, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.04)


def test_wrong_grades_are_mended_by_their_neighbours():
    true, given, near = graded(n=900)
    better = mended(given, near, 3)
    assert int((better != true).sum()) < 0.3 * int((given != true).sum())


def samples(given):
    rng = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 60, (7,), generator=rng), "grades": row} for row in given]


def test_the_best_grades_stay_and_half_of_their_tokens():
    given = T([[1.0], [5.0], [3.0], [4.0]])
    chosen = select(GradedSamples(), samples(given), "0.5,0.5", model=language_model())
    assert chosen.indices == [1, 3] and [int((s["labels"] >= 0).sum()) for s in chosen] == [3, 3]
    both = T([[1.0, 6.0], [5.0, 1.0], [3.0, 3.0], [4.0, 4.0]])
    deita = GradedSamples("deita", limit=1.0)
    assert select(deita, samples(both), "0.5,1", model=language_model()).indices == [2, 3]
    assert deita.grading == ("complexity", "quality") and GradedSamples("ds2").grading == ("accuracy",)
    with pytest.raises(PrunelabError, match="column `grades`"):
        select(GradedSamples(), [torch.arange(1, 8)], "1,1", model=language_model())


def test_rare_samples_come_first_of_one_mended_grade():
    model, rows = language_model(), samples(torch.full((6, 1), 4.0))
    alike = [{**row, "input_ids": rows[0]["input_ids"]} for row in rows[:5]] + rows[5:]
    assert 5 in select(GradedSamples("ds2", near=2), alike, "0.34,1", model=model).indices
    assert GradedSamples("ds2").requires() == {"grades", "embedding"}


class Tokenizer:
    def __call__(self, text, add_special_tokens=True):
        words = [3 + sum(word.encode()) % 50 for word in text.split()]
        return {"input_ids": [1, *words] if add_special_tokens else words}


def test_a_grade_is_the_mean_of_the_figures_as_likely_as_they_come_next():
    model, tokenizer = language_model(), Tokenizer()
    pairs = [("what is this", "a thing"), ("why", "because of that"), ("what is that", "a thing")]
    found = grades(model, tokenizer, "accuracy", pairs, batch=2)
    text = GRADINGS["accuracy"].text.format(question="why", answer="because of that")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double()
    figures = [3 + ord(figure) % 50 for figure in "012345"]
    assert float(found[1]) == pytest.approx(float((logits[figures].softmax(-1) * torch.arange(6)).sum()), abs=1e-6)
    assert found.shape == (3,) and ((found > 0) & (found < 5)).all()


@pytest.mark.parametrize("kind", GRADINGS)
def test_what_is_too_long_loses_the_end_of_what_is_graded_and_not_the_question(kind):
    model = language_model()
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    grades(model, Tokenizer(), kind, [("word " * 300, "word " * 300)], length=60)
    end = Tokenizer()(GRADINGS[kind].text.partition("}")[2].rpartition("}")[2], add_special_tokens=False)["input_ids"]
    assert seen[0].shape == (1, 60) and seen[0][0, -len(end) :].tolist() == end
