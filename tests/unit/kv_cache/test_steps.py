"""Decoding steps: what all layers decide at once is what each would alone, and nothing on the device is looked at."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from benchmarks import looks
from prunelab.common.core.attention_interface import with_cache
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.kv_cache import applied
from prunelab.common.kv_cache.role import CachePruner
from prunelab.methods.a2sf.method import A2SF, A2SFPrefill
from prunelab.methods.h2o.method import H2O
from prunelab.methods.mustafar.method import Mustafar
from prunelab.methods.snapkv.method import SnapKV
from prunelab.methods.spatten.method import SpAtten, SpAttenChat
from prunelab.methods.streaming_llm.method import StreamingLLM, Window
from prunelab.methods.tova.method import TOVA
from tests.contract.caches_references import NewestCache
from tests.unit.kv_cache.test_caches import decoder, prompt

ALIKE = [H2O(), TOVA(), StreamingLLM(2), Window(), SpAttenChat(2), A2SF(recent=1), NewestCache()]
FIXED = [*ALIKE, SpAtten(), Mustafar(window_size=4), SnapKV(window_size=4), A2SFPrefill(recent=3)]


@pytest.mark.parametrize("method", FIXED, ids=lambda m: m.name)
def test_a_token_costs_no_look_beyond_those_of_generate(method):
    model, tokens = decoder(num_hidden_layers=6), prompt(2, 30)
    plain = looks.a_token(model, tokens)
    with applied(method, model, 0.5):
        assert looks.a_token(model, tokens) == plain


def alone(method: CachePruner) -> CachePruner:
    """The same method, whose layers decide one by one."""
    cls = type(method)
    same = replace(method)
    object.__setattr__(same, "__class__", type(cls.__name__, (cls,), {"alike": False, "cascades": lambda _: False}))
    return same


@pytest.mark.parametrize("method", [*ALIKE, SpAtten(), SpAtten(values=0.6)], ids=str)
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
@torch.no_grad()
def test_layers_that_decide_at_once_decide_as_each_alone(method, family):
    model, tokens = decoder(family), prompt(2, 34)
    found = []
    for each in (method, alone(method)):
        with applied(each, model, Budget(9, "count")) as handle:
            cache, logits = DynamicCache(), []
            for part in tokens.split([16, *[1] * 8, 3, *[1] * 7], 1):
                logits.append(model(part, **with_cache({}, cache)).logits[:, -1])
            assert (cache.layers[0].state.stack is not None) == (each is method)
            twin = copy.deepcopy(cache)
            fault = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(tokens[:, :1], **with_cache({}, twin))
            fault.remove()
            assert all(layer.indices.diff(dim=-1).min() > 0 for layer in twin.layers)
            cache.reorder_cache(torch.tensor([1, 0]))
            logits.append(model(tokens[[1, 0], :1], **with_cache({}, cache)).logits[:, -1])
            assert handle.report().entries == (9.0,) * 3
        places = [layer.indices for layer in cache.layers]
        logits.append(model(tokens[:, :1], **with_cache({}, cache)).logits[:, -1])  # behind the block, without pruning
        found.append([torch.stack(logits), *places, *(layer.keys for layer in cache.layers)])
    for one, other in zip(*found, strict=True):  # sums run over the entries in another order
        assert torch.equal(one, other) if one.dtype == torch.long else torch.allclose(one, other, atol=1e-5)


@torch.no_grad()
def test_a_number_that_is_not_finite_is_named_once_a_prompt_and_once_a_block():
    model, tokens = decoder(), prompt(1, 20)
    block = applied(H2O(), model, 0.5)
    block.__enter__()
    cache = model(tokens, use_cache=True)[1]
    weight = model.model.layers[1].self_attn.k_proj.weight
    weight[0, 0] = float("nan")
    model(tokens[:, :1], **with_cache({}, cache))
    with pytest.raises(PrunelabError, match="NaN or infinite"):
        block.__exit__(None, None, None)
    with pytest.raises(PrunelabError, match="NaN or infinite"), applied(H2O(), model, 0.5):
        model(tokens)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_the_bytes_of_a_step_are_those_of_its_entries():
    model, tokens = decoder(), prompt(2, 20)
    with applied(H2O(), model, Budget(9, "count")) as handle:
        model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
        report = handle.report()
    assert report.cache_bytes == 3 * 2 * 2 * 2 * 8 * 4 * 9  # layers, keys and values, batch, heads, width, float32
    assert report.tokens == 25
