"""Document sets: the built-in API documentation, the assets' samples, and licensed DUC folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import documents
from prunelab.common.measures import summarise
from prunelab.common.ranking.sentences import SentenceRanker
from prunelab.common.ranking.text import words
from prunelab.methods.lexrank.method import LexRank
from prunelab.methods.mead.method import Lead, RandomSentences

DOCSTRING = """Compute the ``mean`` of all :func:`~package.entry` values.

It weighs `each` value *alike*, see [1]_. Values of Inf. are kept.

- a list entry that must go

.. versionadded:: 1.0
   With this text.

Code follows the colon::

    x = 1

Parameters
----------
a : array_like
    The values that are to be averaged.
    They may be of any kind.

See Also
--------
median : The value in the middle of all.

Notes
-----
The sum runs in double precision here.

>>> mean([1, 2])
"""


def test_docstrings_are_reduced_to_running_text() -> None:
    summary, prose = documents.describe(DOCSTRING)
    assert summary == "Compute the mean of all package.entry values."
    assert prose == (
        "It weighs each value alike, see.",
        "Values of Inf. are kept.",
        "The values that are to be averaged.",
        "They may be of any kind.",
        "The sum runs in double precision here.",
    )


@pytest.fixture(scope="module")
def testbed() -> tuple[documents.Document, ...]:
    return documents.api_docs(150)


def test_testbed_entries_are_long_distinct_and_repeatable(testbed: tuple[documents.Document, ...]) -> None:
    assert len(testbed) == 150 == len({d.references for d in testbed})
    assert [d.id for d in testbed] == sorted(d.id for d in testbed)
    for document in testbed:
        assert len(document.documents[0]) >= 8 and len(words(document.references[0])) >= 6
        assert not any(mark in s for s in document.documents[0] for mark in ("``", ">>>", ".. ", "http://<"))
    documents.api_docs.cache_clear()
    assert documents.api_docs(150) == testbed
    plain = documents.api_docs(150, shuffled=False)
    assert [sorted(d.documents[0]) for d in plain] == [sorted(d.documents[0]) for d in testbed] and plain != testbed


def test_summaries_of_the_testbed_are_scored(testbed: tuple[documents.Document, ...]) -> None:
    found = {}
    for method in (LexRank(), RandomSentences()):
        name = method.name
        found[name] = summarise.run(method, testbed, Budget(150, "bytes"))
        assert found[name] == summarise.run(method, testbed, Budget(150, "bytes"))
    metric = found["lexrank"]["rouge1_recall"]
    assert metric["n"] == 150 == len(metric["samples"])
    assert metric["value"] == pytest.approx(sum(metric["samples"]) / 150, abs=1e-3)
    assert metric["value"] > found["random_sentences"]["rouge1_recall"]["value"] + 2
    with pytest.raises(PrunelabError, match="no document"):
        summarise.run(Lead(), [], Budget(1, "count"))


@pytest.fixture
def duc_folder(tmp_path: Path) -> Path:
    for name, story in (("APW1", "<P>\nThe dam broke. Rain fell &amp; fell.\n</P>"), ("APW2", "The dam was old.")):
        path = tmp_path / "docs" / "d30001t" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<DOC><HEADLINE>No</HEADLINE>\n<TEXT>\n{story}\n</TEXT></DOC>")
    (tmp_path / "eval" / "models" / "1").mkdir(parents=True)
    for writer in "BA":
        (tmp_path / "eval" / "models" / "1" / f"D30001.M.100.T.{writer}").write_text(f"A dam broke,\nsaid {writer}.\n")
    return tmp_path


def test_duc_folder(duc_folder: Path) -> None:
    (cluster,) = documents.duc(duc_folder)
    assert cluster.documents == (("The dam broke.", "Rain fell & fell."), ("The dam was old.",))
    assert cluster.references == ("A dam broke, said A.", "A dam broke, said B.")


def test_duc_folder_that_lacks_parts(duc_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PrunelabError, match="no DUC folder"):
        documents.duc(tmp_path / "nowhere")
    (duc_folder / "docs" / "d30002t").mkdir()
    with pytest.raises(PrunelabError, match=r"D30002\.M\.100\.T\.A"):
        documents.duc(duc_folder)


def test_missing_assets(tmp_path: Path) -> None:
    for loader in (documents.opinosis, documents.bbc, documents.cnndm):
        with pytest.raises(PrunelabError, match="lacks") as error:
            loader(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not os.environ.get("PRUNELAB_ASSETS"), reason="needs PRUNELAB_ASSETS, a folder of small data sets")
def test_assets() -> None:
    assets = Path(os.environ["PRUNELAB_ASSETS"])
    opinosis, bbc, cnndm = documents.opinosis(assets), documents.bbc(assets), documents.cnndm(assets)
    assert (len(opinosis), len(bbc), len(cnndm)) == (51, 112, 6)
    assert {len(d.references) for d in opinosis} <= {3, 4, 5}
    methods: list[SentenceRanker] = [LexRank(centrality="continuous"), Lead()]
    scores = [summarise.run(m, bbc, Budget(0.4))["rouge1_f"]["value"] for m in methods]
    assert scores[0] > scores[1] + 5
