"""A small text-to-image diffusion model of handwritten digits, built as Stable Diffusion is: CLIP's text encoder, and a
U-Net of residual convolutions and transformer blocks that read the text by cross attention.

There is no autoencoder, since 8 x 8 pixels need none. Shapes: images [B, 1, 8, 8] around -1 to 1, token ids [B, T] with
the padding attended to, as Stable Diffusion does.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 8  # pixels


class Attention(nn.Module):
    """Attention of places to themselves, or to a text [B, T, context]."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        read = x if context is None else context
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(read), self.to_v(read))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """Self attention, cross attention and an MLP over the places of a picture [B, C, H, W]."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, context, heads)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        places = x.flatten(2).transpose(1, 2)
        places = places + self.attn1(self.norm1(places))
        places = places + self.attn2(self.norm2(places), context)
        places = places + self.ff(self.norm3(places))
        return places.transpose(1, 2).view_as(x)


class Residual(nn.Module):
    """Two convolutions, the time between them."""

    def __init__(self, given: int, width: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, given), nn.Conv2d(given, width, 3, padding=1)
        self.time = nn.Linear(time, width)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.short = nn.Conv2d(given, width, 1) if given != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        result: Tensor = self.short(x) + self.conv2(F.silu(self.norm2(hidden)))
        return result


class UNet(nn.Module):
    """Two levels of 8 x 8 and 4 x 4 places."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        deep, time = 2 * width, 4 * width
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in = nn.Conv2d(1, width, 3, padding=1)
        self.down1, self.text1 = Residual(width, width, time), TextBlock(width, context, heads)
        self.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.down2, self.text2 = Residual(width, deep, time), TextBlock(deep, context, heads)
        self.middle = Residual(deep, deep, time)
        self.up2, self.text3 = Residual(2 * deep, deep, time), TextBlock(deep, context, heads)
        self.grow = nn.Conv2d(deep, width, 3, padding=1)
        self.up1, self.text4 = Residual(2 * width, width, time), TextBlock(width, context, heads)
        self.norm_out, self.conv_out = nn.GroupNorm(8, width), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The noise [B, 1, 8, 8] in samples at a time [B] from 0 (none) to 1 (nothing else)."""
        rates = torch.exp(-math.log(1000) * torch.arange(self.width // 2, device=sample.device) / (self.width // 2))
        angles = 1000 * timestep[:, None] * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(sample))
        high = self.text1(self.down1(self.conv_in(sample), time), encoder_hidden_states)
        low = self.text2(self.down2(self.shrink(high), time), encoder_hidden_states)
        x = self.text3(self.up2(torch.cat([self.middle(low, time), low], 1), time), encoder_hidden_states)
        x = self.grow(F.interpolate(x, scale_factor=2.0))
        x = self.text4(self.up1(torch.cat([x, high], 1), time), encoder_hidden_states)
        noise: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return noise


def signal(time: Tensor) -> Tensor:
    """How much of the picture there is at a time, along a cosine; squared it and the noise sum to one."""
    return torch.cos(0.5 * math.pi * 0.98 * time)


class DigitDiffusion(nn.Module):
    """Pictures of digits from tokens of a caption. `components` are what is pruned, as in a pipeline of diffusers."""

    def __init__(self, vocabulary: int, length: int, text: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=text, intermediate_size=4 * text, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=length, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            projection_dim=text,
        )  # fmt: skip
        self.text_encoder = CLIPTextModel(config)
        self.unet = UNet(width, text, heads)

    @property
    def components(self) -> dict[str, nn.Module]:
        """The parts that can be pruned, by name."""
        return {"text_encoder": self.text_encoder, "unet": self.unet}

    def loss(self, images: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the noise that is predicted in pictures at random times."""
        time = torch.rand(len(images), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        much = signal(time)[:, None, None, None]
        noisy = much * images + (1 - much.square()).sqrt() * noise
        return F.mse_loss(self.unet(noisy, time, self.text(ids)), noise)

    def text(self, ids: Tensor) -> Tensor:
        """Hidden states of captions [B, T, D]."""
        states: Tensor = self.text_encoder(input_ids=ids).last_hidden_state
        return states

    @torch.no_grad()
    def generate(self, ids: Tensor, steps: int, guidance: float, generator: torch.Generator) -> Tensor:
        """Pictures [B, 1, 8, 8] by deterministic steps (DDIM, Song et al., 2021) under classifier-free guidance, for
        which an empty caption is all padding."""
        context: Any = torch.cat([self.text(ids), self.text(torch.zeros_like(ids))])
        x = torch.randn(len(ids), 1, SIDE, SIDE, generator=generator).to(context)
        times = torch.linspace(1, 0, steps + 1, device=x.device)
        for now, after in pairwise(times):
            noise, plain = self.unet(x.repeat(2, 1, 1, 1), now.expand(2 * len(x)), context).chunk(2)
            noise = plain + guidance * (noise - plain)
            picture = (x - (1 - signal(now) ** 2).sqrt() * noise) / signal(now)
            picture = picture.clamp(-1.5, 1.5)
            x = signal(after) * picture + (1 - signal(after) ** 2).clamp_min(0).sqrt() * noise
        return x
