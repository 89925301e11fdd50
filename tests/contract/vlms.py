"""Tiny random image and video language models of every class that has an adapter, and prompts for them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, VIDEO, VOCABULARY = 60, 61, 64
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 3}
TEXT = {
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
CROPS = [[32, 64], [64, 32], [64, 64]]
VLMS = ("llava", "llava_next", "llava_onevision", "llava_video", "qwen2_5_vl")
_SIDES = {"llava_onevision": 24, "llava_video": 40}  # pixels of a crop: 3 x 3 and 5 x 5 patches; the others' 32: 4 x 4


def vlm(family: str, *, tower: int = 3, **text: Any) -> Any:
    """A tiny random model of a family, with weights large enough for attention to be uneven. tower: layers of its CLIP
    or SigLIP; Qwen's encoder has one less, as many as CLIP's up to its features."""
    import transformers as t

    torch.manual_seed(0)
    small = VISION | {"num_hidden_layers": tower}
    clip = t.CLIPVisionConfig(**small, image_size=32, patch_size=8)
    side = _SIDES.get(family, 32)
    siglip = t.SiglipVisionConfig(**small, image_size=side, patch_size=8, vision_use_head=False)
    options = TEXT | text
    model: nn.Module
    if family == "llava":
        llama = t.LlamaConfig(**options)
        model = t.LlavaForConditionalGeneration(
            t.LlavaConfig(vision_config=clip, text_config=llama, image_token_id=IMAGE)
        )
    elif family == "llava_next":
        llama = t.LlamaConfig(**options)
        config = t.LlavaNextConfig(
            vision_config=clip, text_config=llama, image_token_id=IMAGE, image_grid_pinpoints=CROPS
        )
        model = t.LlavaNextForConditionalGeneration(config)
    elif family in ("llava_onevision", "llava_video"):
        sizes: dict[str, Any] = {
            "vision_config": siglip,
            "text_config": t.Qwen2Config(**options),
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_grid_pinpoints": [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
        }
        if family == "llava_video":
            from prunelab.common.backbones.llava_video import llava_video

            model = llava_video(**sizes)
        else:
            model = t.LlavaOnevisionForConditionalGeneration(t.LlavaOnevisionConfig(**sizes))
    else:
        vision = {
            "depth": tower - 1,
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
    return lively(model)


def lively(model: Any) -> Any:
    """With weights large enough for attention to be uneven."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) * (0.5 if "q_proj" in name or "k_proj" in name else 0.2))
    model.generation_config.pad_token_id = 0
    return model.eval()


def images(family: str, batch: int = 3, seed: int = 1) -> Tensor:
    """Pixels of one image a sample, of the size that the family's tiny model takes."""
    side = _SIDES.get(family, 32)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def prompt(family: str, pixels: Tensor, text: int = 4) -> dict[str, Any]:
    """Arguments of forward and `generate` for one image a sample [B, 3, H, W], between 3 and `text` words."""
    batch, side = len(pixels), pixels.shape[-1]
    given: dict[str, Any]
    if family == "llava":
        given, visual = {"pixel_values": pixels}, 16
    elif family in ("llava_next", "llava_onevision", "llava_video"):  # a square image: thumbnail and two by two crops
        crops = torch.stack([pixels, pixels.flip(-1), -pixels, pixels.flip(-2), pixels * 0.5], 1)
        patches = side // 8
        given = {"pixel_values": crops, "image_sizes": torch.tensor([[2 * side, 2 * side]] * batch)}
        visual = patches**2 + 2 * patches * (2 * patches + 1)
    else:
        grid = torch.tensor([[1, 8, 8]] * batch)
        given, visual = {"pixel_values": patched(pixels), "image_grid_thw": grid}, 16
    words = ids([[("text", 3), (IMAGE, visual), ("text", text)]])
    return given | {name: tokens.expand(batch, -1) for name, tokens in words.items()}


def film(family: str, frames: int = 4, words: tuple[int, ...] = (4, 4), left: bool = True) -> dict[str, Any]:
    """A prompt of one video a sample, with so many words behind each."""
    batch, side = len(words), _SIDES.get(family, 32)
    pixels = torch.randn(batch, frames, 3, side, side, generator=torch.Generator().manual_seed(2))
    given: dict[str, Any]
    if family == "qwen2_5_vl":
        cut = torch.cat([patched(video[::2], video[1::2]) for video in pixels])
        given = {"pixel_values_videos": cut, "video_grid_thw": torch.tensor([[frames // 2, 8, 8]] * batch)}
        tokens = frames // 2 * 16
    else:
        given = {"pixel_values_videos": pixels}
        tokens = frames * 2 * 3 if family == "llava_video" else frames * 4 + 1
    return given | ids([[("text", 3), (VIDEO, tokens), ("text", n)] for n in words], left)


def patched(pixels: Tensor, after: Tensor | None = None) -> Tensor:
    """Pixels [B, 3, 32, 32] as Qwen's encoder reads them: [B * 64, 3 * 2 * 4 * 4], two by two patches together. Each is
    the first of two frames, `after` the second; an image stands for both."""
    frames = torch.stack([pixels, pixels if after is None else after], 2)
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
    if "token_type_ids" in inspect.signature(model.forward).parameters:  # of a prompt that sees all of itself
        given = given | {"token_type_ids": torch.zeros_like(given["input_ids"])}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        tokens = given["input_ids"]
        given = given | {"mm_token_type_ids": (tokens == IMAGE).long() + 2 * (tokens == VIDEO).long()}
    return given


TEMPLATE = (
    "{% for message in messages %}user {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)


def processor(family: str) -> Any:
    """A processor for a family's tiny model, with words of its own and a chat template."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers

    marks = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE, "<video>": VIDEO}
    words = marks | {f"w{i}": i for i in range(VOCABULARY) if i not in marks.values()}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    seen = {"image_token": "<image>", "video_token": "<video>"}
    if family == "qwen2_5_vl":
        seen |= {"vision_bos_token": "w58", "vision_eos_token": "w59"}
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens=seen,
    )  # fmt: skip
    side = _SIDES.get(family, 32)
    square = {"size": {"height": side, "width": side}}
    if family in ("llava", "llava_next"):
        size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        cls, images = t.LlavaProcessor, t.CLIPImageProcessor(**size)
        if family == "llava_next":
            cls, images = t.LlavaNextProcessor, t.LlavaNextImageProcessor(**size, image_grid_pinpoints=CROPS)
        made = cls(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )  # fmt: skip
    elif family == "qwen2_5_vl":
        pixels = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
        made = t.Qwen2_5_VLProcessor(
            t.Qwen2VLImageProcessor(**pixels), tokenizer, t.Qwen2VLVideoProcessor(**pixels), chat_template=TEMPLATE
        )
    else:
        from prunelab.common.backbones.llava_video import LlavaVideoProcessor

        grid = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
        cls = LlavaVideoProcessor if family == "llava_video" else t.LlavaOnevisionProcessor
        made = cls(
            t.LlavaOnevisionImageProcessor(**square, image_grid_pinpoints=grid), tokenizer,
            t.LlavaOnevisionVideoProcessor(**square), num_image_tokens=(side // 8) ** 2,
            vision_feature_select_strategy="full", chat_template=TEMPLATE,
        )  # fmt: skip
    return made


def checkpoint(folder: Any, family: str) -> Any:
    """The tiny model and its processor, saved as a hub repository lies on disk."""
    model = vlm(family)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder
