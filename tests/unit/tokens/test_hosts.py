"""Host models as people hold them: wrapped, dispatched, of any size, traced, under autocast."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import timm
import torch

from prunelab.common.apply import apply
from prunelab.common.backbones.dino import dino_small
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.tokens.adapters import adapter_for
from prunelab.methods.ats.method import AdaptiveTokenSampling
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.fastv.method import FastV
from prunelab.methods.focus_detr.method import FocusDETR
from prunelab.methods.token_transforming.method import TokenTransforming
from prunelab.methods.tome.method import ToMe
from prunelab.methods.uniform_tokens.method import UniformTokens
from prunelab.methods.zero_tprune.method import ZeroTPrune
from tests.contract.references import images as pictures
from tests.contract.references import vit
from tests.contract.vlms import IMAGE, ids, images, prompt, typed, vlm

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
RANKS = (ZeroTPrune((1, 2, 3)), Budget(0.5))
MERGES = (ToMe(), Budget(1, "removed"))


def _taken(model: Any, size: tuple[int, int]) -> Any:
    """A copy of a model with weights, for one size of images."""
    from timm.layers import resample_abs_pos_embed

    fixed = timm.create_model("vit_tiny_patch16_224", img_size=size, embed_dim=48, depth=6, num_heads=3, num_classes=7)
    fixed.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pos_embed"}, strict=False)
    with torch.no_grad():
        fixed.pos_embed.copy_(resample_abs_pos_embed(model.pos_embed, [side // 16 for side in size], old_size=[4, 4]))
    return fixed.eval()


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        (AdaptiveTokenSampling((1, 2, 3)), Budget(1.0)),
        (ToMe(), Budget(0.1, "removed")),
        (ZeroTPrune((1, 2, 3)), Budget(0.7)),
    ],
    ids=str,
)
@torch.no_grad()
def test_images_of_any_size_are_pruned_and_counted_by_their_own(method, budget):
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 7}
    dynamic = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes).eval()
    for p in dynamic.parameters():
        if p.dim() > 1:
            p.mul_(2.0)
    x, found = torch.randn(2, 3, 128, 96), []
    for model in (dynamic, _taken(dynamic, (128, 96))):
        with apply(method, model, budget) as handle:
            found.append((model(x), handle.report()))
    (first, report), (second, want) = found
    assert torch.allclose(first, second, atol=1e-4)
    assert (report.tokens, report.macs, report.dense_macs) == (want.tokens, want.macs, want.dense_macs)
    if not method.adaptive:
        with apply(method, dynamic, budget) as handle:
            dynamic(x)
            dynamic(torch.randn(2, 3, 64, 64))
            both = handle.report()
        with apply(method, dynamic, budget) as handle:
            dynamic(torch.randn(2, 3, 64, 64))
            small = handle.report()
        assert both.macs == pytest.approx((small.macs + want.macs) / 2)


@pytest.mark.parametrize(("method", "budget"), [RANKS, MERGES], ids=str)
@torch.no_grad()
def test_accelerates_wrappers_stay_around(method, budget):
    from accelerate import cpu_offload, dispatch_model

    model, x = vit(), pictures()
    with apply(method, model, budget) as handle:
        want, report = model(x), handle.report()
    for host in (dispatch_model(copy.deepcopy(model), device_map={"": "cpu"}, force_hooks=True),
                 cpu_offload(copy.deepcopy(model), execution_device="cpu")):  # fmt: skip
        before = {name: vars(m).get("forward") for name, m in host.named_modules()}
        with apply(method, host, budget) as handle:
            assert torch.equal(host(x), want)
            assert handle.report().macs == report.macs
        assert {name: vars(m).get("forward") for name, m in host.named_modules()} == before


@torch.no_grad()
def test_what_cannot_be_run_is_refused_in_one_line():
    x = torch.randn(1, 3, 64, 64)
    parallel = timm.create_model("vit_base_patch16_xp_224", img_size=64, embed_dim=48, depth=4, num_heads=3).eval()
    with pytest.raises(PrunelabError, match="ParallelScalingBlock"), apply(*RANKS[:1], parallel, 0.5):
        pass
    model = vit()
    with apply(RANKS[0], model, RANKS[1]):
        with pytest.raises(PrunelabError, match="cannot be traced"):
            torch.jit.trace(model, pictures())
        with pytest.raises(PrunelabError, match="cannot be traced"):
            torch.export.export(model, (pictures(),))
        with pytest.raises(PrunelabError, match="fill no grid"):
            model.get_intermediate_layers(pictures(), n=2, reshape=True)
        assert [f.shape[1] for f in model.get_intermediate_layers(pictures(), n=1)] == [2]
    assert model.get_intermediate_layers(pictures(), n=1, reshape=True)[0].shape == (3, 24, 4, 4)
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, embed_dim=48, depth=4, num_heads=3).eval()
    with apply(ZeroTPrune(layers=(1,)), hybrid, 0.5) as handle:
        hybrid(x)
    assert handle.report().macs < handle.report().dense_macs


def test_autocast_leaves_scores_alone():
    model, x = vit(), pictures()
    method = TokenTransforming(layers=(1, 2, 3))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for pruner, budget in ((method, 0.7), MERGES, RANKS):
            with apply(pruner, model, budget):
                assert torch.isfinite(model(x).float()).all()


@torch.no_grad()
def test_the_report_behind_the_block_has_its_parts():
    torch.manual_seed(0)
    model = dino_small(width=32, feedforward=64, encoder_layers=2, decoder_layers=2, image_channels=3).eval()
    method = FocusDETR(cascade=(0.8, 0.5))
    parts = method.build(adapter_for(model).info)
    with apply(method, model, 0.5, parts=parts.eval()) as handle:
        model(torch.randn(2, 3, 64, 96))
        inside = handle.report()
    assert handle.report() == inside and not hasattr(model, "pruning_parts")


# -- language models ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_windows_fixed_caches_and_attention_maps_are_refused():
    model = vlm("llava", sliding_window=8)
    given = prompt("llava", images("llava", 1))
    model.config.text_config.sliding_window = 8
    with pytest.raises(PrunelabError, match="windows of the text"), apply(FastV(2), model, 0.5):
        pass
    model = vlm("llava")
    with apply(FastV(2), model, 0.5):
        with pytest.raises(PrunelabError, match="growing cache"):
            model.generate(**given, max_new_tokens=4, cache_implementation="static")
        with pytest.raises(PrunelabError, match="leave output_attentions out"):
            model(**given, output_attentions=True)


def test_right_padding_keeps_its_side_and_labels_need_all_tokens():
    model = vlm("llava")
    words = ids([[("text", 3), (IMAGE, 16), ("text", 9)], [("text", 3), (IMAGE, 16), ("text", 4)]], left=False)
    given = {"pixel_values": images("llava", 2)} | words
    labels, mask = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100), given["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**given, labels=labels)
        for method in (DivPrune(), FastV(2), UniformTokens(where="projected", positions="renumber")):
            with apply(method, model, 1.0):
                kept = model(**given, labels=labels)
            assert torch.allclose(kept.loss, dense.loss, atol=1e-5)
            assert torch.allclose(kept.logits[mask], dense.logits[mask], atol=1e-5)
            with apply(method, model, 0.5):
                with pytest.raises(PrunelabError, match="labels stand beside"):
                    model(**given, labels=labels)
                pruned = model(**given).logits
            alone = {n: v[1:, :23] if n != "pixel_values" else v[1:] for n, v in given.items()}
            with apply(method, model, 0.5):
                single = model(**alone).logits
            assert torch.allclose(pruned[1, : single.shape[1]], single[0], atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
@pytest.mark.parametrize("text", [4, 30])
@torch.no_grad()
def test_a_second_turn_on_the_returned_cache(family, text):
    """`generate` gives again as many tokens as pruning took from the cache's length; they are known."""
    methods = (
        None,
        FastV(2),
        DivPrune(),
        DivPrune(positions="original"),
        UniformTokens(where="projected", positions="renumber"),
    )
    for method in methods:
        model = vlm(family)
        given = typed(model, prompt(family, images(family, 1), text=text))
        count = given["input_ids"].shape[1]
        with contextlib.nullcontext() if method is None else apply(method, model, 0.5):
            first = model.generate(**given, **GREEDY, max_new_tokens=4, return_dict_in_generate=True)
            history = first.sequences
            want = model.generate(**given, **GREEDY, max_new_tokens=10)[0, -6:].tolist()
            types = {}
            if "mm_token_type_ids" in given:
                later = torch.zeros(1, history.shape[1] - count, dtype=torch.long)
                types = {"mm_token_type_ids": torch.cat([given["mm_token_type_ids"], later], 1)}
            cache = first.past_key_values
            again = model.generate(
                input_ids=history, attention_mask=torch.ones_like(history), past_key_values=cache, **types, **GREEDY,
                max_new_tokens=6,
            )  # fmt: skip
        assert again[0, -6:].tolist() == want, method
