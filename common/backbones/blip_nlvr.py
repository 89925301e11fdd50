"""BLIP for sentences about two pictures (NLVR2; Li et al., ICML 2022, arXiv 2201.12086), as its authors publish it: a
ViT of timm, and transformers' text encoder of BLIP, each of whose layers attends to either picture by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention

from prunelab.common.backbones.checkpoint import fill, read

MERGED = 6  # layers before the first that merges what it read of the two pictures by a matrix; the others take the mean
NARROW = {"width": 16, "depth": 7, "heads": 2, "vocabulary": 512}  # of a look-alike


class TwinOutput(nn.Module):
    """What was read of both pictures as one, added to the stream."""

    def __init__(self, width: int, epsilon: float, merge: bool) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(width, eps=epsilon)
        self.dense0, self.dense1 = nn.Linear(width, width), nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None

    def forward(self, first: Tensor, second: Tensor, stream: Tensor) -> Tensor:
        first, second = self.dense0(first), self.dense1(second)
        both = (first + second) / 2 if self.merge_layer is None else self.merge_layer(torch.cat([first, second], -1))
        result: Tensor = self.LayerNorm(both + stream)
        return result


class TwinAttention(nn.Module):
    """Cross-attention to two pictures [2, B, S, D], each with projections of its own."""

    def __init__(self, config: Any, merge: bool) -> None:
        super().__init__()
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.output = TwinOutput(config.hidden_size, config.layer_norm_eps, merge)

    def forward(self, stream: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> tuple[Tensor, None]:
        first, second = (
            attention(stream, encoder_hidden_states=picture)[0]
            for attention, picture in zip((self.self0, self.self1), encoder_hidden_states, strict=True)
        )
        return self.output(first, second, stream), None


class BlipNlvr(nn.Module):
    """Whether a sentence is true of two pictures.

    Parameters
    ----------
    side, width, depth, heads, vocabulary
        Pixels of a picture's side, channels, layers and heads of both encoders, and tokens that the texts have.
    """

    def __init__(self, side: int, width: int, depth: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(
            img_size=side, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
        )
        config = BlipTextConfig(
            vocab_size=vocabulary, hidden_size=width, encoder_hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=depth, num_attention_heads=heads, is_decoder=True, bos_token_id=vocabulary - 2,
        )  # fmt: skip
        self.text_encoder = BlipTextModel(config, add_pooling_layer=False)
        for place, layer in enumerate(self.text_encoder.encoder.layer):
            layer.crossattention = TwinAttention(config, place >= MERGED)
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SimpleNamespace:
        """`logits` [B, 2], false and true, and with labels [B] the `loss`, of pictures [B, 2, 3, H, W] and sentences
        [B, T] that begin with the encoder's own token."""
        seen = self.visual_encoder.forward_features(pixel_values.flatten(0, 1))
        pictures = seen.unflatten(0, (-1, 2)).transpose(0, 1)
        read = self.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=pictures
        ).last_hidden_state
        logits = self.cls_head(read[:, 0])
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def blip_nlvr(side: int = 384, width: int = 768, depth: int = 12, heads: int = 12, vocabulary: int = 30524) -> BlipNlvr:
    """BLIP with ViT-B/16."""
    return BlipNlvr(side, width, depth, heads, vocabulary)


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load the authors' file, with every name and shape checked."""
    weights = read(Path(path))
    weights.pop("text_encoder.embeddings.position_ids", None)  # which are counted
    fill(model, weights, path)
