"""Caches of models as people hold them: adapters, threads, chunks, gradients, caches that are used behind the block."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from prunelab.common.core.attention_interface import with_cache
from prunelab.common.core.errors import PrunelabError
from prunelab.common.kv_cache import applied
from prunelab.common.kv_cache.role import OwnAttention
from prunelab.methods.a2sf.method import A2SF
from prunelab.methods.h2o.method import H2O
from prunelab.methods.mustafar.method import Mustafar
from prunelab.methods.snapkv.method import SnapKV
from prunelab.methods.spatten.method import SpAtten
from prunelab.methods.spec_kv.method import SpecPC
from tests.unit.kv_cache.test_caches import GREEDY, decoder, prompt


@torch.no_grad()
def test_a_prompt_in_chunks_is_refused_and_whole_prompts_go_on():
    model, tokens = decoder(), prompt(1, 40)
    for method in (H2O(), SnapKV(window_size=4)):
        with applied(method, model, 0.5) as handle:
            with pytest.raises(PrunelabError, match="without prefill_chunk_size"):
                model.generate(tokens, prefill_chunk_size=16, **GREEDY)
            model.generate(tokens, **GREEDY)
            assert handle.report().tokens == 47


class Adapted(nn.Module):
    """A model within another, as `peft` wraps it: attributes come from the one inside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def get_base_model(self) -> Any:
        return self.base_model

    def generate(self, *args: Any, **options: Any) -> Any:
        return self.base_model.generate(*args, **options)


@torch.no_grad()
def test_the_cache_of_a_wrapped_model_is_pruned_and_claimed_once():
    model, tokens = decoder(), prompt()
    with applied(SnapKV(window_size=4), model, 0.5) as handle:
        expected, entries = model.generate(tokens, **GREEDY), handle.report().entries
    wrapped = Adapted(model)
    with applied(SnapKV(window_size=4), wrapped, 0.5) as handle:
        assert torch.equal(wrapped.generate(tokens, **GREEDY), expected)
        assert handle.report().entries == entries
        with pytest.raises(PrunelabError, match="already runs"), applied(H2O(), model, 0.5):
            pass


@torch.no_grad()
def test_threads_share_a_model_and_not_a_cache():
    model = decoder()
    prompts = [prompt(1, length, seed) for seed, length in enumerate((20, 26, 32, 38))]
    found: dict[int, Tensor] = {}
    with applied(H2O(), model, 0.5):
        alone = [model.generate(tokens, **GREEDY) for tokens in prompts]

        def run(number: int) -> None:
            for _ in range(4):
                found[number] = model.generate(prompts[number], **GREEDY)
                assert torch.equal(found[number], alone[number])

        workers = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert all(torch.equal(found[number], alone[number]) for number in range(4))


@torch.no_grad()
def test_behind_the_block_a_cache_goes_on_or_says_why_not():
    model, tokens = decoder(), prompt(2, 30)
    for parts in ([1, 1, 1, 1], [4]):
        logits = []
        for inside in (True, False):
            cache = DynamicCache()
            with applied(SnapKV(window_size=4), model, 0.5):
                model(tokens[:, :20], **with_cache({}, cache))
                if inside:
                    logits.append(model(tokens[:, 20:24], **with_cache({}, cache)).logits[:, -1])
            if not inside:
                for part in tokens[:, 20:24].split(parts, 1):
                    last = model(part, **with_cache({}, cache)).logits[:, -1]
                logits.append(last)
        assert torch.allclose(*logits, atol=1e-5)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    cache = DynamicCache()
    with applied(SnapKV(window_size=4), model, 0.9):
        model(tokens[:, :20], attention_mask=mask[:, :20], **with_cache({}, cache))
    with pytest.raises(PrunelabError, match="go on inside the `with` block"):
        model(tokens[:, 20:21], **with_cache({}, cache))


@pytest.mark.parametrize("method", [H2O(), SnapKV(window_size=4), Mustafar(window_size=4)], ids=lambda m: m.name)
@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself(method):
    """As people do who read a long beginning once and ask several questions behind it."""
    model, tokens = decoder(), prompt(1, 40)
    with applied(method, model, 0.5):
        cache = DynamicCache()
        model(tokens[:, :20], **with_cache({}, cache))
        model(tokens[:, 20:21], **with_cache({}, cache))
        twin = copy.deepcopy(cache)
        first, other = (
            [model(part, **with_cache({}, one)).logits for part in (tokens[:, 21:22], tokens[:, 22:23])]
            for one in (cache, twin)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        model(tokens[:, 30:31], **with_cache({}, twin))
        assert cache.get_seq_length() == 23 and twin.get_seq_length() == 24
        third = copy.deepcopy(cache)
    for one in (cache, third):  # and behind the block
        first.append(model(tokens[:, 23:24], **with_cache({}, one)).logits)
    assert torch.equal(*first[-2:])


@pytest.mark.parametrize("method", [H2O(), SnapKV(window_size=4), SpAtten(), A2SF()], ids=lambda m: m.name)
def test_gradients_are_the_models_or_refused(method):
    model, tokens = decoder(), prompt()
    model(tokens, labels=tokens).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with applied(method, model, 1.0):
        loss = model(tokens, labels=tokens).loss
        if isinstance(method, OwnAttention):
            with pytest.raises(PrunelabError, match="without gradients"):
                loss.backward()
            return
        loss.backward()
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(model.parameters(), plain, strict=True))


def test_what_a_pruned_cache_cannot_give_is_refused():
    model, tokens = decoder(), prompt()
    with applied(H2O(), model, 0.5):
        with pytest.raises(PrunelabError, match="without output_attentions"):
            model(tokens, output_attentions=True)
        model.gradient_checkpointing_enable()
        model.train()
        with pytest.raises(PrunelabError, match="gradient checkpointing"):
            model(tokens, use_cache=True)
    model.eval()
    embedded = model.get_input_embeddings()(tokens)
    services = {"draft": decoder(num_hidden_layers=1)}
    with (
        applied(SpecPC(window_size=2), model, 0.5, services=services),
        pytest.raises(PrunelabError, match="give input_ids"),
    ):
        model(inputs_embeds=embedded)
    with applied(H2O(), model, 0.5):
        loss = model(tokens, labels=tokens).loss  # the prompt itself is read whole
    assert torch.allclose(loss, model(tokens, labels=tokens).loss)
