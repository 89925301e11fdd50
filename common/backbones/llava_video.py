"""LLaVA-Video (Zhang et al., 2024), a reconstruction: transformers has no class of its own for it, so it is built of
LLaVA-OneVision's modules with the two things that differ, both for videos alone.

- Frames are pooled two by two by plain averages, an odd last row and column left out (`mm_spatial_pool_mode=average`),
  where OneVision interpolates.
- One newline vector stands behind each row of each pooled frame (`mm_newline_position=grid`), where OneVision has one
  behind the whole video.

Pooling, order and newlines follow the authors' llava_arch.py (LLaVA-VL/LLaVA-NeXT, Apache-2.0, at df17966), and so do
the names of the official checkpoint that `official_name` reads. Nothing here was compared with that checkpoint's own
output: it is too large to fetch where this was written.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava_onevision.configuration_llava_onevision import LlavaOnevisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionPreTrainedModel,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from prunelab.common.backbones.llava_layout import NAMES as NAMES
from prunelab.common.backbones.llava_layout import load_checkpoint as load_checkpoint
from prunelab.common.backbones.llava_layout import official_name as official_name
from prunelab.common.core.errors import PrunelabError

STRIDE = 2


class LlavaVideoConfig(LlavaOnevisionConfig):
    """OneVision's settings under a name of their own, so that a saved model is known again."""

    model_type = "llava_video"


class LlavaVideoModel(LlavaOnevisionModel):
    """OneVision's model with LLaVA-Video's frames."""

    config_class = LlavaVideoConfig

    def pooled(self, patches: Tensor) -> Tensor:
        """Averages of two by two patches: [frames, side * side, C] -> [frames, rows, columns, C]."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        maps = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return nn.functional.avg_pool2d(maps, STRIDE).permute(0, 2, 3, 1)

    def with_newlines(self, patches: Tensor, newline: Tensor) -> Tensor:
        """Pooled frames with the vector newline [C] behind each row: [frames, rows * (columns + 1), C]."""
        maps = self.pooled(patches)
        ends = newline.to(maps).expand(*maps.shape[:2], 1, -1)
        return torch.cat([maps, ends], 2).flatten(1, 2)

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        """What `get_video_features` makes of each frame, [frames, patches, D] -> [frames, tokens, D]."""
        return self.with_newlines(image_features, self.image_newline)

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> Any:
        """OneVision's, without the newline that it puts behind the last frame."""
        as_tuple = kwargs.pop("return_dict", True) is False
        output = super().get_video_features(pixel_values_videos, **kwargs, return_dict=True)
        output.pooler_output = output.pooler_output[:, :-1]
        return output.to_tuple() if as_tuple else output


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """A Qwen2 decoder that reads such frames."""

    config_class = LlavaVideoConfig

    def __init__(self, config: LlavaVideoConfig) -> None:
        LlavaOnevisionPreTrainedModel.__init__(self, config)  # its own would build a model to be thrown away
        self.model = LlavaVideoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class LlavaVideoProcessor(LlavaOnevisionProcessor):
    """OneVision's processor with as many placeholders as LLaVA-Video has tokens a video."""

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """The placeholders of one video."""
        side = round(self.num_image_tokens**0.5) // STRIDE
        placeholders: str = self.video_token * (len(video_inputs["pixel_values_videos"][video_idx]) * side * (side + 1))
        return placeholders


PROCESSOR = LlavaVideoProcessor

AutoConfig.register(LlavaVideoConfig.model_type, LlavaVideoConfig, exist_ok=True)
AutoModelForImageTextToText.register(LlavaVideoConfig, LlavaVideoForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LlavaVideoConfig, LlavaVideoProcessor, exist_ok=True)


def like(config: LlavaOnevisionConfig) -> LlavaVideoConfig:
    """The settings of a LLaVA-OneVision as LLaVA-Video's."""
    return LlavaVideoConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})


def llava_video(**settings: Any) -> LlavaVideoForConditionalGeneration:
    """The model of the given settings of `LlavaVideoConfig`, at random."""
    return LlavaVideoForConditionalGeneration(LlavaVideoConfig(**settings))


def llava_video_7b() -> LlavaVideoForConditionalGeneration:
    """LLaVA-Video-7B-Qwen2: SigLIP-so400m at 384 pixels without its last layer, Qwen2-7B."""
    text = {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    }
    return llava_video(text_config=text)  # the tower is that of OneVision's defaults


def convert(official: Path, onevision: Path, out: Path, model: nn.Module | None = None) -> None:
    """Write a folder in the hub's layout: the weights of the folder `official`, with the processor of a LLaVA-OneVision
    of transformers (llava-hf/llava-onevision-qwen2-7b-ov-hf, in the folder `onevision`). `model` replaces the published
    size."""
    # assumption: words, image sizes and crops of both are the same; both come from Qwen2, SigLIP and anyres_max_9
    if out.exists() and any(out.iterdir()):
        raise PrunelabError(f"{out} is not empty; name a new folder")
    made: Any = llava_video_7b().to(torch.bfloat16) if model is None else model
    load_checkpoint(made, official)
    made.save_pretrained(out)
    processor = LlavaVideoProcessor.from_pretrained(onevision, local_files_only=True, trust_remote_code=False)
    processor.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m prunelab.common.backbones.llava_video OFFICIAL ONEVISION OUT (three folders)")
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
    except PrunelabError as error:
        sys.exit(f"error: {error}")
