"""VTW: where its budget puts K, what is left behind it, and its search."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.vtw.method import VTW, first_layer
from tests.contract.vlms import film, images, prompt, typed, vlm


@torch.no_grad()
def seen(method: VTW, budget: object, family: str = "llava", batch: int = 2) -> list[int]:
    model = vlm(family, num_hidden_layers=8)
    with apply(method, model, budget) as handle:
        model(**typed(model, prompt(family, images(family, batch))))
    return [round(tokens) for tokens, _ in handle.report().tokens]


@pytest.mark.parametrize(("budget", "layer"), [(1.0, 8), (0.5, 4), ("8count", 4), ("5count", 2), (0.0, 0), (0.06, 0)])
def test_the_budget_is_the_mean_over_layers(budget, layer):
    assert seen(VTW(), budget) == [7 + 16] * layer + [7] * (8 - layer)


def test_tables_of_others_name_their_layers():
    assert [round(32 * n / 576) for n in (192, 128, 64)] == [11, 7, 4]
    for family in ("llava", "llava_next", "qwen2_5_vl"):
        tokens = seen(VTW(3), 0, family)
        assert tokens[3:] == [7] * 5 and len(set(tokens[:3])) == 1 and tokens[0] > 7


@torch.no_grad()
def test_videos_and_padded_prompts_leave_their_text():
    model = vlm("llava_onevision")
    with apply(VTW(2), model, 0) as handle:
        model(**film("llava_onevision", words=(4, 2)))
    for row, words in zip(handle.kept()[-1][1], (7, 5), strict=True):
        assert int((row >= 0).sum()) == words


def test_a_layer_and_a_budget_do_not_go_together():
    with pytest.raises(PrunelabError, match="give the budget 0, or no layer"):
        seen(VTW(3), 0.5)
    with pytest.raises(PrunelabError, match="layers 0 to 7"):
        seen(VTW(9), 0)


def test_the_search_stops_where_the_image_no_longer_matters():
    full = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    asked = []

    def withdrawn():
        for layer, shift in enumerate((1.0, 0.3, 0.001, 0.0), 5):
            asked.append(layer)
            yield full + shift * torch.arange(9)

    assert first_layer(full, withdrawn()) == 7 and asked == [5, 6, 7]
    assert first_layer(full, withdrawn(), eta=9.0) == 5
    with pytest.raises(PrunelabError, match="larger one"):
        first_layer(full, [full * 3], eta=1e-9)
