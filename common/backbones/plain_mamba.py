"""PlainMamba (Yang et al., BMVC 2024): vision Mamba without hierarchy and class token, scanning in four snakes.

Parameters have the names of the official classifiers, so that their checkpoints load strictly. B batch, L = h w tokens
in raster order, C width, E = 2 C channels of the scan, N states of a channel, R rank of the step width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.common.backbones.checkpoint import load_checkpoint as load_checkpoint
from prunelab.common.backbones.scan import selective_scan
from prunelab.common.backbones.subset import Subset, gaps
from prunelab.common.backbones.vim import step_projection
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import take

Grid = tuple[int, int]
START, RIGHT, LEFT, UP, DOWN = range(5)  # how a scan reached a step: rows of `direction_Bs`


@cache
def scan_orders(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The four snakes over a grid, each [4, L]: the raster place visited at each step, the step at which each place is
    visited, and how the step was reached. Rows from the top, the same backwards, columns from the left, backwards."""
    with torch.inference_mode(False):  # kept for later calls, which may be differentiated
        grid = torch.arange(height * width, device="cpu").view(height, width)
        rows, columns = grid.clone(), grid.T.clone()
        rows[1::2] = rows[1::2].flip(-1)
        columns[1::2] = columns[1::2].flip(-1)
        orders = torch.stack([s for snake in (rows.flatten(), columns.flatten()) for s in (snake, snake.flip(0))])
        down, right = (orders // width).diff(dim=1), (orders % width).diff(dim=1)
        moves = RIGHT * (right == 1) + LEFT * (right == -1) + UP * (down == -1) + DOWN * (down == 1)
        return orders, orders.argsort(1), F.pad(moves, (1, 0), value=START)


def on_map(layer: nn.Module, x: Tensor, grid: Grid, subset: Subset | None) -> Tensor:
    """A convolution of tokens x [B, E, L] as the map they are from; places of tokens left out hold zeros."""
    full = x if subset is None else subset.scatter(x)
    full = layer(full.unflatten(-1, grid)).flatten(2)
    return full if subset is None else subset.gather(full)


class Mixer(nn.Module):
    """Four selective scans with the same weights, summed and gated.

    permute_ssm_params: False is the released code, whose weights need it: a scan visits the inputs u in its own order,
    but takes step widths, B and C in raster order, so that step t joins the token it visits with those of the t-th
    token. True reorders all of them, as the paper describes it.
    """

    def __init__(self, width: int, states: int = 16, expand: int = 2, permute_ssm_params: bool = False) -> None:
        super().__init__()
        channels, self.states, self.rank = expand * width, states, math.ceil(width / 16)
        self.permute_ssm_params = permute_ssm_params
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.direction_Bs = nn.Parameter(0.02 * torch.randn(5, states))
        self.in_proj = nn.Linear(width, 2 * channels)
        self.conv2d = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.x_proj = nn.Linear(channels, self.rank + 2 * states, bias=False)
        self.dt_proj = step_projection(self.rank, channels)
        self.out_proj = nn.Linear(channels, width)
        self.scans = nn.Identity()  # the scans' gated outputs [B, 4, E, L] in token order: a place to read them

    def forward(self, x: Tensor, grid: Grid, subset: Subset | None = None) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # [B, E, L] each
        u = F.silu(on_map(self.conv2d, u, grid, subset))
        y = self.scans(self.scan(u, grid, subset) * F.silu(z).unsqueeze(1))
        return self.out_proj(y.sum(1).transpose(1, 2))

    def scan(self, u: Tensor, grid: Grid, subset: Subset | None = None) -> Tensor:
        """u [B, E, L] -> the four scans' outputs before the gate [B, 4, E, L], in token order.

        Of a subset a scan visits the tokens in the order of the whole grid, each with the move that reached it there.
        In the released form the j-th visited token meets the step width, B and C of the j-th token in raster order.
        """
        batch, channels, length = u.shape
        order, rank, moves, gap = self.route(batch, grid, subset, u.device)
        u = u.transpose(1, 2)  # [B, L, E]
        step, B, C = self.x_proj(u).split([self.rank, self.states, self.states], -1)
        step = self.dt_proj(step)  # with its bias, which the scan adds again: so the released weights want it

        def visit(x: Tensor) -> Tensor:  # [B, L, ...] -> [B, 4, L, ...]
            return take(x, order.flatten(1)).unflatten(1, (4, length))

        def flat(x: Tensor) -> Tensor:  # [B, 4, L, ...] -> [4 B, ..., L]
            return x.flatten(0, 1).transpose(1, 2)

        step, B, C = (visit(x) if self.permute_ssm_params else x[:, None].expand(-1, 4, -1, -1) for x in (step, B, C))
        y = selective_scan(
            flat(visit(u)),
            flat(step),
            -self.A_log.float().exp(),
            flat(B + self.direction_Bs[moves]),
            flat(C),
            self.D,
            delta_bias=self.dt_proj.bias,
            softplus=True,
            gap=None if gap is None else gap.flatten(0, 1),
        )  # each in its own order
        return take(y.transpose(1, 2), rank.flatten(0, 1)).view(batch, 4, length, channels).transpose(2, 3)

    def route(
        self, batch: int, grid: Grid, subset: Subset | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Per direction [B, 4, L]: the token visited at each step, the step of each token, how each step was reached,
        and how many steps are missing before it, where the state decays over them."""
        orders, places, moves = (x.to(device) for x in scan_orders(*grid))
        if subset is None:
            order, rank, moves = (x.expand(batch, -1, -1) for x in (orders, places, moves))
            return order, rank, moves, None
        steps, order = places[:, subset.places].transpose(0, 1).sort(-1)  # steps of the scans over the whole grid
        moves = moves.expand(batch, -1, -1).gather(-1, steps)
        return order, order.argsort(-1), moves, gaps(steps) if subset.decay else None


class Layer(nn.Module):
    """Normalise, mix, add; in some layers a depthwise convolution over the map follows, without a way round it."""

    def __init__(self, width: int, states: int, depthwise: bool, permute_ssm_params: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.dw = None
        if depthwise:
            conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            self.dw = nn.Sequential(conv, nn.BatchNorm2d(width), nn.GELU())
        self.mamba = Mixer(width, states, permute_ssm_params=permute_ssm_params)

    def forward(self, x: Tensor, grid: Grid, subset: Subset | None = None) -> Tensor:
        """x [B, L, C] of a map of size `grid`, or those of its tokens that `subset` names."""
        x = x + self.mamba(self.norm(x), grid, subset)
        return x if self.dw is None else on_map(self.dw, x.transpose(1, 2), grid, subset).transpose(1, 2)


class Stem(nn.Module):
    """Convolutions that halve the image, then patches of what they saw."""

    def __init__(self, patch: int, width: int, convolutions: int, channels: int = 3, hidden: int = 64) -> None:
        super().__init__()
        self.stride = patch // 2

        def convolve(inputs: int, kernel: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, hidden, kernel, stride, kernel // 2, bias=False)
            return [conv, nn.BatchNorm2d(hidden), nn.ReLU()]

        self.stem = nn.Sequential(*convolve(channels, 7, 2))
        self.convs = nn.Sequential(*(m for _ in range(convolutions) for m in convolve(hidden, 3, 1)))
        self.projection = nn.Conv2d(hidden, width, self.stride, self.stride)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> map [B, C, h, w]; sizes that do not divide are filled up with zeros."""
        x = self.convs(self.stem(images))
        return self.projection(F.pad(x, (0, -x.shape[-1] % self.stride, 0, -x.shape[-2] % self.stride)))


class PlainMamba(nn.Module):
    """The trunk: images to normalised tokens. A layer takes `subset=` where it is to run on some of the tokens."""

    def __init__(
        self,
        size: int,
        patch: int,
        width: int,
        depth: int,
        states: int,
        convolutions: int,
        depthwise: Sequence[int] = (),
        permute_ssm_params: bool = False,
    ) -> None:
        super().__init__()
        self.img_size, self.grid_size = (size, size), (size // patch, size // patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = Stem(patch, width, convolutions)
        self.layers = nn.ModuleList(
            Layer(width, states, index in depthwise, permute_ssm_params) for index in range(depth)
        )
        self.ln1 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, channels, H, W] of any size -> tokens [B, L, C]."""
        if images.dim() != 4 or 0 in images.shape:
            raise PrunelabError(f"this model takes images [batch, channels, height, width], not {list(images.shape)}")
        x = self.patch_embed(images)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2) + self.positions(grid)
        for layer in self.layers:
            x = layer(x, grid)
        return self.ln1(x)

    def positions(self, grid: Grid) -> Tensor:
        """Position embedding [1, L, C], resized for another grid than the model was trained on."""
        if grid == self.grid_size:
            return self.pos_embed
        table = self.pos_embed.transpose(1, 2).unflatten(-1, self.grid_size)
        return F.interpolate(table, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


class Head(nn.Module):
    """A linear classifier of the mean token."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, C] -> logits [B, classes]."""
        return self.fc(tokens.mean(1))


class PlainMambaClassifier(nn.Module):
    """Trunk and head, named `backbone` and `head` as in the official files."""

    SIZES: ClassVar = {"size": 224, "patch": 16, "depth": 24, "states": 16, "convolutions": 2}

    def __init__(self, classes: int = 1000, **sizes: Any) -> None:
        super().__init__()
        self.backbone = PlainMamba(**{**self.SIZES, **sizes})
        self.head = Head(self.backbone.pos_embed.shape[-1], classes)

    @property
    def patch_embed(self) -> Stem:
        """The trunk's stem, where other classifiers have their patch embedding."""
        return self.backbone.patch_embed

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> logits [B, classes]."""
        return self.head(self.backbone(images))


def plain_mamba_l1(**sizes: Any) -> PlainMambaClassifier:
    """PlainMamba-L1 of the paper, 7.6 M parameters with its head."""
    return PlainMambaClassifier(**{"width": 192, "convolutions": 1, "depthwise": (0,), **sizes})


def plain_mamba_l2(**sizes: Any) -> PlainMambaClassifier:
    """PlainMamba-L2 of the paper, 26 M parameters with its head."""
    return PlainMambaClassifier(**{"width": 384, **sizes})


def plain_mamba_l3(**sizes: Any) -> PlainMambaClassifier:
    """PlainMamba-L3 of the paper, 51 M parameters with its head."""
    return PlainMambaClassifier(**{"width": 448, "depth": 36, **sizes})
