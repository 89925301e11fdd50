"""Speculative decoding gives the model's own text, on every family and under every option, or says why it cannot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from scipy import stats

from prunelab.common import speculative
from prunelab.common.catalogue import hub
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import prompts, texts
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import decode
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.speculative import Reader, baselines, trees
from prunelab.common.speculative.reader import info
from prunelab.common.speculative.role import DraftDecoder, Step
from prunelab.common.speculative.trees import DraftTree
from prunelab.common.tasks.decode import Decode
from prunelab.methods.medusa.method import Medusa
from tests.contract.references import TINY_LM, BigramDrafts, language_model

FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi": ("Phi", {}),
    "gpt_neox": ("GPTNeoX", {}),
}


def model_of(family: str = "llama", **overrides: Any):
    """A tiny random model of the family without an end token."""
    name, values = FAMILIES[family]
    torch.manual_seed(0)
    values = {**TINY_LM, "max_position_embeddings": 128, "eos_token_id": None, **values, **overrides}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**values)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) * 0.25)
    return model


@dataclass(frozen=True)
class Bushy(DraftDecoder):
    """Drafts a tree with everything in it: right and wrong tokens, branches, and paths that stand there twice.

    State: a dictionary from each token to the tokens that were last chosen behind it.
    """

    depth: int = 3
    name: ClassVar[str] = "bushy"

    def start(self, vocabulary: int, **services: Any) -> dict[int, list[int]]:
        return {}

    def draft(self, state: dict[int, list[int]], tokens: torch.Tensor, budget: Budget) -> DraftTree:
        drafts, parents, level = [], [], [(-1, int(tokens[-1]))]
        for _ in range(self.depth):
            next_level = []
            for parent, token in level:
                for child in (*state.get(token, [5, 6]), 7, state.get(token, [5])[0]):
                    next_level.append((len(drafts), child))
                    drafts.append(child)
                    parents.append(parent)
            level = next_level[:6]
        count = budget.count(len(drafts))
        return DraftTree(torch.tensor(drafts[:count]), torch.tensor(parents[:count]))

    def observe(self, state: dict[int, list[int]], step: Step) -> None:
        for token, best in zip(step.tokens.tolist(), step.logits.topk(2).indices.tolist(), strict=True):
            state[token] = best


PROMPT = torch.tensor([3, 9, 4, 9, 4, 11])


def plain(model, ids, **options) -> torch.Tensor:
    return model.generate(ids.view(1, -1), **{"do_sample": False, **options})[0, ids.numel() :]


# -- the same text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [Bushy(), BigramDrafts()], ids=lambda m: m.name)
def test_output_is_that_of_plain_generate(family, method):
    model = model_of(family)
    wanted = plain(model, PROMPT, max_new_tokens=40)
    out = speculative.generate(method, model, PROMPT, max_new_tokens=40, budget=Budget(24, "count"))
    assert torch.equal(out.tokens, wanted)
    assert out.steps < 40
    assert out.mat == pytest.approx(40 / out.steps)
    assert out.steps_saved == pytest.approx(100 * (1 - out.steps / 40))
    assert 0 < out.drafting < out.seconds


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_length_is_exact_from_the_shortest_prompt_on(attention, limit, length):
    model = model_of()
    model.set_attn_implementation(attention)
    ids = PROMPT[:length]
    out = speculative.generate(Bushy(), model, ids, max_new_tokens=limit)
    assert len(out.tokens) == limit
    assert torch.equal(out.tokens, plain(model, ids, max_new_tokens=limit))


@dataclass(frozen=True)
class Oracle(DraftDecoder):
    """Drafts the next six tokens of a text that is known."""

    text: tuple[int, ...]
    name: ClassVar[str] = "oracle"

    def start(self, vocabulary: int, **services: Any) -> list[int]:
        return []

    def draft(self, state: list[int], tokens: torch.Tensor, budget: Budget) -> DraftTree:
        chain = torch.tensor(self.text[len(tokens) : len(tokens) + 6], dtype=torch.long)
        return DraftTree(chain, torch.arange(len(chain)) - 1)

    def observe(self, state: list[int], step: Step) -> None:
        state.append(len(step.tokens))


def test_eos_stops_wherever_it_is_met():
    model = model_of()
    text = plain(model, PROMPT, max_new_tokens=40)
    method = Oracle((*PROMPT.tolist(), *text.tolist()))
    inside = 0
    for eos in sorted(set(text.tolist())):
        wanted, state = plain(model, PROMPT, max_new_tokens=40, eos_token_id=eos), []
        out = speculative.generate(method, model, PROMPT, max_new_tokens=40, eos_token_id=eos, state=state)
        assert torch.equal(out.tokens, wanted)
        assert int(out.tokens[-1]) == eos
        assert out.steps == -(-len(wanted) // 7)
        whole = len(wanted) // 7 + (len(wanted) == 40)  # the last step's draft is cut to the length asked for
        assert len(state) == whole, "a step that ended inside its draft is not learned from"
        inside += len(wanted) % 7 != 0
    assert inside >= 5


def test_options_of_generate_hold():
    model = model_of()
    ids = torch.cat([PROMPT, PROMPT, PROMPT])
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "bad_words_ids": [[9]], "min_new_tokens": 5}
    wanted = plain(model, ids, max_new_tokens=30, **options)
    assert not torch.equal(wanted, plain(model, ids, max_new_tokens=30)), "the options change something"
    out = speculative.generate(Bushy(), model, ids, max_new_tokens=30, **options)
    assert torch.equal(out.tokens, wanted)


def test_left_padding_is_ignored():
    model = model_of()
    ids = torch.cat([torch.zeros(3, dtype=torch.long), PROMPT])
    options = {"attention_mask": (torch.arange(9) >= 3).long()[None], "max_new_tokens": 20}
    out = speculative.generate(Bushy(), model, ids, **options)
    assert torch.equal(out.tokens, plain(model, PROMPT, max_new_tokens=20))


def test_a_cache_given_is_gone_on_from_and_left_as_plain_decoding_leaves_it():
    model = model_of()
    caches = []
    for run in ("plain", "drafted"):
        cache = transformers.DynamicCache(config=model.config)
        options = {"past_key_values": cache, "do_sample": False, "return_dict_in_generate": True}
        if run == "plain":
            first = model.generate(PROMPT[None], max_new_tokens=9, **options).sequences
            second = model.generate(torch.cat([first, PROMPT[None]], 1), max_new_tokens=9, **options).sequences
        else:
            with speculative.applied(Bushy(), model) as handle:
                assert torch.equal(model.generate(PROMPT[None], max_new_tokens=9, **options).sequences, first)
                assert torch.equal(
                    model.generate(torch.cat([first, PROMPT[None]], 1), max_new_tokens=9, **options).sequences, second
                )
            assert len(handle.runs) == 2
            assert handle.report().steps == sum(r.steps for r in handle.runs)
        caches.append(cache)
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)


def test_a_long_prompt_is_read_in_one_causal_pass():
    model = model_of()
    ids = torch.randint(61, (80,), generator=torch.Generator().manual_seed(1))
    out = speculative.generate(Bushy(), model, ids, max_new_tokens=20)
    assert torch.equal(out.tokens, plain(model, ids, max_new_tokens=20))


def test_nothing_stays_on_the_model():
    model = model_of()
    with speculative.applied(Bushy(), model), pytest.raises(PrunelabError, match="already runs bushy"):
        speculative.generate(Bushy(), model, PROMPT, max_new_tokens=3)
    assert "generate" not in vars(model)
    with pytest.raises(PrunelabError, match="is empty"), speculative.applied(Bushy(), model):
        model.generate(torch.empty(1, 0, dtype=torch.long))
    assert "generate" not in vars(model)
    assert not any("prunelab" in name for name in vars(model))


# -- reading ---------------------------------------------------------------------------------------------------------


TREE = DraftTree(torch.tensor([7, 8, 7, 9, 9, 4]), torch.tensor([-1, -1, 0, 0, 1, 3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_logits_are_those_of_each_path_alone(family):
    model = model_of(family)
    reader = Reader(model)
    with torch.inference_mode():
        logits = reader.read(PROMPT, TREE)
        for node in range(6):
            path = torch.cat([PROMPT, TREE.tokens[TREE.ancestors[node]]])
            torch.testing.assert_close(logits[node + 1], model(path[None]).logits[0, -1], atol=1e-4, rtol=1e-4)
        grown = DraftTree(torch.cat([TREE.tokens, torch.tensor([2])]), torch.cat([TREE.parents, torch.tensor([5])]))
        more = reader.read(PROMPT, grown, known=6)
        torch.testing.assert_close(more, Reader(model).read(PROMPT, grown)[7:], atol=1e-4, rtol=1e-4)
        reader.keep(torch.tensor([0, 3, 5]))
        longer = torch.cat([PROMPT, torch.tensor([7, 9, 4, 30])])
        after = reader.read(longer, TREE)
        torch.testing.assert_close(after, Reader(model).read(longer, TREE), atol=1e-4, rtol=1e-4)
        other = torch.cat([PROMPT[:4], torch.tensor([1, 2])])
        torch.testing.assert_close(reader.read(other, TREE), Reader(model).read(other, TREE), atol=1e-4, rtol=1e-4)
        assert reader.cache.get_seq_length() == 6 + 6


@dataclass(frozen=True)
class Watchful(Bushy):
    """Has a chain of right tokens read aside, and keeps every step."""

    text: tuple[int, ...] = ()
    name: ClassVar[str] = "watchful"
    reads_hidden: ClassVar[bool] = True

    def begin(self, state: dict[Any, Any], prompt: torch.Tensor) -> None:
        state["begun"] = prompt
        state["steps"] = []

    def aside(self, state: dict[Any, Any], tokens: torch.Tensor) -> DraftTree:
        chain = torch.tensor(self.text[len(tokens) :][:9], dtype=torch.long)
        return DraftTree(chain, torch.arange(len(chain)) - 1)

    def observe(self, state: dict[Any, Any], step: Step) -> None:
        super().observe(state, step)
        state["steps"].append(step)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_aside_is_answered_but_never_accepted(family):
    model = model_of(family, max_position_embeddings=40)
    wanted = plain(model, PROMPT, max_new_tokens=34)
    method, state = Watchful(text=(*PROMPT.tolist(), *wanted.tolist())), {}
    out = speculative.generate(method, model, PROMPT, max_new_tokens=34, state=state, budget=Budget(2, "count"))
    bare = speculative.generate(Bushy(), model, PROMPT, max_new_tokens=34, state={}, budget=Budget(2, "count"))
    assert torch.equal(out.tokens, wanted)
    assert out.steps == bare.steps
    assert torch.equal(state["begun"], PROMPT)
    written = 0
    for step in state["steps"]:
        ahead = wanted[written + 1 :][: len(step.aside)]
        assert len(ahead) == min(9, 33 - written)
        assert torch.equal(step.aside.argmax(-1)[: len(ahead)], ahead)
        head = model.get_output_embeddings()
        torch.testing.assert_close(head(step.hidden), step.logits, atol=1e-5, rtol=1e-5)
        assert len(step.hidden) == len(step.tree.tokens) + 1
        before = len(PROMPT) - 1 if not written else 0
        assert len(step.earlier) == before, "each token is read once, and the prompt with the first draft"
        written += len(step.accepted.tokens)


def test_long_prompts_are_read_first_and_seen_whole():
    model = model_of(max_position_embeddings=90)
    prompt = torch.randint(61, (70,), generator=torch.Generator().manual_seed(5))
    state: dict[Any, Any] = {}
    speculative.generate(Watchful(), model, prompt, max_new_tokens=2, state=state, budget=Budget(2, "count"))
    step = state["steps"][0]
    with torch.no_grad():
        wanted = model(prompt[None], output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(torch.cat([step.earlier, step.hidden[:1]]), wanted, atol=1e-5, rtol=1e-5)


def test_places_aside_stay_within_a_table_of_positions():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24, "vocab_size": 61, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None)).eval()
    wanted = plain(model, PROMPT, max_new_tokens=18)
    method = Watchful(text=(*PROMPT.tolist(), *wanted.tolist(), *range(20)))
    assert torch.equal(speculative.generate(method, model, PROMPT, max_new_tokens=18).tokens, wanted)


# -- trees -----------------------------------------------------------------------------------------------------------


def test_shape_of_a_tree():
    assert TREE.depths.tolist() == [1, 1, 2, 2, 2, 3]
    assert TREE.ancestors[5].tolist() == [True, False, False, True, False, True]
    assert TREE.paths.tolist() == [[7, -1, -1], [8, -1, -1], [7, 7, -1], [7, 9, -1], [8, 9, -1], [7, 9, 4]]
    cut = TREE.within(2)
    assert cut.tokens.tolist() == [7, 8, 7, 9, 9]
    assert TREE.where(torch.tensor([True, False, False, True, False, True])).parents.tolist() == [-1, 0, 1]
    empty = DraftTree(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert empty.paths.shape == (0, 0)
    assert empty.within(3) is empty


def test_the_longest_path_wins_and_ties_go_to_the_first():
    tree = DraftTree(torch.tensor([5, 5, 6, 6]), torch.tensor([-1, -1, 1, 0]))
    accepted = trees.follow(tree, torch.tensor([5, 6, 6, 9, 8]))
    assert accepted.nodes.tolist() == [1, 2]
    assert accepted.tokens.tolist() == [5, 6, 9]
    assert trees.follow(tree, torch.tensor([4, 6, 6, 9, 8])).tokens.tolist() == [4]


def test_a_trie_holds_every_prefix_once_and_fusing_shares_them():
    tree, through = trees.trie(torch.tensor([[4, 5, 6], [4, 5, 2], [4, 3, -1], [9, -1, -1], [4, 5, 6]]))
    assert tree.tokens.tolist() == [4, 3, 5, 2, 6, 9]
    assert tree.parents.tolist() == [-1, 0, 0, 2, 2, -1]
    assert through.tolist() == [4, 1, 3, 1, 2, 1]
    other, _ = trees.trie(torch.tensor([[4, 5, 7, 1]]))
    fused = trees.fuse(tree, other)
    assert sorted(map(tuple, fused.paths.tolist())) == sorted(
        {(4, -1, -1, -1), (4, 3, -1, -1), (4, 5, -1, -1), (4, 5, 2, -1), (4, 5, 6, -1), (9, -1, -1, -1)}
        | {(4, 5, 7, -1), (4, 5, 7, 1)}
    )
    nothing, _ = trees.trie(torch.full((2, 3), -1))
    assert len(nothing.tokens) == 0
    assert len(trees.fuse(nothing, tree).tokens) == 6


# -- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_through_a_tree_leaves_the_distribution_unchanged():
    """First two tokens of 6000 draws against their exact probabilities, on a tree with duplicate paths, which a
    sampler that favours the longest of several draws would get wrong."""
    g = torch.Generator().manual_seed(5)
    first, second = torch.randn(5, generator=g) * 1.2, torch.randn(5, 5, generator=g) * 1.2
    tree = DraftTree(torch.tensor([1, 1, 2, 0, 3, 0, 1, 4]), torch.tensor([-1, -1, -1, 0, 1, 1, 2, 0]))
    logits = torch.cat([first[None], second[tree.tokens[:3]], torch.zeros(5, 5)])
    rng = torch.Generator().manual_seed(0)
    counts = torch.zeros(5, 5)
    for _ in range(6000):
        tokens = trees.sample(tree, logits, rng).tokens.tolist()
        if len(tokens) == 1:
            tokens.append(int(torch.multinomial(second[tokens[0]].softmax(-1), 1, generator=rng)))
        counts[tokens[0], tokens[1]] += 1
    wanted = first.softmax(-1)[:, None] * second.softmax(-1)
    assert stats.chisquare(counts.flatten(), 6000 * wanted.flatten() / wanted.sum()).pvalue > 0.001


def test_sampled_text_is_distributed_as_that_of_plain_generate():
    """Two tokens behind a prompt, 800 texts a side, homogeneity by chi-square; temperature and top-k hold as well."""
    model = model_of(vocab_size=12, num_hidden_layers=1)
    ids, options = PROMPT.clamp(max=11), {"max_new_tokens": 2, "do_sample": True, "temperature": 1.3, "top_k": 6}
    torch.manual_seed(1)
    theirs = model.generate(ids.expand(800, -1), **options)[:, -2:]
    with speculative.applied(Bushy(), model, seed=2):
        ours = torch.cat([model.generate(ids[None], **options)[:, -2:] for _ in range(800)])
    table = torch.stack([torch.bincount(t[:, 0] * 12 + t[:, 1], minlength=144) for t in (ours, theirs)]).numpy()
    common = table[:, table.sum(0) >= 10]
    rest = table[:, table.sum(0) < 10].sum(1, keepdims=True)
    table = common if rest.sum() == 0 else torch.cat([torch.tensor(common), torch.tensor(rest)], 1).numpy()
    assert stats.chi2_contingency(table).pvalue > 0.001


def test_same_seed_same_sample():
    model = model_of()
    options = {"max_new_tokens": 12, "do_sample": True}
    texts = [speculative.generate(Bushy(), model, PROMPT, seed=s, **options).tokens.tolist() for s in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


# -- baselines -------------------------------------------------------------------------------------------------------


def test_baselines_give_the_same_text_and_count_the_targets_passes():
    model, draft = model_of(), model_of(num_hidden_layers=1)
    wanted = plain(model, PROMPT, max_new_tokens=30)
    one = baselines.plain(model, PROMPT, max_new_tokens=30)
    assert torch.equal(one.tokens, wanted)
    assert (one.steps, one.mat, one.steps_saved) == (30, 1.0, 0.0)
    looked_up = baselines.prompt_lookup(model, PROMPT, max_new_tokens=30)
    assert torch.equal(looked_up.tokens, wanted)
    assert looked_up.steps <= 30
    helped = baselines.assistant(model, PROMPT, max_new_tokens=30, draft=model_of())
    assert torch.equal(helped.tokens, wanted)
    assert helped.mat == 2, "the target is its own assistant: always right, and never confident enough for a second"
    assert 0 < helped.drafting < helped.seconds
    assert torch.equal(baselines.assistant(model, PROMPT, max_new_tokens=30, draft=draft).tokens, wanted)
    with pytest.raises(PrunelabError, match="17 tokens and the target 61"):
        baselines.assistant(model, PROMPT, max_new_tokens=30, draft=model_of(vocab_size=17))


# -- bad input -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served(Bushy):
    name: ClassVar[str] = "served"
    services = ("draft",)


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        (torch.empty(0, dtype=torch.long), {}, "the prompt is empty"),
        (torch.ones(128, dtype=torch.long), {}, "no room in the model's context of 128"),
        (torch.ones(2, 5, dtype=torch.long), {}, "one by one"),
        (PROMPT, {"num_beams": 2}, "without beams"),
        (PROMPT, {"use_cache": False}, "leave use_cache on"),
        (PROMPT, {"cache_implementation": "static"}, "Static"),
        (PROMPT, {"assistant_model": 1}, "leave custom_generate and assistants out"),
    ],
    ids=lambda v: next(iter(v), "ok") if isinstance(v, dict) else "",
)
def test_what_cannot_be_decoded_is_refused_in_a_line(ids, options, said):
    with pytest.raises(PrunelabError, match=said) as error:
        speculative.generate(Bushy(), model_of(), ids, max_new_tokens=5, **options)
    assert "\n" not in str(error.value)


def test_caches_without_entries_by_token_are_refused():
    with pytest.raises(PrunelabError, match="sliding window"):
        speculative.generate(Bushy(), language_model("mistral", sliding_window=16), PROMPT, max_new_tokens=5)
    model = model_of()
    offloaded = transformers.DynamicCache(config=model.config)
    offloaded.offloading = True
    for cache in (transformers.StaticCache(config=model.config, max_cache_len=64), offloaded):
        with pytest.raises(PrunelabError, match="cache"):
            speculative.generate(Bushy(), model, PROMPT, max_new_tokens=5, past_key_values=cache)


def test_models_and_services_that_do_not_fit_are_refused():
    with pytest.raises(PrunelabError, match="causal language model"):
        speculative.generate(Bushy(), torch.nn.Linear(2, 2), PROMPT, max_new_tokens=5)
    with pytest.raises(PrunelabError, match="needs the services draft"):
        speculative.generate(Served(), model_of(), PROMPT, max_new_tokens=5)
    services = {"draft": model_of(vocab_size=17)}
    with pytest.raises(PrunelabError, match="the draft model has 17 tokens and the target 61"):
        speculative.generate(Served(), model_of(), PROMPT, max_new_tokens=5, services=services)
    model = model_of()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(PrunelabError, match="flex_attention does not take"):
        speculative.generate(Bushy(), model, PROMPT, max_new_tokens=5)
    with (
        pytest.raises(PrunelabError, match="nothing was generated"),
        speculative.applied(Bushy(), model_of()) as handle,
    ):
        handle.report()


# -- the task --------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of 61 tokens: one for each letter of a text."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 61 for letter in text]}

    def decode(self, tokens: torch.Tensor, **_: Any) -> str:
        return "".join(chr(48 + int(token)) for token in tokens)


QUESTIONS = [
    {"category": "writing", "turns": ["Name a tree.", "And one more?"]},
    {"category": "translation", "turns": ["Sag es auf Deutsch."]},
    {"category": "roleplay", "turns": ["Be a tree."]},
]


NAMED = {"rest": {"store": {"loader": "said"}}, "medusa": {"heads": {"testbed": "said"}}}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Runs of the task on three questions, with tiny models in the place of the catalogue's, a store of what the target
    says, and heads that know nothing."""
    monkeypatch.setattr(texts, "load", lambda identity, config, split: ("Name a tree. ASSISTANT:" * 3, "Be a tree."))
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    target, draft = model_of(max_position_embeddings=600), model_of(num_hidden_layers=1, max_position_embeddings=600)
    monkeypatch.setattr(
        loading, "language", lambda identity, config: (target if identity == "target" else draft, Words())
    )
    torch.manual_seed(0)
    heads = Medusa().build(info(target))
    monkeypatch.setattr(loading, "load", lambda identity, config: (heads, None))
    ids = {"model": "target", "data": {"loader": "questions", "setting": "questions", "file": "question.jsonl"}}

    def execute(
        method: str | None, settings: dict[str, Any] | None = None, draft: str | None = "small", **options: Any
    ) -> dict[str, Any]:
        settings = {"new": 24, "warmup": 1, **(settings or {})}
        named = ids | ({"draft": draft} if draft else {}) | NAMED.get(str(method), {})
        job = Run("decode", "testbed", method, options, "1" if method else None, settings, named)
        return runner.measure(job, {"questions": str(tmp_path), "assets": None})

    return execute


def test_the_task_compares_with_plain_decoding(asked):
    found = {
        "plain": asked(None),
        "lookup": asked(None, decoding="prompt_lookup", tokens=5, ngram=2),
        "assistant": asked(None, decoding="assistant"),
        "recycling": asked("token_recycling"),
        "rasd": asked("rasd"),
        "rest": asked("rest"),
        "lookahead": asked("lookahead"),
        "medusa": asked("medusa"),
    }
    assert found["plain"]["mat"]["value"] == found["plain"]["speedup"]["value"] == 1
    for name, metrics in found.items():
        assert metrics["tokens"]["value"] == 4 * 24, "two turns, one, and one"
        assert metrics["identical"]["value"] == 100
        assert metrics["mat"]["value"] == pytest.approx(96 / metrics["steps"]["value"], abs=1e-3)
        assert metrics["steps_saved"]["value"] == pytest.approx(100 * (1 - metrics["steps"]["value"] / 96), abs=1e-3)
        assert metrics["mat"]["n"] == len(metrics["speedup"]["samples"]) == 3
        # Means over prompts of a time and of its inverse: the product is 1000 where all take the same, else more;
        # both are rounded, and taken from medians of their own.
        assert metrics["ms_per_token"]["value"] * metrics["tokens_per_second"]["value"] > 900
        assert (metrics["drafting"]["value"] > 0) == (name not in ("plain", "lookup"))
    assert found["recycling"]["mat"]["value"] > 1.5


def test_sampling_is_sampled_on_both_sides(asked):
    hot = {"temperature": 1.5, "top_p": 0.95}
    plain, drafted = asked(None, hot), asked("token_recycling", hot)
    assert plain["mat"]["value"] == 1 <= drafted["mat"]["value"]
    assert drafted["identical"]["value"] < 100, "two sampled texts are not one text"
    assert asked("token_recycling", hot)["steps"] == drafted["steps"], "the same seed, the same text"


def test_tasks_of_spec_bench_are_told_apart(asked):
    assert asked(None, {"task": "mt_bench"})["mat"]["n"] == 2
    assert asked(None, {"task": "translation", "new": 3})["tokens"]["value"] == 3
    assert asked(None, {"samples": 1, "new": 3})["tokens"]["value"] == 6
    with pytest.raises(PrunelabError, match="no question of the task 'rag'"):
        asked(None, {"task": "rag"})
    with pytest.raises(PrunelabError, match="no baseline 'beam'"):
        asked(None, decoding="beam")
    with pytest.raises(PrunelabError, match="the setting `draft`"):
        asked(None, draft=None, decoding="assistant")
    with pytest.raises(PrunelabError, match="is run under a draft_decoder; tome is a token_pruner"):
        asked("tome")


def test_published_heads_are_read_as_they_are_stored(tmp_path, monkeypatch):
    model, path = model_of(), tmp_path / "medusa_lm_head.pt"
    stored = Medusa().build(info(model))
    torch.save(stored.state_dict(), path)
    monkeypatch.setattr(hub, "file", lambda identity, kind, config: tmp_path / identity["file"])
    settings = Decode.Settings()
    bench = Bench("paper", {"heads": {"hub": "a/b", "file": path.name}}, settings, chosen="medusa")
    parts = decode._parts(bench, Medusa(), model)
    assert parts is not None
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in parts.state_dict().items())
    torch.save({"0.0.linear.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(PrunelabError, match="does not hold the weights"):
        decode._parts(bench, Medusa(), model)
    with pytest.raises(PrunelabError, match="bushy has no learned parts"):
        decode._parts(bench, Bushy(), model)


def test_a_dialogue_takes_vicunas_form():
    dialogue = prompts.Dialogue(("Name a tree.", "And one more?"), Words())
    first = prompts.VICUNA + "USER: Name a tree. ASSISTANT:"
    assert dialogue.ids([]).tolist() == Words()(first)["input_ids"]
    second = first + " Oak.</s>USER: And one more? ASSISTANT:"
    assert dialogue.ids([" Oak. "]).tolist() == Words()(second)["input_ids"]
