"""DyCoke: which frames are cut, at the edges too, and steps of decoding that read a part of the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from prunelab.common.apply import apply, supports
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.dycoke.method import DyCoke, DyCokeCache, temporal_merging
from tests.contract.references import language_model
from tests.contract.vlms import film, typed, vlm


@pytest.mark.parametrize(
    ("frames", "last", "odd", "whole"),
    [
        (32, "whole", "keep", 9),
        (32, "cut", "keep", 8),
        (4, "whole", "keep", 2),
        (4, "cut", "keep", 1),
        (9, "whole", "drop", 2),
        (9, "whole", "keep", 3),
        (7, "cut", "drop", 2),
        (1, "whole", "keep", 1),
    ],
)
def test_how_many_frames_stay_whole(frames, last, odd, whole):
    tokens = torch.randn(frames, 10, 4, generator=torch.Generator().manual_seed(0))
    place = temporal_merging(tokens, 3, last, odd)
    counts = torch.bincount(place // 10, minlength=frames).tolist()
    assert counts.count(10) == whole
    assert counts.count(3) == frames - whole - (odd == "drop")
    assert bool((place // 10).diff().ge(0).all())


def test_what_repeats_goes_first_and_the_least_alike_leads():
    tokens = torch.eye(4).repeat(2, 1, 1)
    tokens[1, 2] = torch.tensor([0.0, 0.0, -1.0, 0.0])
    tokens[1, 0] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert temporal_merging(tokens, 2).tolist() == [0, 1, 2, 3, 6, 4]


def test_a_lone_frame_cannot_be_dropped():
    with pytest.raises(PrunelabError, match="take 'keep'"):
        temporal_merging(torch.zeros(1, 4, 2), 2, odd_frame="drop")


@torch.no_grad()
def test_both_stages_work_together():
    model = vlm("llava_onevision")
    given = typed(model, film("llava_onevision", words=(4, 4)))
    with apply(DyCoke(), model, 0.5), apply(DyCokeCache(layer=2, start=3, length=12), model, 0.5):
        assert model.generate(**given, max_new_tokens=4, min_new_tokens=4).shape[0] == 2


def steps(method, budget, count=5):
    model = language_model("llama", max_position_embeddings=128)
    ids = torch.randint(3, 61, (2, 24 + count), generator=torch.Generator().manual_seed(1))
    cache, found = DynamicCache(), []
    with torch.no_grad(), apply(method, model, budget) as handle:
        for part in ids.split([24] + [1] * count, 1):
            found.append(model(part, past_key_values=cache).logits[:, -1])
        assert set(handle.report().entries) == {24 + count}, "nothing leaves the cache"
    return torch.stack(found)


def test_steps_read_less_where_attention_moves_and_all_where_it_does_not():
    whole = steps(DyCokeCache(layer=1, start=4, length=16), 1.0)
    moving = steps(DyCokeCache(layer=1, start=4, length=16, threshold=1.0), 0.25)
    assert torch.allclose(whole[0], moving[0]), "the prompt is read whole"
    assert not torch.allclose(whole[2:], moving[2:], atol=1e-5)
    still = DyCokeCache(layer=1, start=4, length=16, threshold=-1.0)
    assert torch.allclose(steps(still, 0.25), whole, atol=1e-5)


def test_a_settled_step_reads_what_was_chosen_last():
    given = {"layer": 1, "start": 4, "length": 16, "threshold": 0.05}
    released, paper = (steps(DyCokeCache(**given, settled=settled), 0.1) for settled in ("all", "last"))
    assert torch.allclose(released[1], paper[1], atol=1e-6)
    assert not torch.allclose(released[2:], paper[2:], atol=1e-5)


def test_a_prompt_shorter_than_its_start_is_refused():
    with pytest.raises(PrunelabError, match="say where the video is"):
        steps(DyCokeCache(layer=1, start=99), 0.5)


def test_a_decoder_without_its_layer_is_refused_before_any_work():
    model = language_model("llama", max_position_embeddings=128)
    with pytest.raises(PrunelabError, match="from layer 3 on, but this model has layers 0 to 2; set its layer"):
        apply(DyCokeCache(), model, 0.5).__enter__()
    assert not supports(DyCokeCache(), model) and supports(DyCokeCache(layer=2), model)
