"""DINO (Zhang et al., ICLR 2023): a two-stage deformable encoder-decoder, on transformers' Deformable-DETR parts.

Mixed query selection, contrastive denoising, look-forward-twice; the head of the first stage is shared by all tokens.
Feature levels are flattened finest first: N tokens of width D over L levels. Inside, `valid` is True where an image
is and False where it was padded; `None` where nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoderLayer,
    DeformableDetrEncoderLayer,
    DeformableDetrMultiscaleDeformableAttention,
)

from prunelab.common.backbones import detection, swin
from prunelab.common.backbones.checkpoint import load_checkpoint
from prunelab.common.backbones.detection import Target, logit
from prunelab.common.backbones.pyramid import ConvPyramid, Neck, ResNet
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import take

__all__ = ["DINO", "Pyramid", "dino_r50", "dino_r101", "dino_small", "load_checkpoint"]


def sine(places: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Sine embedding [..., n * width] of n coordinates in [0, 1], places [..., n]; sines and cosines alternate."""
    steps = torch.arange(width, dtype=torch.float32, device=places.device)
    steps = temperature ** (2 * steps.div(2, rounding_mode="floor") / width)
    angles = places.unsqueeze(-1) * 2 * math.pi / steps
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-3)


def level_shapes(size: tuple[int, int], stride: int, levels: int) -> list[tuple[int, int]]:
    """The shape (h, w) of each level for images of a size (h, w): the first at `stride`, each further one halved."""
    height, width = size
    shapes = []
    for level in range(int(math.log2(stride)) + levels):
        if 2**level >= stride:
            shapes.append((height, width))
        height, width = -(-height // 2), -(-width // 2)
    return shapes[:levels]


@dataclass(frozen=True)
class Pyramid:
    """Flattened feature levels: features and positions [B, N, D] (sine plus level embedding), valid [B, N] or None,
    and the shape (h, w) of each level."""

    features: Tensor
    positions: Tensor
    valid: Tensor | None
    shapes: list[tuple[int, int]]

    def spread(self) -> dict[str, Any]:
        """The level arguments of transformers' deformable attention."""
        shapes = torch.tensor(self.shapes, device=self.features.device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        return {"spatial_shapes": shapes, "spatial_shapes_list": self.shapes, "level_start_index": starts}

    def ratios(self) -> Tensor:
        """[B, L, 2] share of each level's width and height that is image."""
        if self.valid is None:
            return self.features.new_ones(self.features.shape[0], len(self.shapes), 2)
        maps = [v.view(-1, *s).to(self.features.dtype) for v, s in zip(self.split(self.valid), self.shapes)]
        return torch.stack([torch.stack([m[:, 0].mean(1), m[:, :, 0].mean(1)], -1) for m in maps], 1)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens [B, N, ...] level by level."""
        return x.split([height * width for height, width in self.shapes], 1)

    def centres(self) -> Tensor:
        """[B, N, 2] centre (x, y) of every token as a share of the image's valid part."""
        ratios, points = self.ratios(), []
        for level, (height, width) in enumerate(self.shapes):
            rows = (torch.arange(height, dtype=ratios.dtype, device=ratios.device) + 0.5) / height
            columns = (torch.arange(width, dtype=ratios.dtype, device=ratios.device) + 0.5) / width
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            points.append(torch.stack([x, y], -1).view(1, -1, 2) / ratios[:, None, level])
        return torch.cat(points, 1)

    def references(self) -> Tensor:
        """[B, N, L, 2] where every token samples each level, as shares of the padded level."""
        return self.centres().unsqueeze(2) * self.ratios().unsqueeze(1)

    def anchors(self) -> tuple[Tensor, Tensor]:
        """First-stage anchors as logits [B, N, 4] cxcywh, and which tokens [B, N] may propose a box.

        Anchors of level l have the size 0.05 * 2^l of the image. Those at its border and padding propose nothing:
        their anchor is infinite.
        """
        centres = self.centres()
        sizes = [0.05 * 2.0**level for level, (height, width) in enumerate(self.shapes) for _ in range(height * width)]
        side = torch.tensor(sizes, device=centres.device).to(centres.dtype).view(1, -1, 1).expand_as(centres)
        boxes = torch.cat([centres, side], -1)
        usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
        if self.valid is not None:
            usable = usable & self.valid
        return (boxes / (1 - boxes)).log().masked_fill(~usable.unsqueeze(-1), float("inf")), usable


def update(layer: Any, query: Tensor, value: Tensor, valid: Tensor | None, positions: Tensor, **levels: Any) -> Tensor:
    """One deformable encoder layer: queries [B, K, D] look at values [B, N, D], which need not be the same tokens.

    layer: transformers' encoder layer, whose own forward knows one tensor for both. positions [B, K, D] are the
    queries'; `levels` are `reference_points` [B, K, L, 2] and the arguments of `Pyramid.spread`.
    """
    seen, _ = layer.self_attn(
        hidden_states=query,
        attention_mask=valid,
        encoder_hidden_states=value,
        position_embeddings=positions,
        **levels,
    )
    query = layer.self_attn_layer_norm(query + functional.dropout(seen, layer.dropout, layer.training))
    return layer.final_layer_norm(query + layer.mlp(query))


class EncoderLayer(DeformableDetrEncoderLayer):
    """transformers' encoder layer with values of their own."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        *,
        value: Tensor | None = None,
        **levels: Any,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]; `value` [B, N, D] defaults to the tokens themselves."""
        value = hidden_states if value is None else value
        return update(self, hidden_states, value, attention_mask, spatial_position_embeddings, **levels)  # type: ignore[arg-type]


class Encoder(nn.Module):
    """The layers, and what they look at: `hidden`, the tokens as they are there, or the `features` that came in."""

    def __init__(self, layers: Sequence[EncoderLayer], value: Literal["hidden", "features"]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.value = value

    def forward(self, pyramid: Pyramid) -> Tensor:
        """[B, N, D]."""
        hidden, references, levels = pyramid.features, pyramid.references(), pyramid.spread()
        value = pyramid.features if self.value == "features" else None
        for layer in self.layers:
            hidden = layer(hidden, pyramid.valid, pyramid.positions, value=value, reference_points=references, **levels)
        return hidden


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class DINO(nn.Module):
    """The detector.

    backbone: images [B, C, H, W] -> list of maps, finest first, `channels` wide each, each half the size of the one
        before. Images are normalised as the backbone expects.
    value: what the encoder's attention reads in every layer: `hidden`, the tokens as they are there (DINO), or
        `features`, the backbone's features that entered the first layer (what Focus-DETR's release does).
    An input with fewer tokens than `queries` gets one query a token.
    """

    eps: ClassVar[float] = 1e-3  # by which boxes stay off 0 and 1 before the decoder refines them

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        classes: int,
        *,
        width: int = 256,
        heads: int = 8,
        points: int = 4,
        feedforward: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        levels: int = 4,
        queries: int = 900,
        groups: int = 32,
        value: Literal["hidden", "features"] = "hidden",
        copies: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        image_size: tuple[int, int] = (800, 1333),
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if value not in ("hidden", "features"):
            raise PrunelabError(f"value='{value}' is unknown; use hidden or features")
        config = DeformableDetrConfig(
            d_model=width,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_n_points=points,
            decoder_n_points=points,
            encoder_ffn_dim=feedforward,
            decoder_ffn_dim=feedforward,
            num_feature_levels=levels,
            dropout=0.0,
        )
        config._attn_implementation = "sdpa"
        self.width, self.classes, self.queries = width, classes, queries
        self.image_size, self.image_channels = image_size, image_channels
        self.noise = {"number": copies, "label_noise": label_noise, "box_noise": box_noise}
        self.backbone = backbone
        self.neck = Neck(channels, width, levels, groups)
        self.level_embed = nn.Parameter(torch.empty(levels, width))
        self.encoder = Encoder([EncoderLayer(config) for _ in range(encoder_layers)], value)
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        self.query_content = nn.Embedding(queries, width)
        self.label_content = nn.Embedding(classes, width)
        self.decoder = nn.ModuleList(DeformableDetrDecoderLayer(config) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.reference_embed = MLP(2 * width, width, width)
        # one head a decoder layer; the last one is the first stage's
        self.class_embed = nn.ModuleList(nn.Linear(width, classes) for _ in range(decoder_layers + 1))
        self.box_embed = nn.ModuleList(MLP(width, width, width, 4) for _ in range(decoder_layers + 1))
        self._initialise(heads, points)

    def _initialise(self, heads: int, points: int) -> None:
        """Xavier weights; sampling points start on rays around the token; classes start rare, boxes at the anchor."""
        for part in (self.encoder, self.decoder, self.enc_output, self.reference_embed, self.query_content):
            for value in part.parameters():
                if value.dim() > 1:
                    nn.init.xavier_uniform_(value)
        for module in [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(module, DeformableDetrMultiscaleDeformableAttention):
                angle = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
                ray = torch.stack([angle.cos(), angle.sin()], -1)
                ray = ray / ray.abs().max(-1, keepdim=True).values
                reach = torch.arange(1, points + 1, dtype=torch.float32)
                rays = (ray[:, None, None] * reach[:, None]).expand(-1, module.n_levels, -1, -1)
                nn.init.zeros_(module.sampling_offsets.weight)
                module.sampling_offsets.bias.data.copy_(rays.flatten())
                for value in (*module.attention_weights.parameters(), module.value_proj.bias, module.output_proj.bias):
                    nn.init.zeros_(value)
        nn.init.normal_(self.level_embed)
        for module in self.neck.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for head in self.class_embed:
            nn.init.constant_(head.bias, -math.log(99))  # type: ignore[arg-type]  # a probability of 0.01
        for mlp in self.box_embed:
            for value in mlp.layers[-1].parameters():  # type: ignore[union-attr, index]
                nn.init.zeros_(value)

    def grids(self) -> list[tuple[int, int]]:
        """The shape (h, w) of each level for images of the standard size."""
        return level_shapes(self.image_size, self.backbone.stride, len(self.level_embed))  # type: ignore[arg-type]

    # -- forward, in the paper's order ---------------------------------------------------------------------------

    def pyramid(self, images: Tensor, mask: Tensor | None) -> Pyramid:
        """Backbone, neck, positions and padding of images [B, C, H, W]; mask [B, H, W] is True where padded."""
        if mask is not None and mask.device.type != "meta":
            if bool(mask[:, 0, 0].any()):
                raise PrunelabError(
                    "an image is nothing but padding; images start in the upper left corner of the mask"
                )
            mask = mask if bool(mask.any()) else None
        features, positions, valids, shapes = [], [], [], []
        for level, x in enumerate(self.neck(self.backbone(images))):
            shape = (x.shape[2], x.shape[3])
            valid = torch.ones(x.shape[0], *shape, device=x.device)
            if mask is not None:
                valid = 1 - functional.interpolate(mask[:, None].float(), size=shape).squeeze(1)
            rows, columns = valid.cumsum(1), valid.cumsum(2)
            places = [(rows - 0.5) / (rows[:, -1:, :] + 1e-6), (columns - 0.5) / (columns[:, :, -1:] + 1e-6)]
            position = sine(torch.stack(places, -1), self.width // 2).to(x.dtype)
            features.append(x.flatten(2).transpose(1, 2))
            positions.append(position.flatten(1, 2) + self.level_embed[level])
            valids.append(valid.flatten(1).bool())
            shapes.append(shape)
        everything = None if mask is None else torch.cat(valids, 1)
        return Pyramid(torch.cat(features, 1), torch.cat(positions, 1), everything, shapes)

    def memory(self, hidden: Tensor, usable: Tensor) -> Tensor:
        """[B, N, D] what the first stage's heads read: tokens that may not propose a box are zeroed before."""
        return self.enc_output_norm(self.enc_output(hidden.masked_fill(~usable.unsqueeze(-1), 0.0)))

    def select(self, hidden: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor]:
        """The first stage: logits [B, Q, classes] and boxes as logits [B, Q, 4] of the best-scored tokens, and their
        places [B, Q]."""
        anchor, usable = pyramid.anchors()
        memory = self.memory(hidden, usable)
        scores = self.class_embed[-1](memory)
        boxes = self.box_embed[-1](memory) + anchor
        best = scores.max(-1).values.topk(min(self.queries, scores.shape[1]), dim=1).indices
        return take(scores, best), take(boxes, best), best

    def contents(self, hidden: Tensor, best: Tensor) -> Tensor:
        """[B, Q, D] what queries start from, for the encoder's tokens [B, N, D] and the places [B, Q] of the best."""
        return self.query_content.weight[: best.shape[1]].expand(len(best), -1, -1)

    def places(self, sampled: Tensor, before: Tensor | None, reference: Tensor) -> Tensor:
        """[B, Q, D] positions of queries in a decoder layer, for their references [B, Q, 4] cxcywh as shares of the
        padded image (`sampled`) and of the image; `before`: the positions in the layer before."""
        return self.reference_embed(sine(sampled[..., [1, 0, 2, 3]], self.width // 2).to(reference.dtype))

    def decode(
        self, content: Tensor, reference: Tensor, hidden: Tensor, pyramid: Pyramid, blocked: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Logits [B, Q, classes] and boxes [B, Q, 4] behind every decoder layer.

        content [B, Q, D] and reference [B, Q, 4] cxcywh are the queries, hidden [B, N, D] the encoder's tokens.
        blocked [Q, Q] forbids attention among queries. A layer's box is read off the reference that the layer before
        refined with gradients (look forward twice); the reference that moves on is detached.
        """
        allowed = None if blocked is None else ~blocked[None, None]
        ratios = pyramid.ratios().repeat(1, 1, 2).unsqueeze(1)  # [B, 1, L, 4]
        levels, seen, places = pyramid.spread(), reference, None
        logits, boxes = [], []
        for i, layer in enumerate(self.decoder):
            sampled = reference.unsqueeze(2) * ratios
            places = self.places(sampled[:, :, 0], places, reference)
            content = layer(
                content,
                object_queries_position_embeddings=places,
                reference_points=sampled,
                encoder_hidden_states=hidden,
                encoder_attention_mask=pyramid.valid,
                attention_mask=allowed,
                **levels,
            )
            state = self.decoder_norm(content)
            logits.append(self.class_embed[i](state))
            boxes.append((self.box_embed[i](state) + logit(seen, self.eps)).sigmoid())
            seen = (self.box_embed[i](content) + logit(reference, self.eps)).sigmoid()
            reference = seen.detach()
        return logits, boxes

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """images [B, C, H, W], mask [B, H, W] True where padded -> `logits` [B, Q, classes] (sigmoid gives scores)
        and `boxes` [B, Q, 4] cxcywh as shares of each image's valid part."""
        pyramid = self.pyramid(images, mask)
        hidden = self.encoder(pyramid)
        _, proposed, best = self.select(hidden, pyramid)
        logits, boxes = self.decode(self.contents(hidden, best), proposed.detach().sigmoid(), hidden, pyramid)
        return {"logits": logits[-1], "boxes": boxes[-1]}

    # -- training ------------------------------------------------------------------------------------------------

    def loss(
        self,
        images: Tensor,
        mask: Tensor | None,
        targets: Sequence[Target],
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses and their `total`: `class`, `box` and `giou` summed over the decoder's layers, the same of
        the denoising copies (`denoise_*`) and of the first stage (`encoder_*`).

        targets: one dictionary an image, `labels` [m] and `boxes` [m, 4] cxcywh as shares of the image's valid part;
        no box at all is fine. `generator` draws the denoising.
        """
        targets = detection.clean_targets(targets, self.classes)
        pyramid = self.pyramid(images, mask)
        hidden = self.encoder(pyramid)
        first_logits, first_boxes, best = self.select(hidden, pyramid)
        reference, content = first_boxes.detach().sigmoid(), self.contents(hidden, best)
        copies = detection.noised(targets, self.classes, **self.noise, generator=generator)  # type: ignore[arg-type]
        cut, blocked = 0, None
        if copies is not None:
            cut, blocked = copies.labels.shape[1], copies.blocked(reference.shape[1])
            named = self.label_content(copies.labels.clamp(min=0)) * (copies.labels >= 0).unsqueeze(-1)
            # empty slots start from the middle of the image, as an all-zero logit does
            placed = torch.where((copies.labels >= 0).unsqueeze(-1), logit(copies.boxes).sigmoid(), 0.5)
            content, reference = torch.cat([named, content], 1), torch.cat([placed, reference], 1)
        logits, boxes = self.decode(content, reference, hidden, pyramid, blocked)

        count = max(1, sum(len(t["labels"]) for t in targets))
        parts: list[tuple[str, dict[str, Tensor]]] = []
        outputs = [("", result[:, cut:], box[:, cut:]) for result, box in zip(logits, boxes)]
        for prefix, result, box in [*outputs, ("encoder_", first_logits, first_boxes.sigmoid())]:
            matches = detection.match(result, box, targets)
            parts.append((prefix, detection.set_losses(result, box, targets, matches, count)))
        if copies is not None:
            pairs, copied = copies.matches(targets), count * copies.groups
            for result, box in zip(logits, boxes):
                result, box = result[:, :cut], box[:, :cut]
                parts.append(("denoise_", detection.set_losses(result, box, targets, pairs, copied)))
        losses: dict[str, Tensor] = {}
        for prefix, values in parts:
            for name, value in values.items():
                losses[prefix + name] = losses.get(prefix + name, torch.zeros_like(value)) + value
        losses["total"] = torch.stack(list(losses.values())).sum()
        return losses


def dino_r50(classes: int = 80, **options: Any) -> DINO:
    """DINO with a ResNet-50 and four scales, as published; options are those of `DINO`."""
    return DINO(ResNet(50), ResNet.channels, classes, **options)


def dino_r101(classes: int = 80, **options: Any) -> DINO:
    """The same with a ResNet-101."""
    return DINO(ResNet(101), ResNet.channels, classes, **options)


def _dino_swin(size: str, classes: int, **options: Any) -> DINO:
    backbone = swin.Swin(*swin.SIZES[size])
    return DINO(backbone, backbone.channels, classes, **options)


def dino_swin_tiny(classes: int = 80, **options: Any) -> DINO:
    """The same with a Swin-T."""
    return _dino_swin("tiny", classes, **options)


def dino_swin_base(classes: int = 80, **options: Any) -> DINO:
    """The same with a Swin-B of pictures of 384 pixels."""
    return _dino_swin("base", classes, **options)


def dino_swin_large(classes: int = 80, **options: Any) -> DINO:
    """The same with a Swin-L of pictures of 384 pixels."""
    return _dino_swin("large", classes, **options)


def dino_small(classes: int = 10, image_channels: int = 1, **options: Any) -> DINO:
    """Under a million parameters, for small scenes: three encoder and three decoder layers, four scales."""
    sizes: dict[str, Any] = {
        "width": 64,
        "heads": 4,
        "points": 4,
        "feedforward": 256,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "queries": 60,
        "groups": 8,
        "copies": 40,
        "image_size": (160, 160),
    }
    channels = (32, 64, 96)
    backbone = ConvPyramid(image_channels, channels)
    return DINO(backbone, channels, classes, **(sizes | {"image_channels": image_channels} | options))
