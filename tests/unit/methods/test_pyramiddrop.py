"""PyramidDrop: its stages, what its shares are shares of, and what its tables say."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.pyramiddrop.method import PyramidDrop, stages
from prunelab.methods.pyramiddrop.tables import costs, flops
from tests.contract.vlms import images, prompt, vlm


def test_stages_have_one_length():
    assert stages(32, 4) == (8, 16, 24)
    assert stages(40, 4) == (10, 20, 30)
    assert stages(5, 4) == (1, 2, 3)
    assert stages(2, 4) == (1,)
    assert stages(32, 1) == ()


@torch.no_grad()
def test_shares_of_a_stage_and_of_the_image():
    model, given = vlm("llava", num_hidden_layers=8), prompt("llava", images("llava", 2))
    words, image = 7, 16

    def seen(method: PyramidDrop, budget: object) -> list[int]:
        with apply(method, model, budget) as handle:
            model(**given)
        return [int(tokens) - words for tokens, _ in handle.report().tokens]

    assert seen(PyramidDrop(), 0.5) == [image] * 2 + [8] * 2 + [4] * 2 + [2] * 2
    assert seen(PyramidDrop(of="image"), (0.5, 0.25, 0.125)) == [image] * 2 + [8] * 2 + [4] * 2 + [2] * 2
    assert seen(PyramidDrop(of="image"), 0.5) == [image] * 2 + [8] * 6
    assert seen(PyramidDrop((0, 5)), Budget((4, 0), "count")) == [4] * 5 + [0] * 3


@torch.no_grad()
def test_it_ranks_by_the_layer_that_comes():
    model, given = vlm("llava"), prompt("llava", images("llava", 1))
    model.set_attn_implementation("eager")
    rows = model(**given, output_attentions=True).attentions[2][0, :, -1].mean(0)
    with apply(PyramidDrop((2,)), model, Budget(5, "count")) as handle:
        model(**given)
    kept = handle.kept()[0][1][0]
    assert set(kept.tolist()) == {0, 1, 2, 19, 20, 21, 22} | {int(i) + 3 for i in rows[3:19].topk(5).indices}


def test_the_formula_gives_the_printed_figures():
    assert round(flops(576, 1.0), 2) == 3.82
    assert round(flops(576), 2) == 1.78
    assert round(flops(576, number=3), 2) == 2.13
    assert round(costs()["headline/LLaVA-NeXT PyramidDrop/inference FLOPs reduction"]["value"]) == 55


def test_what_cannot_be_is_said():
    for bad, message in (({"of": "crop"}, "of must be one of stage, image"), ({"number": 0}, "of at least 1")):
        with pytest.raises(PrunelabError, match=message):
            PyramidDrop(**bad)
    for method, message in ((PyramidDrop(number=1), "larger `number`"), (PyramidDrop((9,)), "layers 0 to 3")):
        with pytest.raises(PrunelabError, match=message), apply(method, vlm("llava"), 0.5):
            pass
