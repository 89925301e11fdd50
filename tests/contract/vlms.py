"""Tiny random image and video language models of every class that has an adapter, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE, VIDEO, VOCABULARY = 60, 61, 64
_VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 3}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CROPS = [[32, 64], [64, 32], [64, 64]]
VLMS = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl")


def vlm(family: str, **text: Any) -> Any:
    """A tiny random model of a family, with weights large enough for attention to be uneven."""
    import transformers as t

    torch.manual_seed(0)
    clip = t.CLIPVisionConfig(**_VISION, image_size=32, patch_size=8)
    siglip = t.SiglipVisionConfig(**_VISION, image_size=24, patch_size=8, vision_use_head=False)
    options = _TEXT | text
    model: nn.Module
    if family == "llava":
        llama = t.LlamaConfig(**options)
        model = t.LlavaForConditionalGeneration(
            t.LlavaConfig(vision_config=clip, text_config=llama, image_token_id=IMAGE)
        )
    elif family == "llava_next":
        llama = t.LlamaConfig(**options)
        config = t.LlavaNextConfig(
            vision_config=clip, text_config=llama, image_token_id=IMAGE, image_grid_pinpoints=_CROPS
        )
        model = t.LlavaNextForConditionalGeneration(config)
    elif family == "llava_onevision":
        config = t.LlavaOnevisionConfig(
            vision_config=siglip,
            text_config=t.Qwen2Config(**options),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        )
        model = t.LlavaOnevisionForConditionalGeneration(config)
    else:
        vision = {
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "window_size": 64,
            "fullatt_block_indexes": [1],
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config = t.Qwen2_5_VLConfig(
            vision_config=vision,
            text_config={**options, "rope_parameters": rope},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=58,
            vision_end_token_id=59,
        )
        model = t.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) * (0.5 if "q_proj" in name or "k_proj" in name else 0.2))
    model.generation_config.pad_token_id = 0
    return model.eval()


def images(family: str, batch: int = 3, seed: int = 1) -> Tensor:
    """Pixels of one image a sample, of the size that the family's tiny model takes."""
    side = 24 if family == "llava_onevision" else 32
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def prompt(family: str, pixels: Tensor, text: int = 4) -> dict[str, Any]:
    """Arguments of forward and `generate` for one image a sample [B, 3, H, W], between 3 and `text` words."""
    batch, side = len(pixels), pixels.shape[-1]
    given: dict[str, Any]
    if family == "llava":
        given, visual = {"pixel_values": pixels}, 16
    elif family in ("llava_next", "llava_onevision"):  # a square image: thumbnail and two by two crops
        crops = torch.stack([pixels, pixels.flip(-1), -pixels, pixels.flip(-2), pixels * 0.5], 1)
        patches = side // 8
        given = {"pixel_values": crops, "image_sizes": torch.tensor([[2 * side, 2 * side]] * batch)}
        visual = patches**2 + 2 * patches * (2 * patches + 1)
    else:
        grid = torch.tensor([[1, 8, 8]] * batch)
        given, visual = {"pixel_values": patched(pixels), "image_grid_thw": grid}, 16
    words = ids([[("text", 3), (IMAGE, visual), ("text", text)]])
    return given | {name: tokens.expand(batch, -1) for name, tokens in words.items()}


def patched(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, 32, 32] as Qwen's encoder reads them: [B * 64, 3 * 2 * 4 * 4], two by two patches together."""
    frames = pixels.unsqueeze(2).expand(-1, -1, 2, -1, -1)  # each image stands for two frames
    cut = frames.unflatten(4, (4, 2, 4)).unflatten(3, (4, 2, 4))  # [B, 3, 2, 4, 2, 4, 4, 2, 4]
    return cut.permute(0, 3, 6, 4, 7, 1, 2, 5, 8).reshape(-1, 96).to(pixels.dtype)


def ids(samples: list[list[tuple[Any, int]]], left: bool = True, seed: int = 5) -> dict[str, Tensor]:
    """`input_ids`, and where samples differ in length `attention_mask`, of runs of words and of placeholders."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for runs in samples:
        made = [
            torch.randint(3, 50, (n,), generator=generator) if what == "text" else torch.full((n,), what)
            for what, n in runs
        ]
        rows.append(torch.cat(made))
    longest = max(map(len, rows))
    pads = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
    tokens = torch.stack([nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
    return {"input_ids": tokens, "attention_mask": mask}


def typed(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """With the token types that Qwen's processor adds; unchanged for others."""
    if type(model).__name__.startswith("Qwen"):
        tokens = given["input_ids"]
        given = given | {"mm_token_type_ids": (tokens == IMAGE).long() + 2 * (tokens == VIDEO).long()}
    return given
