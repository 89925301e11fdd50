"""Qwen3-VL, through transformers' own class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.plan import Site
from prunelab.common.tokens.adapters.passes import Application
from prunelab.common.tokens.adapters.vlm_qwen import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: as Qwen2-VL, and behind the decoder's first layers each visual token is given features of earlier
    layers of the encoder, which go where it goes: of a mixture of tokens, the same mixture.

    The frames of a video (two pictures each) stand apart in the prompt, with their times between them, so each is a
    video of its own for plans that are made of one alone.
    """

    family = "qwen3_vl"
    model_classes = ("transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLForConditionalGeneration",)

    def _pixels(self, modality: str, grid: Tensor) -> dict[str, Any]:
        given = super()._pixels(modality, grid)
        patches = int(grid.prod(-1).sum())
        places = torch.empty(patches, 4, dtype=torch.long, device="meta")
        return given | {f"{modality}_interp_indices": places, f"{modality}_interp_weights": self.blank(patches, 4)}

    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        return [1] * sum(super().counts(modality, given))

    def crops(self, modality: str, given: Mapping[str, Any], output: Any) -> list[Tensor]:
        frames = super().counts(modality, given)
        tokens = zip(output.pooler_output, frames, strict=True)
        return [frame.unsqueeze(0) for own, count in tokens for frame in own.chunk(count)]

    def crop_grids(self, modality: str, given: Mapping[str, Any], count: int) -> list[tuple[int, int]]:
        return [(int(h), int(w)) for t, h, w in self._grids(modality, given) for _ in range(t)]

    @property
    def carries(self) -> int:
        return len(self.config.vision_config.deepstack_visual_indexes)

    def _prefill(self, application: Application, sites: Sequence[Site], given: dict[str, Any]) -> dict[str, Any]:
        if given.get("deepstack_visual_embeds") is not None:
            x, visual = given["inputs_embeds"], given["visual_pos_masks"].unsqueeze(-1)
            joined = torch.cat(given["deepstack_visual_embeds"], -1).to(x)
            none = joined.new_zeros(*x.shape[:2], joined.shape[1])
            self.running.carried = none.masked_scatter(visual.to(x.device), joined)
        aids = super()._prefill(application, sites, given)
        return aids | {"deepstack_visual_embeds": None, "visual_pos_masks": None}  # they are given as `carried`
