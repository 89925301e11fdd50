"""The visual tokens of a picture that LLaVA-1.5 reads: the patches of its encoder."""

from __future__ import annotations

from typing import Any

SIDE, PATCH = 336, 14  # pixels of CLIP ViT-L/14-336


def tokens() -> dict[str, Any]:
    """The unpruned model's column of T1."""
    return {"T1/LLaVA-1.5/visual tokens": {"value": (SIDE // PATCH) ** 2}}
