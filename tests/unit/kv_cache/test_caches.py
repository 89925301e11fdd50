"""Cache pruning: what is left is attended to as if the rest had been masked, in every family and phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from prunelab.common.core import attention, registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Site
from prunelab.common.kv_cache import Bitmap, applied
from prunelab.common.kv_cache.layer import PrunedLayer, storage_bytes
from prunelab.common.kv_cache.role import CachePruner, CacheSignals, OwnAttention
from prunelab.methods.a2sf.method import A2SF, A2SFPrefill
from prunelab.methods.h2o.method import H2O, ObservedAttention
from prunelab.methods.random_cache.method import RandomCache
from prunelab.methods.snapkv.method import SnapKV
from prunelab.methods.spatten.method import SpAttenChat
from prunelab.methods.streaming_llm.method import StreamingLLM, Window
from prunelab.methods.tova.method import TOVA

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 16}, "Mistral": {"sliding_window": None}, "Phi": {}, "GPTNeoX": {},
}  # fmt: skip
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
ANYWHERE = [  # methods that prune nothing but whole entries
    A2SFPrefill(recent=3), ObservedAttention(), RandomCache(), SnapKV(window_size=4),
    H2O(), StreamingLLM(2), TOVA(), Window(), SpAttenChat(2), A2SF(recent=1),
]  # fmt: skip
every = pytest.mark.parametrize("method", ANYWHERE, ids=lambda m: m.name)


def decoder(family: str = "Llama", **overrides: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **overrides})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def prompt(samples: int = 2, length: int = 20, seed: int = 3) -> Tensor:
    return torch.randint(3, 61, (samples, length), generator=torch.Generator().manual_seed(seed))


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@dataclass(frozen=True)
class Received(CachePruner):
    """What received most attention, kept anew after every pass."""

    fails: bool = False
    name: ClassVar[str] = "test_received"
    when = "both"

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys", "received", "hidden", "outputs"})

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        if self.fails:
            raise RuntimeError("on purpose")
        assert signals.hidden.shape[:2] == signals.outputs.permute(0, 2, 1, 3).shape[:2]
        return signals.received


# -- the oracle ------------------------------------------------------------------------------------------------------

MASKS: dict[int, Tensor] = {}


def masked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> Any:
    """Plain attention under a mask [B, KV, M, N] of each layer."""
    groups = query.shape[1] // key.shape[1]
    key, value, seen = (t.repeat_interleave(groups, 1) for t in (key, value, MASKS[module.layer_idx]))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("test_masked", masked_attention)


def oracle(model: Any, tokens: Tensor, masks: dict[int, Tensor]) -> Tensor:
    """Logits of one full pass whose layers see only what the masks let them."""
    MASKS.update(masks)
    model.set_attn_implementation("test_masked")
    try:
        return model(tokens, use_cache=False).logits
    finally:
        model.set_attn_implementation("sdpa")


@every
def test_pruned_steps_equal_a_full_pass_that_hides_what_left(method):
    """Prompt of 20 tokens, then 7 more one by one: the logits of every step are those of one pass over all 27 tokens
    in which each token sees, by layer and head, what the cache held when it came."""
    model, tokens, start = decoder(), prompt(2, 27), 20
    masks = {layer: torch.ones(27, 27, dtype=torch.bool).tril().repeat(2, 2, 1, 1) for layer in range(3)}
    steps = []
    with torch.no_grad(), applied(method, model, Budget(9, "count")) as handle:
        cache = DynamicCache()
        model(tokens[:, :start], past_key_values=cache)
        for n in range(start, 27):
            for layer, mask in masks.items():
                held = handle.layers[layer].indices
                mask[:, :, n] = torch.zeros(2, 2, 27, dtype=torch.bool).scatter(2, held, True)
                mask[:, :, n, n] = True
            steps.append(model(tokens[:, n : n + 1], past_key_values=cache).logits[:, 0])
        assert handle.report().entries == ((9.0,) * 3 if method.when == "both" else (16.0,) * 3)
    if isinstance(method, A2SF):  # which hides while it reads, too
        for layer, mask in masks.items():
            mask[:, :, :start] = reading_masks(method, model, tokens[:, :start], layer, masks)
    expected = oracle(model, tokens, masks)[:, start:]
    assert torch.allclose(torch.stack(steps, 1), expected, atol=1e-4)


def reading_masks(method: A2SF, model: Any, tokens: Tensor, layer: int, masks: dict[int, Tensor]) -> Tensor:
    """What each token of the prompt sees at a layer, by A2SF's rule told anew, on the masked layers below."""
    inputs: dict[int, tuple[Tensor, Tensor]] = {}
    size = tokens.shape[1]

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        inputs[module.layer_idx] = (query * scaling, key)
        return masked_attention(module, query, key, value, mask, scaling)

    AttentionInterface.register("test_spy", spy)
    MASKS.update({i: mask[:, :, :size, :size] for i, mask in masks.items()})
    model.set_attn_implementation("test_spy")
    model(tokens, use_cache=False)
    model.set_attn_implementation("sdpa")
    query, key = inputs[layer]
    seen = torch.ones(size, size, dtype=torch.bool).tril().repeat(2, 2, 1, 1)
    for b in range(2):
        for h in range(2):
            score, left = torch.zeros(size), []
            for n in range(size):
                left.append(n)
                seen[b, h, n] = torch.tensor([j in left for j in range(size)])
                rows = (query.detach()[b, 2 * h : 2 * h + 2, n] @ key.detach()[b, h, left].T).softmax(-1).sum(0)
                score = method.forgetting * score
                score[left] += rows
                if len(left) > 9:
                    left.remove(min((j for j in left if j <= n - method.recent), key=lambda j: float(score[j])))
    return torch.nn.functional.pad(seen, (0, 7))


# -- with generate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_the_identity_and_padding_changes_nothing(family):
    model, tokens = decoder(family), prompt()
    padding = torch.ones_like(tokens)
    padding[0, :5] = 0
    plain = [model.generate(tokens, attention_mask=mask, **GREEDY) for mask in (torch.ones_like(tokens), padding)]
    for method in (Received(), SnapKV(window_size=4)):
        with applied(method, model, 1.0) as handle:
            assert torch.equal(model.generate(tokens, **GREEDY), plain[0])
            assert handle.report().ratio == 1
            assert torch.equal(model.generate(tokens, attention_mask=padding, **GREEDY), plain[1])
        with applied(method, model, 0.5) as handle:
            padded = model.generate(tokens, attention_mask=padding, **GREEDY)
            assert handle.report().ratio < 0.7
            alone = model.generate(tokens[:1, 5:], **GREEDY)
        assert torch.equal(padded[:1, 5:], alone)
    assert hooks(model) == 0
    assert model.config._attn_implementation == "sdpa"


@every
def test_samples_do_not_know_of_each_other_nor_of_padding(method):
    model, tokens = decoder(), prompt(3, 24)
    padding = torch.ones_like(tokens)
    padding[0, :7] = padding[1, :2] = 0
    with applied(method, model, 0.6):
        together = model.generate(tokens, attention_mask=padding, **GREEDY)
        for i, pad in enumerate((7, 2, 0)):
            alone = model.generate(tokens[i : i + 1, pad:], **GREEDY)
            if "padding" not in method.exempt:
                assert torch.equal(together[i, pad:], alone[0])


def test_a_turn_read_at_once_equals_the_same_turn_read_token_by_token():
    model, tokens = decoder(), prompt(2, 30)
    logits = []
    for parts in ([20, 10], [20, *[1] * 10], [20, 3, 7]):
        with torch.no_grad(), applied(SnapKV(window_size=4), model, 0.5):
            cache, found = DynamicCache(), []
            for part in tokens.split(parts, 1):
                found.append(model(part, past_key_values=cache).logits)
        logits.append(torch.cat(found, 1))
        assert cache.get_seq_length() == 30
        assert cache.layers[0].keys.shape[2] == 20
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert torch.allclose(logits[0], logits[2], atol=1e-5)


def test_beams_sampling_and_a_second_turn():
    model, tokens = decoder(), prompt()
    with applied(H2O(), model, 0.5):
        beams = model.generate(tokens, **{**GREEDY, "num_beams": 3})
        again = model.generate(tokens, **{**GREEDY, "num_beams": 3})
        assert torch.equal(beams, again)
        torch.manual_seed(0)
        model.generate(tokens, **{**GREEDY, "do_sample": True})
    with applied(H2O(), model, 1.0):
        kept_all = model.generate(tokens, **{**GREEDY, "num_beams": 3})
    assert torch.equal(kept_all, model.generate(tokens, **{**GREEDY, "num_beams": 3}))
    with applied(SnapKV(window_size=4), model, 0.5) as handle:
        cache = DynamicCache()
        first = model.generate(tokens, past_key_values=cache, **GREEDY)
        more = torch.cat([first, prompt(2, 5, 9)], 1)
        model.generate(more, past_key_values=cache, **GREEDY)
        assert handle.report().tokens == 20 + 8 + 5 + 7
        assert handle.report().entries == (10 + 8 + 5 + 7.0,) * 3


def test_amounts_by_layer_and_measured_bytes():
    model, tokens = decoder(), prompt()
    with applied(ObservedAttention(), model, Budget((1.0, 0.5, 0.25))) as handle, torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    report = handle.report()
    assert report.entries == (20, 10, 5)
    assert report.cache_bytes == sum(storage_bytes((layer.keys, layer.values)) for layer in cache.layers)
    assert report.cache_bytes == 2 * 2 * 2 * 8 * 4 * 35  # batch, heads, keys and values, width, float32, entries
    assert report.dense_bytes == 2 * 2 * 2 * 8 * 4 * 60


def test_everything_comes_out_again_also_after_an_exception():
    model, tokens = decoder(), prompt()
    plain = model(tokens).logits
    with pytest.raises(RuntimeError, match="on purpose"), applied(Received(fails=True), model, 0.5):
        model(tokens)
    assert hooks(model) == 0
    assert torch.equal(model(tokens).logits, plain)
    with applied(Received(), model, 0.5):
        assert hooks(model) > 0
    assert hooks(model) == 0


def test_half_precision_stays_finite():
    model = decoder().to(torch.bfloat16)
    for method in ANYWHERE:
        with torch.no_grad(), applied(method, model, 0.5):
            cache = DynamicCache()
            model(prompt(), past_key_values=cache)
            assert torch.isfinite(model(prompt(2, 3), past_key_values=cache).logits).all()


def test_an_unpruned_cache_is_taken_over_and_given_back():
    model, tokens = decoder(), prompt(2, 24)
    with torch.no_grad():
        plain = model(tokens).logits[:, -1]
        cache = DynamicCache()
        model(tokens[:, :20], past_key_values=cache)
        with applied(SnapKV(window_size=4), model, 0.5):
            model(tokens[:, 20:23], past_key_values=cache)
        assert isinstance(cache.layers[0], PrunedLayer)
        after = model(tokens[:, 23:], past_key_values=cache).logits[:, -1]  # goes on without hooks
    assert torch.allclose(after, plain, atol=1e-5)


def test_padding_of_a_cache_that_was_filled_before_stays_padding():
    model, tokens = decoder(), prompt(2, 24)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask, position_ids=places).logits[:, 20:]
        cache = DynamicCache()
        filled = {"attention_mask": mask[:, :20], "position_ids": places[:, :20]}
        model(tokens[:, :20], past_key_values=cache, **filled)
        with applied(SnapKV(window_size=4), model, 0.5):
            rest = {"attention_mask": mask, "position_ids": places[:, 20:]}
            later = model(tokens[:, 20:], past_key_values=cache, **rest).logits
    assert torch.allclose(later, plain, atol=1e-5)


def test_crop_takes_back_only_what_came_since():
    model, tokens = decoder(), prompt(2, 24)
    with torch.no_grad(), applied(SnapKV(window_size=4), model, 0.5):
        cache = DynamicCache()
        model(tokens[:, :20], past_key_values=cache)
        first = model(tokens[:, 20:], past_key_values=cache).logits
        cache.crop(-4)
        assert torch.allclose(model(tokens[:, 20:], past_key_values=cache).logits, first, atol=1e-6)
        with pytest.raises(PrunelabError, match="only 4 were added"):
            cache.crop(-5)


# -- attention -------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 9),
    before=st.integers(0, 5),
    heads=st.sampled_from([(2, 1), (4, 2), (3, 3)]),
    pad=st.integers(0, 3),
)
def test_accumulated_attention_equals_the_full_matrix(rows, before, heads, pad):
    total = rows + before
    g = torch.Generator().manual_seed(rows * 31 + before)
    q, k = torch.randn(2, heads[0], rows, 4, generator=g), torch.randn(2, heads[1], total, 4, generator=g)
    real = torch.arange(total) >= torch.tensor([[min(pad, total - 1)], [0]])
    weights = torch.rand(rows, generator=g)
    scores = q @ k.repeat_interleave(heads[0] // heads[1], 1).transpose(2, 3) * 0.5
    causal = torch.ones(rows, total, dtype=torch.bool).tril(before)
    full = scores.masked_fill(~(causal & real[:, None, None]), -1e9).softmax(-1)
    full = full * (weights * real[:, None, before:]).unsqueeze(-1)
    want = full.sum(2).unflatten(1, (heads[1], -1)).sum(2)
    asking = real[:, before:]
    valid = real.unsqueeze(1).expand(-1, heads[1], -1)
    block, attention.BLOCK = attention.BLOCK, 2 * heads[0] * total * 2  # two rows at a time
    try:
        got = attention.accumulated(q, k, 0.5, weights, valid, asking)
    finally:
        attention.BLOCK = block
    assert torch.allclose(got, want, atol=1e-5)


# -- bitmaps ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 130)),
    zeros=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_bitmaps_come_back_bit_by_bit(shape, zeros, dtype):
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=g).masked_fill(torch.rand(shape, generator=g) < zeros, 0).to(dtype)
    if x.numel() > 3:
        x.view(-1)[:3] = torch.tensor([-0.0, float("inf"), float("nan")]).to(dtype)
    packed = Bitmap.pack(x)
    back = packed.unpack()
    assert back.shape == x.shape
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(back.view(as_bits), x.view(as_bits))
    tiles = -(-x.numel() // 64)
    kept = int(((x != 0) | x.signbit()).sum())
    assert sum(t.nbytes for t in packed.tensors) == tiles * (8 + 4) + kept * x.element_size()


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_that_says_what_to_do():
    model, tokens = decoder(), prompt()

    def fails(message: str, method: CachePruner = Received(), budget: Any = 0.5, **call: Any) -> None:
        with pytest.raises(PrunelabError, match=message), applied(method, model, budget):
            model(**{"input_ids": tokens, **call})
        assert hooks(model) == 0

    fails("cannot hold the 6 first and last tokens", SnapKV(window_size=6), Budget(5, "count"))
    fails("cannot hold the 4 first", StreamingLLM(), Budget(0.1))
    fails("the prompt is empty", input_ids=tokens[:, :0])
    fails("65 tokens are more than the model's context of 64", input_ids=prompt(1, 65))
    fails("there is none; run the model with use_cache", use_cache=False)
    fails("pad on the left", attention_mask=torch.ones_like(tokens).index_fill(1, torch.tensor([19]), 0))
    fails("one column a token", attention_mask=torch.ones(2, 1, 20, 20))
    fails("2 amounts but the model has 3 layers", budget=Budget((0.5, 0.5)))
    fails("not to 100words", budget=Budget(100, "words"))
    static = transformers.StaticCache(config=model.config, max_cache_len=40)
    fails("StaticLayer does not hold one entry a token", past_key_values=static)
    with (
        pytest.raises(PrunelabError, match="with a sliding window"),
        applied(Received(), decoder("Mistral", sliding_window=8), 0.5),
    ):
        pass
    with pytest.raises(PrunelabError, match="of the families llama"), applied(Received(), torch.nn.Linear(2, 2), 0.5):
        pass
    with (
        applied(Received(), model, 0.5),
        pytest.raises(PrunelabError, match="already runs"),
        applied(Received(), model, 0.5),
    ):
        pass
    with applied(Received(), model, 0.5) as handle, pytest.raises(PrunelabError, match="nothing ran yet"):
        handle.report()
    with applied(Received(), model, 0.5):
        cache = model(tokens, use_cache=True).past_key_values
        with pytest.raises(PrunelabError, match="holds 2 samples, not 1"):
            model(tokens[:1], past_key_values=cache)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    fails("NaN or infinite")


def test_every_cache_method_is_registered_and_runs_with_its_defaults():
    model = decoder(max_position_embeddings=256, num_hidden_layers=4)
    steps = {"output_logits": True, "return_dict_in_generate": True}
    whole = torch.stack(model.generate(prompt(2, 160), **GREEDY, **steps).logits)
    services = {"draft": decoder(num_hidden_layers=1, max_position_embeddings=256)}
    for cls in registry.load().values():
        if issubclass(cls, CachePruner):
            with applied(cls(), model, 0.5, services=services) as handle:
                said = torch.stack(model.generate(prompt(2, 160), **GREEDY, **steps).logits)
            hides = issubclass(cls, OwnAttention) and not torch.allclose(said, whole)  # from attention alone
            most = 0.85 if cls.name == "think" else 0.8  # which thins keys alone
            assert handle.report().ratio < most or hides, cls.name
