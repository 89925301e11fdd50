"""RASD: each step of the reconstruction against a plain account of it, and the text is the target's."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from prunelab.common import speculative
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.speculative.trees import DraftTree, trie
from prunelab.methods.rasd.method import RASD, continuations, frequent, guess, prune
from tests.unit.speculative.test_decoding import PROMPT, model_of, plain

TABLE = torch.randn(9, 9, generator=torch.Generator().manual_seed(2)) * 2


class Bigram:
    """A draft model that looks one token back, and counts what it reads."""

    vocabulary = 9

    def __init__(self) -> None:
        self.rows = 0

    def read(self, tokens: torch.Tensor, tree: DraftTree, known: int = 0) -> torch.Tensor:
        out = TABLE[torch.cat([tokens[-1:], tree.tokens])]
        self.rows += len(tree.tokens) - known
        return out[known + 1 :] if known else out


def test_the_draft_tree_holds_the_likeliest_paths():
    seen = guess(Bigram(), torch.tensor([4]), 9, 2)
    chances = TABLE.log_softmax(-1)
    scores = {(a, -1): chances[4, a] for a in range(9)}
    scores |= {(a, b): chances[4, a] + chances[a, b] for a, b in product(range(9), range(9))}
    assert [tuple(p) for p in seen.paths.tolist()] == sorted(scores, key=lambda p: -float(scores[p]))
    narrow = guess(Bigram(), torch.tensor([4]), 2, 3)
    assert len(narrow.paths) == 2 + 4 + 4
    assert set(narrow.paths[:, 0].tolist()) == set(TABLE[4].topk(2).indices.tolist())
    assert narrow.probabilities.shape == (5, 9)
    torch.testing.assert_close(narrow.probabilities[1:], TABLE[narrow.read.tokens].softmax(-1))


def test_only_nodes_that_are_looked_behind_are_read():
    draft = Bigram()
    guess(draft, torch.tensor([4]), 3, 4)
    assert draft.rows == 9


def test_suffixes_are_tried_from_long_to_short():
    store = torch.tensor([1, 2, 3, 4, 9, 2, 3, 5, 3, 6])
    found = continuations(store, torch.tensor([8, 1, 2, 3]), 3, 2, 10)
    assert found.tolist() == [[4, 9]]
    assert continuations(store, torch.tensor([7, 2, 3]), 3, 3, 10).tolist() == [[4, 9, 2], [5, 3, 6]]
    assert continuations(store, torch.tensor([7, 2, 3]), 3, 3, 1).tolist() == [[5, 3, 6]]
    assert continuations(store, torch.tensor([5, 3]), 1, 3, 10).tolist()[-1] == [6, -1, -1]
    assert continuations(store, torch.tensor([7]), 3, 2, 10).shape == (0, 2)
    own = torch.tensor([1, 2, 3, 1, 2])
    assert continuations(own, own, 3, 2, 10).tolist() == [[3, 1]]


def test_what_the_draft_model_rules_out_goes_with_all_below_it():
    seen = guess(Bigram(), torch.tensor([4]), 9, 2)
    chances = TABLE.softmax(-1)
    least = float(chances[4].median())
    tree, _ = trie(torch.tensor([[a, b, 0] for a in range(9) for b in range(9)]))
    kept = {tuple(p) for p in tree.paths[prune(tree, seen, least)].tolist()}
    first = [a for a in range(9) if chances[4, a] >= least]
    wanted = {(a, -1, -1) for a in first} | {
        path for a, b in product(first, range(9)) if chances[a, b] >= least for path in ((a, b, -1), (a, b, 0))
    }  # behind the second token the draft model has not looked
    assert kept == wanted
    assert bool(prune(tree, seen, 0.0).all())


def test_frequent_prefixes_stay():
    tree, through = trie(torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 6], [7, 8, 9]]))
    kept = tree.where(frequent(tree, through, 3))
    assert [tuple(p) for p in kept.paths.tolist()] == [(1, -1), (1, 2), (7, -1)]


@pytest.mark.parametrize("budget", [1.0, 0.3, Budget(4, "count"), Budget(0, "count")], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_text_is_the_targets_with_any_draft_model(family, budget):
    model = model_of(family)
    wanted = plain(model, PROMPT, max_new_tokens=30)
    for draft in (model_of(family), model_of(family, num_hidden_layers=1)):
        out = speculative.generate(RASD(), model, PROMPT, max_new_tokens=30, budget=budget, services={"draft": draft})
        assert torch.equal(out.tokens, wanted)
    out = speculative.generate(
        RASD(), model, PROMPT, max_new_tokens=30, budget=budget, services={"draft": model_of(family)}
    )
    if budget == 1.0:
        assert out.mat > 3, "the target as its own draft model"


def test_retrieval_helps_where_the_draft_model_does_not():
    model, weak = model_of(), model_of(num_hidden_layers=1)
    text = torch.cat([PROMPT, plain(model, PROMPT, max_new_tokens=40)])
    steps = {}
    for retrieval in ("context", "store"):
        method = RASD(retrieval=retrieval, least=0.0)
        services = {"draft": weak, "store": text}
        out = speculative.generate(method, model, PROMPT, max_new_tokens=40, services=services)
        assert torch.equal(torch.cat([PROMPT, out.tokens]), text)
        steps[retrieval] = out.steps
    assert steps["store"] < 0.6 * steps["context"]


def test_a_store_is_asked_for():
    with pytest.raises(PrunelabError, match="'store'"):
        speculative.generate(
            RASD(retrieval="store"), model_of(), PROMPT, max_new_tokens=3, services={"draft": model_of()}
        )
