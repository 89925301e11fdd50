"""Python source as training text: its split, its tokenizer, and the sequences that ask for what was defined."""

from __future__ import annotations

import math

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import code

SAMPLE = 40  # files that the tests' tokenizer is trained on


@pytest.fixture(scope="module")
def tokenizer():
    return code.train_tokenizer(code.files("train")[:SAMPLE], 2048)


@pytest.fixture(scope="module")
def stream(tokenizer):
    return code.encode(code.files("held_out")[:4], tokenizer)


@pytest.fixture(scope="module")
def recalls(tokenizer):
    return code.Recalls.of(tokenizer)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_splits_share_no_file_and_held_out_is_a_twentieth():
    train, held_out = code.files("train"), code.files("held_out")
    assert not set(train) & set(held_out)
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07
    with pytest.raises(PrunelabError, match="train or held_out"):
        code.files("test")  # type: ignore[arg-type]


def test_tokenizer_is_deterministic_and_loses_nothing(tokenizer):
    again = code.train_tokenizer(code.files("train")[:SAMPLE], 2048)
    assert again.to_str() == tokenizer.to_str()
    text = "def f(x):\n\n\treturn x ** 2  # größer: 3.14\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(code.MARK) == 0
    with pytest.raises(PrunelabError, match="more than 256"):
        code.train_tokenizer(["x"], 256)


def test_a_mark_stands_before_every_file(tokenizer, stream):
    assert int((stream == 0).sum()) == 4 and stream[0] == 0
    first = stream[1 : int((stream == 0).nonzero()[1])]
    assert tokenizer.decode(first.tolist()) == code.files("held_out")[0]


def test_windows_lie_in_the_stream_and_cover_it():
    found = code.windows(torch.arange(100, dtype=torch.int32), 4, 10)
    assert found[:, 0].tolist() == [0, 30, 60, 90] and found.dtype == torch.int64
    assert torch.equal(found, found[:, :1] + torch.arange(10))
    with pytest.raises(PrunelabError, match="shorten the length"):
        code.windows(torch.arange(9), 1, 10)


def test_recall_asks_for_what_it_defined(recalls, stream):
    pairs, length = 4, 200
    found = recalls.draw(stream, 16, length, pairs, draws())
    assert found.tokens.shape == (16, length) and len(found.answers) == pairs
    size = len(recalls.line)
    for row in found.tokens:
        rows = row.unfold(0, size, 1)
        fixed = [i for i in range(size) if i not in (recalls.key, recalls.value)]
        lines = rows[(rows[:, fixed] == recalls.line[fixed]).all(1)]
        told = {int(line[recalls.key]): int(line[recalls.value]) for line in lines[:-pairs]}
        asked = {int(line[recalls.key]): int(line[recalls.value]) for line in lines[-pairs:]}
        assert len(lines) == 2 * pairs and told == asked and len(told) == pairs
        assert sorted(row[found.answers].tolist()) == sorted(asked.values())
        assert torch.equal(row[found.start :].view(pairs, size), lines[-pairs:])


def test_recall_keeps_the_code_around_it(recalls, stream):
    found = recalls.draw(stream, 1, 300, 3, draws(1)).tokens[0]
    plain = code.windows(stream, 1, 300 - 6 * len(recalls.line), draws(1))[0]
    rest = iter(found.tolist())
    assert all(token in rest for token in plain.tolist())  # in order, with lines in between


def test_recall_refuses_what_does_not_fit(recalls, stream):
    with pytest.raises(PrunelabError, match="at least"):
        recalls.draw(stream, 1, recalls.shortest(4) - 1, 4, draws())
    assert recalls.draw(stream, 1, recalls.shortest(4), 4, draws()).tokens.shape[1] == recalls.shortest(4)
    with pytest.raises(PrunelabError, match="fewer"):
        recalls.draw(stream, 1, 10**5, 10**4, draws())


def test_repeats_are_told_by_their_beginning():
    among = torch.arange(500, 900)
    tokens, known = code.repeats(among, 32, 40, draws())
    assert bool(torch.isin(tokens, among).all())
    for row, told in zip(tokens, known, strict=True):
        period = 40 - int(told.sum()) - 1
        assert 10 <= period < 20 and torch.equal(row[period:], row[: 40 - period])


def test_count_models_against_hand_counts():
    train = torch.tensor([0, 1, 0, 1, 0, 2])  # unigrams with one added: 4, 3, 2 of 9
    found = code.count_models(train, torch.tensor([[0, 1, 0]]), 3)
    assert found["unigram_perplexity"] == pytest.approx(math.exp(-(math.log(3 / 9) + math.log(4 / 9)) / 2))
    # behind 0: 1 twice, 2 once, two kinds; behind 1: 0 twice, one kind
    after_zero, after_one = (2 + 2 * 3 / 9) / (3 + 2), (2 + 1 * 4 / 9) / (2 + 1)
    assert found["bigram_perplexity"] == pytest.approx(math.exp(-(math.log(after_zero) + math.log(after_one)) / 2))
