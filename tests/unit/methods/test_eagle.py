"""EAGLE: a layer that learned a text saves its steps, trees are those of the layer read path by path, text is exact."""

from __future__ import annotations

import pytest
import torch

from prunelab.common import speculative
from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo
from prunelab.common.speculative.reader import info
from prunelab.common.speculative.trees import paths_of
from prunelab.methods.eagle.method import MC_SIM_7B_25, Eagle
from prunelab.methods.eagle.modules import inner_width, loss
from tests.unit.speculative.test_decoding import FAMILIES, PROMPT, model_of, plain

TREES = {"static": Eagle(tree="static", inner=48), "dynamic": Eagle(inner=48, nodes=20, depth=4, width=5)}
TEXT = torch.randint(61, (20,), generator=torch.Generator().manual_seed(3))
FEATURES = torch.randn(20, 32, generator=torch.Generator().manual_seed(4))


def test_the_released_tree_and_layer():
    paths = paths_of(MC_SIM_7B_25)
    assert len(paths) == 25 and paths[:5] == ((0,), (1,), (2,), (3,), (0, 0)) and paths[-1] == (0, 0, 0, 0, 1)
    with torch.device("meta"):
        layer = Eagle().build(ModelInfo("llama", depth=32, heads=32, width=4096, tokens=2048, vocabulary=32000))
    attention = [f"layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    mlp = [f"layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    others = ["embed_tokens.weight", "fc.weight", "fc.bias", "layers.0.post_attention_layernorm.weight"]
    assert set(layer.state_dict()) == {*attention, *mlp, *others}
    count = sum(p.numel() for p in layer.parameters()) - layer.embed_tokens.weight.numel()
    assert round(count / 1e9, 2) == 0.24, "as the authors list it"
    assert [inner_width(width) for width in (4096, 5120, 6656)] == [11008, 13824, 17920]


def at_work(method, vocabulary: int = 61):
    torch.manual_seed(0)
    parts = method.build(ModelInfo("llama", depth=1, heads=4, width=32, tokens=99, vocabulary=vocabulary)).eval()
    output = torch.nn.Linear(32, vocabulary, bias=False)
    for value in (*parts.parameters(), output.weight):
        torch.nn.init.normal_(value, std=0.3)
    return method.start(vocabulary, parts=parts, output=output)


def chances(state, text, features, path):
    """Log-probabilities [V] behind a path of drafts, the layer reading everything anew."""
    known, tokens = features, text[1:]
    for token in path:
        known = torch.cat([known, state.parts(known, tokens, torch.arange(len(tokens)))[0][-1:]])
        tokens = torch.cat([tokens, torch.tensor([token])])
    return state.output(state.parts(known, tokens, torch.arange(len(tokens)))[0][-1]).log_softmax(-1)


def grown(method, lengths=(12, 15, 19)):
    """Trees behind a text that grows, and the state behind the last."""
    state, before, trees = at_work(method), 0, []
    with torch.inference_mode():
        for length in lengths:
            state.length = before + 1 if before else length
            new = FEATURES[before:length]
            state.update(*((new[:0], new) if before else (new[:-1], new[-1:])))
            trees.append(method.draft(state, TEXT[: length + 1], Budget(1.0)))
            before = length
    return state, trees


def test_a_fixed_tree_takes_candidates_of_their_rank():
    state, (*_, tree) = grown(TREES["static"])
    paths, places = paths_of(MC_SIM_7B_25), {}
    with torch.inference_mode():
        for node, path in enumerate(paths):
            above = [int(tree.tokens[places[path[:i]]]) for i in range(1, len(path))]
            order = chances(state, TEXT, FEATURES[:19], above).argsort(descending=True)
            assert int(tree.tokens[node]) == int(order[path[-1]])
            places[path] = node


def test_a_growing_tree_holds_the_surest_candidates():
    state, (*_, tree) = grown(TREES["dynamic"])
    with torch.inference_mode():
        beam, every = [((), 0.0)], {}
        for _ in range(4):
            found = {}
            for path, score in beam:
                best = chances(state, TEXT, FEATURES[:19], path).topk(5)
                found |= {(*path, int(t)): score + float(s) for s, t in zip(best.values, best.indices, strict=True)}
            every |= found
            beam = sorted(found.items(), key=lambda item: -item[1])[:5]
    wanted = sorted(every, key=lambda path: -every[path])[:20]
    assert {tuple(t for t in row if t >= 0) for row in tree.paths.tolist()} == set(wanted)
    assert bool((tree.parents < torch.arange(20)).all())


@pytest.mark.parametrize("kind", TREES)
def test_what_is_kept_of_a_text_changes_nothing(kind):
    method = TREES[kind]
    _, (*_, step_by_step) = grown(method)
    _, (at_once,) = grown(method, (19,))
    assert torch.equal(step_by_step.tokens, at_once.tokens) and torch.equal(step_by_step.parents, at_once.parents)
    state, _ = grown(method)
    with torch.inference_mode():
        again = method.draft(state, TEXT[:20], Budget(1.0))  # a text that did not grow
        assert torch.equal(again.tokens, at_once.tokens)


def test_budget_takes_the_first_or_the_surest():
    for method in TREES.values():
        state, (*_, whole) = grown(method)
        with torch.inference_mode():
            for count in (0, 1, 7):
                part = method.draft(state, TEXT[:20], Budget(count, "count"))
                assert len(part.tokens) == count
                ways = [tuple(row[row >= 0].tolist()) for row in part.paths]
                assert set(ways) <= {tuple(row[row >= 0].tolist()) for row in whole.paths}


def trained(model, text, method, steps=120):
    """A layer that knows the text [N] by heart."""
    torch.manual_seed(0)
    layer = method.build(info(model))
    with torch.no_grad():
        features = model(text[None], output_hidden_states=True).hidden_states[-1][0]
    optimiser, output = torch.optim.AdamW(layer.parameters(), lr=0.01), model.get_output_embeddings()
    for _ in range(steps):
        optimiser.zero_grad()
        predicted, _ = layer(features[:-1], text[1:], torch.arange(len(text) - 1))
        loss(predicted, features[1:], output, weight=1.0).backward()
        optimiser.step()
    return layer.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TREES)
def test_text_is_the_models_and_a_layer_that_knows_it_saves_steps(family, kind):
    model, method = model_of(family), TREES[kind]
    wanted = plain(model, PROMPT, max_new_tokens=40)
    torch.manual_seed(1)
    ignorant, clever = method.build(info(model)), trained(model, torch.cat([PROMPT, wanted]), method)
    steps = []
    for layer in (ignorant, clever):
        out = speculative.generate(method, model, PROMPT, max_new_tokens=40, parts=layer)
        assert torch.equal(out.tokens, wanted)
        steps.append(out.steps)
    assert steps[1] <= 20 and steps[1] < steps[0]


def test_a_prompt_begins_without_a_draft_and_knows_nothing_of_the_last():
    model, method = model_of(), TREES["dynamic"]
    torch.manual_seed(1)
    with apply(method, model, 1.0, parts=method.build(info(model))) as handle:
        texts = [model.generate(PROMPT[None], max_new_tokens=20, do_sample=False) for _ in range(2)]
    assert torch.equal(*texts) and handle.runs[0].steps == handle.runs[1].steps
    state = handle.session.state
    method.begin(state, PROMPT)
    assert len(method.draft(state, PROMPT, Budget(1.0)).tokens) == 0


def test_trees_that_do_not_fit_are_refused():
    with pytest.raises(PrunelabError, match="takes 4 candidates of 3 tokens"):
        at_work(Eagle(tree="static"), 3)
    assert at_work(Eagle(), 3).most == 3
