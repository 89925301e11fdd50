"""Methods of several roles on one model at once, nested in any order: tokens, caches, drafts, pruned weights."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from prunelab.common.apply import apply
from prunelab.common.core.attention_interface import NAME, with_cache
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import at_work
from prunelab.common.core.method import Method
from prunelab.common.kv_cache.role import CachePruner, OwnAttention
from prunelab.common.weights import prune
from prunelab.methods.a2sf.method import A2SF
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.h2o.method import H2O
from prunelab.methods.lazyllm.method import LazyLLM
from prunelab.methods.mustafar.method import Mustafar
from prunelab.methods.snapkv.method import SnapKV
from prunelab.methods.spec_kv.method import SpecKV, SpecPC
from prunelab.methods.token_recycling.method import TokenRecycling
from prunelab.methods.tova.method import TOVA
from tests.contract import vlms
from tests.contract.caches_references import NewestCache, WeakestExperts
from tests.contract.references import BigramDrafts, MagnitudeWeights, NormTokens, ReceivedCache, language_model

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
Applied = tuple[Method, Any]


@contextmanager
def stacked(model: Any, methods: Sequence[Applied], services: Any = None) -> Iterator[list[Any]]:
    """All methods on the model, the first one outermost; services go to those that need some."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(apply(method, model, budget, services=services if method.services else None))
            for method, budget in methods
        ]


def prompt(samples: int = 2, length: int = 24, seed: int = 3) -> Tensor:
    return torch.randint(3, 61, (samples, length), generator=torch.Generator().manual_seed(seed))


def padded(tokens: Tensor, pad: int) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :pad] = 0
    return mask


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def untouched(model: Any, own: int = 0) -> bool:
    """Nothing of a method is left; the library hangs `own` hooks into a vision tower the first time it runs."""
    modules = list(model.modules())
    return (
        hooks(model) == own
        and not at_work(model)
        and not any(name in vars(model) for name in ("generate", "forward"))
        and not any(m.config._attn_implementation == NAME for m in modules if hasattr(m, "config"))
    )


DRAFTS: Applied = (BigramDrafts(), Budget(3, "count"))
PAIRS: list[tuple[Applied, Applied]] = [
    ((NormTokens(), 1.0), (ReceivedCache(), 1.0)),
    ((NormTokens(), 1.0), (NewestCache(), 1.0)),
    ((NormTokens(), 1.0), (Mustafar(keys=0.0, values=0.0), 1.0)),
    ((ReceivedCache(), 1.0), DRAFTS),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(method.name for method, _ in pair))
@torch.no_grad()
def test_keeping_all_of_both_is_the_identity_in_either_order_and_nothing_is_left(pair):
    model = language_model("llama", max_position_embeddings=128)
    tokens = prompt(1 if DRAFTS in pair else 2)
    plain = model.generate(tokens, **GREEDY)
    for order in permutations(pair):
        with stacked(model, order) as handles:
            assert [method.name for method in at_work(model)] == [method.name for method, _ in order]
            assert torch.equal(model.generate(tokens, **GREEDY), plain)
            for handle in handles:
                handle.report()
        assert untouched(model)


@torch.no_grad()
def test_tokens_and_cache_of_a_picture_in_either_order():
    """Pruned visual tokens are read, then the cache of what is left is pruned: by layer, so much and no more."""
    for family in vlms.VLMS:
        model = vlms.vlm(family)
        given = vlms.typed(model, vlms.prompt(family, vlms.images(family, 2)))
        plain = model.generate(**given, **GREEDY)
        own, found = hooks(model), []
        for order in permutations(((DivPrune(), 0.5), (SnapKV(window_size=2), 0.5))):
            with stacked(model, order) as handles:
                found.append(model.generate(**given, **GREEDY))
                held = handles[[method.name for method, _ in order].index("snapkv")].layers
                read = held[0].seen - (GREEDY["max_new_tokens"] - 1)
                assert read < given["input_ids"].shape[1]  # the decoder never saw the others
                assert {layer.keys.shape[2] for layer in held} == {read // 2 + GREEDY["max_new_tokens"] - 1}
        assert torch.equal(*found)
        with stacked(model, ((DivPrune(), 1.0), (SnapKV(window_size=2), 1.0))):
            assert torch.equal(model.generate(**given, **GREEDY), plain)
        assert untouched(model, own)


MASKS: dict[int, Tensor] = {}


def _masked(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value, seen = (t.repeat_interleave(groups, 1) for t in (key, value, MASKS[module.layer_idx]))
    return ((query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(
        1, 2
    ), None


AttentionInterface.register("test_composed", _masked)


@pytest.mark.parametrize("cache_pruner", [ReceivedCache(), NewestCache(), A2SF(recent=1)], ids=lambda m: m.name)
@torch.no_grad()
def test_tokens_then_cache_equal_a_full_pass_that_hides_both(cache_pruner):
    """The oracle: one pass over all tokens, in which each sees, layer by layer, what was read there and is held."""
    model, tokens, start = language_model("llama", max_position_embeddings=128), prompt(2, 27), 20
    steps = []
    with stacked(model, ((NormTokens((1,)), 0.6), (cache_pruner, Budget(6, "count")))) as (tokens_of, caches):
        cache = DynamicCache()
        model(tokens[:, :start], **with_cache({}, cache))
        columns = tokens_of.kept()[0][1]  # [B, K], of the prompt's tokens that went on to layer 1
        masks = {layer: torch.ones(27, 27, dtype=torch.bool).tril().repeat(2, 2, 1, 1) for layer in range(3)}
        later = torch.arange(start, 27).expand(2, -1)
        known = {layer: torch.cat([columns, later], 1) if layer else torch.arange(27).expand(2, -1) for layer in masks}
        for layer in (1, 2):
            gone = torch.ones(2, 27, dtype=torch.bool).scatter(1, known[layer], False)
            masks[layer] &= ~gone[:, None, None, :] | torch.eye(27, dtype=torch.bool)
        for n in range(start, 27):
            for layer, mask in masks.items():
                held = known[layer].unsqueeze(1).expand(-1, 2, -1).gather(2, caches.layers[layer].indices)
                mask[:, :, n] = torch.zeros(2, 2, 27, dtype=torch.bool).scatter(2, held, True)
                mask[:, :, n, n] = True
            steps.append(model(tokens[:, n : n + 1], **with_cache({}, cache)).logits[:, 0])
    if isinstance(cache_pruner, A2SF):
        return  # it hides while it reads, too; that it runs and holds its budget is what is asked here
    MASKS.update(masks)
    model.set_attn_implementation("test_composed")
    expected = model(tokens, use_cache=False).logits[:, start:]
    model.set_attn_implementation("sdpa")
    assert torch.allclose(torch.stack(steps, 1), expected, atol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing_when_tokens_and_cache_are_pruned():
    model, tokens = language_model("llama", max_position_embeddings=128), prompt(2, 24)
    for caches in ((ReceivedCache(), 0.5), (NewestCache(), Budget(5, "count")), (H2O(), 0.5)):
        for order in permutations(((NormTokens((0, 2)), Budget((0.8, 0.5))), caches)):
            with stacked(model, order):
                together = model.generate(tokens, attention_mask=padded(tokens, 7), **GREEDY)
                alone = model.generate(tokens[:1, 7:], **GREEDY)
            assert torch.equal(together[:1, 7:], alone), order


@pytest.mark.parametrize(
    "cache_pruner", [ReceivedCache(), SnapKV(window_size=4), SpecKV(ahead=4, window_size=4)], ids=str
)
@pytest.mark.parametrize("draft", [DRAFTS, (TokenRecycling(), 1.0)], ids=lambda d: d[0].name)
@torch.no_grad()
def test_drafts_behind_a_pruned_prompt_give_the_text_of_the_pruned_model(cache_pruner, draft):
    model = language_model("llama", max_position_embeddings=256).double()
    helper = language_model("llama", seed=1, num_hidden_layers=1, max_position_embeddings=256).double()
    services = {"draft": helper} if cache_pruner.services else None
    long = {**GREEDY, "max_new_tokens": 40}
    for length in (12, 45):
        tokens = prompt(1, length).repeat(1, 2)
        with apply(cache_pruner, model, 0.5, services=services):
            alone = model.generate(tokens, **long)
        for order in permutations(((cache_pruner, 0.5), draft)):
            with stacked(model, order, services) as handles:
                assert torch.equal(model.generate(tokens, **long), alone)
                assert torch.equal(model.generate(tokens, **long), alone)  # with what was learned from the first
                drafts = handles[[m for m, _ in order].index(draft[0])].report()
                assert drafts.mat > 1  # some drafts were confirmed
                caches = handles[[m for m, _ in order].index(cache_pruner)].report()
                assert caches.entries == (length + 39.0,) * 3  # half of the prompt, and what was written
        assert untouched(model)


@torch.no_grad()
def test_pruned_weights_take_every_other_method():
    model = language_model("llama", max_position_embeddings=128)
    prune(MagnitudeWeights(), model, 0.5, prompt(2, 12), progress=False)
    tokens = prompt(1)
    plain = model.generate(tokens, **GREEDY)
    for methods in (((NormTokens(), 1.0), (ReceivedCache(), 1.0)), ((ReceivedCache(), 1.0), DRAFTS)):
        with stacked(model, methods):
            assert torch.equal(model.generate(tokens, **GREEDY), plain)
    assert untouched(model)


@torch.no_grad()
def test_an_exception_leaves_nothing_of_any():
    model, tokens = language_model("llama", max_position_embeddings=128), prompt()
    plain = model(tokens).logits
    for order in permutations(((NormTokens(), 0.5), (ReceivedCache(), 0.5))):
        fault = model.model.layers[2].register_forward_hook(_fails)
        with pytest.raises(RuntimeError, match="on purpose"), stacked(model, order):
            model(tokens)
        fault.remove()
        assert untouched(model)
        assert torch.equal(model(tokens).logits, plain)


def _fails(*_: Any) -> None:
    raise RuntimeError("on purpose")


REFUSED: list[tuple[Applied, Applied, str]] = [
    ((H2O(), 0.5), DRAFTS, "h2o prunes for good at every step"),
    ((SpecPC(), 0.5), DRAFTS, "spec_pc renumbers the prompt"),
    ((SpecPC(), 0.5), (NormTokens(), 0.5), "chooses what is read of the prompt"),
    ((SpecKV(), 0.5), (NormTokens(), 0.5), "chooses what is read of the prompt"),
    ((LazyLLM(layers=(1,)), 0.5), (SnapKV(), 0.5), "brings tokens back from the cache"),
    ((NormTokens(), 0.5), DRAFTS, "verifies drafts against every token"),
    ((SnapKV(), 0.5), (H2O(), 0.5), "already runs"),
]


@pytest.mark.parametrize(("one", "other", "reason"), REFUSED, ids=lambda x: x[0].name if isinstance(x, tuple) else None)
def test_pairs_without_a_meaning_are_refused_in_one_line(one, other, reason):
    model = language_model("llama", max_position_embeddings=128)
    services = {"draft": language_model("llama", seed=1, num_hidden_layers=1, max_position_embeddings=128)}
    for order in permutations((one, other)):
        with (
            pytest.raises(PrunelabError, match=reason) as error,
            stacked(model, order, services),
        ):
            pass
        assert "\n" not in str(error.value)
        assert untouched(model)


@torch.no_grad()
def test_two_models_of_one_configuration_do_not_share_a_method():
    model, tokens = language_model("llama", max_position_embeddings=128), prompt()
    other = type(model)(model.config).eval()
    assert other.config is model.config
    plain = other(tokens).logits
    with apply(H2O(), model, 0.5):
        assert torch.equal(other(tokens).logits, plain)
        with apply(SnapKV(window_size=4), other, 0.5) as handle:
            other.generate(tokens, **GREEDY)
            model.generate(tokens, **GREEDY)
            assert handle.report().tokens == 24 + 11
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"


BLOCKS: dict[str, tuple[str, list[Applied]]] = {
    "cache": ("llama", [(H2O(), 0.5)]),
    "drafts": ("llama", [DRAFTS]),
    "experts": ("mixtral", [(WeakestExperts(), 0.6)]),
    "cache and drafts": ("llama", [(SnapKV(window_size=4), 0.5), DRAFTS]),
    "tokens and cache": ("llama", [(NormTokens(), 0.5), (TOVA(), 0.5)]),
    "experts, drafts and cache": ("mixtral", [(WeakestExperts(), 0.6), DRAFTS, (ReceivedCache(), 0.5)]),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_copy_made_inside_is_the_model_as_it_was(block, implementation, tmp_path):
    family, methods = BLOCKS[block]
    model, tokens = language_model(family, max_position_embeddings=128), prompt(1)
    model.set_attn_implementation(implementation)
    asked = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    plain, saved = torch.cat(model.generate(tokens, **asked).logits), io.BytesIO()
    with stacked(model, methods):
        pruned = torch.cat(model.generate(tokens, **asked).logits)
        twin = copy.deepcopy(model)
        torch.save(model, saved)
        model.save_pretrained(tmp_path)
        for parameter in twin.parameters():
            parameter.add_(0.01)  # its own weights, not the model's
        twin.generate(tokens, **GREEDY)
        again = torch.cat(model.generate(tokens, **asked).logits)
        assert torch.allclose(again, pruned, atol=1e-5)
        for parameter in twin.parameters():
            parameter.sub_(0.01)
    assert untouched(model) and model.config._attn_implementation == implementation
    saved.seek(0)
    for copied in (twin, torch.load(saved, weights_only=False), type(model).from_pretrained(tmp_path)):
        assert copied.config._attn_implementation in (implementation, "sdpa") and not at_work(copied)
        assert torch.allclose(torch.cat(copied.generate(tokens, **asked).logits), plain, atol=1e-3)
        with stacked(copied, methods):
            assert torch.allclose(torch.cat(copied.generate(tokens, **asked).logits), pruned, atol=1e-3)


@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "cache"])
@torch.no_grad()
def test_threads_share_a_model_at_work(block):
    family, methods = BLOCKS[block]
    model, wrong = language_model(family, max_position_embeddings=128), []
    prompts = [prompt(1, length, seed) for seed, length in enumerate((14, 18, 22))]
    with stacked(model, methods):
        alone = [model.generate(tokens, **GREEDY) for tokens in prompts]

        def work(number: int) -> None:
            try:
                with torch.no_grad():
                    texts = [model.generate(prompts[number], **GREEDY) for _ in range(4)]
                wrong.extend(number for text in texts if not torch.equal(text, alone[number]))
            except Exception as error:
                wrong.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


@pytest.mark.parametrize(
    ("block", "applied_to"),
    [("cache", "model"), ("drafts", "compiled"), ("experts", "compiled"), ("tokens and cache", "model")],
)
@torch.no_grad()
def test_what_was_compiled_runs_uncompiled_inside(block, applied_to):
    family, methods = BLOCKS[block]
    tokens = prompt(1)
    plain = language_model(family, max_position_embeddings=128)
    dense = plain(tokens).logits
    with stacked(plain, methods):
        pruned = plain.generate(tokens, **GREEDY)
    torch._dynamo.reset()
    model = language_model(family, max_position_embeddings=128)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(tokens).logits, dense, atol=1e-5)
    model.model.layers[1].compile(backend="eager")
    with stacked(compiled if applied_to == "compiled" else model, methods) as handles:
        assert torch.equal(compiled.generate(tokens, **GREEDY), pruned)
        later = torch.compile(model, backend="eager")  # in the block
        assert torch.equal(later.generate(tokens, **GREEDY), pruned)
        for handle in handles:
            handle.report()
        assert [method.name for method in at_work(compiled)] == [method.name for method, _ in methods]
    assert untouched(model) and not at_work(compiled)
    for again in (compiled, later):
        assert torch.allclose(again(tokens).logits, dense, atol=1e-5)


@torch.no_grad()
def test_blocks_of_threads_that_end_in_any_order_bring_compilation_back():
    models = [language_model(seed=seed) for seed in range(2)]
    blocks = [apply(NormTokens(), model, 0.5) for model in models]
    compiled = torch.compile(models[1], backend="eager")
    compiled(prompt(1))
    for block in blocks:
        block.__enter__()
    blocks[0].__exit__(None, None, None)
    pruned = compiled(prompt(1)).logits
    blocks[1].__exit__(None, None, None)
    assert pruned.shape[1] == 12 and compiled(prompt(1)).logits.shape[1] == 24
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_costs_are_told_with_and_without_a_cache_pruner():
    model, tokens = language_model("llama", max_position_embeddings=128), prompt()
    with apply(NormTokens(), model, 0.5) as handle, torch.no_grad():
        model.generate(tokens, **GREEDY)
        alone = handle.report().macs
    with stacked(model, ((NormTokens(), 0.5), (SnapKV(window_size=4), 0.5))) as (handle, caches), torch.no_grad():
        model.generate(tokens, **GREEDY)
        assert handle.report().macs == alone
        assert caches.report().entries == tuple(float(layer.keys.shape[2]) for layer in caches.layers)


def test_every_cache_pruner_but_those_that_choose_the_prompt_runs_beside_a_token_pruner():
    from prunelab.common.core import registry

    model = language_model("llama", max_position_embeddings=256, num_hidden_layers=4)
    tokens, steps = prompt(2, 100), {"output_logits": True, "return_dict_in_generate": True}
    with apply(NormTokens(), model, 0.8):
        whole = torch.stack(model.generate(tokens, **GREEDY, **steps).logits)
    services = {"draft": language_model("llama", seed=1, num_hidden_layers=1, max_position_embeddings=256)}
    alone = set()
    for cls in registry.load().values():
        if issubclass(cls, CachePruner):
            if (method := cls()).beside(NormTokens()) is not None:
                alone.add(cls.name)
                continue
            with stacked(model, ((NormTokens(), 0.8), (method, 0.6)), services) as (_, handle):
                said = torch.stack(model.generate(tokens, **GREEDY, **steps).logits)
            hides = issubclass(cls, OwnAttention) and not torch.allclose(said, whole)  # from attention alone
            assert handle.report().ratio < 0.95 or hides, cls.name
    assert alone == {"spec_kv", "spec_pc", "spec_kv_pc"}
