"""MustDrop: windows, the filter, the key set, and caches that are trimmed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.h2o.method import H2O
from prunelab.methods.mustdrop.method import MustDrop, dual_filter, key_set, spatial_merge, window_similarity, windows
from tests.contract.vlms import images, prompt, vlm


def test_windows_are_cut_from_a_grid():
    assert windows((3, 6), (3, 3)).tolist() == [[0, 1, 2, 6, 7, 8, 12, 13, 14], [3, 4, 5, 9, 10, 11, 15, 16, 17]]
    assert windows((4, 4), (3, 3)).tolist() == [[0, 1, 2, 4, 5, 6, 8, 9, 10]]
    assert len(windows((2, 2), (3, 3))) == 0


def test_alike_windows_merge_and_others_stay():
    patches = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0))
    patches[:, [0, 1, 4, 5]] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    patches[0, [10, 11, 14, 15]] = torch.tensor([0, 1.0, 0, 0, 0, 0.1])
    members = windows((4, 4), (2, 2))
    alike = window_similarity(patches, members)
    assert torch.allclose(alike[:, 0], torch.ones(2)) and float(alike[0, 3]) == pytest.approx(1)
    mix = spatial_merge(alike, members, 16, 0.9)
    assert mix is not None and mix.outputs == 1 + 1 + 12, "as many as the crop with fewest has"
    out = mix.apply(torch.cat([torch.full((2, 1, 6), 7.0), patches], 1))
    assert torch.allclose(out[:, 0], torch.full((2, 6), 7.0))
    assert torch.allclose(out[1, 1], patches[1, 0]) and torch.allclose(out[1, 2], patches[1, 2])
    assert spatial_merge(alike[1:], members, 16, 2.0) is None


def test_a_token_needs_one_of_two_reasons():
    attention = torch.zeros(1, 1, 2, 5)
    attention[0, 0, :, 1:4] = torch.tensor([[0.5, 0.01, 0.2], [0.4, 0.01, 0.0]])
    image = torch.tensor([[False, True, True, True, False]])
    for overall, single, kept in ((0.3, 0.15, [1, 3]), (0.3, 0.3, [1]), (0.0, 1.0, [1, 2, 3]), (1.0, 0.0, [1, 2, 3])):
        assert dual_filter(attention, image, overall, single)[0].nonzero().squeeze(1).tolist() == kept
    assert key_set(torch.tensor([[[0.1, 0.5, 0.2, 0.3]]]), 0.3).tolist() == [[1, 3]], "rounded up"


@torch.no_grad()
def test_key_tokens_pass_every_filter():
    model = vlm("llava", num_hidden_layers=8, tower=4)
    given = prompt("llava", images("llava", 2))
    with apply(MustDrop(1.0, 1.0, (1, 3), rate=0.25, threshold=1.0), model, 1.0) as handle:
        model(**given)
    assert [round(t) - 7 for t, _ in handle.report().tokens] == [16] * 2 + [4] * 6


@torch.no_grad()
@pytest.mark.parametrize("trims", [None, 1])
def test_caches_keep_what_was_left_and_words_follow(trims):
    model = vlm("llava", num_hidden_layers=8, tower=4)
    given = prompt("llava", images("llava", 2))
    method = MustDrop(1.0, 1.0, (1, 3), rate=0.25, threshold=1.0, trims=trims)
    cache = DynamicCache(config=model.config.text_config)
    with apply(method, model, 1.0) as handle:
        model(**given, past_key_values=cache, use_cache=True)
        lengths = [cache.get_seq_length(layer) for layer in range(8)]
        assert lengths == ([23, 23] if trims is None else [23, 11]) + [11] * 6
        for word in (5, 9):
            ids = torch.full((2, 1), word)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            assert torch.isfinite(logits).all()
        assert [cache.get_seq_length(layer) for layer in range(8)] == [n + 2 for n in lengths]
        words = model.generate(**given, max_new_tokens=3, do_sample=False, num_beams=2)
    assert words.shape[0] == 2 and handle.report().samples > 0


def test_what_cannot_be_is_said():
    with pytest.raises(PrunelabError, match="class token"), apply(MustDrop(), vlm("llava_onevision"), 1.0):
        pass
    model = vlm("llava", tower=4)
    with (
        pytest.raises(PrunelabError, match="take trims=None"),
        apply(MustDrop(), model, 1.0),
        apply(H2O(), model, 0.5),
    ):
        pass


def test_the_key_set_of_a_large_image_is_marked_where_its_patches_are_read():
    """Crops' rows interleave in the sequence, unpadding leaves some patches out, and newlines (-1) are nobody's."""
    order = torch.tensor([0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 10, -1])  # a thumbnail and two crops of 2 x 2 side by side
    row = torch.full((1, 1, 12), 0.01)
    row[..., [2, 6, 11]] = 0.5  # the best of each crop; the last is cut off
    picture = SimpleNamespace(order=order, units=12, grids=((2, 2),) * 3, at=lambda reading: row)
    prunable = torch.tensor([[False] * 2 + [True] * 12 + [False]])
    signals = SimpleNamespace(prunable=prunable, pictures=lambda: [[picture]])
    assert MustDrop(rate=0.25).keys(signals).nonzero()[:, 1].tolist() == [2 + 2, 2 + 9]
