"""Models of images and texts that are tuned for one task each, as two chains of blocks: BLIP, whose text blocks read
what its image blocks gave, and CLIP, whose two encoders meet in the loss alone.

A calibration sample is a call: a mapping of the model's arguments, of one pair or several. The image blocks are
measured first, and what they then give is what the text blocks read. Linears are the only targets (# assumption: no
paper here takes structures out of these models, whose heads meet in cross-attention).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import Chain, Tap, WeightAdapter
from prunelab.common.weights.targets import Observation, Target

IMAGES = ("vision_model.encoder.layers", "visual_encoder.blocks")  # paths of the image blocks
TEXTS = ("text_encoder.encoder.layer", "text_decoder.bert.encoder.layer", "text_model.encoder.layers")


class ImageText(WeightAdapter):
    """BLIP that retrieves, writes captions or judges two pictures, and CLIP."""

    family = "image_text"
    model_classes = (
        "transformers.models.blip.modeling_blip.BlipForImageTextRetrieval",
        "transformers.models.blip.modeling_blip.BlipForConditionalGeneration",
        "transformers.models.clip.modeling_clip.CLIPModel",
        "prunelab.common.backbones.blip_nlvr.BlipNlvr",
    )
    shared = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))
    by_call = True

    def __init__(self, model: nn.Module, only: int | None = None) -> None:
        """only: the number of the chain that is all of it."""
        super().__init__(model)
        self.only = only
        self.paths = [next(path for path in paths if _reaches(model, path)) for paths in (IMAGES, TEXTS)]
        self.stacks = [list(model.get_submodule(path).children()) for path in self.paths]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        stacks = self.stacks if self.only is None else [self.stacks[self.only]]
        return [block for stack in stacks for block in stack]

    def prefix(self, block: int) -> str:
        images = len(self.stacks[0])
        return f"{self.paths[0]}.{block}" if block < images else f"{self.paths[1]}.{block - images}"

    @property
    def chains(self) -> tuple[Chain, ...]:
        images, whole = len(self.stacks[0]), len(self.blocks)
        spans = ((0, images), (images, whole))
        return tuple(Chain("", *span, type(self)(self.model, place)) for place, span in enumerate(spans))

    def run(self, sample: Mapping[str, Any]) -> Any:
        if not hasattr(self.model, "itm_head"):
            return self.model(**sample)
        seen = self.model.vision_model(pixel_values=sample["pixel_values"]).last_hidden_state
        read = {name: value for name, value in sample.items() if name != "pixel_values"}
        return self.model.text_encoder(**read, encoder_hidden_states=seen)  # its own forward masks on the CPU

    def call(self, sample: Any) -> Any:
        return id(sample)  # what the text blocks read of the images is every sample's own

    def check_sample(self, sample: Any) -> None:
        if not isinstance(sample, Mapping) or not {"pixel_values", "input_ids"} <= sample.keys():
            raise PrunelabError("a calibration sample is a call by name, with pixel_values and input_ids among it")

    def finish(self) -> bool:
        return hasattr(self.model, "config")  # no shape changes

    # -- targets -----------------------------------------------------------------------------------------------------

    def _source(self, path: str) -> str:
        if "crossattention" in path:
            return path  # queries are of the text, keys and values of the images
        return super()._source(path)

    def taps(self, target: Target) -> tuple[str, ...]:
        return (target.role,)

    def observe(
        self, target: Target, seen: Mapping[str, Tap], before: Tensor, after: Tensor, tokens: Any
    ) -> Observation:
        inputs = seen[target.role][0][0].flatten(0, -2)
        return Observation(inputs, self.weights(target), before.flatten(0, -2), after.flatten(0, -2), tokens)

    def remove(self, target: Target, kept: Tensor) -> None:
        raise PrunelabError(f"structures of a {type(self.model).__name__} stay; prune single weights")


def _reaches(model: nn.Module, path: str) -> bool:
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module)
