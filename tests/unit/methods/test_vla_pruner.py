"""VLA-Pruner: control steps against a loop, warm-up and reset, padded batches, options and bad input."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.vla_pruner.method import VLAPruner, combined, filtered, temporal_guide, text_relevance
from prunelab.methods.vla_pruner.tables import costs
from tests.contract.vlms import IMAGE, images, prompt, vlm
from tests.unit.tokens.test_vlm import pair

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SMALL = {"layer": 2, "action_layer": 1, "rounded": False}


def test_either_end_of_the_history_may_weigh_most():
    history = torch.eye(3).unsqueeze(1)  # step i looks at token i alone
    released, paper = (temporal_guide(history, 0.5, end, False)[0] for end in ("oldest", "newest"))
    assert torch.allclose(released, torch.tensor([4, 2, 1]) / 7) and torch.allclose(paper, torch.tensor([1, 2, 4]) / 7)
    assert not torch.equal(temporal_guide(history, 0.5)[0], released), "in bfloat16"
    assert not temporal_guide(0 * history).any(), "nothing remembered is nothing, not NaN"


def test_text_rows_count_without_their_ends_and_without_padding():
    rows = torch.tensor([[1.0, 0], [0, 1], [1, 1], [9, 9]])
    padded = torch.cat([torch.zeros(2, 2), rows[1:3]])
    both = torch.stack([rows, padded]).unsqueeze(1)
    assert text_relevance(both).tolist() == [[0.5, 1.0], [0.0, 0.0]]
    assert text_relevance(both, 0, 0).tolist() == [[2.75, 2.75], [0.5, 1.0]]


def test_a_union_within_the_budget_stays_in_order_and_a_larger_one_is_spread_out():
    scores = torch.tensor([[4.0, 3, 2, 1]])
    counts = torch.tensor([[2]])
    same = combined(scores, scores, counts)
    assert filtered(same, torch.randn(1, 4, 3), counts, 2).tolist() == [[0, 1]]
    every = combined(scores, scores.flip(1), counts)
    features = torch.tensor([[[1.0, 0], [1, 0.1], [1, 0.1], [-1, 0]]])
    assert every.all() and filtered(every, features, counts, 2).tolist() == [[3, 0]]


def step(model, given, words: int = 3):
    return model.generate(**given, **GREEDY, max_new_tokens=words)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_three_control_steps_are_remembered_and_the_fourth_is_pruned(family):
    """Spelled out on the eager model, sample by sample of a padded batch."""
    given, method = pair(family, vlm(family)), VLAPruner(**SMALL)
    with apply(method, vlm(family), Budget(5, "count")) as handle:
        model = handle.adapter.model
        for _ in range(3):
            step(model, given)
            assert handle.kept()[0][1].shape[1] == given["input_ids"].shape[1], "not pruned yet"
        model(**given)
        found = handle.kept()[0][1]
        history = handle.memory["history"]
        handle.reset()
        model(**given)
        assert handle.kept()[0][1].shape[1] == given["input_ids"].shape[1], "a new episode"
    eager, total = vlm(family), given["input_ids"].shape[1]
    eager.set_attn_implementation("eager")
    output = eager.generate(**given, **GREEDY, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    acted = torch.stack([maps[1][:, :, -1, :total].mean(1) for maps in output.attentions]).mean(0)
    received = eager(**given, output_attentions=True).attentions[1].mean(1)
    states = []
    eager.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    eager(**given)
    for sample in range(2):
        visual = (given["input_ids"][sample] == IMAGE).nonzero().squeeze(1)
        assert torch.allclose(history[-1][sample, : len(visual)], acted[sample, visual], atol=1e-5)
        real = given["attention_mask"][sample].bool()
        current = received[sample, real].sum(0)[visual]
        union = {*current.topk(5).indices.tolist(), *acted[sample, visual].topk(5).indices.tolist()}
        unit = torch.nn.functional.normalize(states[0][sample, visual], dim=-1)
        distance, left, picks = 1 - unit @ unit.T, sorted(union), []
        if len(union) > 5:
            picks = [max(left, key=lambda i: min(float(distance[i, j]) for j in left if j != i))]
            while len(picks) < 5:
                rest = [i for i in left if i not in picks]
                picks.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in picks)))
        kept = visual[sorted(picks or union)].tolist()
        assert [i for i in found[sample].tolist() if i in visual.tolist()] == kept


@torch.no_grad()
def test_pruned_tokens_are_remembered_as_unseen():
    given, model = prompt("llava", images("llava", 1)), vlm("llava")
    with apply(VLAPruner(**SMALL | {"action_layer": 3}, window=1), model, Budget(4, "count")) as handle:
        for _ in range(3):
            step(model, given)
        kept = handle.kept()[0][1]
        model(**given)
        (last,) = handle.memory["history"]
        visual = (given["input_ids"][0] == IMAGE).nonzero().squeeze(1)
        assert [visual[i].item() for i in last[0].nonzero().squeeze(1)] == [i for i in kept[0].tolist() if i in visual]


@torch.no_grad()
@pytest.mark.parametrize("rows", ["all", "last", "text"])
def test_without_a_window_prefill_relevance_stands_alone(rows):
    given, model = prompt("llava", images("llava", 2)), vlm("llava")
    eager = vlm("llava")
    eager.set_attn_implementation("eager")
    maps = eager(**given, output_attentions=True).attentions[1].mean(1)
    (visual,) = {tuple((row == IMAGE).nonzero().squeeze(1).tolist()) for row in given["input_ids"]}
    chosen = {"all": slice(None), "last": slice(-1, None), "text": slice(visual[-1] + 2, -1)}[rows]
    want = torch.tensor(visual)[maps[:, chosen].mean(1)[:, visual].topk(6).indices.sort().values]
    with apply(VLAPruner(layer=2, window=0, rows=rows), model, Budget(6, "count")) as handle:
        model(**given)
        found = handle.kept()[0][1]
        assert not handle.memory
    assert [[i for i in row if i in visual] for row in found.tolist()] == want.tolist()


@torch.no_grad()
def test_another_batch_in_mid_episode_and_layers_that_are_not_there_are_named():
    model = vlm("llava")
    with apply(VLAPruner(**SMALL), model, 0.5) as handle:
        step(model, prompt("llava", images("llava", 2)))
        step(model, prompt("llava", images("llava", 2)))
        with pytest.raises(PrunelabError, match=r"remembers 2 prompts .* call handle.reset\(\)"):
            model(**prompt("llava", images("llava", 1)))
        handle.reset()
        model(**prompt("llava", images("llava", 1)))
    with pytest.raises(PrunelabError, match="of decoding, last_row of layers 0 to 3"), apply(VLAPruner(), model, 0.5):
        pass


@torch.no_grad()
def test_a_step_out_of_order_is_named():
    model, first = vlm("llava"), prompt("llava", images("llava", 2))
    with apply(VLAPruner(**SMALL), model, 0.5):
        cache = model(**first).past_key_values
        longer = {name: torch.cat([first[name], first[name][:, -1:]], 1) for name in ("input_ids", "attention_mask")}
        model(**first | longer)
        with pytest.raises(PrunelabError, match="out of order"):
            model(input_ids=first["input_ids"][:, -1:], past_key_values=cache)


def test_the_formula_comes_near_the_papers_flops():
    want = {"Vanilla": 1.906, "VLA-Pruner keep50": 1.139, "VLA-Pruner keep25": 0.758, "VLA-Pruner keep12.5": 0.571}
    found = {name.split("/")[1]: entry["value"] for name, entry in costs().items()}
    assert found == pytest.approx(want, abs=0.005)
