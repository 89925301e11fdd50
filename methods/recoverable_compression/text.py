"""The service that the method asks for: how like a text patches are, by the text tower paired with the encoder."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def text_similarity(text: Tensor, projection: nn.Module) -> Callable[[Tensor], Tensor]:
    """The service for one question, or one a picture.

    Parameters
    ----------
    text : Tensor
        The question's embedding [W] or one a picture [B, W], from CLIP's `get_text_features`.
    projection : Module
        CLIP's `visual_projection`, which takes the last hidden states of patches there, too.
    """
    text = nn.functional.normalize(text.float(), dim=-1)

    def service(hidden: Tensor) -> Tensor:
        patches = nn.functional.normalize(projection(hidden).float(), dim=-1)
        return (patches @ text.to(patches).expand(len(patches), -1).unsqueeze(-1)).squeeze(-1) * text.shape[-1] ** -0.5

    return service
