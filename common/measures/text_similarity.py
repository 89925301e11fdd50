"""How like a text the patches of a picture are, by the text tower that was trained with the encoder (CLIP): the service
`text_similarity` of methods that read the question before the language model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError


def text_similarity(text: Tensor, projection: nn.Module, norm: nn.Module | None = None) -> Callable[..., Tensor]:
    """The service for one question, or one a picture.

    Parameters
    ----------
    text : Tensor
        The question's embedding [W] or one a picture [B, W], from CLIP's `get_text_features`.
    projection : Module
        CLIP's `visual_projection`, which takes the hidden states of patches there, too.
    norm : Module, optional
        CLIP's `vision_model.post_layernorm`, for methods that compare patches behind it: they call `service(hidden,
        normed=True)`.
    """
    text = nn.functional.normalize(text.float(), dim=-1)

    def service(hidden: Tensor, normed: bool = False) -> Tensor:
        if normed and norm is None:
            raise PrunelabError(
                "the method compares patches behind the encoder's last norm; make text_similarity with"
                " norm=clip.vision_model.post_layernorm"
            )
        if text.dim() > 1 and len(text) != len(hidden):
            raise PrunelabError(f"text_similarity has questions about {len(text)} pictures, and {len(hidden)} came")
        precision = next(projection.parameters(), hidden).dtype  # the tower's may be another than the model's
        hidden = hidden.to(precision)
        hidden = norm(hidden) if normed and norm is not None else hidden
        patches = nn.functional.normalize(projection(hidden).float(), dim=-1)
        return (patches @ text.to(patches).expand(len(patches), -1).unsqueeze(-1)).squeeze(-1) * text.shape[-1] ** -0.5

    return service


class TextTower:
    """Makes the service of questions, one a picture, with a CLIP model and its processor. Questions are cut where the
    tower's context ends."""

    def __init__(self, clip: Any, processor: Any) -> None:
        self.clip, self.tokenizer = clip, processor.tokenizer

    @torch.inference_mode()
    def __call__(self, questions: Sequence[str]) -> Callable[..., Tensor]:
        tokens = self.tokenizer(list(questions), return_tensors="pt", padding=True, truncation=True)
        text = self.clip.get_text_features(**tokens.to(self.clip.device)).pooler_output
        return text_similarity(text, self.clip.visual_projection, self.clip.vision_model.post_layernorm)
