"""PruneVid: labels, segments and groups at their edges, videos of few frames, several videos, and the printed FLOPs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.prunevid import method as prunevid
from prunelab.methods.prunevid import tables
from prunelab.methods.prunevid.method import PruneVid, Segment, best_of_groups, grouped, places, refined, segments
from tests.contract.vlms import VIDEO, film, ids, typed, vlm


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ([0], [0]),
        ([3, 1, 2], [0, 0, 0]),
        ([1, 1, 2, 1, 2, 2], [1, 1, 1, 1, 2, 2]),
        ([1, 1, 2, 3, 3, 3], [1, 1, 3, 3, 3, 3]),
        ([1, 1, 2, 3, 3], [1, 1, 1, 3, 3]),
        ([2, 1, 1], [1, 1, 1]),
        ([1, 1, 2, 1, 1], [1, 1, 1, 1, 1]),
        ([0, 0, 1, 2, 1, 1, 2, 2, 0], [0, 0, 0, 0, 1, 1, 2, 2, 2]),
    ],
)
def test_stretches_that_are_freed_join_the_longer_neighbour(labels, wanted):
    assert refined(labels) == wanted


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 7, 16])
def test_segments_cover_a_video_of_any_length(frames):
    vectors = torch.randn(frames, 6, generator=torch.Generator().manual_seed(0))
    found = segments(vectors, 0.25, 7)
    assert [first for first, _ in found] == [sum(n for _, n in found[:i]) for i in range(len(found))]
    assert sum(n for _, n in found) == frames


def test_scenes_are_found_and_what_stands_still_in_them():
    scenes = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0)
    tokens = scenes.expand(8, 1, 5, 8).reshape(8, 5, 8).clone()
    tokens[:, 2] = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    tokens[:, 2] *= 0.1
    assert segments(tokens.mean(1), 0.25, 3) == [(0, 4), (4, 4)]
    still, moving = places(tokens[:4], 0.8)
    assert (still.tolist(), moving.tolist()) == ([0, 1, 3, 4], [2])
    assert [len(part) for part in places(tokens[:1], -1.0)] == [0, 5], "nothing repeats in one frame"


def test_a_still_video_is_one_frame():
    frame = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    left, parts = PruneVid().merged(frame.expand(9, -1, -1), 0.5, torch.zeros(9, 7))
    assert parts == [Segment(9, 6, 0)]
    assert left.place.tolist() == list(range(6))
    assert torch.allclose(left.weight, torch.full((54,), 1 / 9))


def test_small_groups_can_lose_everything_and_others_keep_their_share():
    groups = grouped([Segment(2, 4, 1)], torch.device("cpu")).unsqueeze(0)
    assert groups.tolist() == [[0, 0, 0, 0, 1, 2]]
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.9, 0.8]])
    assert best_of_groups(scores, groups, 0.5).tolist() == [[False, True, True, False, False, False]]
    beside = torch.tensor([[0, -1, 0, 0, -1, 2]])
    assert best_of_groups(scores, beside, 0.0).tolist() == [[False, True, False, False, True, False]]
    assert bool(best_of_groups(scores, groups, 1.0).all())


@pytest.mark.parametrize("frames", [1, 2, 5])
@torch.no_grad()
def test_videos_of_few_frames(frames):
    model = vlm("llava_onevision")
    given = typed(model, film("llava_onevision", frames, words=(4, 6)))
    with apply(PruneVid(whole=1), model, (0.5, 0.5)) as handle:
        both = model(**given).logits[:, -1]
        before, after = handle.report().tokens[0][0], handle.report().tokens[-1][0]
    assert after < before < given["input_ids"].shape[1]
    with apply(PruneVid(whole=1), model, (0.5, 0.5)):
        for row in range(2):
            alone = {name: value[row : row + 1] for name, value in given.items()}
            real = alone.pop("attention_mask").bool()
            alone["input_ids"] = alone["input_ids"][real].unsqueeze(0)
            assert torch.allclose(model(**alone).logits[0, -1], both[row], atol=1e-4)


@torch.no_grad()
def test_each_of_two_videos_keeps_its_share(monkeypatch):
    seen = []
    original = prunevid.best_of_groups
    monkeypatch.setattr(
        prunevid, "best_of_groups", lambda scores, groups, ratio: seen.append(groups) or original(scores, groups, ratio)
    )
    model = vlm("llava_onevision")
    one = film("llava_onevision", 3, words=(4,))
    pixels = torch.cat([one["pixel_values_videos"], one["pixel_values_videos"].flip(1)])
    words = ids([[("text", 3), (VIDEO, 13), ("text", 2), (VIDEO, 13), ("text", 4)]])
    with apply(PruneVid(similarity=1.0), model, (1.0, 0.5)):
        model(**typed(model, {"pixel_values_videos": pixels, **words}))
    (groups,) = seen
    first, second = (groups[groups >> 32 == video] for video in (0, 1))
    assert len(first) == len(second) == 12, "pooled tokens, four a frame"
    assert int((groups < 0).sum()) == 3 + 2 + 4 + 2, "words and newlines are in none"
    assert (first.unique() + (1 << 32)).tolist() == second.unique().tolist()


def test_a_layer_that_is_not_there_is_refused_before_work():
    model = vlm("llava_onevision")
    with pytest.raises(PrunelabError, match="prunes at layer 11, but this model has layers 0 to 3"):
        apply(PruneVid(layer=10), model, 0.5).__enter__()


def test_flops_are_the_printed_ones():
    path = Path(prunevid.__file__).with_name("reported.csv")
    printed = {f"{r['table']}/{r['row']}/{r['column']}": float(r["value"]) for r in csv.DictReader(path.open())}
    made = tables.costs()
    assert len(made) == 13
    for cell, figure in made.items():
        assert round(figure["value"], 2) == printed[cell], cell
