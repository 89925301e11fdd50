"""Automata against Python's own regular expressions and JSON reader, masks against single tokens, and the task."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from prunelab.common.constrained import constraints, smc
from prunelab.common.constrained.constraints import Automaton, Predicate, Regular, json_pattern, token_texts
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import constrained
from prunelab.methods.awrs.method import AWRS, LocallyConstrained
from tests.contract import references

ALPHABET = "ab01 \n_.é"
PATTERNS = [
    "", "a", "ab*", "(a|b)*0", "a{2,4}b?", "a{2,}|b{0}", "[^ab]+", "[a-b0]{3}", r"\d+\.\d*", r"\w+\s\W", ".*0",
    "(?:a|ab)(?:0|b0)?", "(a*)*b", "(a?){3}", r"[\d_]+?é", "a|b|", r"\D\S", "(|a)+1",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_automata_accept_what_python_matches(pattern):
    automaton, draws = Automaton.of(pattern, ALPHABET), random.Random(0)
    accepted = 0
    for _ in range(3000):
        text = "".join(draws.choice(ALPHABET) for _ in range(draws.randrange(7)))
        accepted += automaton.accepts(text)
        assert automaton.accepts(text) == bool(re.fullmatch(pattern, text)), text
    assert accepted


def test_every_state_can_still_be_completed():
    automaton = Automaton.of("(ab|ba)+0|a[^ab01 \n_.é]", ALPHABET)  # the second branch needs a letter that is not there
    table, alive = automaton.table, automaton.final.copy()
    for _ in range(len(table)):
        alive |= alive[table].any(1)
    assert alive[:-1].all() and not alive[-1]
    assert (table[-1] == automaton.sink).all() and (table[:, -1] == automaton.sink).all()
    assert not automaton.accepts("a€")


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(string.ascii_letters + ' "\\\n{}[],:é', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\"", max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@pytest.fixture(scope="module")
def json_automaton():
    return Automaton.of(json_pattern(3), string.printable + "é")


@settings(max_examples=200, deadline=None)
@given(value=JSONS, tight=st.booleans())
def test_json_is_accepted_up_to_its_depth(json_automaton, value, tight):
    text = json.dumps(value, separators=(",", ":") if tight else None)
    assert json_automaton.accepts(text) == (1 <= depth(value) <= 3)


def test_what_the_json_automaton_writes_is_json(json_automaton):
    draws, known = random.Random(1), string.printable + "é"
    whole = 0
    for _ in range(300):
        state, text = 0, ""
        while len(text) < 60 and not json_automaton.final[state]:
            allowed = [c for c in known if json_automaton.walk(state, json_automaton.codes(c)) != json_automaton.sink]
            text += draws.choice([c for c in allowed if c in '[]{}":,0'] or allowed)
            state = json_automaton.walk(0, json_automaton.codes(text))
        if json_automaton.final[state]:
            json.loads(text)
            whole += 1
    assert whole > 50
    for wrong in ("[01]", "{1: 2}", "[1,]", "[", "{}}", '["a]', "[+1]", "[.5]", "nul", "", "[[[[1]]]]", '["\n"]'):
        assert not json_automaton.accepts(wrong), wrong


VOCABULARY = ("<end>", "a", "b", "ab", "ba", "0", "a0", None, "", "€", "abab", "0\n")


def vocabulary(size: int = len(VOCABULARY)) -> list[str | None]:
    return [None, *VOCABULARY[1:size]]


def test_masks_are_the_single_answers():
    regular = Regular.of("(ab)*0?", vocabulary(), end=0)
    for state in range(len(regular.automaton.table)):
        assert regular.mask(state).tolist() == [regular.allows(state, t) for t in range(len(VOCABULARY))]
    at = regular.step(regular.start(), 3)
    assert [VOCABULARY[t] for t in regular.mask(at).nonzero()[0]] == ["<end>", "a", "ab", "0", "abab"]
    assert not regular.allows(at, 99)  # an entry of the model that the tokenizer does not have


def test_a_text_closes_where_nothing_can_follow():
    regular = Regular.of("a*0", vocabulary(), end=0)
    assert not regular.closed(regular.start())
    assert regular.closed(regular.step(0, 6)) and regular.allows(regular.step(0, 6), 0)
    assert not regular.allows(regular.start(), 0)


def test_predicates_see_all_tokens():
    even = Predicate(lambda text: sum(text) < 7, lambda text: sum(text) % 2 == 0, end=0)
    state = even.step(even.step(even.start(), 3), 2)
    assert state == (3, 2) and even.allows(state, 1) and not even.allows(state, 2) and not even.allows(state, 0)
    assert even.allows(even.step(state, 1), 0) and even.complete((2,)) and not even.closed((2,))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[xyz]", "no text over this vocabulary"), ("a[xyz]|x*y", "no text over this vocabulary"),
        ("(a", "not a regular"),
        ("a(?=b)", "assert"), (r"(a)\1", "groupref"), ("^a", "at"), ("(?i)a", "flags"), ("(?i:a)", "subpattern"),
    ],
)  # fmt: skip
def test_patterns_that_cannot_be_used_are_refused(pattern, message):
    with pytest.raises(PrunelabError, match=message):
        Automaton.of(pattern, ALPHABET)


def test_patterns_that_blow_up_and_json_of_no_depth_are_refused(monkeypatch):
    monkeypatch.setattr(constraints, "STATES", 500)
    with pytest.raises(PrunelabError, match="more than 500 states"):
        Automaton.of("[ab]*a[ab]{12}", ALPHABET)
    monkeypatch.setattr(constraints, "NODES", 5000)
    with pytest.raises(PrunelabError, match="more than 5000 parts"):
        Automaton.of("(a?){100}", ALPHABET)  # few states, of which each is nearly all nodes
    with pytest.raises(PrunelabError, match="at least 1"):
        json_pattern(0)


# -- tokenizers and the task -----------------------------------------------------------------------------------------

TEXT = 'def f(x=None, y=1, z="name", done=True, rest=None):\n    values = [1, 2]\n' * 12


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    from prunelab.common.data.code import MARK, train_tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer([TEXT, "naïve €"], 300), bos_token=MARK, eos_token=MARK
    )


def test_token_texts_are_what_tokens_add(tokenizer):
    texts = token_texts(tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    assert "".join(texts[i] for i in ids if texts[i]) == TEXT
    assert texts[tokenizer.eos_token_id] is None and len(texts) == len(tokenizer)
    parts = [texts[i] for i in tokenizer("😀")["input_ids"]]  # four bytes, none of them a character
    assert all(isinstance(part, bytes) for part in parts) and b"".join(parts).decode() == "😀"


@pytest.mark.parametrize(
    "pattern",
    [r"\w+", r"[^a-z]", r"[а-я]{2}", r"é|€", r".", r"[一-龥]+", r"[😀-😂]", r"\W\d*", r"[\u07fe-\u0802]", r"\D"],
)
def test_characters_are_told_apart_byte_by_byte_as_python_does(pattern):
    automaton, draws = Automaton.of(pattern, [bytes(range(256))]), random.Random(0)
    pool = "aZ0 _\n.éß€😀😂一龥中жЯ७\u0300\u07ff\u0800\u0801\ud7ff\ue000\uffff\U00010000\U0010ffff"
    accepted = 0
    for _ in range(2000):
        text = "".join(draws.choice(pool) for _ in range(draws.choice((1, 1, 2, 3))))
        accepted += automaton.accepts(text)
        assert automaton.accepts(text) == bool(re.fullmatch(pattern, text)), text
    assert accepted
    assert not any(
        automaton.final[automaton.walk(0, automaton.codes(part))] for part in (b"\xff", b"\xc3", b"\xed\xa0\x80")
    )


def test_a_character_is_written_in_parts(tokenizer):
    regular = Regular.of("[€😀]{2}", token_texts(tokenizer), tokenizer.eos_token_id)
    for text in ("€😀", "😀😀"):
        state = regular.start()
        for token in tokenizer(text)["input_ids"]:
            assert not regular.complete(state) and regular.allows(state, token)
            assert regular.mask(state).tolist() == [regular.allows(state, t) for t in range(len(regular.texts))]
            state = regular.step(state, token)
        assert regular.closed(state)
    (first, *_) = tokenizer("中")["input_ids"]
    assert not regular.allows(regular.start(), first)  # begins other characters alone


@pytest.mark.parametrize("sampler", [AWRS(), LocallyConstrained(proper=True)], ids=lambda s: s.name)
@torch.inference_mode()
def test_texts_written_in_parts_of_characters_weigh_what_the_model_gives_them(tokenizer, sampler):
    """Every way to write them by tokens counts, those that end within a character among them."""
    regular = Regular.of("[€ï]", token_texts(tokenizer), tokenizer.eos_token_id)
    behind = constrained.Prompt(references.language_model(vocab_size=320, eos_token_id=0, bos_token_id=0), [5, 9])
    wanted: dict[tuple[int, ...], float] = {}

    def follow(state, tokens, mass):
        if regular.closed(state):
            wanted[tokens] = mass
            return
        rows = behind.start(1)
        for token in tokens:
            rows = behind.feed(torch.tensor([0]), torch.tensor([token]))
        chances = rows[0].double().softmax(-1)
        for token in regular.mask(state).nonzero()[0].tolist():
            follow(regular.step(state, token), (*tokens, token), mass * float(chances[token]))

    follow(regular.start(), (), 1.0)
    assert {regular.written(tokens) for tokens in wanted} == {"€", "ï"} and max(map(len, wanted)) > 1
    found, rng = [], torch.Generator().manual_seed(0)
    for _ in range(40):
        got = smc.run(sampler, behind, regular, Budget(1.0), 4, 0.5, 6, rng)
        assert all(got.complete) and set(got.tokens) <= wanted.keys()
        found.append(math.exp(got.log_z))
    error = statistics.stdev(found) / math.sqrt(len(found))
    assert abs(statistics.mean(found) - sum(wanted.values())) < 4 * error


def test_token_texts_of_bytes_and_of_parts_of_words():
    """`<0xE2>` of SentencePiece is a byte, `##b` of WordPiece goes on with a word."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a", "é", "▁é"]
    pairs = [("▁", "a"), ("▁", "é")]
    inner = Tokenizer(
        models.BPE({t: i for i, t in enumerate(known)}, pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallen = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    texts = token_texts(fallen)
    ids = fallen("a é😀", add_special_tokens=False)["input_ids"]
    assert [texts[i] for i in ids] == [" a", " é", b"\xf0", b"\x9f", b"\x98", b"\x80"]
    assert texts[known.index("<0x41>")] == "A" and texts[1] is None
    parts = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "é": 3}, unk_token="[UNK]"))
    parts.decoder, parts.pre_tokenizer = decoders.WordPiece(), pre_tokenizers.Whitespace()
    pieces = PreTrainedTokenizerFast(tokenizer_object=parts, unk_token="[UNK]")
    assert token_texts(pieces) == [None, " a", "b", " é"]


def test_token_texts_keep_leading_blanks_of_metaspace_tokenizers():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "▁a": 2, "▁the": 3, "b": 4}, unk_token="<s>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert token_texts(PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>"))[1:] == ["a", " a", " the", "b"]
    del inner
    bare = Tokenizer(models.WordLevel({"<s>": 0, "b": 1}, unk_token="<s>"))
    with pytest.raises(PrunelabError, match="letter a"):
        token_texts(PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<s>"))


@pytest.fixture
def model(tokenizer, monkeypatch):
    model = references.language_model(vocab_size=320, max_position_embeddings=96, eos_token_id=0, bos_token_id=0)
    monkeypatch.setattr(constrained.loading, "language", lambda identity, config: (model, tokenizer))
    monkeypatch.setattr(constrained.texts, "load", lambda identity, config: (TEXT,))
    return model


SETTINGS = {"after": "=", "pattern": r'(True|None|[0-9]|"[a-z]+"),', "samples": 6, "context": 24, "max_tokens": 20}


def run(method=None, options=None, **changes):
    settings = {**SETTINGS, **changes}
    return Run("constrained", "testbed", method, options or {}, None, settings, ids={"model": {}, "data": {}})


def test_the_task_compares_samplers(model):
    masked = runner.measure(run("locally_constrained"), {})
    assert masked["calls"]["value"] == masked["masking_calls"]["value"] == 320
    assert masked["saving"]["value"] == 0 and "log_z" not in masked
    adaptive = runner.measure(run("awrs", {"estimator": "adaptive"}), {})
    assert adaptive["calls"]["value"] < 200 and adaptive["log_z"]["value"] < 0
    for found in (masked, adaptive):
        assert found["alive"]["value"] == 100 and 0 < found["valid"]["value"] <= 100
        assert found["accuracy"]["n"] == 6 and found["accuracy"]["value"] <= found["valid"]["value"]
    plain = runner.measure(run(), {})
    assert plain["calls"]["value"] == 1 and plain["valid"]["value"] < adaptive["valid"]["value"]
    assert runner.measure(run("awrs", {"estimator": "adaptive"}), {}) == adaptive


def test_the_task_writes_json(model):
    found = runner.measure(run("awrs", after=" =", pattern=" ", json=1, samples=3, max_tokens=40), {})
    assert found["alive"]["value"] == 100


def test_places_are_real_ones_spread_evenly():
    found = constrained.places([TEXT], "=", SETTINGS["pattern"], 48)
    assert len(found) == 48 and [a for _, a in found[:4]] == ["None,", "1,", '"name",', "True,"]
    assert all(TEXT.startswith(prompt + answer) for prompt, answer in found)
    assert constrained.places([TEXT], "=", SETTINGS["pattern"], 2) == [found[0], found[24]]
    with pytest.raises(PrunelabError, match="48 places"):
        constrained.places([TEXT], "=", SETTINGS["pattern"], 49)


def test_a_prompt_feeds_what_the_model_would_read(model):
    prompt = constrained.Prompt(model, [5, 6, 7])
    with torch.inference_mode():
        first = prompt.start(3)
        prompt.feed(torch.tensor([0, 1, 2]), torch.tensor([8, 9, 10]))
        got = prompt.feed(torch.tensor([2, 0, 0]), torch.tensor([11, 12, 13]))
        whole = [[5, 6, 7, 10, 11], [5, 6, 7, 8, 12], [5, 6, 7, 8, 13]]
        assert torch.allclose(got, model(torch.tensor(whole)).logits[:, -1], atol=1e-4)
        assert torch.allclose(first[0], model(torch.tensor([[5, 6, 7]])).logits[0, -1], atol=1e-4)


def test_prompts_that_do_not_fit_are_refused(model):
    with pytest.raises(PrunelabError, match="prompt is empty"):
        constrained.Prompt(model, [])
    with pytest.raises(PrunelabError, match="context of 96"):
        runner.measure(run("awrs", context=95, max_tokens=60), {})
    with pytest.raises(PrunelabError, match="wanda is a weight_pruner"):
        runner.measure(run("wanda"), {})


def test_weight_and_spread():
    from prunelab.common.constrained.smc import Particles

    got = Particles(((1,), (2,), (3,)), torch.tensor([0.0, math.log(3), -math.inf]), (True, True, False), 9, 3)
    assert constrained.weight(got, [False, True, True]) == pytest.approx(75)
    assert got.log_z == pytest.approx(math.log(4 / 3))
    assert constrained.spread(got.log_weights) == pytest.approx(math.log(3) / math.sqrt(2))
    dead = Particles(((1,),), torch.tensor([-math.inf]), (False,), 9, 3)
    assert constrained.weight(dead, [True]) == 0 and constrained.spread(dead.log_weights) is None


def test_a_model_without_enough_entries_is_refused(model, tokenizer, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()
    monkeypatch.setattr(constrained.loading, "language", lambda identity, config: (small, tokenizer))
    with pytest.raises(PrunelabError, match="40 entries"):
        runner.measure(run("awrs"), {})
