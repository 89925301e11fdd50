"""TransPrune: transitions that add up over the cuts against a loop, padded batches, options and bad layers."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.transprune.method import TransPrune, guidance, normalised, transition
from prunelab.methods.transprune.tables import costs
from tests.contract.vlms import IMAGE, images, prompt, vlm
from tests.unit.tokens.test_vlm import pair

SMALL = {"layers": (2, 3), "first": 0}


def test_a_transition_is_a_ratio_of_norms_times_a_softmax_of_turns():
    before, after = torch.tensor([[[3.0, 4], [0, 1], [2, 0]]]), torch.tensor([[[3.0, 4], [2, 0], [-4, 0]]])
    turns = torch.tensor([0.0, 1.0, 2.0]).exp()
    want = torch.tensor([1.0, 2.0, 2.0]) * turns / turns.sum()
    assert torch.allclose(transition(before, after)[0], want)
    among = torch.tensor([[True, True, False]])
    some = transition(before, after, among)[0]
    assert torch.allclose(some, torch.tensor([1.0, 2.0, 0.0]) * turns / turns[:2].sum())
    assert transition(before, after, among, "magnitude")[0].tolist() == [1.0, 2.0, 0.0]
    size = torch.tensor([0.0, 1.0, 0.0]).exp()
    assert torch.allclose(transition(before, after, terms="direction", angle="absolute")[0], size / size.sum())


def test_guidance_is_a_mean_over_heads_and_rows_and_nothing_without_text():
    rows = torch.tensor([[[[1.0, 0], [0, 1]], [[1, 0], [1, 0]]]])
    assert guidance(rows).tolist() == [[0.75, 0.25]]
    assert guidance(rows[:, :, :0]).tolist() == [[0.0, 0.0]]


def cuts(method, model, given, budget):
    with torch.no_grad(), apply(method, model, budget) as handle:
        logits = model(**given).logits
        return [index for _, index in handle.kept()], logits


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_two_cuts_add_up_what_the_layers_between_did(family):
    """Spelled out on the eager model, cut by hand: two samples whose questions differ in length."""
    given = pair(family, vlm(family))
    method = TransPrune(**SMALL, positions="original")
    found, _ = cuts(method, vlm(family), given, Budget((9, 4), "count"))
    for sample in range(2):
        alone = {name: value[sample : sample + 1] for name, value in given.items()}
        skip = int((alone["attention_mask"] == 0).sum())
        if family == "llava":
            alone["input_ids"] = alone["input_ids"][:, skip:]
            alone["attention_mask"] = alone["attention_mask"][:, skip:]
            single, _ = cuts(method, vlm(family), alone, Budget((9, 4), "count"))
            for together, one in zip(found, single, strict=True):
                row = together[sample]
                assert (row[row >= skip] - skip).tolist() == one[0].tolist()
    model, state = vlm(family), {}
    model.set_attn_implementation("eager")

    def watch(layer, name, module):
        def keep(module, args, output):
            state[layer, name] = (output[0] if isinstance(output, tuple) else output).detach()

        module.register_forward_hook(keep)

    for layer, block in enumerate(model.model.language_model.layers):
        parts = (block.input_layernorm, block.self_attn, block.post_attention_layernorm, block.mlp)
        for name, module in zip(("ai", "ao", "mi", "mo"), parts, strict=True):
            watch(layer, name, module)
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions[2]
    valid = given["attention_mask"].bool()
    moved = sum(
        transition(state[layer, a], state[layer, b], valid) for layer in (0, 1) for a, b in (("ai", "ao"), ("mi", "mo"))
    )
    for sample, words in enumerate((6, 3)):
        visual = (given["input_ids"][sample] == IMAGE).nonzero().squeeze(1)
        paid = maps[sample, :, -words:].mean((0, 1))[visual]
        score = normalised(moved[sample, visual].unsqueeze(0)) + normalised(paid.unsqueeze(0))
        want = visual[score[0].topk(9).indices.sort().values]
        row = found[0][sample]
        assert [i for i in row.tolist() if i in visual.tolist()] == want.tolist()


def test_options_change_what_counts():
    model = vlm("llava")
    given = prompt("llava", images("llava", 3))
    kept = {}
    choices = {
        "default": {}, "attention": {"alpha": 0.0}, "moves": {"alpha": 1.0},
        "turns": {"alpha": 1.0, "terms": "direction"}, "last": {"accumulate": False}, "image": {"among": "image"},
    }  # fmt: skip
    for name, options in choices.items():
        kept[name] = cuts(TransPrune(**SMALL, **options), model, given, Budget((8, 3), "count"))[0][-1]
    assert all(index.shape == (3, 10) for index in kept.values())
    assert not torch.equal(kept["attention"], kept["moves"])
    assert not torch.equal(kept["moves"], kept["turns"])


def test_a_share_is_of_all_visual_tokens_at_every_cut():
    found, logits = cuts(TransPrune(**SMALL), vlm("llava"), prompt("llava", images("llava", 2)), (0.875, 0.125))
    assert [index.shape[1] for index in found] == [7 + 14, 7 + 2] and logits.shape[1] == 9


@pytest.mark.parametrize(("options", "message"), [
    ({"layers": (3, 2), "first": 0}, "have to rise"), ({"layers": (2, 3), "first": 2}, "come before"),
    ({"layers": (), "first": 0}, "have to rise"), ({}, "layers 0 to 3"),
])  # fmt: skip
def test_bad_layers_are_named_before_work(options, message):
    with pytest.raises(PrunelabError, match=message), apply(TransPrune(**options), vlm("llava"), 0.5):
        pass


def test_the_released_shares_give_the_papers_flops():
    found = {name: round(entry["value"], 2) for name, entry in costs().items()}
    assert found["T1 LLaVA-1.5-7B/TransPrune-High/TFLOPs"] == 1.56
    assert found["T2 LLaVA-NeXT-7B/TransPrune-High/TFLOPs"] == 8.33
