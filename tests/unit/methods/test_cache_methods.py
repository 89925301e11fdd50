"""What single cache pruners promise beyond the contract."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.kv_cache import Draft, applied
from prunelab.common.kv_cache import layer as layer_module
from prunelab.methods.a2sf.method import A2SF, query_weights
from prunelab.methods.h2o.method import H2O
from prunelab.methods.mustafar.method import Mustafar, largest, per_token
from prunelab.methods.spatten.method import SpAtten, fetched, local_values, quantised
from prunelab.methods.spec_kv.method import SpecKV, SpecKVPC, SpecPC, first_of_each
from prunelab.methods.streaming_llm.method import StreamingLLM
from prunelab.methods.think.method import ThinK
from tests.unit.kv_cache.test_caches import GREEDY, decoder, prompt


def padded(tokens: Tensor, pad: int) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :pad] = 0
    return mask


# -- A2SF and H2O ----------------------------------------------------------------------------------------------------


def test_forgetting_nothing_while_writing_is_h2o():
    """From the same pruned prompt on, A2SF at 1 evicts what H2O without recent tokens evicts."""
    model, tokens = decoder(), prompt(2, 12)
    held = []
    for method in (A2SF(forgetting=1.0), H2O(recent=0.0)):
        with torch.no_grad(), applied(method, model, Budget(12, "count")) as handle:
            cache = DynamicCache()
            for part in torch.cat([tokens, prompt(2, 6, 5)], 1).split([12, *[1] * 6], 1):
                model(part, past_key_values=cache)
            held.append(torch.stack([layer.indices for layer in handle.layers]))
    assert torch.equal(*held)


def test_a_low_factor_prefers_what_came_lately():
    model, tokens = decoder(), prompt(2, 40)
    age = {}
    for forgetting in (0.1, 1.0):
        with torch.no_grad(), applied(A2SF(forgetting), model, 0.3) as handle:
            model(tokens, use_cache=True)
        age[forgetting] = torch.stack([39 - layer.indices for layer in handle.layers]).float().mean()
    assert age[0.1] < age[1.0]
    assert query_weights(torch.tensor([2, 1, 0]), 0.5).tolist() == [0.25, 0.5, 1.0]


def test_streaming_keeps_the_first_and_the_last():
    model = decoder()
    with torch.no_grad(), applied(StreamingLLM(sink=2), model, Budget(6, "count")) as handle:
        cache = DynamicCache()
        for part in prompt(1, 20).split([17, 1, 1, 1], 1):
            model(part, past_key_values=cache)
    assert handle.layers[0].indices[0, 0].tolist() == [0, 1, 16, 17, 18, 19]


# -- Mustafar --------------------------------------------------------------------------------------------------------


def thinned(model: Any, tokens: Tensor, steps: int, method: Mustafar, dense: float) -> list[Tensor]:
    """The last logits of every step, by the rule itself: an unpruned cache whose vectors are cut where they leave the
    window."""
    cache, found = DynamicCache(), []
    for n, part in enumerate(tokens.split([tokens.shape[1] - steps, *[1] * steps], 1)):
        found.append(model(part, past_key_values=cache).logits[:, -1])
        for layer in cache.layers:
            end = layer.keys.shape[2] - method.window_size
            start = 0 if n == 0 else end - 1
            layer.keys[:, :, start:end] = per_token(layer.keys[:, :, start:end], 1 - dense)
            layer.values[:, :, start:end] = per_token(layer.values[:, :, start:end], 1 - dense)
    return found


@pytest.mark.parametrize("resting", [True, False])
def test_mustafar_prunes_each_token_once_behind_the_step_in_which_it_leaves(resting):
    model, tokens, method = decoder(hidden_size=64), prompt(2, 30), Mustafar(window_size=6, resting=resting)
    with torch.no_grad():
        want = thinned(model, tokens, 8, method, 0.4)
        with applied(method, model, 0.4) as handle:
            cache, got = DynamicCache(), []
            for part in tokens.split([22, *[1] * 8], 1):
                got.append(model(part, past_key_values=cache).logits[:, -1])
    assert torch.allclose(torch.stack(got), torch.stack(want), atol=1e-6)
    assert handle.report().entries == (30,) * 3
    layer = handle.layers[0]
    # 16 numbers a vector, k = int(0.6 * 16) = 9, so that 8 go and 8 stay. Of a resting cache all tokens before the
    # window are packed, else the prompt's 16, and those written since wait for a block of 64
    done = 24 if resting else 16
    vectors = done * 2 * 2
    assert layer.packed[0][0].numbers.numel() == vectors * 8
    assert bool(((layer.keys[:, :, : 24 - done] != 0).sum(-1) == 8).all())
    packed, waiting = vectors * 8 * 4 + vectors * 16 // 64 * 12, (30 - done) * 2 * 2 * 16 * 4
    assert handle.report().cache_bytes == 3 * 2 * (packed + waiting)


def test_bitmaps_grow_by_blocks_and_are_made_one(monkeypatch):
    monkeypatch.setattr(layer_module, "BLOCK", 4)
    monkeypatch.setattr(layer_module, "BLOCKS", 3)
    model, tokens, method = decoder(), prompt(2, 40), Mustafar(window_size=6, resting=False)
    with torch.no_grad():
        want = thinned(model, tokens, 25, method, 0.4)
        with applied(method, model, 0.4) as handle:
            cache, got, parts = DynamicCache(), [], []
            for part in tokens.split([15, *[1] * 25], 1):
                got.append(model(part, past_key_values=cache).logits[:, -1])
                parts.append(len(cache.layers[0].packed))
    assert torch.allclose(torch.stack(got), torch.stack(want), atol=1e-6)
    assert max(parts) == 3
    assert parts[-1] < 3
    held = sum(keys.shape[2] for keys, _ in handle.layers[0].packed)
    assert held + handle.layers[0].keys.shape[2] == 40


@torch.no_grad()
def test_a_cache_that_is_written_is_dense_and_rests_as_bitmaps(monkeypatch):
    """Also where it is reordered, cut, copied, read in pieces, or left by an exception in between."""
    monkeypatch.setattr(layer_module.Growing, "ROOM", 3)
    model, tokens = decoder(), prompt(2, 40)
    found = []
    for resting in (True, False):
        with applied(Mustafar(window_size=6, resting=resting), model, 0.4) as handle:
            cache, logits, dense = DynamicCache(), [], []
            for part in tokens[:, :34].split([15, *[1] * 8, 3, *[1] * 8], 1):
                logits.append(model(part, past_key_values=cache).logits[:, -1])
                dense.append(not cache.layers[0].packed)
            assert dense == [False, *[resting] * 8, False, *[resting] * 8]
            cache.reorder_cache(torch.tensor([1, 0]))
            logits.append(model(tokens[[1, 0], 34:35], past_key_values=cache).logits[:, -1])
            cache.crop(-1)
            fault = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
            twin = copy.deepcopy(cache)
            with pytest.raises(ZeroDivisionError):
                model(tokens[:, 35:36], past_key_values=twin)
            fault.remove()
            logits.append(model(tokens[:, 36:37], past_key_values=cache).logits[:, -1])
            ratio = handle.report().ratio
            assert cache.layers[0].packed
            logits.append(model(tokens[:, 37:38], past_key_values=cache).logits[:, -1])
            assert bool(cache.layers[0].packed) != resting
        assert cache.layers[0].packed and ratio < 0.85
        logits.append(model(tokens[:, 38:39], past_key_values=cache).logits[:, -1])  # behind the block
        found.append(torch.stack(logits))
    assert torch.allclose(*found, atol=1e-6)


def test_a_packed_cache_goes_on_without_hooks():
    model, tokens = decoder(), prompt(2, 30)
    with torch.no_grad():
        with applied(Mustafar(window_size=6), model, 0.4):
            cache = DynamicCache()
            model(tokens[:, :20], past_key_values=cache)
        assert cache.layers[0].packed
        steps = [model(tokens[:, n : n + 1], past_key_values=cache).logits for n in (20, 21, 22)]
        dense = DynamicCache()
        model(tokens[:, :20], past_key_values=dense)
        for layer in dense.layers:
            layer.keys[:, :, :14] = per_token(layer.keys[:, :, :14], 0.6)
            layer.values[:, :, :14] = per_token(layer.values[:, :, :14], 0.6)
        want = [model(tokens[:, n : n + 1], past_key_values=dense).logits for n in (20, 21, 22)]
    assert torch.allclose(torch.cat(steps), torch.cat(want), atol=1e-6)


def test_mustafar_as_the_paper_counts_and_by_channel():
    x = torch.randn(2, 2, 32, 10)
    assert largest(x, 0.7).sum(-1).unique().tolist() == [4]
    assert largest(x, 0.7, released=False).sum(-1).unique().tolist() == [3]
    assert not largest(x, 1.0, released=False).any()
    model, tokens = decoder(), prompt(2, 29)
    method = Mustafar(window_size=8, value_groups="channel", keys=0.0, values=0.5)
    with torch.no_grad(), applied(method, model, 1.0) as handle:
        cache = DynamicCache()
        for part in tokens.split([19, *[1] * 10], 1):
            model(part, past_key_values=cache)
    layer = handle.layers[1]  # in the first one the same tokens have the same values, and ties stay together
    layer.unpack()
    groups = (layer.values[:, :, :16] == 0).unflatten(2, (2, 8)).sum(3)
    assert bool((groups == 3).all())  # of 8 tokens, k = 4, so that 3 go from every channel
    assert not bool((layer.values[:, :, 16:] == 0).any())
    with pytest.raises(PrunelabError, match="give a ratio"), applied(Mustafar(), model, Budget(5, "count")):
        model(tokens)


@torch.no_grad()
def test_mustafar_weighs_the_values_of_a_prompt_by_what_its_last_tokens_read():
    model, tokens = decoder(), prompt(2, 29)
    method = Mustafar(window_size=8, value_groups="channel", value_scores="output", keys=0.5, values=0.5)
    dense = DynamicCache()
    want = model(tokens[:, :24], past_key_values=dense).logits[:, -1]
    with applied(method, model, 0.5) as handle:
        cache = DynamicCache()
        assert torch.allclose(model(tokens[:, :24], past_key_values=cache).logits[:, -1], want, atol=1e-6)
        for n in range(24, 29):
            model(tokens[:, n : n + 1], past_key_values=cache)
    layer = handle.layers[1]
    layer.unpack()
    values = dense.layers[1].values
    gone = layer.values[:, :, :24] == 0
    assert bool((gone.sum(2) == 12).all()) and not bool((layer.values[:, :, 24:] == 0).any())
    assert torch.equal(layer.values[:, :, :24], values.masked_fill(gone, 0))
    assert not torch.equal(gone, values.abs() <= values.abs().median(2, keepdim=True).values), "not by magnitude alone"
    assert bool((layer.keys[:, :, :21] == 0).any()) and not bool((layer.keys[:, :, 21:] == 0).any())
    with pytest.raises(PrunelabError, match="groups of channels"):
        Mustafar(value_scores="output")


# -- ThinK -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("part", ["keys", "values"])
def test_think_lets_the_same_channels_of_all_but_the_last_tokens_of_a_prompt_go(part):
    model, tokens = decoder(), prompt(2, 30)
    dense = DynamicCache()
    want = model(tokens[:, :26], past_key_values=dense).logits[:, -1]
    with applied(ThinK(part, recent=6), model, 0.5) as handle:
        cache = DynamicCache()
        assert torch.allclose(model(tokens[:, :26], past_key_values=cache).logits[:, -1], want, atol=1e-6)
        found = [model(tokens[:, n : n + 1], past_key_values=cache).logits[:, -1] for n in range(26, 30)]
    for layer, whole in zip(handle.layers, dense.layers, strict=True):
        layer.unpack()
        thin, full = (getattr(x, part)[:, :, :26] for x in (layer, whole))
        gone = (thin[:, :, :20] == 0).all(2)
        assert bool((gone.sum(-1) == full.shape[-1] // 2).all())
        assert torch.equal(thin[:, :, 20:], full[:, :, 20:])
        assert torch.equal(thin[:, :, :20], full[:, :, :20].masked_fill(gone.unsqueeze(2), 0))
        other = "values" if part == "keys" else "keys"
        assert torch.equal(getattr(layer, other)[:, :, :26], getattr(whole, other))
        full[:, :, :20].masked_fill_(gone.unsqueeze(2), 0)
    then = [model(tokens[:, n : n + 1], past_key_values=dense).logits[:, -1] for n in range(26, 30)]
    assert torch.allclose(torch.stack(found), torch.stack(then), atol=1e-5)
    assert handle.report().entries == (30,) * 3


@torch.no_grad()
def test_think_looks_at_no_padding():
    model, tokens = decoder(), prompt(1, 20)
    padded = torch.cat([tokens.new_zeros(1, 7), tokens], 1)
    seen = torch.ones_like(padded).index_fill(1, torch.arange(7), 0)
    kept = []
    for ids, mask in ((tokens, None), (padded, seen)):
        with applied(ThinK(recent=2), model, 0.5) as handle:
            places = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
            model(ids, attention_mask=mask, position_ids=places, past_key_values=DynamicCache())
        layer = handle.layers[1]
        layer.unpack()
        kept.append((layer.keys[:, :, -20:-2] == 0).all(2))
    assert torch.equal(*kept) and bool(kept[0].any())
    with pytest.raises(PrunelabError, match="give a ratio"), applied(ThinK(), model, Budget(5, "count")):
        model(tokens)


# -- SpAtten ---------------------------------------------------------------------------------------------------------


def really_dropped(model: Any, tokens: Tensor, keep: list[int]) -> tuple[Tensor, list[list[int]]]:
    """The last token's logits where pruned tokens do not exist for later layers at all, and who is left behind each."""
    base = model.model
    model.set_attn_implementation("eager")
    hidden = base.embed_tokens(tokens)
    places = torch.arange(tokens.shape[1])
    importance = torch.zeros(tokens.shape[1])
    left = []
    for layer, count in zip(base.layers, keep, strict=True):
        n = len(places)
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        rotary = base.rotary_emb(hidden, position_ids=places.unsqueeze(0))
        out, weights = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask)
        hidden = hidden + out
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        importance[places] += weights.sum((0, 1, 2))
        ranked = importance[places].clone()
        ranked[-1] = float("inf")
        stay = ranked.topk(count).indices.sort().values
        places, hidden = places[stay], hidden[:, stay]
        left.append(places.tolist())
    model.set_attn_implementation("sdpa")
    return model.lm_head(base.norm(hidden))[:, -1], left


@torch.no_grad()
def test_spatten_equals_a_model_in_which_pruned_tokens_are_gone():
    model, tokens = decoder(), prompt(1, 24)
    want, left = really_dropped(model, tokens, [18, 12, 6])
    with applied(SpAtten(), model, Budget((0.75, 0.5, 0.25))) as handle:
        got = model(tokens, use_cache=True).logits[:, -1]
    assert torch.allclose(got, want, atol=1e-5)
    for layer, places in zip(handle.layers, left, strict=True):
        assert layer.indices[0, 0].tolist() == layer.indices[0, 1].tolist() == places


@torch.no_grad()
def test_spatten_generates_and_padding_changes_nothing():
    model, tokens = decoder(), prompt(2, 24)
    plain = model.generate(tokens, **GREEDY)
    with applied(SpAtten(), model, 1.0):
        assert torch.equal(model.generate(tokens, **GREEDY), plain)
    method = SpAtten(heads=0.5, values=0.5, msb=6, threshold=0.5)
    with applied(method, model, 0.5) as handle:
        together = model.generate(tokens, attention_mask=padded(tokens, 6), **GREEDY)
        alone = model.generate(tokens[:1, 6:], **GREEDY)
        assert handle.report().entries == (9.0,) * 3
        assert int(handle.layers[0].state.memory["heads"].sum()) == 2
        assert 0 < handle.layers[0].state.memory["refetched"] <= 1
    assert torch.equal(together[:1, 6:], alone)


def test_spatten_quantises_in_two_parts_and_counts_what_it_fetches():
    x = torch.randn(5, 32)
    step = x.abs().amax(-1, keepdim=True) / (2**9 - 1)
    assert bool(((quantised(x, 6, 4) - x).abs() <= 16.5 * step).all())
    assert bool(((quantised(x, 10) - x).abs() <= 0.5001 * step).all())
    leading = quantised(x, 6, 4) / step / 16
    assert torch.allclose(leading, leading.round(), atol=1e-3)
    row = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert local_values(row, 0.5).tolist() == pytest.approx([0, 0.4, 0.3, 0])
    cost = fetched(0.5, 1.0, 0.5, 0.25, 8, 4)
    assert cost == {"keys": 0.5 * 9 / 16, "values": 0.25 * 12 / 16, "total": (0.5 * 9 + 0.25 * 12) / 32}


# -- with a draft ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_spec_kv_reads_ahead_without_a_trace():
    model, tokens = decoder(), prompt(2, 24)
    draft = Draft(decoder(num_hidden_layers=1))
    plain = model(tokens).logits
    with applied(SpecKV(ahead=5, window_size=3), model, Budget(10, "count"), services={"draft": draft}) as handle:
        out = model(tokens, use_cache=True)
    assert torch.allclose(out.logits, plain, atol=1e-5)
    assert out.past_key_values.get_seq_length() == 24
    assert handle.report().entries == (10,) * 3
    assert all(layer.indices.max() == 23 for layer in handle.layers)
    assert bool((handle.layers[0].indices[..., -3:] == torch.tensor([21, 22, 23])).all())


@torch.no_grad()
def test_spec_kv_with_the_target_as_its_own_draft_keeps_what_the_answer_asks_for():
    """The scores are the attention that the answer's queries really pay, where the draft is never wrong."""
    model, tokens = decoder(), prompt(1, 24)
    answer = model.generate(tokens, **{**GREEDY, "max_new_tokens": 6})
    method = SpecKV(ahead=6, window_size=1, kernel_size=1)
    with applied(method, model, 0.5, services={"draft": decoder()}) as handle:
        model(tokens, use_cache=True)
    model.set_attn_implementation("eager")
    rows = model(answer, output_attentions=True).attentions[0][0, :, 23:, :23]  # [H, 7, 23]
    model.set_attn_implementation("sdpa")
    best = rows.unflatten(0, (2, 2)).amax((1, 2)).topk(11).indices.sort().values
    assert torch.equal(handle.layers[0].indices[0, :, :-1], best)


@torch.no_grad()
def test_spec_pc_is_the_model_on_the_shorter_prompt():
    model, tokens = decoder(), prompt(2, 24)
    services = {"draft": Draft(decoder(num_hidden_layers=2))}
    method = SpecPC(window_size=4, kernel_size=3, neighbours=3, first_layer=1)
    with applied(method, model, 0.5, services=services) as handle:
        kept = method.shorten(tokens, None, Budget(0.5), services)
        got = model.generate(tokens, **GREEDY)
        assert handle.report().tokens == 24 + 7
        assert handle.report().entries == (12 + 7,) * 3
        together = model.generate(tokens, attention_mask=padded(tokens, 6), **GREEDY)
        alone = model.generate(tokens[:1, 6:], **GREEDY)
    shorter = model.generate(tokens.gather(1, kept), **GREEDY)
    assert torch.equal(got[:, 24:], shorter[:, 12:])
    assert torch.equal(together[:1, 24:], alone[:, 18:])


@torch.no_grad()
def test_spec_kv_pc_does_one_after_the_other():
    model, tokens = decoder(), prompt(2, 40)
    services = {"draft": Draft(decoder(num_hidden_layers=2))}
    method = SpecKVPC(ahead=4, window_size=2, prompt=30, neighbours=3, smoothing=3)
    with applied(method, model, Budget(12, "count"), services=services) as handle:
        model.generate(tokens, **GREEDY)
    assert handle.report().entries == (12 + 7,) * 3
    assert handle.layers[0].seen == 30 + 7


def test_a_draft_must_be_there_and_read_the_same_tokens():
    model = decoder()
    with pytest.raises(PrunelabError, match="needs the services draft"), applied(SpecKV(), model, 0.5):
        pass
    other = decoder(vocab_size=50)
    with (
        pytest.raises(PrunelabError, match="draft has a vocabulary of 50 and the model one of 61"),
        applied(SpecKV(), model, 0.5, services={"draft": other}),
    ):
        pass
    with (
        pytest.raises(PrunelabError, match="is the model itself"),
        applied(SpecKV(), model, 0.5, services={"draft": model}),
    ):
        pass
    assert first_of_each(torch.tensor([3, 1, 3, 0, 1])).tolist() == [3, 1, 0]
