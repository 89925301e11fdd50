"""The contract of cache pruners, over every registered one with its defaults and the reference, on a tiny decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.kv_cache import applied
from prunelab.common.kv_cache.role import CachePruner, CacheSignals, OwnAttention, ShortensPrompt, ThinsVectors
from tests.contract import references
from tests.contract.references import invariant

LENGTH, MORE = 80, 6
DEPTH = 4  # of the decoder: the defaults of all methods name layers that it has
METHODS = [c() for c in registry.load().values() if issubclass(c, CachePruner)] + [references.ReceivedCache()]
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def decoder(**overrides: Any) -> Any:
    return references.language_model("llama", max_position_embeddings=256, **{"num_hidden_layers": DEPTH, **overrides})


def services(method: CachePruner) -> dict[str, Any]:
    return {name: decoder(num_hidden_layers=2, seed=1) for name in method.services}


def tokens(samples: int = 2, length: int = LENGTH + MORE) -> Tensor:
    return references.token_ids(samples, length).clamp_min(3)


@torch.no_grad()
def read(method: CachePruner, model: Any, ids: Tensor, budget: Any, pad: int = 0, **options: Any) -> tuple[Tensor, Any]:
    """Logits [B, MORE, V] behind the prompt, token by token, and the handle with its
    report behind the prompt as `prompt`."""
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    cache, found, prompt = DynamicCache(), [], None
    with applied(method, model, budget, services=services(method), **options) as handle:
        for n, part in enumerate(ids.split([ids.shape[1] - MORE, *[1] * MORE], 1)):
            end = ids.shape[1] - MORE + n
            out = model(
                part,
                past_key_values=cache,
                attention_mask=mask[:, :end],
                position_ids=places[:, end - part.shape[1] : end],
            )
            found.append(out.logits[:, -1])
            prompt = prompt if n else handle.report()
    handle.prompt = prompt
    return torch.stack(found[:-1], 1), handle


@every
def test_keep_all_is_the_identity(method):
    model, ids = decoder(), tokens()
    logits, _ = read(method, model, ids, 1.0)
    with torch.no_grad():
        assert torch.allclose(logits, model(ids).logits[:, LENGTH - 1 : -1], atol=1e-4)


@every
@pytest.mark.parametrize("budget", [Budget(0.55), Budget(50, "count"), Budget(30, "removed")], ids=str)
def test_budget_is_met_and_order_kept(method, budget):
    if isinstance(method, ThinsVectors) and budget.unit != "ratio":
        pytest.skip("thins vectors out by a share")
    _, handle = read(method, decoder(), tokens(), budget)
    extra = MORE * (method.when == "prefill")
    with invariant("budget", method):
        assert handle.prompt.entries == (budget.count(LENGTH),) * DEPTH
        assert handle.report().entries == (budget.count(LENGTH) + extra,) * DEPTH
    for layer in handle.layers:
        assert bool((layer.indices.diff(dim=-1) > 0).all())


@every
def test_a_sample_knows_nothing_of_others_nor_of_padding(method):
    model, ids = decoder(), tokens(2, LENGTH + MORE + 8)
    together, _ = read(method, model, ids, 0.6, pad=8)
    with invariant("padding", method):
        alone, _ = read(method, model, ids[:1, 8:], 0.6)
        assert torch.allclose(together[:1], alone, atol=1e-4)
    with invariant("batch", method):
        alone, _ = read(method, model, ids[1:], 0.6)
        assert torch.allclose(together[1:], alone, atol=1e-4)


@every
def test_same_seed_same_cache_and_nothing_is_left_behind(method):
    model, ids = decoder(), tokens()
    first, _ = read(method, model, ids, 0.6, seed=3)
    again, _ = read(method, model, ids, 0.6, seed=3)
    assert torch.equal(first, again)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every
def test_half_precision_stays_finite(method, dtype):
    logits, handle = read(method, decoder().to(dtype), tokens(), 0.6)
    assert torch.isfinite(logits).all()
    assert handle.layers[0].keys.dtype == dtype


@every
@settings(max_examples=15, deadline=None)
@given(entries=st.integers(1, 60), ratio=st.floats(0, 1), new=st.integers(1, 60))
def test_any_size_is_planned_or_refused(method, entries, ratio, new):
    if isinstance(method, (OwnAttention, ShortensPrompt)):
        method = references.ReceivedCache()  # those decide elsewhere
    new = entries if method.when == "prefill" else min(new, entries)
    g = torch.Generator().manual_seed(entries)
    queries, keys, values = (torch.randn(2, h, n, 4, generator=g) for h, n in ((4, new), (2, entries), (2, entries)))
    found = CacheSignals(
        {
            "queries": lambda: queries,
            "keys": lambda: keys,
            "values": lambda: values,
            "received": lambda: found.accumulated(),
        },
        scale=0.5,
        indices=torch.arange(entries).expand(2, 2, -1),
        prompt=(entries, entries),
        seen=entries,
        marks={},
        prefill=new == entries,
        info=ModelInfo("reference", 1, 4, 16, 256),
        rng=torch.Generator().manual_seed(0),
    )
    kept = Budget(ratio).count(entries)
    if kept < min(sum(method.protected(kept)), entries) and "budget" not in method.exempt:
        with pytest.raises(PrunelabError, match="raise the budget"):
            method.plan(Site(0), found, Budget(ratio))
        return
    index = method.plan(Site(0), found, Budget(ratio)).reduce.index
    if "budget" not in method.exempt:
        assert index.shape == (2, 2, kept)
    assert bool((index.diff(dim=-1) > 0).all())
