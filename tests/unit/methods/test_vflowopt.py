"""VFlowOpt: what is recycled, stages of a whole model, and the search for a strategy."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.vflowopt.method import VFlowOpt, calibrated, dropped, patch_entropy, recycled, trusted
from prunelab.methods.vflowopt.search import Space, Strategy, expected_improvement, optimise, similarity, stages
from tests.contract.vlms import IMAGE, film, ids, images, prompt, typed, vlm


def test_the_most_attended_is_trusted_where_none_is():
    received = torch.tensor([[1.0, 2.0, 9.0], [1.0, 1.0, 1.1]])
    assert trusted(received, 1.5).tolist() == [[False, False, True]] * 2
    weights = torch.rand(1, 2, 5, 5).softmax(-1)
    scores, trust = calibrated(lambda a, b: weights[:, :, a:b], (1, 2, 5), 0.0)
    assert bool(trust.all()) and torch.allclose(scores, weights.mean((1, 2)), atol=1e-6)


def test_entropy_counts_grey_levels():
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[..., :2, 2:] = torch.tensor([[0.1, 0.3], [0.5, 0.7]])
    bits = patch_entropy(pixels, (2, 2))[0]
    assert torch.allclose(bits, torch.tensor([0.0, 2.0, 0.0, 0.0]), atol=1e-4)
    assert torch.isfinite(patch_entropy(-pixels, (2, 2))).all(), "negative ones wrap around"


def test_cells_leave_one_token_each():
    importance = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.3, 0.4, 1.0, 0.05, 0.6, 1.0])  # 2 by 2, then rows of 2 and newline
    stays, low, stands, weight = recycled(importance, 4, 2, 3, 2.0, 0.6)
    assert sorted(low.tolist()) == [1, 2, 4, 5, 7, 8], "four leave, and two more for 2 by 2 cells"
    assert bool(stays[[0, 3, 6, 9]].all())
    assert set(stands.tolist()) == {2, 8}, "of each cell the most important; thumbnail and crops apart"
    for place in set(stands.tolist()):
        assert float(weight[stands == place].sum()) == pytest.approx(1.0)


@torch.no_grad()
def test_three_stages_of_a_large_image():
    model = vlm("llava_next", num_hidden_layers=6)
    given = prompt("llava_next", images("llava_next", 2))
    with apply(VFlowOpt(threshold=1.2, cell=3.0), model, (0.5, 0.5, 0.5)) as handle:
        model(**given)
    seen = [t - 7 for t, _ in handle.report().tokens]
    whole = 16 + 8 * 9
    assert seen[0] == seen[1] and 0.4 * whole <= seen[0] <= 0.6 * whole
    assert seen[2] == pytest.approx(seen[0] / 2, abs=1) and seen[4] == pytest.approx(seen[2] / 2, abs=1)
    kept = [index for _, index in handle.kept()]
    for before, after in pairwise(kept):
        for b in range(2):
            assert set(after[b].tolist()) - {-1} <= set(before[b].tolist())


@pytest.mark.parametrize("options", [{}, {"calibrate": False}, {"recycle": False}, {"entropy": 0.5}], ids=str)
@torch.no_grad()
def test_unlike_images_of_one_batch_are_decided_alone(options):
    model, pixels = vlm("llava_next"), torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sizes, lengths = torch.tensor([[32, 64], [64, 32]]), (16 + 4 * 9, 16 + 8 * 5)
    given = ids([[("text", 3), (IMAGE, n), ("text", 4)] for n in lengths])
    method = VFlowOpt(threshold=1.2, cell=3.0, **options)
    with apply(method, model, 0.5):
        both = model(**given, pixel_values=pixels, image_sizes=sizes).logits[:, -1]
    for i, length in enumerate(lengths):
        alone = {name: value[i : i + 1, -length - 7 :] for name, value in given.items()}
        with apply(method, model, 0.5):
            one = model(**alone, pixel_values=pixels[i : i + 1], image_sizes=sizes[i : i + 1]).logits[:, -1]
        assert torch.allclose(both[i], one[0], atol=1e-5)


@torch.no_grad()
def test_videos_keep_their_best():
    model = vlm("llava_onevision")
    with apply(VFlowOpt(1.2, layers=()), model, 0.5) as handle:
        model(**film("llava_onevision"))
    assert round(handle.report().tokens[0][0]) == 7 + 17 - dropped(17, 0.5)


def test_entropy_needs_whole_crops():
    model, given = vlm("qwen2_5_vl"), prompt("qwen2_5_vl", images("qwen2_5_vl", 1))
    method = VFlowOpt(calibrate=False, entropy=1.0)
    with pytest.raises(PrunelabError, match="take entropy=0"), torch.no_grad(), apply(method, model, 0.5):
        model(**typed(model, given))


def test_a_strategy_meets_its_target():
    assert stages(28) == (9, 9, 10)
    for point in ((0.25, 0.6, 1, 3, 0), (0.3, 0.8, 1, 3, 0)):
        strategy = Space(0.25).strategy(point)
        assert strategy.third == 1 or strategy.retention() == pytest.approx(0.25)
    assert Strategy(0.11661529508161146, 1.0, 0, 1, 0, 0.6011).retention() == pytest.approx(0.1, abs=1e-4)


def test_the_search_finds_a_maximum():
    def objective(strategy: Strategy) -> float:
        return -((strategy.threshold / 50 - 0.7) ** 2) - (strategy.entropy - 0.4) ** 2

    found = optimise(objective, trials=25, start=8, candidates=300)
    assert len(found) == 25 and found[0][1] == max(value for _, value in found)
    assert found[0][1] > -0.05
    assert expected_improvement(*map(torch.tensor, ([0.0, 1.0], [1.0, 1e-13])), 0.5).tolist()[1] == pytest.approx(0.5)
    with pytest.raises(PrunelabError, match="begin with 1 to 5"):
        optimise(objective, trials=5, start=9)
    with pytest.raises(PrunelabError, match="no finite number"):
        optimise(lambda strategy: float("nan"), trials=2, start=1)


def test_the_objective_is_the_last_tokens_state():
    model, given = vlm("llava", num_hidden_layers=6), prompt("llava", images("llava", 1))
    said = similarity(model, [given, given])
    assert said(Strategy(1.0, 1.0, 1.0, 4.0, 0.0, 1.0)) == pytest.approx(2.0, abs=1e-5)
    assert said(Strategy(0.2, 0.5, 1.0, 4.0, 0.0, 0.5)) < 2.0 - 1e-4
