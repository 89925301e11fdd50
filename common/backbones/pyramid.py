"""Convolutional backbones that give a pyramid of feature maps, and the neck that brings the maps to one width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from prunelab.common.core.errors import PrunelabError


class ResNet(nn.Module):
    """Levels at strides 8, 16 and 32 of a ResNet-50 or -101 with frozen batch norms; the stem does not learn."""

    channels, stride = (512, 1024, 2048), 8

    def __init__(self, depth: Literal[50, 101] = 50) -> None:
        super().__init__()
        whole = getattr(torchvision.models, f"resnet{depth}")(weights=None, norm_layer=FrozenBatchNorm2d)
        self.conv1, self.bn1, self.maxpool = whole.conv1, whole.bn1, whole.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = whole.layer1, whole.layer2, whole.layer3, whole.layer4
        self.conv1.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.layer1(self.maxpool(self.bn1(self.conv1(images)).relu()))
        second = self.layer2(x)
        third = self.layer3(second)
        return [second, third, self.layer4(third)]


class ConvPyramid(nn.Module):
    """A small convolutional backbone: the stem brings images to 1 / `stride`, each further stage halves them."""

    def __init__(self, image_channels: int, channels: Sequence[int], stride: int = 8) -> None:
        super().__init__()
        self.channels, self.stride = tuple(channels), stride
        halvings = int(math.log2(stride))
        if 2**halvings != stride:
            raise PrunelabError(f"stride {stride} is no power of two; use 4 or 8")
        widths = [max(16, channels[0] >> (halvings - 1 - i)) for i in range(halvings - 1)] + [channels[0]]
        self.stem = nn.Sequential(*(self._stage(i, o) for i, o in pairwise([image_channels, *widths])))
        self.stages = nn.ModuleList(self._stage(i, o) for i, o in pairwise(channels))

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        """A strided and a plain 3 x 3 convolution."""
        layers: list[nn.Module] = []
        for width, stride in ((inputs, 2), (outputs, 1)):
            conv = nn.Conv2d(width, outputs, 3, stride, 1, bias=False)
            layers += [conv, nn.GroupNorm(min(8, outputs // 4), outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps


class Neck(nn.Module):
    """Every backbone map, and maps of half the size made from the last one, at one width."""

    def __init__(self, channels: Sequence[int], width: int, levels: int, groups: int) -> None:
        super().__init__()

        def stage(inputs: int, **options: Any) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, width, **options), nn.GroupNorm(groups, width))

        self.lateral = nn.ModuleList(stage(c, kernel_size=1) for c in channels)
        self.extra = nn.ModuleList(
            stage(channels[-1] if i == 0 else width, kernel_size=3, stride=2, padding=1)
            for i in range(levels - len(channels))
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        out = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        x = maps[-1]
        for conv in self.extra:
            x = conv(x)
            out.append(x)
        return out
