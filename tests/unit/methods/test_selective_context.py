"""Selective Context: units take the information of their pieces, the least of it goes, and bad input is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.selective_context.method import (
    Context,
    SelectiveContext,
    noun_chunks,
    self_information,
    sentences,
    threshold,
    unit_information,
)
from tests.unit.speculative.test_decoding import model_of

TEXT = "Dr. Who  sat on the mat. It was old!\nDid he see e.g. it? He did."


def split(text: str, sizes: list[int]) -> list[str]:
    """The text in pieces of these sizes, as long as it lasts."""
    parts = []
    for size in sizes * len(text):
        if not text:
            return parts
        parts.append(text[:size])
        text = text[size:]
    return parts


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab ", min_size=1, max_size=30),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_pieces_are_laid_beside_units(text, small, large, draws):
    pieces, units = split(text, small), split(text, large)
    values = [draws.uniform(0, 9) for _ in pieces]
    shares: list[list[float]] = [[] for _ in units]
    stops = np.cumsum([len(unit) for unit in units]).tolist()
    place = 0
    for piece, value in zip(pieces, values, strict=True):
        ended = [u for u, stop in enumerate(stops) if place < stop <= place + len(piece)]
        for unit in ended:
            shares[unit].append(value / len(ended))
        if not ended and piece != " ":
            shares[next(u for u, stop in enumerate(stops) if stop > place)].append(value)
        place += len(piece)
    wanted = [np.mean(share) if share else np.nan for share in shares]
    np.testing.assert_allclose(unit_information(pieces, values, units), wanted)


def test_sentences_end_at_full_stops_and_question_marks():
    assert sentences(TEXT) == ["Dr. Who sat on the mat.", "It was old! Did he see e.g. it?", "He did."]
    assert sentences("  \n ") == []


def services(values: dict[str, float]) -> dict[str, Any]:
    """Words as pieces and as phrases, each with the blank before it."""

    def words(sentence: str) -> list[str]:
        first, *others = sentence.split()
        return [first, *(f" {word}" for word in others)]

    def information(sentence: str) -> tuple[list[str], list[float]]:
        return words(sentence), [values.get(word.strip(), 5.0) for word in words(sentence)]

    return {"information": information, "phrases": words}


def test_the_least_informative_units_go():
    known = services({"the": 0.1, "It": 0.2, "was": 0.3, "on": 1.0})
    text = "He sat on the mat. It was old."
    assert SelectiveContext().compress(text, Budget(5, "count"), known) == "He sat on mat. old."
    assert SelectiveContext("token").compress(text, Budget(1.0), known) == "He sat on the mat.It was old."
    assert SelectiveContext().compress(text, Budget(1.0), known) == text
    assert SelectiveContext("sentence").compress(text, Budget(0.5), known) == "He sat on the mat. "


def test_ties_and_units_without_pieces_stay():
    context = Context(("a", "b", "c", "d"), np.array([1.0, np.nan, 2.0, 2.0]))
    method = SelectiveContext("token")
    ranking = method.ranking(context)
    assert ranking.scores.tolist() == [1.0, 2.0, 2.0, 2.0]
    assert method.take(context, ranking, Budget(0.0)) == [1, 2, 3]
    assert method.take(context, ranking, Budget(1.0)) == [0, 1, 2, 3]
    assert threshold(context, Budget(0.5)) == 2.0


class Letters:
    """A tokenizer of single characters."""

    bos_token_id, eos_token_id = None, 60

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 for letter in text]}

    def decode(self, tokens: list[int]) -> str:
        return chr(tokens[0])


def test_self_information_is_the_models():
    model = model_of()
    pieces, values = self_information(model, Letters())("abc")
    ids = torch.tensor([[60, *(ord(letter) % 60 for letter in "abc")]])
    with torch.inference_mode():
        chances = model(ids).logits[0].softmax(-1)
    assert len(pieces) == 3
    np.testing.assert_allclose(values, [-float(chances[i, ids[0, i + 1]].log()) for i in range(3)], rtol=1e-5)
    with pytest.raises(PrunelabError, match="201 tokens and the model a context of 128"):
        self_information(model, Letters())("x" * 200)
    mute = Letters()
    mute.eos_token_id = None
    with pytest.raises(PrunelabError, match="neither a start nor an end token"):
        self_information(model, mute)


def test_phrases_of_a_pipeline_carry_the_blank_before_them():
    @dataclass
    class Word:
        text: str
        whitespace_: str

    def pipeline(sentence: str) -> list[Word]:
        return [Word("The mat", " "), Word("lay", ""), Word(",", " "), Word("still", "")]

    assert noun_chunks(pipeline)("The mat lay, still") == ["The mat", " lay", ",", " still"]


@pytest.mark.parametrize(
    ("level", "text", "given", "said"),
    [
        ("word", TEXT, ("information",), "level must be one of phrase, sentence, token"),
        ("phrase", TEXT, ("information",), "needs the service 'phrases' to rank a phrase"),
        ("token", TEXT, (), "needs the service 'information' to rank a token"),
        ("token", "  ", ("information",), "no sentence to shorten"),
    ],
)
def test_what_is_missing_is_told(level, text, given, said):
    every = services({})
    with pytest.raises(PrunelabError, match=said):
        SelectiveContext(level).compress(text, Budget(0.5), {name: every[name] for name in given})


def test_a_token_that_cannot_be_is_refused():
    with pytest.raises(PrunelabError, match="NaN or infinite"):
        SelectiveContext("token").compress("He sat.", Budget(0.5), services({"sat.": float("inf")}))
