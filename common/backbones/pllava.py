"""PLLaVA (Xu et al., 2024), a reconstruction: transformers has no class of its own for it, so it is built of
LLaVA-NeXT-Video's modules, whose pooling of frames two by two comes before the projector; PLLaVA's comes behind it.

With the authors' 16 frames and a pooled shape of 16 x 12 x 12 their adaptive average is that of two by two patches.
Pooling, and the adapters of rank 128 on queries and values, whose strength the authors' evaluation sets, follow
modeling_pllava.py and tasks/eval/model_utils.py (magic-research/PLLaVA, Apache-2.0, at 2768c18). The names under which
the published file keeps them are peft's, and could not be compared with the file: it is too large to fetch where this
was written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava_next_video.configuration_llava_next_video import LlavaNextVideoConfig
from transformers.models.llava_next_video.modeling_llava_next_video import (
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoModel,
    LlavaNextVideoMultiModalProjector,
    LlavaNextVideoPooler,
    LlavaNextVideoPreTrainedModel,
)
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor

from prunelab.common.backbones.checkpoint import fill, read
from prunelab.common.backbones.llava_layout import COUNTED, VOCABULARY, padded
from prunelab.common.core.errors import PrunelabError

ALPHA, RANK = 14, 128  # of the adapters, in the script of PruneVid and of the authors' evaluation
NAMES = (
    (r"vision_tower\.vision_model\.", "model.vision_tower."),
    (r"multi_modal_projector\.", "model.multi_modal_projector."),
    (r"language_model\.(?:base_model\.model\.)?model\.", "model.language_model."),
    (r"language_model\.(?:base_model\.model\.)?lm_head\.", "lm_head."),
)


class PllavaConfig(LlavaNextVideoConfig):
    """LLaVA-NeXT-Video's settings under a name of their own, so that a saved model is known again."""

    model_type = "pllava"


class PoolingProjector(LlavaNextVideoMultiModalProjector):
    """LLaVA-NeXT-Video's projector, behind which the patches of frames are pooled: [frames, patches, D] -> [frames,
    tokens, D], while `moving`."""

    moving = False

    def __init__(self, config: PllavaConfig) -> None:
        super().__init__(config)
        self.pooler = LlavaNextVideoPooler(config)

    def forward(self, image_features: Tensor) -> Tensor:
        projected: Tensor = super().forward(image_features)
        return self.pooler(projected) if self.moving else projected


class PllavaModel(LlavaNextVideoModel):
    """LLaVA-NeXT-Video's model with frames that are pooled behind the projector."""

    config_class = PllavaConfig

    def __init__(self, config: PllavaConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector, self.vision_resampler = PoolingProjector(config), nn.Identity()

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> Any:
        """LLaVA-NeXT-Video's, pooled: `pooler_output` is [B, frames * tokens, D]."""
        self.multi_modal_projector.moving = True
        try:
            return super().get_video_features(pixel_values_videos, **kwargs)
        finally:
            self.multi_modal_projector.moving = False


class PllavaForConditionalGeneration(LlavaNextVideoForConditionalGeneration):
    """A Vicuna decoder that reads such frames."""

    config_class = PllavaConfig

    def __init__(self, config: PllavaConfig) -> None:
        LlavaNextVideoPreTrainedModel.__init__(self, config)  # its own would build a model to be thrown away
        self.model = PllavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


PROCESSOR = LlavaNextVideoProcessor

AutoConfig.register(PllavaConfig.model_type, PllavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(PllavaConfig, PllavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(PllavaConfig, PROCESSOR, exist_ok=True)


def like(config: LlavaNextVideoConfig) -> PllavaConfig:
    """The settings of a LLaVA-NeXT-Video as PLLaVA's."""
    return PllavaConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})


def pllava(**settings: Any) -> PllavaForConditionalGeneration:
    """The model of the given settings of `PllavaConfig`, at random."""
    return PllavaForConditionalGeneration(PllavaConfig(**settings))


def pllava_7b() -> PllavaForConditionalGeneration:
    """PLLaVA-7B: CLIP-L at 336 pixels, Vicuna-7B."""
    return pllava()  # both are LLaVA-NeXT-Video's defaults


def official_name(name: str) -> str:
    """The name in our class of a weight of the published file."""
    for pattern, here in NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", here, name).replace(".base_layer.", ".")
    return name


def merged(weights: dict[str, Tensor], alpha: float = ALPHA) -> dict[str, Tensor]:
    """Weights with their adapters added: W + alpha / rank * B A, of A [rank, in] and B [out, rank]."""
    adapted = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        start, sign, _ = name.partition(".lora_A.")
        if not sign:
            continue
        up = weights.get(name.replace(".lora_A.", ".lora_B."))
        own = f"{start}.weight"
        if up is None or own not in adapted:
            raise PrunelabError(f"the adapter {name} lacks its other half, or what it adapts; download it again")
        change = (up.float() @ down.float()) * (alpha / len(down))
        adapted[own] = (adapted[own].float() + change).to(adapted[own].dtype)
    return adapted


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load the published checkpoint, a .safetensors file or the folder of all its shards, with every name checked."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise PrunelabError(f"{path} holds no .safetensors file; give the folder of the official checkpoint")
    results = merged({official_name(name): weight for file in files for name, weight in read(file).items()})
    results = {name: weight for name, weight in results.items() if not name.endswith(COUNTED)}
    wanted = model.state_dict()
    for name in VOCABULARY:
        if name in results and name in wanted:
            results[name] = padded(results[name], len(wanted[name]))
    newline = "model.image_newline"  # stands between crops of images alone, which PLLaVA does not cut
    results.setdefault(newline, torch.zeros_like(wanted[newline]))
    fill(model, results, path)
