"""Which patches tokens stand for, behind every site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.tokens.adapters.vlm_attribution import Attribution
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.fastv.method import FastV
from prunelab.methods.holitom.method import HoliTom
from prunelab.methods.pooled_tokens.method import PooledTokens
from prunelab.methods.quota.method import QuoTA
from prunelab.methods.random_drop.method import RandomDrop
from tests.contract.vlms import VLMS, film, images, prompt, typed, vlm

every = pytest.mark.parametrize("family", VLMS)


@torch.inference_mode()
def followed(method: Any, model: Any, given: dict[str, Tensor], budget: Any = 0.5) -> tuple[Attribution, Any]:
    with apply(method, model, budget) as handle:
        model.generate(**given, max_new_tokens=2, min_new_tokens=2)
        return handle.application.trace.attribution, handle.kept()


@every
def test_kept_tokens_of_an_image_are_its_patches(family):
    model = vlm(family)
    given = typed(model, prompt(family, images(family, 2)))
    for method in (DivPrune(), FastV(), RandomDrop((0,), "projected", positions="renumber")):
        found, kept = followed(method, model, given)
        order = found.encoded["image"].order()
        for sample in range(2):
            ((_, masses),) = found.behind(sample)
            whole = found.dense(sample)["image"][sample].flatten()
            left = masses["image"][sample].flatten()
            places = kept[-1][1][sample]
            if method.sites(None)[0].where == "projected":
                patches = places
            else:
                visual = found.visual["image"][sample].nonzero().squeeze(1)
                packed = {int(place): i for i, place in enumerate(visual)}
                tokens = [packed[int(p)] for p in places if int(p) in packed]
                patches = order[sample][tokens]
                patches = patches[patches >= 0]
            want = torch.zeros_like(left)
            want[patches] = 1.0
            assert torch.allclose(left, want * (whole > 0))
            assert not masses["image"][1 - sample].any(), "each sample has its own"


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "qwen2_5_vl"])
def test_masses_add_up_to_the_tokens_of_a_video(family):
    model, given = vlm(family), None
    given = typed(model, film(family, words=(4,)))
    for method in (DivPrune(), FastV(), PooledTokens(), QuoTA("even"), HoliTom(similarity=0.9), HoliTom(3)):
        if family == "qwen2_5_vl" and isinstance(method, HoliTom):
            continue
        budget = Budget((0.5, 0.5)) if getattr(method, "layer", None) == 3 else Budget(0.5)
        found, _ = followed(method, model, given, budget)
        (whole,) = found.dense(0)["video"]
        assert float(whole.sum()) == pytest.approx({"llava_onevision": 16, "llava_video": 16, "qwen2_5_vl": 32}[family])
        for site, masses in found.behind(0):
            (left,) = masses["video"]
            visual = next(step[1] for step in found.steps if step[0] is site)
            newlines = int(visual.sum()) - float(left.sum())
            assert 0 <= round(newlines, 3) <= {"llava_onevision": 1, "llava_video": 20, "qwen2_5_vl": 0}[family]
            assert round(newlines, 3) == int(round(newlines, 3)), "whole tokens"


def test_pooled_tokens_stand_for_what_pooling_mixes():
    model, given = vlm("llava_onevision"), film("llava_onevision", words=(4,))
    found, kept = followed(RandomDrop((0,), "packed"), model, given, 0.3)
    ((_, masses),) = found.behind(0)
    tokens = kept[0][1][0]
    tokens = tokens[(tokens >= 3) & (tokens < 3 + 16)] - 3
    one = torch.zeros(16)
    one[tokens] = 1.0
    basis = torch.eye(9).view(9, 3, 3)
    pooled = torch.nn.functional.interpolate(basis[None], size=[2, 2], mode="bilinear")[0].flatten(1)  # [9, 4]
    want = torch.einsum("tk,pk->tp", one.view(4, 4), pooled)
    assert torch.allclose(masses["video"][0], want, atol=1e-6)


def test_merged_tokens_hand_their_mass_to_all_they_are_made_of():
    model, given = vlm("llava_onevision"), film("llava_onevision", words=(4,))
    with torch.no_grad(), apply(HoliTom(similarity=-1.0), model, 0.5) as handle:  # all frames are alike: one segment
        model(**given)
        found = handle.application.trace.attribution
        seen = handle.adapter.projected("video", [0])
        plan, _ = handle.adapter.decide(handle.application, handle.application.sites[0], *seen)
    ((_, masses),) = found.behind(0)
    assert torch.allclose(masses["video"][0].flatten(), plan.reduce.matrix(36)[0].sum(0), atol=1e-6)
    assert float(masses["video"][0].sum()) == pytest.approx(plan.reduce.outputs)
    assert float(masses["video"][0].max()) < 1, "no patch is left alone"
