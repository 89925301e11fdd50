"""HoloV: shares of parts against a loop, what becomes of lost ones, and what a decoder then reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.holov.method import HoloV, parts_of, quotas, share_overflow
from tests.contract.vlms import images, prompt, typed, vlm


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_parts_follow_the_papers_rule_and_the_first_are_longer():
    assert [sum(n for n, _ in parts_of(576, keep, 0)) for keep in (192, 128, 64)] == [5, 8, 16]
    assert parts_of(576, 192, 0) == [(1, 116), (4, 115)]
    assert parts_of(2880, 320, 0) == [(16, 180)]
    assert parts_of(10, 4, 12) == [(10, 1)] and parts_of(5, 0, 0) == [(5, 1)]


def spelled_out(tokens, attention, method, keep):
    """One sample, part by part."""
    bounds, start = [], 0
    for count, size in parts_of(len(tokens), keep, method.crops):
        for _ in range(count):
            bounds.append(range(start, start + size))
            start += size
    means, scores = [], []
    for part in bounds:
        x, a = tokens[list(part)], attention[list(part)]
        unit = x / (x.norm(dim=1, keepdim=True) + 1e-6)
        alike = unit @ unit.T
        alike.fill_diagonal_(0)
        m = len(part)
        variance = ((alike - alike.sum(1, keepdim=True) / (m - 1)) ** 2).sum(1) / (m - 1)
        score = 1000 * a + method.diversity * (1000 * a).mean() / (variance.mean() + 1e-6) * variance
        scores.append(score)
        means.append(score.mean())
    weight = torch.stack(means) / (sum(means) + 1e-6)
    quota = [int(w * keep) for w in weight]
    for c in weight.argsort(descending=True, stable=True)[: keep - sum(quota)].tolist():
        quota[c] += 1
    out = []
    for part, q, score in zip(bounds, quota, scores, strict=True):
        best = attention[list(part)] if method.choose == "attention" else score
        ranked = best.argsort(descending=True, stable=True)[:q].tolist()
        out += list(part) if q >= len(part) else [part[i] for i in ranked]
    return (out + [-1] * keep)[:keep], quota, [len(part) for part in bounds]


@settings(max_examples=25, deadline=None)
@given(total=st.integers(8, 60), keep=st.integers(1, 20), parts=st.integers(1, 4), seed=st.integers(0, 50),
       choose=st.sampled_from(["attention", "score"]), diversity=st.sampled_from([0.09, 1.0]))  # fmt: skip
def test_slots_are_the_loops(total, keep, parts, seed, choose, diversity):
    tokens, attention = (
        torch.randn(total, 6, generator=seeded(seed)),
        torch.rand(total, generator=seeded(seed + 1)) ** 6,
    )
    method = HoloV(crops=parts, diversity=diversity, choose=choose)
    want, quota, sizes = spelled_out(tokens, attention, method, keep)
    assert method.slots(tokens.unsqueeze(0), attention.unsqueeze(0), keep)[0].tolist() == want
    assert want.count(-1) == keep - sum(min(q, s) for q, s in zip(quota, sizes, strict=True))


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), share=st.floats(0, 1), seed=st.integers(0, 50))
def test_shared_overflow_finds_a_place_for_all(sizes, share, seed):
    room = torch.tensor(sizes)
    keep = int(share * sum(sizes))
    raw = torch.rand(2, len(sizes), generator=seeded(seed)) ** 8 + 1e-9
    weights = raw / (raw.sum(1, keepdim=True) + 1e-6)
    quota = share_overflow(quotas(weights, torch.tensor([[keep]] * 2)), weights, room, keep)
    assert quota.sum(1).tolist() == [keep] * 2
    assert bool((quota <= room).all()) and bool((quota >= 0).all())


@pytest.mark.parametrize("overflow", ["zero", "drop", "share"])
def test_what_the_decoder_reads(overflow):
    """Peaks in one part: as released the rest is zero vectors, else there are fewer tokens, or others."""
    model = vlm("llava")
    given = prompt("llava", images("llava", 1))
    method = HoloV(crops=8, overflow=overflow, scale=1e6)
    read = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad(), apply(method, model, Budget(10, "count")) as handle:
        model(**given)
        features = handle.adapter.features.flatten(0, 1)
        rows = next(iter(handle.adapter.encoded.values())).seen.signal("cls_row", 1, 8, 1)[0].mean(-1)
    slot = method.slots(features.unsqueeze(0), rows.unsqueeze(0), 10)[0]
    got = read[0][0, 3:-4]
    lost = int((slot < 0).sum())
    if overflow == "zero":
        assert torch.allclose(got, torch.where(slot[:, None] >= 0, features[slot.clamp_min(0)], 0.0), atol=1e-6)
    else:
        assert torch.allclose(got, features[slot[slot >= 0].sort().values], atol=1e-6)
    assert lost == 0 if overflow == "share" else lost > 0


def test_zeros_have_no_place_of_their_own_and_qwen_has_no_class_token():
    model = vlm("qwen2_5_vl")
    given = typed(model, prompt("qwen2_5_vl", images("qwen2_5_vl", 1)))
    with pytest.raises(PrunelabError, match="reads cls_row"), apply(HoloV(), model, 0.5):
        pass
    zeros = HoloV(attention="received", positions="original")
    with torch.no_grad(), pytest.raises(PrunelabError, match="number"), apply(zeros, model, 0.5):
        model(**given)
    with (
        torch.no_grad(),
        apply(HoloV(attention="received", overflow="drop", positions="original"), model, 0.5) as handle,
    ):
        model(**given)
        assert handle.kept()[0][1].shape[1] <= 8
