"""Lookahead decoding: the window is Jacobi iteration, the pool forgets the oldest, and the text is the model's."""

from __future__ import annotations

import pytest
import torch

from prunelab.common import speculative
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.speculative import Reader, Session
from prunelab.methods.lookahead.method import Lookahead, Pool, diagonals, refine, window
from tests.unit.speculative.test_decoding import FAMILIES, PROMPT, model_of, plain


def test_the_pool_forgets_what_was_longest_unseen():
    pool = Pool(2)
    pool.add_text([4, 5, 6, 4, 7, 8], 3)
    assert pool.behind(4) == [(5, 6), (7, 8)]
    pool.add(4, [5, 6])
    pool.add(4, [9, 9])
    assert pool.behind(4) == [(5, 6), (9, 9)]
    assert pool.behind(5) == [(6, 4)]
    assert pool.behind(8) == []


def test_columns_of_the_window_are_diagonals():
    """Level l, entry j stands l + j places ahead, and sees the chain up to there and its own column."""
    levels = [torch.arange(10, 13), torch.arange(20, 24), torch.arange(30, 34)]
    tree = window(levels)
    assert tree.depths.tolist() == [1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5]
    assert tree.paths[6].tolist() == [10, 11, 12, 23, -1]
    assert tree.paths[9].tolist() == [10, 11, 22, 32, -1]
    assert tree.paths[7].tolist() == [20, 30, -1, -1, -1]
    new = torch.arange(40, 44)
    assert diagonals(torch.tensor([7]), levels, new) == [
        [7, 20, 30, 40], [10, 21, 31, 41], [11, 22, 32, 42], [12, 23, 33, 43],
    ]  # fmt: skip
    assert [level.tolist() for level in refine(levels, new, 3)] == [[21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43]]


def test_the_window_fills_up_in_the_first_passes():
    model, method = model_of(), Lookahead(level=5, window=4)
    session = Session(method, Budget(1.0), method.start(61))
    session.begin(PROMPT)
    tokens, reader, sizes = PROMPT, Reader(model), []
    with torch.inference_mode():
        for _ in range(5):
            sizes.append([len(level) for level in session.state.levels])
            step = session.step(reader, tokens)
            before = [level.tolist() for level in session.state.levels]
            session.learn(step)
            last = session.state.levels[-1]
            for entry, node in enumerate(range(len(step.aside) - len(before[-1]), len(step.aside))):
                path = torch.cat([tokens, (tree := window([torch.tensor(r) for r in before])).paths[node]])
                answer = model(path[path >= 0][None]).logits[0, -1].argmax()
                kept = entry - (len(before[-1]) - len(last))
                assert kept < 0 or answer == last[kept], "an entry is what the model says behind all it sees"
            assert len(tree.tokens) == len(step.aside)
            tokens = torch.cat([tokens, step.accepted.tokens])
    assert sizes == [[6], [5, 6], [4, 5, 5], [3, 4, 4, 4], [3, 4, 4, 4]]
    assert len(tokens) - len(PROMPT) >= 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method", [Lookahead(), Lookahead(level=3, window=1, guesses=1), Lookahead(7, 20, 20, bonus=True, prompt_pool=True)]
)
def test_text_is_the_models(family, method):
    model = model_of(family)
    out = speculative.generate(method, model, PROMPT, max_new_tokens=60)
    assert torch.equal(out.tokens, plain(model, PROMPT, max_new_tokens=60))
    if method.window > 1:
        assert out.steps < 55
    again = speculative.generate(method, model, PROMPT, max_new_tokens=60)
    assert again.steps == out.steps, "the window starts with the same tokens"


def test_a_text_begins_with_an_empty_pool():
    model, method = model_of(), Lookahead()
    with speculative.applied(method, model) as handle:
        for _ in range(2):
            model.generate(PROMPT[None], max_new_tokens=40, do_sample=False)
    first, second = handle.runs
    assert first.steps == second.steps


def test_a_confirmed_guess_gives_its_length_or_one_more():
    text = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    for bonus, most in ((False, 3), (True, 4)):
        method = Lookahead(level=4, window=2, guesses=3, bonus=bonus)
        state = method.start(20)
        method.begin(state, text)
        state.levels = [torch.tensor([1]), torch.tensor([1, 1]), torch.tensor([1, 1])]
        for gram in ((9, 9, 9), (2, 3, 4), (2, 9, 4)):
            state.pool.add(1, gram)
        tree = method.draft(state, text[:1], Budget(1.0))
        assert len(tree.tokens) == 3 * (most - 1)
        logits = torch.nn.functional.one_hot(torch.cat([text[:1], tree.tokens]) + 1, 20).float()
        assert method.accept(tree, logits).tokens.tolist() == [2, 3, 4, 5][:most]
        newest = method.draft(state, text[:1], Budget(most, "count"))
        assert newest.tokens.tolist() == ([2, 3, 4, 2] if bonus else [2, 3, 2]), "the newest two, the second cut short"
        assert newest.parents.tolist() == [-1, *range(most - 2), -1]
        assert len(method.draft(state, text[:1], Budget(0, "count")).tokens) == 0


def test_a_prompt_pool_knows_prompt_and_text():
    model = model_of()
    for known in (True, False):
        method = Lookahead(level=4, window=1, guesses=60, prompt_pool=known)
        state = method.start(61)
        out = speculative.generate(method, model, PROMPT, max_new_tokens=30, state=state)
        assert torch.equal(out.tokens, plain(model, PROMPT, max_new_tokens=30))
        text = [*PROMPT.tolist(), *out.tokens.tolist()]
        grams = [tuple(text[i + 1 : i + 4]) in state.pool.behind(text[i]) for i in range(len(text) - 3)]
        assert all(grams) == known


@pytest.mark.parametrize("options", [{"level": 2}, {"window": 0}, {"guesses": 0}])
def test_sizes_that_make_no_ngram_are_refused(options):
    with pytest.raises(PrunelabError, match=r"n-grams of 3 tokens and a window|window must be"):
        Lookahead(**options).start(61)
