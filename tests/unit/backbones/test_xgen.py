"""XGen's tokenizer against the algorithm it is defined by: of all neighbours whose text is a token, those merge first
whose token has the smallest number."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunelab.common.backbones import xgen
from prunelab.common.core.errors import PrunelabError

MERGES = [("Ġ", "Ġ"), ("Ġ", "a"), ("a", "b"), ("ĠĠ", "ĠĠ"), ("Ġa", "b"), ("ĉ", "ĉ"), ("ĠĠĠĠ", "ĠĠĠĠ"),
          ("ĠĠĠĠĠĠĠĠ", "ĠĠĠĠĠĠĠĠ"), ("ĠĠĠĠĠĠĠĠĠĠĠĠĠĠĠĠ", "ĠĠĠĠĠĠĠĠĠĠĠĠĠĠĠĠ")]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2():
    """A small GPT-2 tokenizer, whose numbers follow the order of its merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *("".join(pair) for pair in MERGES), xgen.END]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=xgen.END)


def merged(piece: str, vocabulary: dict[str, int]) -> list[int]:
    if piece in vocabulary:
        return [vocabulary[piece]]
    parts = list(piece)
    while True:
        ranks = [(vocabulary.get(a + b, 10**9), i) for i, (a, b) in enumerate(pairwise(parts))]
        if not ranks or min(ranks)[0] == 10**9:
            return [vocabulary[part] for part in parts]
        at = min(ranks)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_texts_are_cut_as_the_algorithm_cuts_them(gpt2):
    made = xgen.tokenizer(gpt2)
    vocabulary = made.get_vocab()
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    chance = random.Random(0)
    texts = [" " * n + end for n in (1, 2, 3, 8, 16, 31, 32, 33, 40, 64, 70) for end in ("", "ab", "\n")]
    texts += ["".join(chance.choices([" ", "\t", "a", "b", "\n"], [8, 4, 2, 2, 1], k=60)) for _ in range(50)]
    for text in texts:
        wanted = [i for piece, _ in split.pre_tokenize_str(text) for i in merged(piece, vocabulary)]
        assert made(text)["input_ids"] == wanted, repr(text)
        assert made.decode(wanted, clean_up_tokenization_spaces=False) == text


def test_runs_come_behind_all_that_was_there(gpt2):
    made = xgen.tokenizer(gpt2)
    first = 256 + len(MERGES) + 1
    assert made(" " * 31)["input_ids"] == [first] and made(" " * 2)["input_ids"] == [first + 29]
    assert made("\t" * 9)["input_ids"] == [first + 30] and made("\t" * 2)["input_ids"] == [first + 37]
    assert made.eos_token == xgen.END


def test_other_tokenizers_are_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?")))
    with pytest.raises(PrunelabError, match="merges no pairs"):
        xgen.tokenizer(words)
