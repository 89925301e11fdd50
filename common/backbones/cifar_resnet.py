"""The residual networks for 32 x 32 images of He et al. (CVPR 2016, section 4.2), whose shortcuts have no parameters.

Three stages of n blocks with 16, 32 and 64 channels make a depth of 6n + 2. Where a stage halves the resolution, its
shortcut takes every second pixel and sets channels of zeros on both sides ("option A").
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.backbones.checkpoint import fill, read

CHANNELS = (16, 32, 64)


class Block(nn.Module):
    """Two 3 x 3 convolutions, [B, in, H, W] to [B, out, H / stride, W / stride], beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(inner + x)


class CifarResNet(nn.Module):
    """Images [B, 3, 32, 32] to logits [B, classes]."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        self.layer1 = _stage(blocks, CHANNELS[0], CHANNELS[0], 1)
        self.layer2 = _stage(blocks, CHANNELS[0], CHANNELS[1], 2)
        self.layer3 = _stage(blocks, CHANNELS[1], CHANNELS[2], 2)
        self.linear = nn.Linear(CHANNELS[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def resnet20() -> CifarResNet:
    """0.27 M parameters."""
    return CifarResNet(3)


def resnet56() -> CifarResNet:
    """0.85 M parameters."""
    return CifarResNet(9)


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load a checkpoint whose names may carry the `module.` of a parallel training. Those from before batch norms
    counted their batches lack the counters, which nothing reads here."""
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    results = {name.removeprefix("module."): value for name, value in read(Path(path)).items()}
    fill(model, {**counters, **results}, path)
