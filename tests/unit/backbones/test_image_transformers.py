"""LV-ViT and SWAG's ViTs: their published layouts, and methods on them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer as Published

from prunelab.common.apply import apply
from prunelab.common.backbones import lvvit, swag
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.ats.method import AdaptiveTokenSampling
from prunelab.methods.tome.method import ToMe
from prunelab.methods.zero_tprune.method import ZeroTPrune

SIZES = {"img_size": 64, "embed_dim": 32, "num_heads": 4, "num_classes": 7}


def small() -> lvvit.LVViT:
    torch.manual_seed(0)
    model = lvvit.lvvit(depth=4, mlp_ratio=3.0, **SIZES).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    for block in model.blocks:
        block.ls1.gamma.data.fill_(0.5)
        block.ls2.gamma.data.fill_(0.5)
    return model


def as_published(model: lvvit.LVViT, images: torch.Tensor) -> torch.Tensor:
    """The forward pass as the authors' code writes it."""
    stem = model.patch_embed
    x = images
    for convolution, norm in ((stem.conv1, stem.bn1), (stem.conv2, stem.bn2), (stem.conv3, stem.bn3)):
        x = F.relu(norm(convolution(x)))
    x = stem.proj(x).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    for block in model.blocks:
        x = x + block.attn(block.norm1(x)) / 2
        x = x + block.mlp(block.norm2(x)) / 2
    x = model.norm(x)
    return model.head(x[:, 0]) + 0.5 * model.aux_head(x[:, 1:]).max(1)[0]


@torch.no_grad()
def test_lvvit_is_the_authors_network():
    model, images = small(), torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(images), as_published(model, images), atol=1e-5)
    assert lvvit.lvvit_s().num_features == 384
    assert round(sum(p.numel() for p in lvvit.lvvit_s().parameters()) / 1e6, 1) == 26.2  # 26.15 M and the scales


def test_lvvit_reads_the_authors_file(tmp_path):
    model = small()
    published = {name: weight for name, weight in model.state_dict().items() if ".ls" not in name}
    torch.save({"state_dict": published}, tmp_path / "x.pth.tar")
    other = lvvit.lvvit(depth=4, mlp_ratio=3.0, **SIZES).eval()
    lvvit.load_checkpoint(other, tmp_path / "x.pth.tar")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(other(images), model(images))
    torch.save({name: weight for name, weight in published.items() if "aux" not in name}, tmp_path / "y.pth")
    with pytest.raises(PrunelabError, match="aux_head"):
        lvvit.load_checkpoint(other, tmp_path / "y.pth")


@torch.no_grad()
def test_methods_work_on_lvvit_and_padding_has_no_say():
    model, images = small(), torch.randn(3, 3, 64, 64)
    for method, budget in ((ToMe(), 1.0), (ZeroTPrune(layers=(1, 2)), 1.0)):
        with apply(method, model, budget):
            assert torch.allclose(model(images), model(images[:]), atol=1e-5)
    with apply(ZeroTPrune(layers=(1, 2)), model, 0.5) as handle:
        assert not torch.allclose(model(images), as_published(model, images), atol=1e-3)
        assert handle.report().saving > 0
    ats = AdaptiveTokenSampling(layers=(1, 2))
    with apply(ats, model, 0.7):
        together = model(images)
        alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)


@torch.no_grad()
def test_swag_is_torchvisions_network(tmp_path):
    torch.manual_seed(0)
    published = Published(
        image_size=64, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=128, num_classes=7
    ).eval()
    for weight in published.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    torch.save(published.state_dict(), tmp_path / "x.pth")
    model = swag.swag(depth=2, **SIZES).eval()
    swag.load_checkpoint(model, tmp_path / "x.pth")
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(images), published(images), atol=1e-5)
    for method, budget in (
        (ToMe(), "4removed"),
        (ZeroTPrune(layers=(0, 1)), 0.5),
        (AdaptiveTokenSampling(layers=(1,)), 0.5),
    ):
        with apply(method, model, budget) as handle:
            model(images)
        assert handle.report().saving > 0, method.name
    for made, parameters in ((swag.vit_b_16, 86.9), (swag.vit_l_16, 305.2), (swag.vit_h_14, 633.5)):
        with torch.device("meta"):
            assert round(sum(p.numel() for p in made().parameters()) / 1e6, 1) == parameters
