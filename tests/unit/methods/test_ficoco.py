"""FiCoCo-V: what leaves in all, where from, and what becomes of it."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.methods.ficoco.method import FiCoCoV, above, compressed, importance, penalised
from tests.contract import errors, vlms


def test_the_number_is_met_behind_the_last_layer():
    model = vlms.vlm("llava", tower=6)
    given = errors.prompts("llava", model, (5,))
    shown = int((given["input_ids"] == model.config.image_token_id).sum())
    for budget, left in (("5count", 5), ("9count", 9), (1.0, shown)):
        with apply(FiCoCoV(first=1), model, budget) as handle, torch.no_grad():
            model(**given)
            seen = {mlp for attention, mlp in handle.report().tokens}
        assert seen == {given["input_ids"].shape[1] - shown + left}


def test_one_of_every_square_becomes_more_redundant():
    scores = torch.tensor([[0.4, 0.2, -0.3, 0.5, 0.1, 0.3, -0.1, 0.6]])
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])  # two rows of four: squares {0 1 4 5} and {2 3 6 7}
    wanted = torch.tensor([[0.4, 0.2, -0.6, 0.5, 0.05, 0.3, -0.1, 0.6]])
    assert torch.allclose(penalised(scores, places, 4), wanted)
    gone = penalised(scores[:, [0, 1, 3]], places[:, [0, 1, 3]], 4)  # of those that left none counts
    assert torch.allclose(gone, torch.tensor([[0.4, 0.1, 0.25]]))


def test_without_a_class_token_what_is_paid_counts_alone():
    attention = torch.randn(2, 6, 6)
    paid = torch.nn.functional.normalize(attention.mean(-1), dim=-1)
    assert torch.allclose(importance(attention, 0), -0.65 * paid)


def test_weights_of_what_stays_add_up_to_one():
    gone, targets = torch.tensor([[2, 4]]), torch.tensor([[[1, 3], [1, 5]]])
    matrix = compressed(6, gone, targets, torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])).matrix(6)
    assert torch.allclose(matrix.sum(-1), torch.ones(1, 4))
    assert torch.allclose(matrix[0, 1], torch.tensor([0, 1, 0.75, 0, 0.5, 0]) / 2.25)


@pytest.mark.parametrize(("tokens", "count"), [(577, 2), (400, 1), (3, 1), (1, 1)])
def test_how_many_lie_above_a_quantile(tokens, count):
    assert above(tokens, 0.998) == count
    if tokens > 100:
        x = torch.randn(tokens, generator=torch.Generator().manual_seed(0))
        assert int((x > x.quantile(0.998)).sum()) == count
