"""Vision transformers whose attention knows where tokens stand, and others that a handful of methods is tried on:
keep-all is the identity, what is left is what the whole model makes of the same tokens with the others hidden."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Site
from prunelab.methods.ats.method import AdaptiveTokenSampling
from prunelab.methods.cls_attention.method import ClassAttention
from prunelab.methods.random_drop.method import RandomDrop
from prunelab.methods.tome.method import ToMe
from prunelab.methods.zero_tprune.method import ZeroTPrune
from tests.contract.references import images
from tests.unit.tokens.test_vlm import Reader

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 7}
KIN: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov3": ("vit_small_patch16_dinov3", {"global_pool": "token", "init_values": 0.5}),
    "dinov3_average": ("vit_small_patch16_dinov3", {"init_values": 0.5}),
    "eva02": ("eva02_tiny_patch14_224", {"ref_feat_shape": (4, 4)}),
    "eva02_apart": ("eva02_base_patch14_224", {"ref_feat_shape": (4, 4)}),  # projections of their own
    "beit": ("beit_base_patch16_224", {"init_values": 0.5}),
    "beit_shared": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "siglip2": ("vit_base_patch16_siglip_224", {}),  # pooled by attention
    "siglip2_average": ("vit_base_patch16_siglip_gap_224", {}),
}
every = pytest.mark.parametrize("family", KIN)
CUTS = (
    RandomDrop((1,), "input"),
    RandomDrop((1, 3), "input"),
    RandomDrop((1,), "after_attention"),
    RandomDrop((1,), "block_output"),
    RandomDrop((1,), "input", "bypass"),
)
MERGES = (ToMe(), Budget(3, "removed"))


def kin(family: str) -> Any:
    """A tiny random model of a family."""
    name, more = KIN[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **TINY | more).eval()
    with torch.no_grad():
        for which, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) * (0.4 if "q" in which else 0.15))
            elif "relative" in which or "bias" in which:
                p.normal_(0, 0.3)
    return model


@torch.no_grad()
def oracle(model: Any, x: Tensor, kept: list[tuple[Site, Tensor]], rest: str) -> Tensor:
    """The whole model's answer where from each site on no token sees one that left."""

    def hide(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            total, mask = args[0].shape[1], None
            for site, places in kept:
                first = site.layer + (site.where != "input")
                if layer == site.layer if rest == "bypass" else layer >= first:
                    left = torch.zeros(len(x), total).scatter(1, places, 1.0)
                    mask = torch.where(left > 0, 0.0, float("-inf"))[:, None, None]
            if mask is None:
                return None
            name = "shared_rel_pos_bias" if "shared_rel_pos_bias" in kwargs else "attn_mask"
            given = kwargs.get(name)
            return args, kwargs | {name: mask if given is None else given + mask}

        return hook

    def past(site: Site, places: Tensor) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            through = torch.zeros(len(x), output.shape[1], 1).scatter(1, places.unsqueeze(2), 1.0)
            return output * through + args[0] * (1 - through)

        return hook

    hooks = [b.attn.register_forward_pre_hook(hide(i), with_kwargs=True) for i, b in enumerate(model.blocks)]
    if rest == "bypass":
        hooks += [model.blocks[site.layer].register_forward_hook(past(site, places)) for site, places in kept]
    elif model.global_pool != "token":
        left = kept[-1][1].unsqueeze(2)
        hooks.append(model.norm.register_forward_hook(lambda _, __, y: y.gather(1, left.expand(-1, -1, y.shape[2]))))
    try:
        return model(x)
    finally:
        for hook in hooks:
            hook.remove()


@every
@torch.no_grad()
def test_keep_all_is_the_identity(family):
    model, x = kin(family), images()
    dense = model(x)
    for method in (*CUTS, ToMe()):
        budget = Budget(0, "removed") if isinstance(method, ToMe) else 1.0
        with apply(method, model, budget):
            assert torch.allclose(model(x), dense, atol=2e-6), method
        assert torch.equal(model(x), dense), "and everything is as before"


@every
@torch.no_grad()
def test_what_is_left_equals_the_oracle(family):
    model, x = kin(family), images()
    for method in CUTS:
        with apply(method, model, 0.5) as handle:
            pruned, report = model(x), handle.report()
            kept = handle.kept()
        assert torch.allclose(pruned, oracle(model, x, kept, method.rest), atol=1e-5), method
        assert report.macs < report.dense_macs


@every
@torch.no_grad()
def test_batches_merging_and_numbers_that_differ(family):
    model, x = kin(family), images()
    pooled = getattr(model, "attn_pool", None) is not None
    methods = [(ZeroTPrune((1, 2)), 0.5)]
    methods += [] if pooled else [MERGES]  # attention over a mixture cannot be weighed
    if model.num_prefix_tokens:
        methods += [(ClassAttention((1,)), 0.5), (AdaptiveTokenSampling((1, 2)), 1.0)]
    for method, budget in methods:
        with apply(method, model, budget) as handle:
            together = model(x)
            assert handle.report().macs < handle.report().dense_macs or method.adaptive
        assert not torch.allclose(together, model(x), atol=1e-4)
        alone = []
        for i in range(len(x)):
            with apply(method, model, budget):
                alone.append(model(x[i : i + 1]))
        assert torch.allclose(together, torch.cat(alone), atol=1e-5), method


@pytest.mark.parametrize("family", ["dinov3", "eva02", "eva02_apart", "beit", "beit_shared"])
@torch.no_grad()
def test_signals_are_the_layers_own_attention(family):
    model, x = kin(family), images()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    first, second = Site(2, "block_output"), RandomDrop((1,), "input")
    reader = Reader(first, "attention", "cls_row", "received", "attention_logits")
    seen: list[Tensor] = []
    model.blocks[2].attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    with apply(reader, model, 1.0):
        model(x)
    assert torch.allclose(reader.read["attention"], seen[-1], atol=1e-5)
    assert torch.allclose(reader.read["cls_row"], seen[-1][:, :, 0], atol=1e-5)
    assert torch.allclose(reader.read["received"], seen[-1].sum(2), atol=1e-4)
    assert torch.allclose(reader.read["attention_logits"].softmax(-1), seen[-1], atol=1e-5)

    class After(Reader):
        def sites(self, info: Any) -> list[Site]:
            return [Site(1, "input"), Site(2, "block_output", index=1)]

        def requires(self, site: Site) -> frozenset[str]:
            return frozenset() if site.layer == 1 else super().requires(site)

        def plan(self, site: Site, signals: Any, budget: Budget) -> Any:
            return second.plan(site, signals, Budget(0.5)) if site.layer == 1 else super().plan(site, signals, budget)

    behind = After(first, "attention")
    with apply(behind, model, 1.0):
        model(x)
    assert behind.read["attention"].shape == seen[-1].shape and seen[-1].shape[-1] < 17
    assert torch.allclose(behind.read["attention"], seen[-1], atol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "hiera_tiny_224"])
def test_windowed_families_are_refused_by_name(name):
    with (
        pytest.raises(PrunelabError, match=r"tokens cannot leave a .*windows"),
        apply(ToMe(), timm.create_model(name), MERGES[1]),
    ):
        pass
