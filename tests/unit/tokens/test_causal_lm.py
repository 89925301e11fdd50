"""Tokens that leave a causal language model's prompt, and come back: against slow references, in five families."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Mix, Plan, Site
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.ftp.method import FTP
from prunelab.methods.lazyllm.method import LazyLLM
from prunelab.methods.random_drop.method import RandomDrop

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Phi")
LAYERS = (1, 2, 4)
BUDGET = Budget((0.7, 0.6, 0.5))
EXTRA: dict[str, dict[str, Any]] = {"Mistral": {"sliding_window": None}, "Qwen3": {"head_dim": 8}}


def model_of(family: str = "Llama", **changes: Any) -> Any:
    """A tiny random model with two key-value heads for four, attention uneven enough to matter."""
    import transformers

    cls = getattr(transformers, f"{family}ForCausalLM")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    marks = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**sizes, **heads, **marks, **EXTRA.get(family, {}), **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) * (0.45 if "q_proj" in name or "k_proj" in name else 0.25))
    return model


def ids(batch: int = 2, length: int = 20, seed: int = 3) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Attended(TokenPruner):
    """What the newest token attends to."""

    layers: tuple[int, ...] = LAYERS
    rest: Any = "drop"
    reads: tuple[str, ...] = ("last_row",)

    name: ClassVar[str] = "attended"

    def sites(self, info):
        return [Site(layer, "input") for layer in self.layers]

    def requires(self, site):
        return frozenset(self.reads)

    def score(self, site, signals: TokenSignals) -> Tensor:
        return signals.last_row.mean(1)


DEFER = Attended(rest="defer")


@dataclass(frozen=True)
class KeyNorms(Attended):
    """By the length of keys, which a coming back token must bring from the cache."""

    reads: tuple[str, ...] = ("keys",)

    def score(self, site, signals: TokenSignals) -> Tensor:
        return signals.keys.float().norm(dim=-1).mean(1)


# -- references -------------------------------------------------------------------------------------------------------


def masked_forward(model: Any, tokens: Tensor, kept: dict[int, set[int]], prompt: int) -> Tensor:
    """Logits [N, V] of one sequence [N] when the layers from each site on do not see the prompt tokens that left."""
    places = torch.arange(len(tokens))
    x = model.model.embed_tokens(tokens[None])
    table = model.model.rotary_emb(x, places[None])
    seen = torch.ones(len(tokens), dtype=torch.bool)
    for layer, block in enumerate(model.model.layers):
        if layer in kept:
            seen = torch.tensor([p >= prompt or p in kept[layer] for p in places.tolist()])
        mask = ((places <= places[:, None]) & seen) | torch.eye(len(tokens), dtype=torch.bool)
        x = block(x, attention_mask=mask[None, None], position_embeddings=table)
    norm = getattr(model.model, "norm", None) or model.model.final_layernorm
    return model.lm_head(norm(x))[0]


class Slow:
    """Deferring token by token, with dictionaries: one Llama, one sample, plain attention."""

    def __init__(self, model: Any, layers: tuple[int, ...], shares: tuple[float, ...], prompt: int) -> None:
        self.model, self.shares, self.prompt = model, dict(zip(layers, shares)), prompt
        self.kv: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in model.model.layers]
        self.waiting: dict[int, tuple[int, Tensor]] = {}
        self.total, self.came_back = 0, 0

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [V] behind the last of the new tokens [M]."""
        inner = self.model.model
        fresh = range(self.total, self.total + len(tokens))
        hidden = {c: inner.embed_tokens(t[None]) for c, t in zip(fresh, tokens)}
        self.total += len(tokens)
        newest, active = self.total - 1, list(range(self.total))
        attended: dict[int, float] = {}
        for layer, block in enumerate(inner.layers):
            if layer in self.shares:
                active = self.choose(active, attended, self.shares[layer])
                for c in [c for c in hidden if c not in active]:
                    self.waiting[c] = (layer, hidden.pop(c))
                for c in active:
                    if c not in self.kv[layer] and c not in hidden:
                        where, hidden[c] = self.waiting.pop(c)
                        assert where == layer
                        self.came_back += 1
            queries = {}
            for c, h in hidden.items():
                q, k, v = self.project(block, h, c)
                assert c not in self.kv[layer], "computed twice"
                self.kv[layer][c], queries[c] = (k, v), q
            for c, h in hidden.items():
                seen = [a for a in active if a <= c]
                keys = torch.stack([self.kv[layer][a][0] for a in seen], 1).repeat_interleave(2, 0)  # [H, U, d]
                values = torch.stack([self.kv[layer][a][1] for a in seen], 1).repeat_interleave(2, 0)
                weights = (queries[c][:, None] @ keys.transpose(1, 2) / queries[c].shape[1] ** 0.5).softmax(-1)
                h = h + block.self_attn.o_proj((weights @ values).flatten()[None])
                hidden[c] = h + block.mlp(block.post_attention_layernorm(h))
                if c == newest:
                    attended = dict(zip(seen, weights[:, 0].mean(0).tolist()))
        return self.model.lm_head(inner.norm(hidden[newest]))[0]

    def choose(self, active: list[int], attended: dict[int, float], share: float) -> list[int]:
        """The best share of the active prompt tokens before the prompt's last, and all others."""
        prunable = [c for c in active if c < self.prompt - 1]
        best = sorted(prunable, key=lambda c: (-attended[c], c))[: int(round(share * len(prunable), 6))]
        return sorted(best + [c for c in active if c >= self.prompt - 1])

    def project(self, block: Any, h: Tensor, column: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query [H, d], key and value [KV, d], rotated by the token's own position."""
        attn, x = block.self_attn, block.input_layernorm(h)
        cos, sin = self.model.model.rotary_emb(h[None], torch.tensor([[column]]))

        def turn(t: Tensor) -> Tensor:
            half = torch.cat([-t[:, t.shape[1] // 2 :], t[:, : t.shape[1] // 2]], 1)
            return t * cos[0] + half * sin[0]

        q, k, v = (p(x).view(-1, attn.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        return turn(q), turn(k), v

    def generate(self, tokens: Tensor, count: int) -> list[int]:
        """Greedy tokens behind a prompt [N]."""
        found, logits = [], self.step(tokens)
        for _ in range(count):
            found.append(int(logits.argmax()))
            logits = self.step(torch.tensor(found[-1:]))
        return found


# -- keep-all and the model afterwards --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rest", ["drop", "defer"])
@torch.no_grad()
def test_keeping_all_changes_nothing(family, rest):
    model, tokens = model_of(family), ids()
    want, words = model(tokens).logits, model.generate(tokens, max_new_tokens=8, do_sample=False)
    with apply(Attended(rest=rest), model, 1.0):
        assert torch.allclose(model(tokens).logits, want, atol=1e-5)
        assert torch.allclose(model(tokens, use_cache=False).logits, want, atol=1e-5)
        assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), words)


@pytest.mark.parametrize("rest", ["drop", "defer"])
@torch.no_grad()
def test_keeping_all_samples_the_same_words(rest):
    model, tokens = model_of(), ids()
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 2, "temperature": 0.7}
    torch.manual_seed(1)
    want = model.generate(tokens, **options)
    with apply(Attended(rest=rest), model, 1.0):
        torch.manual_seed(1)
        assert torch.equal(model.generate(tokens, **options), want)


def traces(model: Any) -> tuple[int, str]:
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())
    return count, model.config._attn_implementation


@torch.no_grad()
def test_everything_comes_out_also_after_an_exception():
    model, tokens = model_of(), ids()
    before, want = traces(model), model(tokens).logits
    with apply(DEFER, model, 0.5):
        assert traces(model) != before
        model.generate(tokens, max_new_tokens=3)
    assert traces(model) == before
    with pytest.raises(ZeroDivisionError), apply(DEFER, model, 0.5):
        raise ZeroDivisionError
    assert traces(model) == before
    assert torch.equal(model(tokens).logits, want)


# -- dropping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dropping_equals_a_full_forward_that_does_not_see_what_left(family):
    model, tokens = model_of(family), ids(1)
    with apply(Attended(), model, BUDGET) as handle:
        cache = DynamicCache(config=model.config)
        logits = model(tokens, past_key_values=cache).logits
        places = {site.layer: origin[0].tolist() for site, origin in handle.kept()}
        kept = {layer: set(found) for layer, found in places.items()}
        assert [len(p) for p in places.values()] == [14, 8, 4]  # of 19 prunable ones 13, of these 7, of these 3
        assert [len(layer.keys[0, 0]) for layer in cache.layers] == [20, 14, 8, 8, 4, 4]
        later = [logits[:, -1].argmax(-1, keepdim=True)]
        answers = []
        for part in (1, 1, 3):  # three at once too
            new = torch.cat([later[-1], ids(1, part - 1, seed=part)], 1)
            later[-1] = new
            answers.append(model(new, past_key_values=cache).logits[0])
            later.append(answers[-1][-1:].argmax(-1, keepdim=True))
    whole = torch.cat([tokens, *later[:-1]], 1)[0]
    want = masked_forward(model, whole, kept, tokens.shape[1])
    assert torch.allclose(logits[0], want[places[4]], atol=1e-5)
    assert torch.allclose(torch.cat(answers), want[tokens.shape[1] :], atol=1e-5)


@torch.no_grad()
def test_dropping_before_the_first_layer_keeps_positions():
    model, tokens, new = model_of(), ids(1), ids(1, 2, seed=8)
    with apply(RandomDrop((0,), "input"), model, 0.4) as handle:
        cache = DynamicCache(config=model.config)
        logits = model(tokens, past_key_values=cache).logits[0]
        places = handle.kept()[0][1][0].tolist()
        assert len(places) == 1 + 7
        assert len(cache.layers[0].keys[0, 0]) == 8
        later = model(new, past_key_values=cache).logits[0]  # without position ids, which the model counts by its cache
        words = model.generate(tokens, max_new_tokens=4, do_sample=False)
        kept = {0: set(handle.kept()[0][1][0].tolist())}
    want = masked_forward(model, torch.cat([tokens, new], 1)[0], {0: set(places)}, 20)
    assert torch.allclose(logits, want[places], atol=1e-5)
    assert torch.allclose(later, want[20:], atol=1e-5)
    assert torch.equal(masked_forward(model, words[0], kept, 20)[19:-1].argmax(-1), words[0, 20:])


@torch.no_grad()
def test_eager_attention_gets_the_same_masks():
    model, tokens = model_of(), ids(1)
    with apply(RandomDrop((2,), "input"), model, 0.5):
        want = model.generate(tokens, max_new_tokens=5, do_sample=False)
    model.set_attn_implementation("eager")
    with apply(RandomDrop((2,), "input"), model, 0.5):
        assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), want)


# -- deferring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [3, 4, 5])
@torch.no_grad()
def test_deferring_equals_the_slow_reference(seed):
    model, tokens = model_of().double(), ids(1, seed=seed)
    slow = Slow(model, LAYERS, (0.7, 0.6, 0.5), 20)
    want = slow.generate(tokens[0], 10)
    assert slow.came_back > 0
    with apply(DEFER, model, BUDGET):
        told = {"output_logits": True, "return_dict_in_generate": True}
        found = model.generate(tokens, max_new_tokens=10, do_sample=False, **told)
    assert found.sequences[0, 20:].tolist() == want
    again = Slow(model, LAYERS, (0.7, 0.6, 0.5), 20)
    logits = [again.step(tokens[0]), *(again.step(torch.tensor([t])) for t in want[:-1])]
    assert torch.allclose(torch.stack(logits), torch.cat(list(found.logits)).double(), atol=1e-5)


def computed(model: Any, tokens: Tensor, mask: Tensor | None, words: int, method: TokenPruner, budget: Budget) -> Any:
    """Handle and, by layer, how many rows its key projection worked on in each pass."""
    rows: list[list[int]] = [[] for _ in model.model.layers]
    hooks = [
        block.self_attn.k_proj.register_forward_hook(lambda m, a, out, into=into: into.append(out.shape[1]))
        for block, into in zip(model.model.layers, rows)
    ]
    with apply(method, model, budget) as handle:
        model.generate(tokens, attention_mask=mask, max_new_tokens=words, do_sample=False)
        books = handle.adapter.running.cache
    for hook in hooks:
        hook.remove()
    return handle, rows, books


@torch.no_grad()
def test_no_token_is_computed_twice_in_a_layer():
    model, tokens = model_of(), ids(1)
    handle, rows, book = computed(model, tokens, None, 12, DEFER, BUDGET)
    assert any(count > 1 for count in rows[-1][1:]), "some came back"
    for held in book.held.values():
        columns = held.columns[0].tolist()
        assert held.valid is None
        assert len(columns) == len(set(columns)), "one entry a token"
    for layer, counts in enumerate(rows):
        assert sum(counts) == len(book.held[sum(layer >= s for s in LAYERS)].columns[0])
        assert sum(counts) <= 20 + 11
    shares = [attention for attention, _ in handle.report().tokens]
    assert shares == [sum(counts) - 11 for counts in rows]  # of the prompt, what came back included


@torch.no_grad()
def test_padded_batches_equal_single_samples():
    model = model_of()
    samples = [ids(1, n, seed=n)[0] for n in (20, 11, 16)]
    tokens = torch.stack([torch.nn.functional.pad(s, (20 - len(s), 0)) for s in samples])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(s), (20 - len(s), 0)) for s in samples])
    for method in (Attended(), DEFER, KeyNorms(rest="defer")):
        with apply(method, model, BUDGET) as handle:
            together = model.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False)[:, 20:]
            seen = handle.application.trace.attention
        alone, counts = [], torch.zeros(6)
        for sample in samples:
            with apply(method, model, BUDGET) as handle:
                alone.append(model.generate(sample[None], max_new_tokens=10, do_sample=False)[0, len(sample) :])
                counts += torch.tensor(handle.application.trace.attention)
        assert torch.equal(together, torch.stack(alone)), method
        assert seen == counts.tolist()


@dataclass(frozen=True)
class ThenAll(Attended):
    """Little of the prompt, then all of it."""

    rest: Any = "defer"
    reads: tuple[str, ...] = ("last_row", "keys")
    keys: Any = field(default_factory=list, compare=False)  # of the last site, in each pass

    def plan(self, site, signals, budget):
        self.keys[:] = [*self.keys, signals.keys]
        return super().plan(site, signals, budget if len(self.keys) <= len(self.layers) else Budget(1.0))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_all_back_before_the_last_layer_the_next_word_is_the_dense_one(family):
    model, tokens = model_of(family), ids()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    longer, seen = torch.cat([tokens, tokens[:, :1]], 1), torch.cat([mask, mask[:, -1:]], 1)
    places = (seen.cumsum(1) - 1).clamp_min(0)
    dense = model(longer, attention_mask=seen, position_ids=places).logits[:, -1:]
    for method, same in ((Attended((5,), "defer"), False), (ThenAll((5,)), True)):
        with apply(method, model, 0.4):
            cache = DynamicCache(config=model.config)
            model(tokens, past_key_values=cache, attention_mask=mask, position_ids=places[:, :-1])
            assert len(cache.layers[5].keys[0, 0]) == 8
            last = model(longer[:, -1:], past_key_values=cache, attention_mask=seen, position_ids=places[:, -1:]).logits
        assert torch.allclose(last, dense, atol=1e-4) == same


@torch.no_grad()
def test_keys_come_from_the_cache_in_the_order_of_the_tokens():
    model, tokens = model_of(), ids()
    longer = torch.cat([tokens, tokens[:, :1]], 1)
    whole, method = ThenAll((4, 5), "drop"), ThenAll((4, 5))
    with apply(whole, model, 1.0):
        model(longer)
    with apply(method, model, 0.4) as handle:
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache)
        model(longer[:, -1:], past_key_values=cache)
        assert bool((handle.adapter.running.cache.held[1].columns.diff() < 0).any()), "computed in another order"
    assert torch.allclose(method.keys[2], whole.keys[0], atol=1e-5)
    assert torch.allclose(method.keys[3], whole.keys[1], atol=1e-5)


@torch.no_grad()
def test_samples_change_places_with_all_that_is_known_of_them():
    model, tokens = model_of(), ids()
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0

    def run(swap: bool) -> Tensor:
        with apply(DEFER, model, BUDGET):
            cache = DynamicCache(config=model.config)
            places = (mask.cumsum(1) - 1).clamp_min(0)
            model(tokens, past_key_values=cache, attention_mask=mask, position_ids=places)
            seen, found = mask, []
            for step in range(5):
                new = ids(2, 1, seed=step)
                if swap and step == 2:
                    cache.reorder_cache(torch.tensor([1, 0]))
                    seen = seen.flip(0)
                new = new.flip(0) if swap and step >= 2 else new
                seen = torch.cat([seen, torch.ones_like(new)], 1)
                given = {"attention_mask": seen, "position_ids": seen.sum(1, keepdim=True) - 1}
                found.append(model(new, past_key_values=cache, **given).logits[:, -1])
        return torch.stack(found)

    plain, swapped = run(False), run(True)
    assert torch.allclose(swapped[:2], plain[:2], atol=1e-5)
    assert torch.allclose(swapped[2:].flip(1), plain[2:], atol=1e-5)


@torch.no_grad()
def test_beam_search_moves_what_waits():
    model, tokens = model_of(), ids()
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    want = model.generate(tokens, **options)
    with apply(DEFER, model, 1.0):
        assert torch.equal(model.generate(tokens, **options), want)
    with apply(DEFER, model, BUDGET):
        together = model.generate(tokens, **options)
        alone = [model.generate(t[None], **options) for t in tokens]
    assert torch.equal(together, torch.cat(alone))


# -- costs ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_report_costs_the_prompt_and_leaves_generation_undisturbed():
    model, tokens = model_of(), ids(1)
    with apply(DEFER, model, BUDGET) as handle:
        report = handle.report()
        assert report.tokens[0] == (64.0, 64.0)
        assert report.tokens[-1][0] == 1 + int(0.5 * int(0.6 * int(0.7 * 63)))
        assert 0 < report.scoring_macs < 0.01 * report.macs < 0.01 * report.dense_macs
        want = model.generate(tokens, max_new_tokens=6, do_sample=False)
        cache = DynamicCache(config=model.config)
        logits = model(tokens, past_key_values=cache).logits
        words = []
        for _ in range(6):
            words.append(logits[:, -1].argmax(-1, keepdim=True))
            handle.report()  # in the middle
            logits = model(words[-1], past_key_values=cache).logits
    assert torch.equal(torch.cat(words, 1), want[:, 20:])


# -- bad input --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mistakes_are_named():
    model, tokens = model_of(), ids(2)
    mask = torch.ones_like(tokens)
    mask[1, -3:] = 0
    filled = DynamicCache(config=model.config)
    model(tokens, past_key_values=filled)
    with apply(DEFER, model, 0.5):
        with pytest.raises(PrunelabError, match="pad on the left"):
            model(tokens, attention_mask=mask)
        with pytest.raises(PrunelabError, match="prompt is empty"):
            model(tokens[:, :0])
        with pytest.raises(PrunelabError, match="filled without the method"):
            model(tokens[:, :1], past_key_values=filled)
        with pytest.raises(PrunelabError, match="more than the model's context"):
            model(ids(1, 65))
        with pytest.raises(PrunelabError, match="one column a token"):
            model(tokens, attention_mask=torch.ones(2, 1, 20, 20))
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache)
        with pytest.raises(PrunelabError, match="one new token at a time"):
            model(tokens[:, :2], past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(PrunelabError, match="changed since"):
            model(tokens[:, :1], past_key_values=cache)


def test_what_a_model_cannot_give_is_refused_before_work():
    with pytest.raises(PrunelabError, match="sliding_window"), apply(DEFER, model_of("Mistral", sliding_window=8), 0.5):
        pass
    with pytest.raises(PrunelabError, match=r"reads hidden.*rest='drop'"):
        adapter_for(model_of()).check(Attended(rest="defer", reads=("hidden",)), [Site(2, "input")])
    with pytest.raises(PrunelabError, match="not to be had"):
        adapter_for(model_of()).check(Attended(), [Site(0, "input")])
    with pytest.raises(PrunelabError, match="layer 2 behind layer 2"), apply(Attended((2, 2)), model_of(), 0.5):
        pass
    with pytest.raises(PrunelabError, match="tokens can halt"), apply(Attended(rest="halt"), model_of(), 0.5):
        pass


@torch.no_grad()
def test_plans_that_a_language_model_cannot_follow_are_refused():
    @dataclass(frozen=True)
    class Planned(Attended):
        made: Any = None

        def plan(self, site, signals, budget):
            return self.made

    first = Gather(torch.arange(3).expand(2, -1))
    pairs = Mix(torch.zeros(2, 1).long(), torch.zeros(2, 1).long(), torch.ones(2, 1), 1)
    for made, error in (
        (Plan(first), "left out the newest token"),
        (Plan(pairs), "not merged or biased"),
        (Plan(Gather(torch.zeros(2, 0).long())), "leaves no token"),
    ):
        with apply(Planned(made=made), model := model_of(), 0.5), pytest.raises(PrunelabError, match=error):
            model(ids())


@torch.no_grad()
def test_a_prompt_in_chunks_is_refused_and_a_second_turn_is_right():
    model, tokens = model_of(), ids(1)
    run = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(1)
    for method in (Attended(), LazyLLM((2, 4)), FTP()):
        parts = method.build(adapter_for(model).info)
        with apply(method, model, 0.7, parts=None if parts is None else parts.eval()):
            with pytest.raises(PrunelabError, match="without prefill_chunk_size"):
                model.generate(tokens, max_new_tokens=4, prefill_chunk_size=4, **run)
            whole = model.generate(tokens, max_new_tokens=6, **run)
            first = model.generate(tokens, max_new_tokens=3, return_dict_in_generate=True, **run)
            said, cache = first.sequences, first.past_key_values
            more = {"attention_mask": torch.ones_like(said), "past_key_values": cache, "max_new_tokens": 3, **run}
            assert torch.equal(model.generate(said, **more), whole)
        assert "generate" not in vars(model)
