"""REST: the index and each rule against a plain account of it, and the text is the model's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common import speculative
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.speculative.trees import EMPTY
from prunelab.methods.rest.method import REST, Datastore, affordable, arrange, prefixes, suffix_array
from tests.unit.speculative.test_decoding import FAMILIES, PROMPT, model_of, plain

fast = settings(max_examples=60, deadline=None)
texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def unpadded(rows: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(t for t in row if t != EMPTY) for row in rows.tolist()]


@fast
@given(texts)
def test_suffixes_come_in_their_order(text):
    wanted = sorted(range(len(text)), key=lambda i: text[i:])
    assert suffix_array(torch.tensor(text)).tolist() == wanted


def test_a_text_that_repeats_itself_is_sorted_too():
    assert suffix_array(torch.zeros(70, dtype=torch.int32)).tolist() == list(range(69, -1, -1))


@fast
@given(st.lists(texts, min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 3))
def test_continuations_are_those_of_the_longest_end_that_occurs(documents, end, most):
    store = Datastore.of(map(torch.tensor, documents), chunk=40)
    streams, room = [[]], 40
    for document in documents:
        if len(streams[-1]) + len(document) > room and streams[-1]:
            streams.append([])
        streams[-1] += document
    assert [chunk.tokens.tolist() for chunk in store.chunks] == streams
    wanted: list[tuple[int, ...]] = []
    for size in range(min(5, len(end)), 0, -1):
        for stream in streams:
            places = [i + size for i in range(len(stream)) if stream[i : i + size] == end[-size:]]
            behind = sorted(places, key=lambda i: stream[i:])[:most]
            wanted += [tuple(stream[i : i + 3]) for i in behind if i < len(stream)]
        if wanted:
            break
    found = store.continuations(torch.tensor(end), range(5, 0, -1), 3, most)
    assert found.shape[1] == 3
    assert unpadded(found) == wanted


@fast
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 20))
def test_frequent_prefixes_are_kept_as_far_as_they_can_be_afforded(found, choices):
    paths = torch.tensor([row + [EMPTY] * (4 - len(row)) for row in found])
    counts = Counter(tuple(row[: i + 1]) for row in found for i in range(len(row)))
    rows, through = prefixes(paths)
    assert dict(zip(unpadded(rows), through.tolist(), strict=True)) == counts
    assert through.tolist() == sorted(through.tolist(), reverse=True)
    rows = rows[:choices]
    kept = set(unpadded(rows[affordable(rows, choices)]))
    left = sorted(unpadded(rows), key=lambda path: (len(set(path)), len(path)))
    while sum(len(set(path)) for path in left) > choices:
        left.pop()
    assert sorted(len(set(path)) for path in kept) == sorted(len(set(path)) for path in left)
    assert all(path[:-1] in kept for path in kept if len(path) > 1), "with a node its parent stays"
    tree = arrange(rows[affordable(rows, choices)])
    assert set(unpadded(tree.paths)) == kept
    assert len(tree.tokens) == len(kept) <= choices
    assert tree.depths.tolist() == sorted(tree.depths.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_the_models_and_comes_out_of_the_store(family):
    model = model_of(family)
    wanted = plain(model, PROMPT, max_new_tokens=40)
    known = torch.cat([torch.tensor([1, 2, 3]), PROMPT, wanted])
    noise = torch.randint(61, (300,), generator=torch.Generator().manual_seed(1))
    for store, most in ((known, 6), (Datastore.of([noise, known, noise], chunk=320), 12), (noise, 40)):
        out = speculative.generate(REST(), model, PROMPT, max_new_tokens=40, services={"store": store})
        assert torch.equal(out.tokens, wanted)
        assert out.steps <= most
    cut = Budget(3, "count")
    out = speculative.generate(REST(), model, PROMPT, max_new_tokens=40, services={"store": known}, budget=cut)
    assert torch.equal(out.tokens, wanted)
    assert 10 <= out.steps < 40, "two distinct tokens in a row are all that three nodes buy"


def test_where_nothing_is_found_nothing_is_drafted():
    state = REST().start(61, store=torch.arange(30))
    assert len(REST().draft(state, torch.tensor([7, 7]), Budget(1.0)).tokens) == 0
    assert len(REST().draft(state, torch.tensor([29]), Budget(1.0)).tokens) == 0, "one token is too short an end"
    assert REST().draft(state, torch.tensor([50, 3, 4]), Budget(1.0)).tokens.tolist() == list(range(5, 15))


@pytest.mark.parametrize(
    ("options", "store", "said"),
    [
        ({}, torch.tensor([1, 61]), "token 61 and the model has 61 tokens"),
        ({}, torch.empty(0, dtype=torch.long), "this one is empty"),
        ({"shortest": 0}, torch.arange(9), "shortest must be a whole number of at least 1"),
    ],
)
def test_stores_and_sizes_that_do_not_fit_are_refused(options, store, said):
    with pytest.raises(PrunelabError, match=said):
        speculative.generate(REST(**options), model_of(), PROMPT, max_new_tokens=3, services={"store": store})
    with pytest.raises(PrunelabError, match="needs the services store"):
        speculative.generate(REST(), model_of(), PROMPT, max_new_tokens=3)
