"""The index of methods, read from source text, says what importing them says."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import pytest

from prunelab.common.core import index, registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method


@pytest.mark.parametrize("name", index.entries())
def test_an_entry_says_what_the_class_says(name):
    entry, cls = index.entries()[name], registry.get(name)
    assert issubclass(cls, Method) and not inspect.isabstract(cls)
    assert (entry.name, entry.role, entry.slug) == (cls.name, cls.role, registry.slug(cls))
    assert entry.doc == inspect.cleandoc(cls.__doc__ or "")
    wanted = [(f.name, None if f.default is MISSING else repr(f.default)) for f in fields(cls)]
    assert [(option.name, option.default) for option in entry.options] == wanted


def test_no_method_is_missed():
    for slug in {entry.slug for entry in index.entries().values()}:
        import importlib

        module = importlib.import_module(f"prunelab.methods.{slug}.method")
        own = {cls.name for cls in registry.defined(module, Method) if "name" in vars(cls)}
        assert own == {entry.name for entry in index.entries().values() if entry.slug == slug}


SOURCE = '''
"""A method written in other ways."""
import dataclasses
import typing as t
from typing import ClassVar
from prunelab.common.ranking import sentences
from prunelab.common.core.plan import Site as Where
if t.TYPE_CHECKING:
    from nowhere import Nothing

NAME, LAYERS = "unused", 3
FIRST = "first"
AMOUNT: float = 0.25

class Helper:
    name = "helper of no role"

@dataclasses.dataclass(frozen=True, kw_only=True)
class First(sentences.FeatureRanker, t.Generic[t.T]):
    """Doc.

    More.
    """
    name: "ClassVar[str]" = FIRST
    share: float = AMOUNT
    weight: 'float' = 2.0
    items: tuple[int, ...] = dataclasses.field(default=(1, 2))
    more: list = dataclasses.field(default_factory=list)
    needed: int

class Second(First):
    name = \\
        "second"
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A methods folder with one file; the rest of the project is where it is."""
    monkeypatch.setattr(index, "METHODS", tmp_path)
    index.entries.cache_clear()
    (tmp_path / "other").mkdir()
    yield tmp_path / "other" / "method.py"
    index.entries.cache_clear()


def test_any_way_of_writing_is_read(folder):
    folder.write_text(SOURCE)
    first, second = index.entries()["first"], index.entries()["second"]
    assert list(index.entries()) == ["first", "second"]
    assert (first.role, first.doc, first.slug) == ("ranker", "Doc.\n\nMore.", "other")
    assert [option.name for option in first.options][:2] == ["weight", "position"]
    defaults = {option.name: option.default for option in first.options}
    assert defaults["weight"] == "2.0" and defaults["share"] == "0.25" and defaults["items"] == "(1, 2)"
    assert defaults["more"] == "list()" and defaults["needed"] is None and "name" not in defaults
    assert second.options == first.options and second.doc == first.doc and second.class_name == "Second"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class A(:\n", "line 1 is not valid Python"),
        (SOURCE.replace('name: "ClassVar[str]" = FIRST', "name = 'fir' + 'st'"), "must be a literal string"),
        (SOURCE.replace('"second"', '"first"'), "two methods are named 'first'"),
    ],
)
def test_mistakes_name_the_file(folder, text, message):
    folder.write_text(text)
    with pytest.raises(PrunelabError, match=message) as error:
        index.entries()
    assert "\n" not in str(error.value)


OPTIONS = [
    ("zero_tprune", {"layers": 3}, {"layers": (3,)}),
    ("zero_tprune", {"layers": [2, 5]}, {"layers": (2, 5)}),
    ("zero_tprune", {"layers": "2,5"}, {"layers": (2, 5)}),
    ("zero_tprune", {"iterations": None}, {"iterations": None}),
    ("zero_tprune", {"variance_range": "none"}, {"variance_range": None}),
    ("token_recycling", {"tree": [[0], [0, 1]]}, {"tree": ((0,), (0, 1))}),
    ("lexrank", {"epsilon": "1e-6"}, {"epsilon": 1e-6}),
    ("lexrank", {"threshold": 0}, {"threshold": 0}),
]


@pytest.mark.parametrize(("name", "given", "read"), OPTIONS, ids=str)
def test_options_are_read_by_the_type_of_the_field(name, given, read):
    method = registry.create(name, **given)
    assert {key: getattr(method, key) for key in read} == read


WRONG = [
    ("fastv", {"layer": "x"}, "fastv: layer must be a whole number of at least 0, not 'x'"),
    ("fastv", {"layer": True}, "layer must be a whole number"),
    ("fastv", {"layer": 2.5}, "layer must be a whole number"),
    ("zero_tprune", {"layers": "a"}, "layers must be whole numbers such as 2,5"),
    ("zero_tprune", {"variance_range": [0.1]}, "2 values, each a number of at least 0 or none"),
    ("divprune", {"distance": "l3"}, "one of cosine, l1, l2"),
    ("token_recycling", {"tree": 3}, "a list, each whole numbers"),
    ("holitom", {"layer": "x"}, "a whole number of at least 0 or none"),
    ("fastv", {"layers": 3}, "did you mean layer"),
]


@pytest.mark.parametrize(("name", "given", "message"), WRONG, ids=lambda v: str(v)[:30])
def test_options_of_another_type_are_one_line(name, given, message):
    with pytest.raises(PrunelabError) as error:
        registry.create(name, **given)
    assert message in str(error.value) and "\n" not in str(error.value)
