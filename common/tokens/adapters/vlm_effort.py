"""Layers of a decoder that do less for visual tokens, which all stay: attention within windows of the picture, heads
and layers that do not look at it, and a part of the MLP (`core.plan.Effort`).

Attention is the library's own: what a head does not see of a picture is its values, which are zero there, so that no
matrix of attention stands in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core import attention
from prunelab.common.core.attention_interface import replaced as answered
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import replaced
from prunelab.common.core.plan import Effort, take
from prunelab.common.tokens.adapters.passes import Application
from prunelab.common.tokens.adapters.vlm_decoder import DecoderSide

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def eased(adapter: DecoderSide, application: Application) -> Iterator[Callable[[], Any]]:
    """Put the method's efforts to work. Yields what takes each out again."""
    method = application.method
    if not method.eases:
        return
    budget, blocks = application.budget.at(0), list(adapter.blocks)
    stated = {layer: method.effort(layer, adapter.info, budget) for layer in range(len(blocks))}
    efforts = {layer: effort for layer, effort in stated.items() if effort is not None}
    attending = [layer for layer, effort in efforts.items() if not effort.attends_as_ever]
    if attending:
        turn = answered([blocks[layer].self_attn for layer in attending], functools.partial(attend, adapter, efforts))
        turn.__enter__()
        yield lambda: turn.__exit__(None, None, None)
    for layer, effort in efforts.items():
        if effort.neurons < 1:
            mlp = blocks[layer].mlp
            if not all(hasattr(mlp, name) for name in GATED):
                raise PrunelabError(
                    f"{method.name}: a part of the MLP is taken of gated ones, and this model has others"
                )
            yield replaced(mlp, "forward", functools.partial(slim, adapter, mlp, mlp.forward, effort.neurons))


def attend(
    adapter: DecoderSide,
    efforts: dict[int, Effort],
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Outputs [B, M, H, d] of a layer's heads."""
    running, effort = adapter.running, efforts[module.layer_idx]
    groups, rows, total = queries.shape[1] // keys.shape[1], queries.shape[2], keys.shape[2]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    visual = running.cached.visual.to(keys.device) if running.decoding else running.prunable
    columns = F.pad(visual, (0, total - visual.shape[1]))
    heads = values.new_ones(len(values[0])) if effort.heads is None else values.new_tensor(effort.heads)
    shown = heads if effort.read else torch.zeros_like(heads)
    values = values * torch.where(columns[:, None, :, None], shown[:, None, None], 1.0)
    if effort.window and not running.decoding:
        mask = windowed(adapter, effort.window)
    elif mask is None and rows > 1:
        mask = torch.ones(rows, total, dtype=torch.bool, device=keys.device).tril(total - rows)
    out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale).transpose(1, 2)
    if running.decoding or effort.heads is None:
        return out
    return out * torch.where(visual[:, :, None, None], heads[:, None], 1.0)


def windowed(adapter: DecoderSide, window: int) -> Tensor:
    """[B, 1, N, N] which tokens see which: of one picture those nearby, of another none, and else those before."""
    running = adapter.running
    if window not in running.windows:
        visual, valid = running.prunable, running.tokens.valid
        total = visual.shape[1]
        seen = torch.ones(total, total, dtype=torch.bool, device=visual.device).tril()
        group, row, column = places(adapter).to(visual.device).unbind(-1)
        placed = group >= 0
        near = attention.neighbours(row, column, window) & (group.unsqueeze(2) == group.unsqueeze(1))
        mask = torch.where(placed.unsqueeze(2) & placed.unsqueeze(1), near, seen)
        if valid is not None:
            mask = (mask & valid.unsqueeze(1)) | torch.eye(total, dtype=torch.bool, device=mask.device)
        running.windows[window] = mask.unsqueeze(1)
    return running.windows[window]


def places(adapter: DecoderSide) -> Tensor:
    """[B, N, 3] of each visual token its crop, row and column, -1 for text and newlines."""
    running = adapter.running
    if not running.encoded:
        raise PrunelabError(
            "windows are of pictures, whose sizes the encoder tells; give the model pixels, not features"
        )
    result = torch.full((*running.anywhere.shape, 3), -1)
    first = 0  # the number of an image's first crop
    for modality, encoded in running.encoded.items():
        visual, orders = running.visual[modality].cpu(), encoded.order()
        own: list[Tensor] = []
        for order, (height, width), features in zip(orders, encoded.grids, encoded.features, strict=True):
            if order is None:
                raise PrunelabError(
                    "a window of the picture needs tokens that are single patches; this model pools them"
                )
            size = height * width
            place = torch.stack([first + order // size, order // width % height, order % width], 1)
            own.append(place.masked_fill((order < 0).unsqueeze(1), -1))
            first += len(features)
        for sample, images in enumerate(encoded.owners(visual.sum(1).tolist())):
            if images:
                result[sample, visual[sample]] = torch.cat([own[image] for image in images])
    return result


def slim(adapter: DecoderSide, mlp: Any, whole: Callable[[Tensor], Tensor], share: float, x: Tensor) -> Tensor:
    """What an MLP makes of x [B, N, D], of visual tokens by the first of its neurons alone."""
    running = adapter.running
    if running.decoding:
        return whole(x)
    count = int(share * mlp.gate_proj.out_features)

    def part(tokens: Tensor) -> Tensor:
        gate, up = (
            F.linear(tokens, layer.weight[:count], None if layer.bias is None else layer.bias[:count])
            for layer in (mlp.gate_proj, mlp.up_proj)
        )
        return F.linear(mlp.act_fn(gate) * up, mlp.down_proj.weight[:, :count], mlp.down_proj.bias)

    visual = running.prunable
    if running.tokens.valid is not None:  # samples of unlike lengths, or with unlike numbers of visual tokens
        return torch.where(visual.unsqueeze(-1), part(x), whole(x))
    order = visual.int().argsort(dim=1, descending=True, stable=True)
    pieces = order.split([x.shape[1] - running.text, running.text], 1)
    out = torch.cat([part(take(x, pieces[0])), whole(take(x, pieces[1]))], 1)
    return take(out, order.argsort(1))
