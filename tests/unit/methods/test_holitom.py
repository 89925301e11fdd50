"""HoliTom: its segmentation against a search of all cuts, its merges against loops that spell them out, on a video."""

from __future__ import annotations

import csv
import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.holitom import spelled_out
from prunelab.common.apply import apply
from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, ModelInfo, Site
from prunelab.common.experiments import papers
from prunelab.common.tokens.signals import TokenSignals
from prunelab.common.tokens.video import footprints, pooled
from prunelab.methods.holitom.method import HoliTom, absorbed, kept_count
from prunelab.methods.holitom.segmentation import frame_similarity, gain_table, run_lengths, segment, split
from prunelab.methods.holitom.tables import costs
from tests.contract.references import signals as synthetic
from tests.contract.vlms import VIDEO, ids, images, prompt, vlm


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- segmentation ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 7), places=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_segments_save_as_much_as_any_cut_of_the_video(frames, places, share, seed):
    similar = torch.rand(frames - 1, places, generator=seeded(seed)) < share
    runs = run_lengths(similar)

    def gain(first: int, last: int) -> int:
        return (last - first) * int(similar[first:last].all(0).sum()) if last > first else 0

    table = gain_table(runs)
    for first, last in itertools.combinations_with_replacement(range(frames), 2):
        assert table[first, last - first] == gain(first, last)
    cuts, saved = segment(runs)
    assert [first for first, _ in cuts] == [0] + [last + 1 for _, last in cuts[:-1]] and cuts[-1][1] == frames - 1
    assert saved == sum(gain(*part) for part in cuts)
    for count in range(frames):
        for ends in itertools.combinations(range(frames - 1), count):
            starts = [0, *(e + 1 for e in ends)]
            assert sum(gain(s, e) for s, e in zip(starts, [*ends, frames - 1], strict=True)) <= saved
    assert (cuts, saved) == spelled_out(similar), "ties too"


def test_no_segment_is_longer_than_the_window():
    runs = run_lengths(torch.ones(9, 3, dtype=torch.bool))
    assert segment(runs)[0] == [(0, 9)]
    assert segment(runs, 4)[0] == [(0, 3), (4, 7), (8, 9)]
    assert segment(runs, 1) == ([(t, t) for t in range(10)], 0)


def test_128_frames_are_cut_within_50_ms_on_one_core():
    similar = torch.rand(127, 196, generator=seeded(0)) > 0.1
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            start = time.perf_counter()
            segment(run_lengths(similar))
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times) < 0.05


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pooling", "side"), [("bilinear", 14), ("average", 13), ("none", 27)])
def test_footprints_are_what_pooling_mixes(pooling, side):
    maps = torch.randn(2, 27, 27, 5, generator=seeded(1))
    patch, weight = footprints(27, 27, pooling)
    assert patch.shape[0] == side**2
    mixed = (maps.flatten(1, 2)[:, patch] * weight.unsqueeze(-1)).sum(2)
    assert torch.allclose(mixed, pooled(maps, pooling).flatten(1, 2), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 20), share=st.floats(0.05, 1), part=st.sampled_from([None, 0.6]), seed=st.integers(0, 9))
def test_a_cluster_is_its_centre_and_the_mean_of_the_others(tokens, share, part, seed):
    x = torch.randn(2, tokens, 4, generator=seeded(seed))
    distance = selection.scaled_distance(x)
    found = selection.cluster(distance, selection.density_peaks(distance, max(1, int(share * tokens)), 7))
    merged = found.mix(part).apply(x)
    for b in range(2):
        for c, centre in enumerate(found.centres[b].tolist()):
            others = [i for i in range(tokens) if found.slot[b, i] == c and i != centre]
            assert found.slot[b, centre] == c
            assert all(distance[b, i, centre] == distance[b, i, found.centres[b]].min() for i in others)
            if not others:
                want = x[b, centre]
            elif part is None:
                want = x[b, [centre, *others]].mean(0)
            else:
                want = part * x[b, centre] + (1 - part) * x[b, others].mean(0)
            assert torch.allclose(merged[b, c], want, atol=1e-5)


def test_noise_parts_equal_densities():
    distance = torch.ones(1, 6, 6) - torch.eye(6)
    assert selection.density_peaks(distance, 2, 7).tolist() == [[0, 1]]
    noise = torch.tensor([[0, 0, 0, 0, 1e-6, 2e-6]])
    assert selection.density_peaks(distance, 2, 7, noise).tolist() == [[5, 4]]


@pytest.mark.parametrize("inner", ["running", "mean"])
def test_inside_the_decoder_tokens_go_into_the_most_similar_kept_one(inner):
    """Two samples, the second padded in front and with fewer visual tokens."""
    x = torch.randn(2, 14, 6, generator=seeded(2))
    row = torch.rand(2, 3, 14, generator=seeded(3))
    prunable = torch.zeros(2, 14, dtype=torch.bool)
    prunable[0, 2:11] = prunable[1, 5:12] = True
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[1, :3] = False
    method = HoliTom(layer=2, inner=inner)
    info = ModelInfo("test", 4, 3, 6, 14)
    site = method.sites(info)[1]
    sources = {"hidden": lambda: x, "last_row": lambda: row}
    given_signals = TokenSignals(sources, prunable=prunable, units=9, info=info, valid=valid)
    plan = method.plan(site, given_signals, Budget(0.5))
    reduce = plan.reduce
    assert isinstance(reduce, Gather) and plan.positions == "original"
    made = method.refine(site, reduce.apply(x), given_signals, plan)
    for b in range(2):
        visual = prunable[b].nonzero().squeeze(1)
        kept = visual[row[b].mean(0)[visual].topk(len(visual) // 2).indices].sort().values.tolist()
        want, guests = {i: x[b, i].clone() for i in kept}, {i: [x[b, i]] for i in kept}
        for i in visual.tolist():
            if i not in kept:
                best = kept[int(torch.cosine_similarity(x[b, i], x[b, kept], dim=-1).argmax())]
                want[best] = (want[best] + x[b, i]) / 2
                guests[best].append(x[b, i])
        if inner == "mean":
            want = {i: torch.stack(all_).mean(0) for i, all_ in guests.items()}
        want |= {i: x[b, i] for i in range(14) if valid[b, i] and not prunable[b, i]}
        real = range(reduce.outputs) if reduce.valid is None else reduce.valid[b].nonzero().squeeze(1).tolist()
        assert [int(reduce.index[b, k]) for k in real] == sorted(want)
        for k, i in zip(real, sorted(want), strict=True):
            assert torch.allclose(made[b, k], want[i], atol=1e-6)


def test_nothing_is_merged_where_no_visual_token_stays():
    x = torch.randn(1, 5, 3, generator=seeded(4))
    kept = Gather(torch.tensor([[0, 4]]))
    visual = torch.tensor([[False, True, True, True, False]])
    assert torch.equal(absorbed(x, kept, visual, True), kept.apply(x))


# -- on a video --------------------------------------------------------------------------------------------------------


def video(frames: int, seed: int = 2, batch: int = 2) -> dict[str, torch.Tensor]:
    """A prompt for the tiny OneVision, 2 x 2 tokens a frame; the left half hardly changes, the right one jumps."""
    pixels = torch.randn(batch, frames, 3, 24, 24, generator=seeded(seed))
    pixels[:, 1:, ..., :16] = pixels[:, :1, ..., :16] + 0.05 * pixels[:, 1:, ..., :16]
    return {"pixel_values_videos": pixels} | ids([[("text", 3), (VIDEO, 4 * frames + 1), ("text", 4)]] * batch)


def by_hand(tokens: torch.Tensor, attention: torch.Tensor, tau: float, ratio: float, order: str) -> torch.Tensor:
    """The tokens [K, D] left of pooled ones [T, N, D] that receive [T, N], token by token."""
    frames, places, _ = tokens.shape
    runs = run_lengths(frame_similarity(tokens) > tau)
    cuts, saved = segment(runs)
    share = min(1, ratio * frames * places / (frames * places - saved))
    out = []
    for first, last in cuts:
        static, dynamic = split(runs, (first, last))
        means = tokens[first : last + 1, static].mean(0)
        clusters = round(len(static) * share)
        if clusters:
            distance = selection.scaled_distance(means.unsqueeze(0))
            found = selection.cluster(distance, selection.density_peaks(distance, clusters, 7))
            for c, centre in enumerate(found.centres[0].tolist()):
                others = [i for i in range(len(static)) if found.slot[0, i] == c and i != centre]
                token = 0.6 * means[centre] + 0.4 * means[others].mean(0) if others else means[centre]
                out.append((first, int(static[centre]), token))
        for frame in range(first, last + 1):
            best = attention[frame, dynamic].topk(kept_count(len(dynamic), share)).indices
            out += [(frame, int(i), tokens[frame, i]) for i in dynamic[best].sort().values]
    if order == "grid":
        out.sort(key=lambda entry: entry[:2])
    return torch.stack([token for _, _, token in out])


@pytest.mark.parametrize("order", ["segment", "grid"])
def test_the_decoder_reads_what_is_left_of_the_video(order):
    """Against a sequence put together by hand from the tower's and projector's own outputs."""
    model, asked = vlm("llava_onevision"), video(6)
    body = model.model
    tower = body.vision_tower
    method = HoliTom(similarity=0.95, order=order)
    with torch.no_grad():
        with apply(method, model, 0.4):
            got = model(**asked).logits[:, -1]
            words = model.generate(**asked, max_new_tokens=3, min_new_tokens=3, num_beams=2)
        tower.set_attn_implementation("eager")
        seen = tower(asked["pixel_values_videos"].flatten(0, 1), output_hidden_states=True, output_attentions=True)
        features = body.multi_modal_projector(seen.hidden_states[-1])
        tokens = body.apply_pooling(features).unflatten(0, (2, 6))
        received = seen.attentions[-1].mean((1, 2)).view(12, 3, 3, 1)
        attention = pooled(received, "bilinear").view(2, 6, 4)
        embedded = model.get_input_embeddings()(asked["input_ids"])
        for b in range(2):
            cuts, saved = segment(run_lengths(frame_similarity(tokens[b]) > 0.95))
            assert saved > 0 and len(cuts) < 6, "something repeats"
            left = by_hand(tokens[b], attention[b], 0.95, 0.4, order)
            parts = [embedded[b, :3], left, body.image_newline.unsqueeze(0), embedded[b, -4:]]
            want = model(inputs_embeds=torch.cat(parts).unsqueeze(0)).logits[:, -1]
            assert torch.allclose(got[b : b + 1], want, atol=1e-5)
    assert words.shape == (2, asked["input_ids"].shape[1] + 3)


def test_both_merges_work_together_alone_and_in_a_padded_batch():
    model, asked = vlm("llava_onevision"), video(5)
    method, budget = HoliTom(layer=2, similarity=0.95), Budget((0.5, 0.5))
    runs = [[("text", 3), (VIDEO, 21), ("text", 4)], [("text", 1), (VIDEO, 21), ("text", 2)]]
    asked |= ids(runs)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        with apply(method, model, budget) as handle:
            output = model(**asked)
            report = handle.report()
            together = model.generate(**asked, **options)[:, -4:]
        attention = [tokens for tokens, _ in report.tokens]
        assert attention[0] == attention[1] > attention[2] == attention[3]
        cache = output.past_key_values
        assert cache.layers[1].keys.shape[2] > cache.layers[2].keys.shape[2]
        assert report.cache_bytes is not None
        for b in range(2):
            row = asked["attention_mask"][b].bool()
            alone = {"pixel_values_videos": asked["pixel_values_videos"][b : b + 1]}
            alone |= {name: asked[name][b : b + 1, row] for name in ("input_ids", "attention_mask")}
            with apply(method, model, budget):
                assert torch.allclose(model(**alone).logits[:, -1], output.logits[b : b + 1, -1], atol=1e-5)
                assert torch.equal(model.generate(**alone, **options)[:, -4:], together[b : b + 1])


def test_tokens_merged_inside_the_decoder_keep_their_positions():
    model, asked = vlm("llava_onevision"), video(4, batch=1)
    with torch.no_grad(), apply(HoliTom(layer=1), model, Budget((1.0, 0.5))) as handle:
        model(**asked)
        positions = handle.adapter.running.positions[0]  # type: ignore[attr-defined]
        before = handle.application.trace.attention[0]
    assert len(positions) < before == positions[-1] + 1, "gaps, but the last token is where it was"
    assert bool((positions.diff() > 0).all())


def test_an_image_is_not_pooled_and_keeps_what_receives_most_attention():
    model, pixels = vlm("llava"), images("llava", 2)
    with torch.no_grad():
        with apply(HoliTom(), model, 0.3):
            got = model(**prompt("llava", pixels)).logits[:, -1]
        with apply(ByReceived(), model, Budget(kept_count(16, 0.3), "count")):
            assert torch.allclose(model(**prompt("llava", pixels)).logits[:, -1], got, atol=1e-5)


class ByReceived(HoliTom):
    """The same ranking as a plain selection."""

    def plan(self, site, signals, budget):
        from prunelab.common.core.plan import Plan

        return Plan(signals.keep(budget, scores=signals.received.mean(1)), positions="renumber")


def test_newlines_stand_behind_rows_where_the_model_has_them():
    model, pixels = vlm("llava_next"), images("llava_next", 1)
    asked = prompt("llava_next", pixels)
    with torch.no_grad(), apply(HoliTom(similarity=1.0, order="grid"), model, 1.0):
        assert model(**asked).logits.shape[1] == 7 + 5 * (16 + 4), "five crops of four rows, each with its newline"


def test_noise_comes_from_the_seed():
    model, asked = vlm("llava_onevision"), video(6)
    with torch.no_grad():
        found = []
        for seed, noise in ((0, 0.0), (0, 1e-6), (0, 1e-6), (0, 9.0), (1, 9.0)):
            with apply(HoliTom(similarity=0.5, noise=noise), model, 0.3, seed=seed):
                found.append(model(**asked).logits)
    assert torch.equal(found[1], found[2])
    assert found[3].shape == found[4].shape and not torch.equal(found[3], found[4])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_budget_below_one_token_a_segment_is_refused():
    model, asked = vlm("llava_onevision"), video(6)
    with torch.no_grad():
        with apply(HoliTom(similarity=-1.0), model, 0.01), pytest.raises(PrunelabError, match="frames 0 to 5; give a"):
            model(**asked)
        with apply(HoliTom(), model, 0.0), pytest.raises(PrunelabError, match="give a larger"):
            model(**asked)
    with pytest.raises(PrunelabError, match="between 0 and 1"):
        Budget(1.2)


def test_padded_features_and_missing_signals_are_refused():
    method = HoliTom()
    padded = synthetic(patches=9, pad=3)[0]
    with pytest.raises(PrunelabError, match="one length only"):
        method.plan(method.sites(padded.info)[0], padded, Budget(0.5))
    with pytest.raises(PrunelabError, match="layers 0 to 3"), apply(HoliTom(layer=18), vlm("llava_onevision"), 0.5):
        pass


def test_sites_and_a_count_for_a_budget():
    info = ModelInfo("test", 28, 28, 8, 99)
    assert HoliTom().sites(info) == [Site(0, "projected")]
    assert HoliTom(layer=18).sites(info)[1] == Site(18, "input", 1)
    given_signals = synthetic(patches=20)[0]  # pooled to ten
    method = HoliTom()
    reduce = method.plan(method.sites(info)[0], given_signals, Budget(4, "count")).reduce
    assert reduce.outputs == 1 + 4


# -- the tables --------------------------------------------------------------------------------------------------------


def test_flops_columns_give_every_printed_digit():
    found = costs()
    with (papers.METHODS / "holitom" / "reported.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if "FLOPs" in r["column"]]
    checked = 0
    for row in rows:
        value = found.get(f"{row['table']}/{row['row']}/{row['column']}")
        if value is None:
            assert row["row"] == "PDrop 100%", row
            continue
        assert round(value["value"], 1) == float(row["value"]), row
        checked += 1
    assert checked == len(found) == len(rows) - 2
    assert math.isclose(found["main LLaVA-OV-7B/HoliTom 25%/prefill FLOPs"]["value"], 7.11, abs_tol=0.005)
