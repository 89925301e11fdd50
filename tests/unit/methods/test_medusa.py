"""Medusa: heads that learned a text save its steps, typical acceptance is the paper's, and greedy text is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prunelab.common import speculative
from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.speculative.reader import info
from prunelab.common.speculative.trees import DraftTree, Template, paths_of
from prunelab.methods.medusa.method import MC_SIM_7B_63, VICUNA_7B_STAGE2, Medusa, candidates, typical
from prunelab.methods.medusa.modules import Heads, losses
from tests.unit.speculative.test_decoding import FAMILIES, PROMPT, model_of, plain

GOLDEN = Path(__file__).parents[2] / "golden" / "medusa"


@pytest.mark.parametrize(("name", "tree"), [("mc_sim_7b_63", MC_SIM_7B_63), ("vicuna_7b_stage2", VICUNA_7B_STAGE2)])
def test_the_released_trees(name, tree):
    with np.load(GOLDEN / f"buffers_{name}.npz") as stored:
        theirs = [tuple(r for r in path if r >= 0) for path in stored["in_choices"].tolist()]
    assert list(paths_of(tree)) == sorted(theirs, key=lambda path: (len(path), path))


def test_nodes_take_the_candidates_of_their_depth():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    template = Template.of([(0,), (2,), (0, 1), (2, 0), (2, 0, 3)])
    order = logits.argsort(-1, descending=True)
    wanted = [order[0, 0], order[0, 2], order[1, 1], order[1, 0], order[2, 3]]
    assert candidates(logits, template, 4).tolist() == [int(token) for token in wanted]


def trained(model, text, method, steps=150):
    """Heads that know the text [N] by heart."""
    torch.manual_seed(0)
    heads = method.build(info(model))
    with torch.no_grad():
        hidden = model(text[None], output_hidden_states=True).hidden_states[-1]
    optimiser = torch.optim.AdamW(heads.parameters(), lr=0.02)
    output = model.get_output_embeddings() if method.tied else torch.nn.Identity()
    for _ in range(steps):
        optimiser.zero_grad()
        losses(output(heads(hidden)), text[None]).sum().backward()
        optimiser.step()
    return heads.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_text_is_the_models_and_heads_that_know_it_save_steps(family, tied):
    model, method = model_of(family), Medusa(tied=tied)
    wanted = plain(model, PROMPT, max_new_tokens=40)
    torch.manual_seed(1)
    ignorant = method.build(info(model))
    clever = trained(model, torch.cat([PROMPT, wanted]), method)
    steps = []
    for heads in (ignorant, clever):
        out = speculative.generate(method, model, PROMPT, max_new_tokens=40, parts=heads)
        assert torch.equal(out.tokens, wanted)
        steps.append(out.steps)
    assert 9 <= steps[1] <= 16
    assert steps[1] < steps[0], "one step reads the prompt, the others give up to five tokens each"


def test_a_prompt_begins_without_a_draft_and_knows_nothing_of_the_last():
    model, method = model_of(), Medusa()
    torch.manual_seed(1)
    heads = method.build(info(model))
    with apply(method, model, 1.0, parts=heads) as handle:
        for _ in range(2):
            out = model.generate(PROMPT[None], max_new_tokens=20, do_sample=False)
            assert torch.equal(out[0, 6:], plain_of(model))
    assert handle.runs[0].steps == handle.runs[1].steps
    state = handle.session.state
    assert state.hidden is not None
    method.begin(state, PROMPT)
    assert len(method.draft(state, PROMPT, Budget(1.0)).tokens) == 0


def plain_of(model):
    return plain(model_of(), PROMPT, max_new_tokens=20)


@pytest.mark.parametrize("count", [0, 1, 10, 11, 40, 63])
def test_budget_takes_the_first_nodes(count):
    model, method = model_of(), Medusa()
    torch.manual_seed(1)
    heads = method.build(info(model))
    state = method.start(61, parts=heads)
    out = speculative.generate(
        method, model, PROMPT, max_new_tokens=20, budget=Budget(count, "count"), state=state, parts=heads
    )
    assert torch.equal(out.tokens, plain_of(model))
    whole, part = (method.draft(state, PROMPT, budget) for budget in (Budget(1.0), Budget(count, "count")))
    assert torch.equal(part.tokens, whole.tokens[:count])
    assert torch.equal(part.ancestors, whole.ancestors[:count, :count])


def test_typical_acceptance_is_the_papers():
    generator = torch.Generator().manual_seed(3)
    tree = DraftTree(torch.tensor([1, 2, 1, 3, 3, 0, 4, 5]), torch.tensor([-1, -1, 0, 0, 1, 2, 3, 4]))
    accepted_something = 0
    for scale in (0.3, 1.0, 3.0):
        for _ in range(40):
            logits = torch.randn(9, 6, generator=generator) * scale
            p = logits.softmax(-1)
            best: tuple[int, float, list[int]] = (0, 0.0, [])
            for node in range(8):
                path = tree.ancestors[node].nonzero().squeeze(1).tolist()
                rows = [0, *(n + 1 for n in path[:-1])]
                chance = [float(p[row, tree.tokens[n]]) for row, n in zip(rows, path, strict=True)]
                entropy = [-float((p[row] * (p[row] + 1e-5).log()).sum()) for row in rows]
                if all(c > min(0.2, 0.5 * np.exp(-e)) for c, e in zip(chance, entropy, strict=True)):
                    best = max(best, (len(path), float(np.log(chance).sum()), path), key=lambda found: found[:2])
            accepted = typical(tree, logits, 0.2, 0.5)
            assert accepted.nodes.tolist() == best[2]
            last = best[2][-1] + 1 if best[2] else 0
            assert accepted.tokens.tolist() == [*tree.tokens[best[2]].tolist(), int(logits[last].argmax())]
            accepted_something += bool(best[2])
    assert 20 < accepted_something < 120


def test_typical_acceptance_is_for_sampling_alone():
    model, method = model_of(), Medusa(sampling="typical")
    torch.manual_seed(1)
    heads = method.build(info(model))
    out = speculative.generate(method, model, PROMPT, max_new_tokens=20, parts=heads)
    assert torch.equal(out.tokens, plain_of(model))
    hot = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    eager = speculative.generate(method, model, PROMPT, max_new_tokens=20, parts=heads, **hot)
    assert eager.steps < out.steps, "an undecided model accepts nearly everything"


def test_layers_of_a_head_are_one_block():
    heads = Heads(4, 7, 2, layers=3)
    assert sum(p.numel() for p in heads.parameters()) == 2 * (4 * 4 + 4 + 7 * 4)
    x = torch.randn(5, 4)
    assert torch.equal(heads(x), torch.stack([head[-1](head[0](head[0](head[0](x)))) for head in heads]))


def test_parts_and_trees_that_do_not_fit_are_refused():
    model = model_of()
    with pytest.raises(PrunelabError, match="medusa has learned parts; pass parts"):
        speculative.generate(Medusa(), model, PROMPT, max_new_tokens=3)
    with pytest.raises(PrunelabError, match=r"do not fit medusa on this model: 0\.1\.weight"):
        speculative.generate(Medusa(), model, PROMPT, max_new_tokens=3, parts=Heads(info(model).width, 50, 5))
    method = Medusa(heads=3)
    with pytest.raises(PrunelabError, match="tree is 4 deep"):
        speculative.generate(method, model, PROMPT, max_new_tokens=3, parts=method.build(info(model)))
