"""ToDRE: greedy picks against the pseudo-code, pivots, and leaving the decoder where the text looks away."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.todre.method import ToDRE, from_centre, looked_at, max_sum_order
from tests.contract.vlms import film, images, prompt, vlm


def spelled_out(tokens, pivot, count, rule):
    """The paper's pseudo-code, for one sample."""
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    picks, alike = [pivot], unit @ unit[pivot]
    alike[pivot] = float("inf")
    for _ in range(count - 1):
        best = int(alike.argmin())
        picks.append(best)
        near = unit @ unit[best]
        alike = alike + near if rule == "sum" else torch.maximum(alike, near)
        alike[picks] = float("inf")
    return picks


@settings(max_examples=25, deadline=None)
@given(total=st.integers(1, 30), share=st.floats(0.1, 1), rule=st.sampled_from(["sum", "max"]), seed=st.integers(0, 99))
def test_picks_are_the_pseudo_codes(total, share, rule, seed):
    tokens = torch.randn(2, total, 5, generator=torch.Generator().manual_seed(seed))
    pivot, count = torch.tensor([[0], [total - 1]]), max(1, int(share * total))
    order = max_sum_order(tokens, pivot, count, rule)
    for b in range(2):
        assert order[b].tolist() == spelled_out(tokens[b], int(pivot[b]), count, rule)
    assert max_sum_order(tokens, pivot, 0).shape == (2, 0)


def test_the_share_of_attention_is_of_rows_that_are_there():
    attention = torch.zeros(2, 1, 2, 4)
    attention[0, 0] = torch.tensor([[0.05, 0.0, 0.95, 0.0], [0.05, 0.1, 0.0, 0.85]])
    attention[1, 0, 1] = torch.tensor([0.5, 0.1, 0.2, 0.2])  # this sample's first row is padding
    visual = torch.tensor([[True, True, False, False], [False, True, False, False]])
    share, asked = looked_at(attention, visual)
    assert torch.allclose(share, torch.tensor([0.1, 0.1])) and bool(asked.all())
    assert looked_at(attention[:, :, :0], visual)[1].tolist() == [False, False]


def kept(method, model, given, count):
    with torch.no_grad(), apply(method, model, Budget(count, "count")) as handle:
        model(**given)
        return handle.kept(), handle.adapter.features


def test_the_pivot_is_the_class_tokens_favourite_in_the_encoders_last_layer():
    model, eager = vlm("llava"), vlm("llava")
    given = prompt("llava", images("llava", 2))
    eager.set_attn_implementation({"vision_config": "eager"})
    with torch.no_grad():
        maps = eager.model.vision_tower(given["pixel_values"], output_attentions=True).attentions
    best = maps[-1][:, :, 0, 1:].mean(1).argmax(1)
    (_, index), *_ = kept(ToDRE(), model, given, 1)[0]
    assert index.squeeze(1).tolist() == best.tolist()


def test_a_large_images_pivot_is_of_its_thumbnail_and_a_videos_of_any_frame():
    given = prompt("llava_next", images("llava_next", 3))
    (_, index), *_ = kept(ToDRE(), vlm("llava_next"), given, 1)[0]
    assert bool((index < 16).all())
    with pytest.raises(PrunelabError, match="class token"), apply(ToDRE(), vlm("llava_onevision"), 0.5):
        pass
    for pivot, pick in (("centre", torch.argmin), ("farthest", torch.argmax)):
        found, features = kept(ToDRE(pivot), vlm("llava_onevision"), film("llava_onevision", words=(4,)), 1)
        assert int(found[0][1]) == int(pick(from_centre(features.flatten(0, 1).unsqueeze(0))))


@pytest.mark.parametrize(("threshold", "left"), [(1.1, 7), (0.0, 12)])
def test_visual_tokens_leave_before_the_late_layer_or_stay(threshold, left):
    model = vlm("llava")
    given = prompt("llava", images("llava", 2))
    seen = {}
    with torch.no_grad(), apply(ToDRE(threshold=threshold, late=(0.5, 0.75)), model, Budget(5, "count")):
        for number, layer in enumerate(model.model.language_model.layers):
            layer.register_forward_pre_hook(lambda module, args, n=number: seen.update({n: args[0].shape[1]}))
        model(**given)
    assert [seen[n] for n in range(4)] == [12, 12, left, left]


def test_each_sample_leaves_by_its_own_attention():
    """What is dropped for one is not for the other."""
    model = vlm("llava")
    given = prompt("llava", images("llava", 2))
    eager = vlm("llava")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager(**given, output_attentions=True).attentions[2][:, :, -4:]  # all tokens kept: budget 16
    visual = torch.zeros(2, 23, dtype=torch.bool)
    visual[:, 3:19] = True
    share, _ = looked_at(maps, visual)
    between = float(share.mean())
    found = kept(ToDRE(threshold=between), model, given, 16)[0]
    late = found[-1][1]
    assert [int((row >= 0).sum()) for row in late] == [7 if s < between else 23 for s in share.tolist()]


def test_no_late_layer_is_the_first_stage_alone():
    assert len(ToDRE(late=()).sites(vlm_info())) == 1
    assert [s.layer for s in ToDRE(late=(0.5, 0.875, 1.0)).sites(vlm_info())] == [0, 16, 28]


def vlm_info():
    from prunelab.common.core.plan import ModelInfo

    return ModelInfo("test", 32, 4, 8, 600)
