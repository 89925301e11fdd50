"""Tiny models of further families of image and video language models, which a handful of methods is tried on: those of
`vlms` meet every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.contract.vlms import CROPS, IMAGE, TEXT, VIDEO, VISION, ids, lively, patched, typed

Shown = tuple[dict[str, Any], int]  # arguments of the encoder, and the tokens of each image or video


@dataclass(frozen=True)
class Kin:
    """A family: its tiny model of so many layers of an encoder, and arguments for pixels [B, 3, 32, 32] of images or
    [B, T, 3, 32, 32] of videos."""

    build: Callable[[int, dict[str, Any]], nn.Module]
    shown: Callable[[Tensor], Shown]
    film: Callable[[Tensor], Shown] | None = None
    class_token: bool = False  # whether methods can read the encoder's
    closed: bool = False  # whether nothing is read of the encoder
    rows: bool = False  # whether pixels come in rows of a sample's images
    apart: int = 0  # tokens of a frame, where words stand between frames


def _qwen2_vl(tower: int, text: dict[str, Any]) -> nn.Module:
    import transformers as t

    vision = {"depth": tower - 1, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 58, "vision_end_token_id": 59}
    config = t.Qwen2VLConfig(vision_config=vision, text_config={**text, "rope_parameters": rope}, **marks)
    return t.Qwen2VLForConditionalGeneration(config)


def _qwen3_vl(tower: int, text: dict[str, Any]) -> nn.Module:
    import transformers as t

    vision = {"depth": tower - 1, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 58, "vision_end_token_id": 59}
    words = {**text, "rope_parameters": rope, "head_dim": 8}
    return t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(vision_config=vision, text_config=words, **marks))


def _internvl(tower: int, text: dict[str, Any]) -> nn.Module:
    import transformers as t

    vision = VISION | {"num_hidden_layers": tower, "image_size": 32, "patch_size": 4, "layer_scale_init_value": 1.0}
    config = t.InternVLConfig(
        vision_config=vision, text_config=t.Qwen2Config(**text), image_token_id=IMAGE, image_seq_length=16
    )
    return t.InternVLForConditionalGeneration(config)


def _llava_next_video(tower: int, text: dict[str, Any]) -> nn.Module:
    import transformers as t

    clip = t.CLIPVisionConfig(**VISION | {"num_hidden_layers": tower}, image_size=32, patch_size=8)
    marks = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    config = t.LlavaNextVideoConfig(
        vision_config=clip, text_config=t.LlamaConfig(**text), image_grid_pinpoints=CROPS, **marks
    )
    return t.LlavaNextVideoForConditionalGeneration(config)


def _pllava(tower: int, text: dict[str, Any]) -> nn.Module:
    import transformers as t

    from prunelab.common.backbones.pllava import pllava

    clip = t.CLIPVisionConfig(**VISION | {"num_hidden_layers": tower}, image_size=32, patch_size=8)
    marks = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    return pllava(vision_config=clip, text_config=t.LlamaConfig(**text), image_grid_pinpoints=CROPS, **marks)


def _video_llava(tower: int, text: dict[str, Any]) -> nn.Module:
    import transformers as t

    clip = t.CLIPVisionConfig(**VISION | {"num_hidden_layers": tower}, image_size=32, patch_size=8)
    marks = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    config = t.VideoLlavaConfig(vision_config=clip, text_config=t.LlamaConfig(**text), **marks)
    return t.VideoLlavaForConditionalGeneration(config)


def _llava_mistral(tower: int, text: dict[str, Any]) -> nn.Module:
    import transformers as t

    clip = t.CLIPVisionConfig(**VISION | {"num_hidden_layers": tower}, image_size=32, patch_size=8)
    mistral = t.MistralConfig(**text, sliding_window=None)
    config = t.LlavaNextConfig(
        vision_config=clip, text_config=mistral, image_token_id=IMAGE, image_grid_pinpoints=CROPS
    )
    return t.LlavaNextForConditionalGeneration(config)


def _idefics3(name: str) -> Callable[[int, dict[str, Any]], nn.Module]:
    def build(tower: int, text: dict[str, Any]) -> nn.Module:
        import transformers as t

        vision = VISION | {"num_hidden_layers": tower, "image_size": 32, "patch_size": 4}
        sizes = {"vision_config": vision, "text_config": t.LlamaConfig(**text), "scale_factor": 2, "pad_token_id": 0}
        config = getattr(t, f"{name}Config")(**sizes, image_token_id=IMAGE)
        model: nn.Module = getattr(t, f"{name}ForConditionalGeneration")(config)
        return model

    return build


def _paligemma(tower: int, text: dict[str, Any]) -> nn.Module:
    import transformers as t

    vision = t.SiglipVisionConfig(
        **VISION | {"num_hidden_layers": tower}, image_size=32, patch_size=8, projection_dim=32, vision_use_head=False
    )
    config = t.PaliGemmaConfig(
        vision_config=vision, text_config=t.GemmaConfig(**text, head_dim=8), image_token_index=IMAGE, projection_dim=32
    )
    return t.PaliGemmaForConditionalGeneration(config)


def _openvla(tower: int, text: dict[str, Any]) -> nn.Module:
    from prunelab.common.backbones.openvla import openvla

    sizes = {"embed_dim": 24, "depth": tower, "num_heads": 3, "patch_size": 8}
    marks = {"image_token_index": IMAGE, "action_token_id": 59, "empty_token_id": 3, "pad_to_multiple_of": 8}
    encoders = {"timm_arguments": [sizes, sizes | {"mlp_ratio": 2}], "image_sizes": [32, 32]}
    return openvla(text_config={"model_type": "llama", **text}, **encoders, **marks)


def _channels(pixels: Tensor) -> Shown:
    return {"pixel_values": torch.cat([pixels, -pixels], 1)}, 16


def _pictures(pixels: Tensor) -> Shown:
    import transformers as t

    from prunelab.common.core.attention_interface import pixels_name

    return {pixels_name(t.VideoLlavaModel): pixels}, 16


def _tiles(pixels: Tensor) -> Shown:
    return {"pixel_values": pixels}, 16


def _anyres(pixels: Tensor) -> Shown:
    crops = torch.stack([pixels, pixels.flip(-1), -pixels, pixels.flip(-2), pixels * 0.5], 1)
    return {"pixel_values": crops, "image_sizes": torch.tensor([[64, 64]] * len(pixels))}, 16 + 8 * 9


def _frames(tokens: int) -> Callable[[Tensor], Shown]:
    return lambda videos: ({"pixel_values_videos": videos}, videos.shape[1] * tokens)


def _patches(pixels: Tensor) -> Shown:
    return {"pixel_values": patched(pixels), "image_grid_thw": torch.tensor([[1, 8, 8]] * len(pixels))}, 16


def _pairs(videos: Tensor) -> Shown:
    half = videos.shape[1] // 2
    cut = torch.cat([patched(video[::2], video[1::2]) for video in videos])
    return {"pixel_values_videos": cut, "video_grid_thw": torch.tensor([[half, 8, 8]] * len(videos))}, half * 16


KIN: Mapping[str, Kin] = {
    "qwen2_vl": Kin(_qwen2_vl, _patches, _pairs),
    "idefics3": Kin(_idefics3("Idefics3"), _tiles, rows=True),
    "smolvlm": Kin(_idefics3("SmolVLM"), _tiles, rows=True),
    "paligemma": Kin(_paligemma, _tiles),
    "openvla": Kin(_openvla, _channels, closed=True),
    "qwen3_vl": Kin(_qwen3_vl, _patches, _pairs, apart=16),
    "internvl": Kin(_internvl, _tiles, class_token=True),
    "video_llava": Kin(_video_llava, _pictures, _frames(17), class_token=True),
    "llava_mistral": Kin(_llava_mistral, _anyres, class_token=True),
    "pllava": Kin(_pllava, _anyres, _frames(4), class_token=True),
    "llava_next_video": Kin(_llava_next_video, _anyres, _frames(4), class_token=True),
}
MOVING = tuple(name for name, kin in KIN.items() if kin.film)


def kin(family: str, tower: int = 3, **text: Any) -> Any:
    """A tiny random model of a family."""
    torch.manual_seed(0)
    return lively(KIN[family].build(tower, TEXT | text))


def asked(family: str, model: Any, questions: tuple[int, ...] = (6, 3), images: tuple[int, ...] = ()) -> dict[str, Any]:
    """A prompt for each question of so many words, behind as many images (left out: one each); padded in front."""
    images = images or (1,) * len(questions)
    pixels = torch.randn(sum(images), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    given, tokens = KIN[family].shown(pixels)
    if KIN[family].rows:  # of samples, filled up with crops of zeros
        own = given["pixel_values"].split(images)
        filled = [torch.cat([x, x.new_zeros(max(images) - len(x), *x.shape[1:])]) for x in own]
        given = given | {"pixel_values": torch.stack(filled)}
    shown = [[(IMAGE, tokens), ("text", 1)] * n for n in images]
    runs = [[("text", 3), *own, ("text", words)] for own, words in zip(shown, questions, strict=True)]
    return typed(model, given | ids(runs))


def filmed(family: str, model: Any, questions: tuple[int, ...] = (6, 3), frames: int = 4) -> dict[str, Any]:
    """The same behind a video each."""
    videos = torch.randn(len(questions), frames, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    film = KIN[family].film
    assert film is not None
    given, tokens = film(videos)
    piece = KIN[family].apart or tokens
    shown = [("text", 2), (VIDEO, piece)] * (tokens // piece)
    return typed(model, given | ids([[("text", 1), *shown, ("text", words)] for words in questions]))
