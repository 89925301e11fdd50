"""Words, sentences, idf and similarity."""

from __future__ import annotations

import math
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prunelab
from prunelab.common.core.errors import PrunelabError
from prunelab.common.ranking import text
from prunelab.common.ranking.text import Background, Similarity, threshold_graph

corpora = st.lists(st.lists(st.sampled_from(list("abcdef")), max_size=8), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Don't re-use 3.5 cars, Zoë!", ["don't", "re-use", "3.5", "cars", "zoë"]),
        ("U.S. -- 40,000 (x_y)", ["u", "s", "40,000", "x", "y"]),
        ("  ...  ", []),
    ],
)
def test_words(sentence: str, expected: list[str]) -> None:
    assert text.words(sentence) == expected


@pytest.mark.parametrize(
    "expected",
    [
        ["Dr. Smith met J. R. Ewing at 3.30 p.m. yesterday.", "It rained."],
        ["See Fig. 3, i.e. the left one, e.g. Tom's.", "“Well?”", "She left... and came back!", "(Yes.)", "So"],
        ["The U.S. Army moved.", "He lives in the U.S.", "The end."],
        ["Version 2.0 is out.", "2024 was good."],
    ],
)
def test_sentences(expected: list[str]) -> None:
    assert text.sentences("\n".join(expected)) == expected


def test_blank_line_ends_a_sentence() -> None:
    assert text.sentences("A heading\n\nand  a\nline") == ["A heading", "and a line"]
    assert text.sentences(" \n ") == []


@given(st.text(max_size=200))
def test_sentences_lose_nothing(raw: str) -> None:
    assert "".join("".join(text.sentences(raw)).split()) == "".join(raw.split())


def test_idf() -> None:
    corpus = Background.from_texts(["the cat", "the dog the dog", "", "the bird"])
    np.testing.assert_allclose(corpus.idf(["the", "dog", "fish"]), [0, math.log(3), math.log(3)])
    assert corpus.idf(["fish"], unseen=1.0)[0] == 1
    with pytest.raises(PrunelabError, match="at least one document"):
        Background.of([[]])


def cosine(x: list[str], y: list[str], idf: dict[str, float]) -> float:
    """The paper's formula, word by word."""
    a, b = Counter(x), Counter(y)
    norms = [math.sqrt(sum((n * idf[w]) ** 2 for w, n in c.items())) for c in (a, b)]
    return sum(a[w] * b[w] * idf[w] ** 2 for w in a) / math.prod(norms) if all(norms) else 0.0


@given(corpora, st.floats(0, 0.95))
def test_operator_graph_and_formula_agree(corpus: list[list[str]], threshold: float) -> None:
    counts, vocabulary = text.term_counts(corpus)
    idf = Background.of([*corpus, ["x"]]).idf(vocabulary)
    similarity = Similarity.of(counts, idf)
    dense = similarity.dense()
    table = dict(zip(vocabulary, idf.tolist(), strict=True))
    expected = [[1.0 if i == j else cosine(x, y, table) for j, y in enumerate(corpus)] for i, x in enumerate(corpus)]
    np.testing.assert_allclose(dense, expected, atol=1e-12)
    assert (dense.diagonal() == 1).all()
    v = np.linspace(-1, 2, len(corpus))
    np.testing.assert_allclose(similarity @ v, dense @ v, atol=1e-12)
    np.testing.assert_allclose(similarity.cosines(0, list(range(len(corpus)))), dense[0], atol=1e-12)
    if (abs(dense - threshold) > 1e-9).all():
        assert (similarity.graph(threshold).toarray() == threshold_graph(dense, threshold).toarray()).all()


def test_blocks_and_single_precision_give_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    corpus = [[f"w{int(w)}" for w in rng.zipf(1.6, 12).clip(max=400)] for _ in range(300)]
    counts, vocabulary = text.term_counts(corpus)
    similarity = Similarity.of(counts, Background.of(corpus).idf(vocabulary))
    expected = threshold_graph(similarity.dense(), 0.1).toarray()
    assert 300 < expected.sum() < 300**2
    for block in (2**25, 7 * 300):
        monkeypatch.setattr(text, "_BLOCK", block)
        graph = similarity.graph(0.1)
        assert (graph.toarray() == expected).all()
        assert set(graph.data.tolist()) == {1}


def test_empty_sentences_are_linked_to_themselves_alone() -> None:
    counts, vocabulary = text.term_counts([[], ["the"], ["the"], ["a", "the"]])
    idf = np.array([0.0, 1.0])
    assert vocabulary == ["the", "a"]
    np.testing.assert_array_equal(Similarity.of(counts, idf).dense(), np.eye(4))
    np.testing.assert_array_equal(Similarity.of(counts, idf, self_links=False).dense(), np.diag([0, 0, 0, 1]))


def test_graph_is_strict() -> None:
    counts, _ = text.term_counts([["a"], ["b"], ["a", "b"]])
    assert Similarity.of(counts, np.ones(2)).graph(0.0).toarray().tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 1]]


def test_threshold_is_strict_in_the_matrix_own_precision() -> None:
    printed = np.array([[1, 0.2], [0.2, 1]], np.float32)
    assert threshold_graph(printed, 0.2).nnz == 2
    assert threshold_graph(printed, 0.19).nnz == 4


# -- other scripts, other encodings, long texts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (unicodedata.normalize("NFD", "für Bücher, Ångström"), ["für", "bücher", "ångström"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("می\u200cخواهم بروم", ["می\u200cخواهم", "بروم"]),
        ("exam\u00adple", ["example"]),
        ("今天 Tokyo 2.5", ["今", "天", "tokyo", "2.5"]),
        ("ひらがな カタカナ 한국어", ["ひ", "ら", "が", "な", "カタカナ", "한국어"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("İstanbul'da", ["i̇stanbul'da"]),
    ],
)
def test_words_of_other_scripts(sentence: str, expected: list[str]) -> None:
    assert text.words(sentence) == expected


@pytest.mark.parametrize(
    "expected",
    [
        ["今天天气很好。", "我们去公园散步！", "当然想。"],
        ["彼は言った。", "「はい。」", "終わり"],
        ["Did he go?", "No.", "He stayed."],
        ["See No. 5.", "Am 31. August ging sie.", "Es war 1998.", "Der 3. Mai."],
        ["See Smith et al. (2004).", "So say Ross et al.", "The end."],
        ["यह है।", "वह गया।"],
        ["هل ذهب؟", "نعم."],
        ["བཀྲ་ཤིས།", "བདེ་ལེགས།"],
        ["សួស្តី។", "លាហើយ។"],
        ["We met on Jan. 3.", "It rained.", "In Dec. 2004 it did not.", "So it was in Jan.", "Then it stopped."],
    ],
)
def test_sentences_of_other_scripts_and_with_numbers(expected: list[str]) -> None:
    assert text.sentences(" ".join(expected)) == expected
    assert text.sentences("".join(expected)) == expected or not set("。！") & set(expected[0])


def test_a_byte_order_mark_is_no_letter() -> None:
    assert text.sentences("\ufeffHello there. Bye.") == ["Hello there.", "Bye."]


@pytest.mark.parametrize("wrong", [b"One. Two.", None, 3, {"a": "One."}, ["One.", 2], [b"One."]], ids=repr)
def test_what_is_no_text_is_refused_in_a_line(wrong: object) -> None:
    with pytest.raises(PrunelabError, match=r"give a string|give strings") as error:
        prunelab.summarise("lead", wrong, 1.0)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_budget_counts_letters_where_there_are_no_blanks() -> None:
    assert [text.length(s) for s in ("two words", "a - b", "今天很好。", "今天 very good。")] == [2, 3, 4, 4]


@pytest.mark.parametrize("piece", ["Mr. ", ".", ". ", "a.", "(. ", "He went. ", "\n ", "1.", "a-", "。", "é. "])
def test_time_grows_with_the_text_and_not_with_its_square(piece: str) -> None:
    def seconds(copies: int) -> float:
        raw, best = piece * copies + "x", math.inf
        for _ in range(3):
            start = time.process_time()
            text.sentences(raw)
            text.words(raw)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(80_000) < 40 * seconds(8_000) + 0.05  # ten times as long; a hundred times where it squares
