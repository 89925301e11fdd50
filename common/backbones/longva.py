"""LongVA (Zhang et al., 2024, arXiv 2406.16852), a reconstruction: transformers has no class of its own for it, so it
is built of LLaVA-OneVision's modules, as LLaVA-Video is, with CLIP in SigLIP's place and videos alone.

The patches of frames are pooled two by two by plain averages behind the projector, and no newline stands behind
anything. Order and pooling follow the authors' llava_arch.py (EvolvingLMMs-Lab/LongVA, Apache-2.0), where a picture is
cut and pooled as a video is; here pictures are OneVision's, and no table asks of any. Nothing here was compared with
the checkpoint's own output: it is too large to fetch where this was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llava_onevision.configuration_llava_onevision import LlavaOnevisionConfig
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from prunelab.common.backbones.checkpoint import fill, read_all
from prunelab.common.backbones.llava_layout import NAMES as NAMES
from prunelab.common.backbones.llava_layout import fitted, official_name
from prunelab.common.backbones.llava_video import (
    STRIDE,
    LlavaVideoConfig,
    LlavaVideoForConditionalGeneration,
    LlavaVideoModel,
)

SIDE = 336  # pixels of CLIP's frames
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": SIDE,
    "patch_size": 14,
    "projection_dim": 768,
}
THETA = 1e9  # of the rotary positions, which were stretched to 224,000 tokens
CONTEXT = 224_000


class LongvaConfig(LlavaVideoConfig):
    """OneVision's settings under a name of their own, so that a saved model is known again."""

    model_type = "longva"


class LongvaModel(LlavaVideoModel):
    """OneVision's model with LongVA's frames."""

    config_class = LongvaConfig

    def with_newlines(self, patches: Tensor, newline: Tensor) -> Tensor:
        """Pooled frames, without any: [frames, rows * columns, C]."""
        return self.pooled(patches).flatten(1, 2)


class LongvaForConditionalGeneration(LlavaVideoForConditionalGeneration):
    """A Qwen2 decoder that reads such frames."""

    config_class = LongvaConfig

    def __init__(self, config: LongvaConfig) -> None:
        super().__init__(config)
        self.model = LongvaModel(config)
        self.post_init()


class LongvaProcessor(LlavaOnevisionProcessor):
    """OneVision's processor with CLIP's frames, and as many placeholders as LongVA has tokens a video."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """OneVision's, or our own: both say the same but for frames."""
        kwargs.pop("trust_remote_code", None)
        made: Any = super().from_pretrained(*args, trust_remote_code=False, **kwargs)
        for part in (made.image_processor, made.video_processor):
            part.size = {"height": SIDE, "width": SIDE}
            part.image_mean, part.image_std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        made.num_image_tokens = (SIDE // CLIP["patch_size"]) ** 2  # type: ignore[operator]
        return made

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """The placeholders of one video."""
        side = round(self.num_image_tokens**0.5) // STRIDE
        placeholders: str = self.video_token * (len(video_inputs["pixel_values_videos"][video_idx]) * side * side)
        return placeholders


PROCESSOR = LongvaProcessor

AutoConfig.register(LongvaConfig.model_type, LongvaConfig, exist_ok=True)
AutoModelForImageTextToText.register(LongvaConfig, LongvaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LongvaConfig, LongvaProcessor, exist_ok=True)


def like(config: LlavaOnevisionConfig) -> LongvaConfig:
    """The settings of a LLaVA-OneVision as LongVA's: a CLIP in its published size (as narrow as the other, where that
    is a look-alike's), the last layer but one, and rotary positions for long texts."""
    given = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    vision, text = given["vision_config"], given["text_config"]
    tower = dict(CLIP)
    if vision["hidden_size"] < CLIP["hidden_size"]:
        heads, head = CLIP["num_attention_heads"], vision["hidden_size"] // vision["num_attention_heads"]
        tower |= {"hidden_size": heads * head, "intermediate_size": 2 * heads * head}  # type: ignore[operator]
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "max_position_embeddings": CONTEXT}
    crops = [[size // vision["image_size"] * SIDE for size in pair] for pair in given["image_grid_pinpoints"]]
    given |= {"vision_config": tower, "text_config": text, "image_grid_pinpoints": crops}
    return LongvaConfig(**given | {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"})


def longva(**settings: Any) -> LongvaForConditionalGeneration:
    """The model of the given settings of `LongvaConfig`, at random."""
    return LongvaForConditionalGeneration(LongvaConfig(**settings))


def longva_7b() -> LongvaForConditionalGeneration:
    """LongVA-7B: CLIP-L at 336 pixels, Qwen2-7B."""
    text = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # fmt: skip
    return LongvaForConditionalGeneration(like(LlavaOnevisionConfig(text_config=text)))


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load an official checkpoint, a .safetensors file or the folder of all its shards, with every name checked."""
    results = fitted(model, {official_name(name): weight for name, weight in read_all(path).items()})
    newline = "model.image_newline"  # OneVision's pictures have one, LongVA has none
    results.setdefault(newline, torch.zeros_like(model.state_dict()[newline]))
    fill(model, results, path)
