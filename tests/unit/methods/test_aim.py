"""AIM: what merging gives the decoder, what the schedule drops, and the paper's cost simulation."""

from __future__ import annotations

import csv

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import papers
from prunelab.methods.aim.method import AIM, importance, merge, retained
from prunelab.methods.aim.tables import QWEN2_7B, VICUNA_7B, costs, prefill, scheduled, staged
from tests.contract.vlms import VLMS, film, images, prompt, typed, vlm
from tests.unit.tokens.test_vlm import oracle, pair

# -- merging -----------------------------------------------------------------------------------------------------------


def test_half_of_the_tokens_leaves_the_odd_places_in_order():
    x = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(0))
    out = merge(x, 5, (2, 5)).apply(x)
    unit = torch.nn.functional.normalize(x, dim=-1)
    partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).argmax(-1)
    for b in range(2):
        for odd in range(5):
            group = [x[b, 2 * odd + 1], *(x[b, 2 * e] for e in range(5) if partner[b, e] == odd)]
            assert torch.allclose(out[b, odd], torch.stack(group).mean(0), atol=1e-6)


@pytest.mark.parametrize("outputs", [1, 2, 7, 13, 25, 48, 49])
def test_rounds_end_where_they_should_and_share_every_token_out(outputs):
    x = torch.randn(3, 49, 6, generator=torch.Generator().manual_seed(1))
    matrix = selection.merged(x, outputs).matrix(49)
    assert matrix.shape[1] == outputs
    assert torch.allclose(matrix.sum(-1), torch.ones(3, outputs)), "means"
    assert bool(((matrix > 0).sum(1) == 1).all()), "no token in two places"


def test_pooling_alone_is_the_models_own():
    """A video that is pooled and not merged: the decoder reads what it reads without the method."""
    model = vlm("llava_onevision")
    given = film("llava_onevision")
    with torch.no_grad():
        dense = model(**given).logits
        with apply(AIM(pool=2), model, 1.0):
            assert torch.allclose(model(**given).logits, dense, atol=5e-5)


def test_frames_are_merged_apart():
    model = vlm("llava_onevision")
    given = film("llava_onevision")
    with torch.no_grad(), apply(AIM(pool=2), model, Budget(2, "count")) as handle:
        output = model(**given)
        assert output.past_key_values.layers[0].keys.shape[2] == 7 + 4 * 2 + 1
        whole = handle.adapter.encoded["video"].features[0]
        assert handle.report().tokens[0][0] == 7 + 4 * 2 + 1
    order = [merge(frame.unsqueeze(0), 2, (3, 3), 2).apply(frame.unsqueeze(0))[0] for frame in whole]
    embed = model.get_input_embeddings()(given["input_ids"][:1])
    sequence = torch.cat(
        [embed[:, :3], torch.cat(order).unsqueeze(0), model.model.image_newline[None, None], embed[:, -4:]], 1
    )
    with torch.no_grad():
        want = model.lm_head(model.model.language_model(inputs_embeds=sequence).last_hidden_state)
    assert torch.allclose(output.logits[:1], want, atol=5e-5)


# -- the random walk and the schedule ----------------------------------------------------------------------------------


def test_a_walk_on_plain_averages_is_where_it_leads():
    """With attention that is even over the past, one step from anywhere: harmonic sums."""
    n = 6
    logits = torch.zeros(1, 2, n, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    want = torch.tensor([sum(1 / (row + 1) for row in range(column, n)) / n for column in range(n)])
    assert torch.allclose(importance(logits, iterations=1)[0], want)
    assert torch.allclose(importance(logits, damping=1.0)[0], torch.full((n,), 1 / n))


def test_padding_starts_no_walk():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 8, 8, generator=g)
    valid = torch.tensor([[False, False, True, True, True, True, True, True]])
    seen = torch.ones(8, 8, dtype=torch.bool).tril() & valid[:, None, None]
    padded = logits.masked_fill(~(seen | torch.eye(8, dtype=torch.bool)), float("-inf"))
    alone = logits[..., 2:, 2:].masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
    assert torch.allclose(importance(padded, valid=valid)[:, 2:], importance(alone), atol=1e-6)


def test_the_schedule_falls_evenly_to_none():
    assert [retained(layer, 14, 22) for layer in (13, 14, 17, 21, 25)] == [1.0, 0.875, 0.5, 0.0, 0.0]
    scores, prunable = torch.tensor([[9.0, 1, 3, 2, 0]]), torch.tensor([[False, True, True, True, False]])
    assert selection.top_k_units(scores, prunable, 3, [1]).index.tolist() == [[0, 2, 4]]
    assert selection.top_k_units(scores, prunable, 3, [0]).index.tolist() == [[0, 4]]


def test_the_first_cut_is_by_the_eager_attention_of_the_layer_before():
    model, eager = vlm("llava"), vlm("llava")
    eager.set_attn_implementation("eager")
    given = prompt("llava", images("llava", 2))
    with torch.no_grad():
        with apply(AIM(layers=(0, 2)), model, 1.0) as handle:
            model(**given)
        attention = eager(**given, output_attentions=True).attentions[0]
    kept = next(places for site, places in handle.kept() if site.where == "input")
    walk = importance(attention.log())[:, 3:19]
    for b in range(2):
        assert set(kept[b].tolist()) == {0, 1, 2, 19, 20, 21, 22} | {int(i) + 3 for i in walk[b].topk(8).indices}


@pytest.mark.parametrize("family", VLMS)
def test_prefill_equals_the_oracle_and_caches_empty(family):
    model = vlm(family)
    given = pair(family, model)
    with torch.no_grad(), apply(AIM(layers=(0, 3)), model, 1.0) as handle:
        pruned = model(**given)
        kept = [(site, places) for site, places in handle.kept() if site.where == "input"]
        held = [layer.keys.shape[2] for layer in pruned.past_key_values.layers]
        words = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    want = oracle(model, given, kept, renumber=False)
    places = kept[-1][1]
    for b in range(2):
        real = places[b] >= 0
        assert torch.allclose(pruned.logits[b, real], want[b, places[b, real]], atol=5e-5)
    assert held == sorted(held, reverse=True) and len(set(held)) == 4
    assert held[-1] == int((given["attention_mask"] - (given["input_ids"] == 60).long()).sum(1).max()), (
        "only text is left"
    )
    assert words.shape[1] == given["input_ids"].shape[1] + 3


def test_merging_and_the_schedule_together_alone_and_in_a_padded_batch():
    model = vlm("llava")
    given = pair("llava", model)
    with torch.no_grad(), apply(AIM(layers=(1, 4)), model, 0.5):
        together = model(**given).logits[:, -1]
        for b in range(2):
            real = given["attention_mask"][b].bool()
            one = {"input_ids": given["input_ids"][b : b + 1, real], "pixel_values": given["pixel_values"][b : b + 1]}
            assert torch.allclose(model(**one).logits[0, -1], together[b], atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(PrunelabError, match="larger l2"):
        AIM(layers=(5, 5))
    with pytest.raises(PrunelabError, match="of at least 1"):
        AIM(pool=0)
    model, given = vlm("llava"), prompt("llava", images("llava", 1))
    with pytest.raises(PrunelabError, match="one budget"), apply(AIM(layers=(0, 2)), model, Budget((0.5, 0.2, 0.1))):
        model(**given)
    bare = typed(model, {"input_ids": given["input_ids"][:, :3]})
    with pytest.raises(PrunelabError, match="no visual token"), apply(AIM(), model, 0.5):
        model(**bare)


# -- costs -------------------------------------------------------------------------------------------------------------


def test_simulated_costs_are_the_printed_ones():
    found = costs()
    with (papers.METHODS / "aim" / "reported.csv").open() as file:
        printed = {f"{r['table']}/{r['row']}/{r['column']}": float(r["value"]) for r in csv.DictReader(file)}
    assert set(found) <= set(printed) and len(found) == 60
    off = {name for name, value in found.items() if abs(value["value"] - printed[name]) > 0.006}
    shares, columns = (
        ("12.5%", "6.3%", "3.1%", "1.6%"),
        ("FLOPs", "prefill"),
    )  # by a schedule that the paper does not tell
    assert off == {"video/VTW/prefill"} | {f"merge ratio/{share}/{column}" for share in shares for column in columns}
    assert found["video/VTW/prefill"]["value"] == pytest.approx(printed["video/VTW/prefill"], rel=0.003)


def test_the_simulation_counts_two_operations_a_multiplication():
    """Against the weights and the attention maps alone, which are nearly everything."""
    tokens = 6372
    weights = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    maps = 28 * 2 * tokens**2 * 3584
    assert prefill(staged(QWEN2_7B, (0, tokens - 100)))[0] * 1e12 == pytest.approx(
        2 * (weights * tokens + maps), rel=0.003
    )
    assert scheduled(72, 13, 21, VICUNA_7B)[:14] == [112] * 13 + [103]
    assert scheduled(72, 13, 21, VICUNA_7B)[20:] == [40] * 12
