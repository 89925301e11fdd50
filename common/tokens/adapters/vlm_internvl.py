"""InternVL 2.5 and 3, through transformers' own class."""

from __future__ import annotations

from prunelab.common.tokens.adapters.vlm import VisionLanguage


class InternVL(VisionLanguage):
    """InternVL: two by two patches of a tile's features are joined before the projector.

    The class is handed tiles, and frames of videos, without being told whose they are: each is an image of its own. No
    token leaves inside the encoder, where a part of a square could; what a token receives there is the mean over its
    patches.
    """

    family = "internvl"
    model_classes = ("transformers.models.internvl.modeling_internvl.InternVLForConditionalGeneration",)
    signals = VisionLanguage.without("tower")
    tower_attention = "attention"

    def joined(self, modality: str) -> int:
        return round(1 / self.config.downsample_ratio)
