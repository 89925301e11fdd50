"""Vim (Zhu et al., ICML 2024): vision Mamba that scans patches in both directions, with the class token in the middle.

Parameters have the names of the official bidirectional "v2, div2" models, so that their checkpoints load strictly.
B batch, L tokens, C width, E = 2 C channels of the scan, N states of a channel, R rank of the step width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.common.backbones.checkpoint import load_checkpoint as load_checkpoint
from prunelab.common.backbones.scan import selective_scan
from prunelab.common.backbones.subset import Subset, gaps
from prunelab.common.core.errors import PrunelabError

STEP = (1e-3, 1e-1)  # range of the step widths that a fresh model starts with, log-uniform


class Mixer(nn.Module):
    """Two selective scans, one of them over the reversed sequence, whose mean is projected back."""

    def __init__(self, width: int, states: int = 16, expand: int = 2, kernel: int = 4) -> None:
        super().__init__()
        channels, self.states, self.rank = expand * width, states, math.ceil(width / 16)
        for suffix in ("", "_b"):
            decay = torch.arange(1.0, states + 1).log().repeat(channels, 1)
            self.register_parameter(f"A{suffix}_log", nn.Parameter(decay))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(channels)))
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        for suffix in ("", "_b"):
            self.add_module(f"conv1d{suffix}", nn.Conv1d(channels, channels, kernel, groups=channels))
            self.add_module(f"x_proj{suffix}", nn.Linear(channels, self.rank + 2 * states, bias=False))
            self.add_module(f"dt_proj{suffix}", step_projection(self.rank, channels))
        self.out_proj = nn.Linear(channels, width, bias=False)
        self.scans = nn.Identity()  # both scans' gated outputs [B, 2, E, L] in token order: a place to read them

    def forward(self, x: Tensor, subset: Subset | None = None) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # [B, E, L] each
        ahead = self.scan(u, z, subset)
        back = self.scan(u.flip(-1), z.flip(-1), subset and subset.reversed(), "_b").flip(-1)
        y = self.scans(torch.stack([ahead, back], 1))
        return self.out_proj(y.mean(1).transpose(1, 2))

    def scan(self, u: Tensor, z: Tensor, subset: Subset | None = None, suffix: str = "") -> Tensor:
        """Convolution and selective scan of one direction: u and gate z [B, E, L] -> [B, E, L].

        Of the sequence a subset is cut from, the convolution sees the tokens alone, or with `spread` at their places.
        """
        parts: Any = {name: getattr(self, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D")}
        spread = subset is not None and subset.spread
        full = subset.scatter(u) if subset is not None and spread else u
        full = parts["conv1d"](F.pad(full, (parts["conv1d"].kernel_size[0] - 1, 0)))
        u = F.silu(subset.gather(full) if subset is not None and spread else full)
        step, B, C = parts["x_proj"](u.transpose(1, 2)).split([self.rank, self.states, self.states], -1)
        dt_proj = parts["dt_proj"]
        return selective_scan(
            u,
            F.linear(step, dt_proj.weight).transpose(1, 2),
            -getattr(self, f"A{suffix}_log").float().exp(),
            B.transpose(1, 2),
            C.transpose(1, 2),
            parts["D"],
            z,
            dt_proj.bias,
            softplus=True,
            gap=gaps(subset.places) if subset is not None and subset.decay else None,
        )


class Block(nn.Module):
    """Add, normalise, mix. The residual stream is kept in float32."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.mixer = Mixer(width, states)
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None, subset: Subset | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden, residual [B, L, C] -> the mixer's output and the stream it is yet to be added to."""
        residual = add(hidden, residual)
        return self.mixer(self.norm(residual.to(hidden.dtype)), subset), residual


class ClassToken(nn.Module):
    """Reads the class token [B, C] of tokens [B, L, C] at its place, one for all or one a sample [B]."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        return x[:, self.place] if place is None else x[torch.arange(len(x), device=x.device), place]


class PatchEmbed(nn.Module):
    """Patches of an image [B, channels, H, W] as tokens [B, L, C], row by row."""

    def __init__(self, size: int, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.img_size, self.grid_size = (size, size), (size // patch, size // patch)
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or tuple(images.shape[2:]) != self.img_size:
            size = "x".join(map(str, self.img_size))
            raise PrunelabError(f"this model takes images [batch, channels, {size}], not {list(images.shape)}")
        return self.proj(images).flatten(2).transpose(1, 2)


class Vim(nn.Module):
    """A Vim classifier. A block takes `subset=` where it is to run on some of the tokens."""

    def __init__(
        self,
        size: int = 224,
        patch: int = 16,
        width: int = 192,
        depth: int = 24,
        states: int = 16,
        classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        grid = size // patch
        self.class_place = grid * grid // 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, width))
        self.patch_embed = PatchEmbed(size, patch, channels, width)
        self.head = nn.Linear(width, classes)
        self.layers = nn.ModuleList(Block(width, states) for _ in range(depth))
        self.norm_f = nn.RMSNorm(width, eps=1e-5)
        self.read = ClassToken(self.class_place)
        for parameter in (self.cls_token, self.pos_embed, self.head.weight):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            for name, parameter in self.layers.named_parameters():
                if name.endswith("out_proj.weight"):
                    parameter.div_(math.sqrt(depth))  # so that the stream's variance does not grow with depth

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> logits [B, classes]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The normalised class token [B, C]."""
        x = self.patch_embed(images)
        middle = self.class_place
        x = torch.cat([x[:, :middle], self.cls_token.expand(len(x), -1, -1), x[:, middle:]], 1) + self.pos_embed
        hidden, residual = x, None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.read(self.norm_f(add(hidden, residual).to(x.dtype)))

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay spares beside the one-dimensional ones."""
        return {name for name, _ in self.named_parameters() if name.endswith(("_log", "pos_embed", "cls_token"))}


def add(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream, in float32 at least."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide if residual is None else wide + residual


def step_projection(rank: int, channels: int) -> nn.Linear:
    """The layer that widens steps from `rank` to all channels, started so that softplus of its bias is in `STEP`."""
    layer = nn.Linear(rank, channels)
    nn.init.uniform_(layer.weight, -(rank**-0.5), rank**-0.5)
    low, high = (math.log(value) for value in STEP)
    with torch.no_grad():
        step = (low + (high - low) * torch.rand(channels)).exp().clamp_min(1e-4)
        layer.bias.copy_(step + (-(-step).expm1()).log())  # the inverse of softplus
    return layer


def vim_tiny(**sizes: Any) -> Vim:
    """Vim-Ti of the paper, 7 M parameters."""
    return Vim(**{"width": 192, **sizes})


def vim_small(**sizes: Any) -> Vim:
    """Vim-S of the paper, 26 M parameters."""
    return Vim(**{"width": 384, **sizes})


def vim_base(**sizes: Any) -> Vim:
    """Vim-B of the official repository, 98 M parameters."""
    return Vim(**{"width": 768, **sizes})
