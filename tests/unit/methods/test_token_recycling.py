"""Token Recycling: the released tree, the table, hot start, and budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prunelab.common import speculative
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.token_recycling.method import PUBLISHED, Template, TokenRecycling, expand, paths_of, renew
from tests.unit.speculative.test_decoding import FAMILIES, PROMPT, model_of, plain

GOLDEN = Path(__file__).parents[2] / "golden" / "token_recycling"


def test_the_released_tree():
    template = Template.of(paths_of(PUBLISHED))
    assert [b - a for a, b in zip(template.bounds, template.bounds[1:])] == [8, 21, 25, 15, 8, 3]
    assert len(set(range(80)) - set(template.parents.tolist())) == 40
    assert int(template.ranks.max()) == 7
    with np.load(GOLDEN / "buffers_2.2.2.npz") as stored:
        theirs = [tuple(r for r in path if r >= 0) for path in stored["in_tree_template"].tolist()]
    assert list(paths_of(PUBLISHED)) == theirs


def test_drafts_walk_the_table_rank_by_rank():
    table = torch.randint(50, (50, 8), generator=torch.Generator().manual_seed(0))
    paths = paths_of(PUBLISHED)
    drafts = expand(table, torch.tensor([7]), Template.of(paths)).tolist()
    for path, token in zip(paths, drafts, strict=True):
        walked = 7
        for rank in path:
            walked = int(table[walked, rank])
        assert token == walked


def test_the_last_of_equal_tokens_renews_the_row():
    g = torch.Generator().manual_seed(1)
    table, logits = torch.zeros(6, 3, dtype=torch.long), torch.randn(5, 6, generator=g)
    renew(table, torch.tensor([4, 2, 4, 2, 0]), logits)
    best = logits.topk(3).indices
    assert torch.equal(table[[4, 2, 0]], best[[2, 3, 4]])
    assert not table[[1, 3, 5]].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", [(), ((0,), (0, 0), (0, 0, 0)), ((2,), (5,), (2, 7), (5, 0))], ids=len)
def test_text_is_the_models_and_is_learned(family, tree):
    model, method = model_of(family), TokenRecycling(tree=tree)
    wanted = plain(model, PROMPT, max_new_tokens=40)
    with speculative.applied(method, model) as handle:
        for _ in range(2):
            out = model.generate(PROMPT[None], max_new_tokens=40, do_sample=False)
            assert torch.equal(out[0, 6:], wanted)
    cold, hot = handle.runs
    if family == "llama" and not tree:
        assert hot.steps < cold.steps, "the table outlives the prompt"
    known = handle.session.state.table.any(1)
    assert known[wanted[:-1]].all(), "every token behind which the model went on has candidates"
    if len(tree) == 3:  # the chain shows few other tokens
        assert not known.all(), "reading the prompt teaches nothing"


@pytest.mark.parametrize("count", [0, 1, 5, 8, 9, 40, 80])
def test_budget_takes_the_first_nodes(count):
    model, method = model_of(), TokenRecycling()
    state = method.start(61)
    speculative.generate(method, model, PROMPT, max_new_tokens=20, state=state)
    whole = method.draft(state, PROMPT, Budget(1.0))
    part = method.draft(state, PROMPT, Budget(count, "count"))
    assert torch.equal(part.tokens, whole.tokens[:count])
    assert torch.equal(part.parents, whole.parents[:count])
    assert torch.equal(part.ancestors, whole.ancestors[:count, :count])
    out = speculative.generate(method, model, PROMPT, max_new_tokens=20, budget=Budget(count, "count"), state=state)
    assert torch.equal(out.tokens, plain(model, PROMPT, max_new_tokens=20))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tree": ((0, 0), (0,))}, "short ones first"),
        ({"tree": ((0,), (0,))}, "each path of ranks once"),
        ({"tree": ((0,), (1, 0))}, r"but not its parent; add \(1,\)"),
        ({"tree": ((8,),)}, "9 candidates"),
        ({"candidates": 70}, "model has 61 tokens"),
    ],
)
def test_trees_that_are_none_are_refused(options, said):
    with pytest.raises(PrunelabError, match=said):
        TokenRecycling(**options).start(61)
