"""One tiny random model of every family that token pruning is applied to, under one small interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from common.adapters import adapter_for
from common.apply import apply
from common.errors import PrunelabError
from common.roles import TokenPruner
from common.types import Budget, ModelInfo
from tests.contract.references import VITS, vit


def _sharpened(model: nn.Module) -> nn.Module:
    """Larger weights, so that what a token says depends on the others."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(1.5)
    return model.eval()


def _vim() -> nn.Module:
    from common.backbones.vim import Vim

    torch.manual_seed(0)
    return _sharpened(Vim(size=32, patch=8, width=24, depth=16, states=4, classes=7))


def _plain_mamba() -> nn.Module:
    from common.backbones.plain_mamba import PlainMambaClassifier

    torch.manual_seed(0)
    return _sharpened(PlainMambaClassifier(7, size=32, patch=8, width=24, depth=16, states=4, convolutions=1))


def _segmenter() -> nn.Module:
    from common.backbones.segvit import segmenter

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"window": 32, "patch": 4, "width": 24, "depth": 12, "heads": 3, "stages": (5, 7, 11)}
    model = _sharpened(segmenter(classes=5, head_width=12, head_heads=2, head_layers=1, **sizes))
    with torch.no_grad():
        for head in model.heads:  # sure of something
            for p in head.parameters():
                p.mul_(20.0 if p.dim() > 1 else 1.0)
    return model


def _dino() -> nn.Module:
    from common.backbones.dino import dino_small

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 32, "heads": 4, "feedforward": 48, "encoder_layers": 6, "decoder_layers": 2}
    return _sharpened(dino_small(7, 3, levels=3, queries=5, groups=4, image_size=(32, 32), **sizes))


def _deformable_detr() -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    torch.manual_seed(0)
    config = DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet(),
        d_model=32,
        encoder_layers=6,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
        two_stage_num_proposals=5,
        two_stage=True,
        with_box_refine=True,
        num_labels=7,
        dropout=0.0,
    )
    return _sharpened(DeformableDetrForObjectDetection(config))


def _resnet() -> Any:
    from transformers import ResNetConfig

    stages = ["stage2", "stage3", "stage4"]
    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=stages)


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {
    **{name: partial(vit, name) for name in VITS},
    "vim": _vim,
    "plain_mamba": _plain_mamba,
    "segmenter": _segmenter,
    "dino": _dino,
    "deformable_detr": _deformable_detr,
}


def images(family: str, batch: int = 3) -> Tensor:
    """Images of the size that the family's tiny model takes."""
    side = 96 if family == "deformable_detr" else 32
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@cache
def info(family: str) -> ModelInfo:
    return adapter_for(FAMILIES[family]()).info


@cache
def _adapter(family: str) -> Any:
    return adapter_for(FAMILIES[family]())


def usable(method: TokenPruner, family: str) -> bool:
    """Whether the family has the method's sites, their signals and the fates it asks for."""
    try:
        sites = method.sites(info(family))
        _adapter(family).check(method, sites)
    except PrunelabError:
        return False
    return True


def applied(method: TokenPruner, model: nn.Module, budget: Budget | float, **options: Any) -> Any:
    """`apply`, with learned parts drawn at random where the method has some."""
    torch.manual_seed(1)
    parts = method.build(adapter_for(model).info)
    return apply(method, model, budget, parts=None if parts is None else parts.eval(), **options)


def output(model: nn.Module, x: Tensor) -> Tensor:
    """What a model says of images, as one tensor [B, ...]."""
    found = model(x)
    if isinstance(found, Tensor):
        return found
    values = [v for k, v in found.items() if k in ("logits", "boxes", "pred_boxes")]
    return torch.cat([v.flatten(1) for v in values], 1)


__all__ = ["FAMILIES", "applied", "images", "info", "output", "usable"]
