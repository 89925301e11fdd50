"""Families of image and video language models that a handful of methods is tried on, one for each kind of site:
keep-all is the identity, the rest is what a full forward pass on the kept tokens gives, also padded, with several
images, in a second turn, and under every way to write."""

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
from prunelab.methods.random_drop.method import RandomDrop
from tests.contract.kin import KIN, MOVING, asked, filmed, kin
from tests.contract.vlms import VIDEO
from tests.unit.tokens.test_vlm import Reader, check_generation, oracle

PROJECTED = RandomDrop((0,), "projected", positions="renumber")
PACKED = RandomDrop((0,), "packed")
INSIDE = RandomDrop((0, 3), "input")
CUTS = (PACKED, RandomDrop((0,), "packed", positions="renumber"), INSIDE, FastV(1))
ENCODED = RandomDrop((0,), "encoded", positions="renumber")
TOWER = RandomDrop((1,), "tower", positions="renumber")
KEEPERS = (PROJECTED, PACKED, INSIDE, DivPrune(), FastV(2))
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
every = pytest.mark.parametrize("family", KIN)
asking = pytest.mark.parametrize(
    ("family", "ask"),
    [(f, asked) for f in KIN] + [(f, filmed) for f in MOVING],
    ids=lambda v: getattr(v, "__name__", v),
)


@asking
@torch.no_grad()
def test_keep_all_is_the_identity(family, ask):
    model = kin(family)
    given = ask(family, model)
    dense, mask = model(**given).logits, given["attention_mask"].bool()
    for method in KEEPERS:
        with apply(method, model, 1.0):
            assert torch.allclose(model(**given).logits[mask], dense[mask], atol=2e-4), method
        assert torch.equal(model(**given).logits, dense), "and everything is as before"


@asking
@torch.no_grad()
def test_what_happens_before_the_projector(family, ask):
    """Tokens that leave the encoder, or behind it, leave the sequence; where the class joins patches none leave it."""
    model = kin(family)
    given = ask(family, model)
    dense, mask = model(**given).logits, given["attention_mask"].bool()
    for method in (ENCODED, TOWER):
        if method.where not in adapter_for(model).signals:
            with pytest.raises(PrunelabError, match=f"prunes at '{method.where}', but"), apply(method, model, 0.5):
                pass
            continue
        with apply(method, model, 1.0):
            assert torch.allclose(model(**given).logits[mask], dense[mask], atol=2e-4), method
        with apply(method, model, 0.5):
            assert model(**given).logits.shape[1] < dense.shape[1]


@asking
@torch.no_grad()
def test_prefill_equals_the_oracle(family, ask):
    model = kin(family)
    given = ask(family, model)
    for method in CUTS:
        with apply(method, model, 0.5) as handle:
            pruned, kept = model(**given).logits, handle.kept()
        want = oracle(model, given, kept, getattr(method, "positions", "") == "renumber")
        for b, places in enumerate(kept[-1][1]):
            real = places >= 0
            assert torch.allclose(pruned[b, real], want[b, places[real]], atol=5e-5), method


@asking
@pytest.mark.parametrize("how", ["greedy", "sampling", "beams"])
def test_generate_equals_the_oracle(family, ask, how):
    model = kin(family)
    given = ask(family, model)
    if how == "beams":
        try:
            model.generate(**given, num_beams=3, max_new_tokens=1)
        except ValueError:
            pytest.skip("5.20 itself writes no beams behind this family's videos")
    for method in (DivPrune(), FastV(2)):
        check_generation(model, given, method, how)


@every
@torch.no_grad()
def test_several_images_and_unlike_numbers_of_them(family):
    model = kin(family)
    given = asked(family, model, (4, 2), (1, 2))
    row = given["attention_mask"][0].bool()
    alone = asked(family, model, (4,), (1,)) | {"input_ids": given["input_ids"][:1, row]}
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    for method in (PACKED, DivPrune(), FastV(2)):
        with apply(method, model, 0.5) as handle:
            pruned, kept = model(**given).logits[:, -1], handle.kept()
        want = oracle(model, given, kept, getattr(method, "positions", "") == "renumber")
        assert torch.allclose(pruned, want[:, -1], atol=5e-5), method
    for method in (DivPrune(), FastV(2)):  # those that draw nothing
        with apply(method, model, 0.5):
            both = model(**given).logits[:, -1]
            assert torch.allclose(model(**alone).logits[:, -1], both[:1], atol=5e-5), method
    with apply(PROJECTED, model, Budget(3, "count")):
        assert model(**given).logits.shape[1] < given["input_ids"].shape[1]


@every
@torch.no_grad()
def test_a_second_turn_on_the_returned_cache(family):
    model = kin(family)
    given = asked(family, model, (30,))
    count = given["input_ids"].shape[1]
    for method in (None, FastV(2), DivPrune(), PROJECTED):
        with contextlib.nullcontext() if method is None else apply(method, model, 0.5):
            want = model.generate(**given, **GREEDY, max_new_tokens=10)[0, -6:].tolist()
        with contextlib.nullcontext() if method is None else apply(method, model, 0.5):
            first = model.generate(**given, **GREEDY, max_new_tokens=4, return_dict_in_generate=True)
            history = first.sequences
            later = torch.zeros(1, history.shape[1] - count, dtype=torch.long)
            types = {k: torch.cat([v, later], 1) for k, v in given.items() if k.endswith("token_type_ids")}
            again = model.generate(
                input_ids=history, attention_mask=torch.ones_like(history), past_key_values=first.past_key_values,
                **types, **GREEDY, max_new_tokens=6,
            )  # fmt: skip
        assert again[0, -6:].tolist() == want, method


@every
@torch.no_grad()
def test_what_the_encoder_attends_to_is_read(family):
    model = kin(family)
    given = asked(family, model, (4, 3))
    for where in ("projected", "packed"):
        reader = Reader(Site(0, where), "received")
        if KIN[family].closed:
            with pytest.raises(PrunelabError, match="reads received, not to be had"), apply(reader, model, 1.0):
                pass
            continue
        with apply(reader, model, 1.0):
            model(**given)
        assert bool(torch.isfinite(reader.read["received"]).all())
        spread = reader.read["received"].mean(1)
        assert bool((spread.amax(1) > spread.amin(1)).all())
    if KIN[family].class_token:
        for where in ("projected", "packed"):
            with apply(FasterVLM(where), model, 0.5):
                assert model(**given).logits.shape[1] < given["input_ids"].shape[1]
    else:
        with pytest.raises(PrunelabError, match="reads cls_row, not to be had"), apply(FasterVLM(), model, 0.5):
            pass


@torch.no_grad()
def test_what_is_read_of_joined_patches_is_their_mean():
    model, eager = kin("internvl"), kin("internvl")
    eager.set_attn_implementation({"vision_config": "eager"})
    given = asked("internvl", model, (4, 3))
    reader = Reader(Site(0, "projected"), "cls_row", "received")
    with apply(reader, model, 1.0):
        model(**given)
    maps = eager.model.vision_tower(given["pixel_values"], output_attentions=True).attentions[-1]  # 8 x 8 patches
    for name, whole in (("cls_row", maps[:, :, 0, 1:]), ("received", maps.sum(2)[..., 1:])):
        want = whole.unflatten(2, (4, 2, 4, 2)).mean((3, 5)).flatten(2)
        assert torch.allclose(reader.read[name], want, atol=1e-5), name


@every
def test_costs_follow_the_tokens(family):
    model = kin(family)
    adapter = adapter_for(model)
    tokens, text = adapter.info.tokens, adapter.example().text
    half = text + (tokens - text) // 2
    with apply(FastV(2), model, 0.5) as handle:
        report = handle.report()
    assert report.tokens == ((tokens, tokens),) * 2 + ((half, half),) * 2
    assert 0 < report.scoring_macs < report.macs < report.dense_macs
    with apply(DivPrune(), model, 0.5) as handle:
        assert handle.report().tokens == ((half, half),) * 4
    with apply(PROJECTED, model, 0.5) as handle:
        assert handle.report().macs < report.dense_macs
    if family in MOVING:
        given = filmed(family, model, (6,), frames=4)
        with apply(FastV(2), model, 0.5) as handle:
            seen = handle.report(adapter.shaped(given))
            assert seen.tokens[0][0] == given["input_ids"].shape[1]
        if "video_grid_thw" not in given:  # whose videos have no standard size
            assert adapter.visual_tokens(adapter.prompt(frames=4)) == int((given["input_ids"] == VIDEO).sum())


@torch.no_grad()
def test_what_would_come_out_wrong_is_refused_in_one_line():
    import transformers as t

    from tests.contract.vlms import TEXT, VISION

    vision = t.SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False)
    words = t.Gemma3TextConfig(**TEXT, head_dim=8)
    gemma = t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(vision_config=vision, text_config=words, mm_tokens_per_image=4, image_token_index=60)
    )
    with pytest.raises(PrunelabError, match=r"tokens cannot leave a Gemma3.*windows of the text"):
        adapter_for(gemma)
    model = kin("paligemma")
    given = asked("paligemma", model)
    given["token_type_ids"][:, -2:] = 1
    with apply(DivPrune(), model, 0.5), pytest.raises(PrunelabError, match="leave suffix and labels out"):
        model(**given)
    windowed = kin("llava_mistral")
    windowed.config.text_config.sliding_window = 8
    with pytest.raises(PrunelabError, match="windows of the text"), apply(FastV(2), windowed, 0.5):
        pass
