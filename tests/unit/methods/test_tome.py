"""ToMe between the layers of a language model's image encoder; its form for classifiers is replayed against the
authors' vectors."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.tome.method import ToMe
from tests.contract.vlms import images, prompt, vlm

IN_TOWER = ToMe(proportional=False, where="tower", positions="renumber")


@pytest.mark.parametrize(("budget", "left"), [("10count", 10), ("0.5", 8), ("3removed", 4)])
@torch.no_grad()
def test_as_many_leave_between_all_layers_and_the_budget_is_what_is_left(budget: str, left: int) -> None:
    model = vlm("llava", tower=6)  # of which five are before the features
    given = prompt("llava", images("llava"))
    with apply(IN_TOWER, model, budget) as handle:
        model(**given)
    assert [site.layer for site in handle.application.sites] == [1, 2, 3, 4]
    assert [seen for seen, _ in handle.report().tokens] == [7 + left] * 4


@torch.no_grad()
def test_what_is_merged_twice_weighs_as_much_as_it_holds() -> None:
    model = vlm("llava", tower=4)
    with apply(IN_TOWER, model, "5count") as handle:
        model(**prompt("llava", images("llava", 1)))
        matrix = handle.adapter.encoding.reduced.matrix(17)[0]  # of the class token and 16 patches, after two mergings
    held = (matrix > 0).sum(1)
    assert len(held) == 6 and held.sum() == 17 and held.max() > 2
    assert torch.allclose(matrix, (matrix > 0) / held.unsqueeze(1))


def test_no_attention_is_proportional_there() -> None:
    model = vlm("llava", tower=4)
    with pytest.raises(PrunelabError, match="no attention is biased"), apply(ToMe(where="tower"), model, "8count"):
        model(**prompt("llava", images("llava", 1)))
