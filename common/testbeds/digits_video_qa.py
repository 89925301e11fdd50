"""The video language model that answers questions about digits in motion (`common.data.questions`): LLaVA-OneVision's
parts at a small size, a SigLIP tower, a projector of two layers, frames pooled two by two, and a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.data import pictures, questions
from prunelab.common.data.pictures import CELL, FRAME, NONE, SLOT
from prunelab.common.data.questions import IDS
from prunelab.common.testbeds.digits_qa import DigitsQA
from prunelab.common.testbeds.digits_vit import sines


@dataclass(frozen=True)
class DigitsVideoQA(DigitsQA):
    """As `DigitsQA`. There is no class token; tokens learn to name digits, and more inside the decoder:

    seen: layers behind which a visual token of a digit that has moved names its direction in the same way, and one of
    any digit that crosses whether it is the `first` (`last` if not). Without it the model needed many times the steps
    to compare frames.
    """

    steps: int = 3000
    batch: int = 12
    alone: float = 0.12
    seen: int = 3
    tower_depth: int = 3
    layer_decay: float = 1.0

    name: ClassVar[str] = "digits_video_qa"
    kind: ClassVar[questions.Kind] = "video"

    def build(self) -> nn.Module:
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            Qwen2Config,
            SiglipVisionConfig,
        )

        side = FRAME * CELL
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**self.tower(side), vision_use_head=False),
            text_config=Qwen2Config(**self.decoder()),
            image_token_id=IDS[questions.IMAGE], video_token_id=IDS[questions.VIDEO],
            image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side]], tie_word_embeddings=False,
        )  # fmt: skip
        model: Any = self.started(LlavaOnevisionForConditionalGeneration(config))
        with torch.no_grad():  # places must be told apart finely for motion to be seen
            model.model.vision_tower.embeddings.position_embedding.weight.copy_(0.5 * sines(self.tower_width, FRAME))
        return model

    def compose(self, generator: torch.Generator, clutter: float) -> questions.Facts:
        return pictures.videos("train", self.batch, generator, clutter, deformed=True)

    def encode(self, net: Any, facts: Any) -> tuple[Mapping[str, Any], Tensor]:
        projected: list[Tensor] = []
        hook = net.model.multi_modal_projector.register_forward_hook(lambda *seen: projected.append(seen[-1]))
        try:
            seen = net.model.get_video_features(facts.pixels, return_dict=True)
        finally:
            hook.remove()
        return {"video": seen}, self.named(net, projected[0], facts)

    def named(self, net: Any, features: Tensor, facts: Any) -> Tensor:
        """The loss of naming what the features of patches show."""
        return self.patchwise(net, features, questions.DIGITS, facts.cells(facts.digit, facts.resting))

    def answering(self, net: Any, facts: Any, encoded: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        hidden: list[Tensor] = []
        layer = net.model.language_model.layers[self.seen - 1]
        hook = layer.register_forward_hook(lambda *seen: hidden.append(seen[-1]))
        try:
            total = super().answering(net, facts, encoded, generator)
        finally:
            hook.remove()
        first = int((questions.prefix(self.kind) == IDS[questions.VIDEO]).int().argmax())
        tokens = net.model.language_model.norm(hidden[0][:, first : first + questions.visual_tokens(self.kind) - 1])
        for words, cells in self.inside(facts):
            pooled = F.max_pool2d(cells.unflatten(-1, (FRAME, FRAME)).float(), 2).long().flatten(1)  # [B, T * 16]
            there = pooled >= 0
            total = total + self.naming * self.patchwise(net, tokens[there], words, pooled[there])
        return total

    def inside(self, facts: Any) -> Iterable[tuple[Sequence[str], Tensor]]:
        """What the decoder learns to name: words, and which of them a cell is."""
        none = torch.full_like(facts.resting, NONE)
        moved = facts.cells(facts.way, none)
        moved[:, ::SLOT] = NONE  # a digit that just came
        yield questions.WAYS, moved
        yield questions.ENDS, facts.cells(later(facts.digit), none)


def later(digit: Tensor) -> Tensor:
    """Whether each of the digits [B, N], in the order of time, is not the first: 0 or 1."""
    return ((digit >= 0).cumsum(1) > 1).long()
