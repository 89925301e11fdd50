"""What a user can get wrong about a prompt, a budget or a method: one line each that says what to do."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Site
from prunelab.common.tokens.adapters import adapter_for
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.fastervlm.method import FasterVLM
from prunelab.methods.fastv.method import FastV
from prunelab.methods.holitom.method import HoliTom
from prunelab.methods.quota.method import QuoTA
from prunelab.methods.random_drop.method import RandomDrop
from tests.contract.vlms import IMAGE, VIDEO, VLMS, film, ids, images, prompt, typed, vlm
from tests.unit.tokens.test_vlm import Reader

every = pytest.mark.parametrize("family", VLMS)
moving = pytest.mark.parametrize("family", ["llava_onevision", "llava_video", "qwen2_5_vl"])
CALLS = {"forward": lambda model, given: model(**given), "generate": lambda m, g: m.generate(**g, max_new_tokens=2)}
how = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@torch.no_grad()
def refused(method: Any, model: Any, given: dict[str, Any], call: Any = CALLS["forward"], budget: Any = 0.5) -> str:
    """The message, which is one line; afterwards the model is as it was."""

    def wrapped() -> set[str]:
        return {name for module in model.modules() for name, value in vars(module).items() if callable(value)}

    before = wrapped()
    with pytest.raises(PrunelabError) as error, apply(method, model, budget):
        call(model, given)
    assert wrapped() == before, "nothing stays on the model"
    assert "\n" not in str(error.value)
    return str(error.value)


@every
@how
@pytest.mark.parametrize("more", [-1, 1])
def test_placeholders_that_disagree_with_features(family, call, more):
    model = vlm(family)
    given = prompt(family, images(family, 1))
    tokens = int((given["input_ids"] == IMAGE).sum())
    given = typed(model, given | ids([[("text", 3), (IMAGE, tokens + more), ("text", 4)]]))
    said = refused(DivPrune(), model, given, call)
    assert said.startswith(f"the prompt has {tokens + more} placeholders for {tokens} visual features; give each image")


@moving
@how
def test_placeholders_that_disagree_with_a_video(family, call):
    model = vlm(family)
    given = film(family, words=(4,))
    tokens = int((given["input_ids"] == VIDEO).sum())
    given = typed(model, given | ids([[("text", 3), (VIDEO, tokens - 2), ("text", 4)]]))
    assert f"{tokens - 2} placeholders for {tokens} visual" in refused(FastV(), model, given, call)


@every
@how
@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "words"])
def test_no_visual_token_in_the_prompt(family, call, pixels):
    model = vlm(family)
    given = prompt(family, images(family, 1)) if pixels else {}
    given = typed(model, given | ids([[("text", 9)]]))
    said = refused(DivPrune(), model, given, call)
    assert said == "the prompt holds no visual token; put the processor's image or video token into it"


@moving
@how
def test_a_video_without_a_frame(family, call):
    model = vlm(family)
    given = typed(model, film(family, frames=0, words=(4,)))
    assert refused(FastV(), model, given, call) == "the model was given a video without a frame; give at least one"


def test_fewer_tokens_than_segments():
    """Below one token a segment (HoliTom), a frame (QuoTA) or at all."""
    model, given = vlm("llava_onevision"), film("llava_onevision", words=(4,))
    for method in (HoliTom(similarity=1.0), HoliTom(similarity=-1.0)):
        assert "give a larger" in refused(method, model, given, budget=0.0)
    for budget in (Budget(3, "count"), Budget(0.0)):
        assert "give a larger budget" in refused(QuoTA("even"), model, given, budget=budget)
    assert "give a larger budget" in refused(RandomDrop((0,), "projected"), model, given, budget=0.0)


@pytest.mark.parametrize("budget", [1.01, (0.5, 1.5), -0.1, float("nan"), True, "1"])
def test_ratios_outside_their_range(budget):
    with pytest.raises(PrunelabError, match=r"out of range: it must be between 0 and 1|not a finite number"):
        Budget(budget)
    with pytest.raises(PrunelabError, match="out of range"):
        Budget.parse("1.2")


def test_signals_that_a_site_cannot_give():
    """A message names the signal and the site, and for a class token that there is none."""
    cases = {
        (
            "llava_onevision",
            FasterVLM(),
        ): "fastervlm reads cls_row, not to be had at projected; this model has no class",
        (
            "llava_video",
            FasterVLM("packed"),
        ): "fastervlm reads cls_row, not to be had at packed; this model has no class",
        ("qwen2_5_vl", FasterVLM()): "fastervlm reads cls_row, not to be had at projected",
        ("llava", FastV(0)): "fastv reads last_row, not to be had at input",
        ("llava", FastV(4)): "prunes at layer 4, but this model has layers 0 to 3; set the method's layers",
        ("llava", Reader(Site(0, "packed"), "keys")): "reader reads keys, not to be had at packed",
        ("llava", RandomDrop((1,), "after_attention")): "but llava has only tower, encoded, projected, packed, input",
        ("llava", RandomDrop((0,), "packed", rest="halt")): "random_drop needs a model whose tokens can halt",
    }
    for (family, method), text in cases.items():
        model = vlm(family)
        assert text in refused(method, model, prompt(family, images(family, 1)))


def test_frame_scores_that_do_not_fit():
    model, given = vlm("llava_onevision"), film("llava_onevision")
    assert "quota weighs frames by the service 'frame_scores'; pass services" in refused(QuoTA(), model, given)
    for rows in ([torch.ones(4)], [torch.ones(3)] * 2):
        scored = apply(QuoTA(), model, 0.5, services={"frame_scores": rows})
        with pytest.raises(PrunelabError, match="one row of scores a video"), torch.no_grad(), scored:
            model(**given)


@moving
def test_what_is_shown_is_told_to_methods(family):
    """`modality`: image, video, or None for both."""
    model = vlm(family)
    if family == "qwen2_5_vl":
        both = typed(
            model,
            film(family, words=(4,))
            | {k: v for k, v in prompt(family, images(family, 1)).items() if k in ("pixel_values", "image_grid_thw")}
            | ids([[("text", 2), (VIDEO, 32), ("text", 2), (IMAGE, 16), ("text", 3)]]),
        )
        asked = {"image": typed(model, prompt(family, images(family, 1))), "video": typed(model, film(family))}
        asked |= {None: both}
    else:
        asked = {"image": prompt(family, images(family, 1)), "video": film(family)}
    for wanted, given in asked.items():
        for site in (Site(0, "packed"), Site(0, "projected"), Site(2, "input")):
            reader = Reader(site, "hidden")
            pooled = family != "qwen2_5_vl" and site.where == "projected" and wanted != "image"
            fails = pytest.raises(PrunelabError, match="renumber") if pooled else contextlib.nullcontext()
            with torch.no_grad(), fails, apply(reader, model, 1.0):  # pooled frames have no place in the sequence
                model(**given)
            assert reader.modality == (wanted if site.where != "projected" else wanted or "video")


def test_families_that_read_no_videos_say_so():
    with pytest.raises(PrunelabError, match="llava reads no videos"):
        adapter_for(vlm("llava")).prompt(frames=4)
