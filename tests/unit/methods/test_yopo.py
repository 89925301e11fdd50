"""YOPO: the authors' heads, the vote, what a layer is asked for, and bad input; `test_effort` holds the layers."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Effort, ModelInfo
from prunelab.methods.yopo.method import YOPO, active_heads, neighbour_mask, released, visual_ratio
from prunelab.methods.yopo.tables import costs, work
from tests.contract.vlms import images, prompt, vlm


@pytest.mark.parametrize(("heads", "layers", "active"), [
    ("7b_8", 32, 260), ("7b_16", 32, 499), ("7b_24", 32, 773),
    ("13b_5", 40, 200), ("13b_10", 40, 407), ("13b_20", 40, 798), ("13b_30", 40, 1197),
])  # fmt: skip
def test_the_authors_heads(heads, layers, active):
    mask = released(heads)
    assert mask.shape == (layers, layers) and int(mask.sum()) == active and bool(mask[:2].all())
    assert released("all") is None


def test_neighbours_are_within_a_square_on_both_sides():
    near = neighbour_mask(3, 4, 3)
    assert near[0].nonzero().squeeze(1).tolist() == [0, 1, 4, 5]
    assert near[5].sum() == 9 and near[3].nonzero().squeeze(1).tolist() == [2, 3, 6, 7]
    assert torch.equal(near, near.T) and torch.equal(neighbour_mask(3, 4, 1), torch.eye(12, dtype=torch.bool))


def test_a_head_is_active_where_enough_samples_say_so():
    weights = torch.zeros(3, 2, 1, 4, 4)
    weights[..., 1:3] = torch.tensor([0.1, 0.3])[None, :, None, None, None]
    weights[..., 0] = 1.0
    ratios = visual_ratio(weights, 1, 2)
    assert torch.allclose(ratios[0, :, 0], torch.tensor([0.2, 0.6]))
    assert active_heads(ratios, 0.5, 0).squeeze(1).tolist() == [True, True, True]
    assert active_heads(ratios, 0.5, 1).squeeze(1).tolist() == [True, True, False]


def test_what_layers_are_asked_for():
    info = ModelInfo("test", 32, 32, 64, 600)
    method = YOPO(layers=16, heads="7b_16")
    early, late = (method.effort(layer, info, Budget(0.5)) for layer in (15, 16))
    assert (early.window, early.read, early.neurons, late.read) == (5, True, 0.5, False)
    assert list(early.heads) == released("7b_16")[15].tolist()
    assert YOPO(0, 9).effort(0, info, Budget(1.0)) == Effort() and Effort().attends_as_ever


def test_nothing_changes_where_nothing_is_taken():
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    with torch.no_grad():
        dense = model(**given).logits
        with apply(YOPO(window=0), model, 1.0):
            assert torch.allclose(model(**given).logits, dense, atol=1e-5)
        with apply(YOPO(window=3), model, 1.0):
            assert not torch.allclose(model(**given).logits, dense, atol=1e-3)


def test_bad_input_is_one_line_before_work():
    model = vlm("llava")
    with pytest.raises(PrunelabError, match="of 32 layers with 32 heads"), apply(YOPO(heads="7b_8"), model, 0.5):
        pass
    with pytest.raises(PrunelabError, match="share of an MLP's neurons"), apply(YOPO(), model, "64count"):
        pass
    with pytest.raises(PrunelabError, match="one of all"):
        YOPO(heads="7b_7")


def test_half_of_everything_is_the_papers_quarter():
    from prunelab.common.costs.formulas import LLAVA_13B

    assert work(LLAVA_13B, 0.5, 0.5, 20) == 0.25
    found = {name: round(entry["value"], 2) for name, entry in costs().items()}
    assert [found[f"T2/LLaVA-1.5-7B {row}/FLOPs"] for row in ("Original", "YOPO 25%", "YOPO 12%")] == [7.63, 1.91, 0.92]
    assert [found[f"T2/LLaVA-1.5-13B {row}/FLOPs"] for row in ("Original", "FastV", "YOPO 12%")] == [14.89, 3.72, 1.79]
