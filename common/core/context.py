"""How much a model reads at once."""

from __future__ import annotations

from typing import Any

from prunelab.common.core.errors import PrunelabError


def refuse_long(model: Any, length: int, what: str) -> None:
    """Refuse what has more tokens than a model of transformers has places for."""
    config = getattr(model, "config", None)
    inner = getattr(config, "get_text_config", lambda: config)()
    context = getattr(inner, "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context < length:
        raise PrunelabError(f"{what} has {length:,} tokens and the model a context of {context:,}; cut it first")
