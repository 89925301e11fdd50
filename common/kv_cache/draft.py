"""A small model that guesses for a large one: what comes next, and what of the prompt matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core import attention
from prunelab.common.core import attention_interface as seam


class Draft:
    """A draft model as a service to methods. It must read the target's tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.decoder = seam.decoder_of(model)

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return int(self.decoder.config.vocab_size)

    def continues(self, tokens: Tensor, valid: Tensor | None, count: int) -> Tensor:
        """Up to `count` tokens [B, A] that the draft would write behind the prompt [B, N], the likeliest each time."""
        mask = torch.ones_like(tokens) if valid is None else valid.long()
        end = self.model.generation_config.eos_token_id
        pad = end[0] if isinstance(end, list) else end
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=pad
            )
        return out[:, tokens.shape[1] :].clone()

    def looks(
        self, tokens: Tensor, valid: Tensor | None, last: int, steps: int = 0, first_layer: int = 0
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """What the draft attends to, in the layers from `first_layer` on.

        First the attention [B, H, last, N] of the prompt's last tokens, a layer each; then, for each of `steps` tokens
        that the draft writes, the attention [B, H, 1, N + step] of that token, a layer each.
        """
        results: list[Tensor] = []
        mask = torch.ones_like(tokens) if valid is None else valid.long()

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, scale: float
        ) -> Tensor:
            fresh = mask[:, : key.shape[2]].bool()
            if int(module.layer_idx) >= first_layer:  # type: ignore[arg-type]
                real = None if bool(fresh.all()) else fresh.unsqueeze(1)
                results.append(attention.causal_rows(query[:, :, -last:], key, scale, real).flatten(1, 2))
            allowed = None
            if not bool(fresh.all()):
                indices = torch.arange(key.shape[2], device=key.device)
                own = indices[-query.shape[2] :, None]
                allowed = (indices <= own) & (fresh[:, None, None] | (indices == own))
            return seam.sdpa(module, query, key, value, allowed, scale)

        later: list[list[Tensor]] = []
        with torch.inference_mode(), seam.replaced(seam.attention_layers(self.decoder), attend):
            out = self.model(input_ids=tokens, attention_mask=mask, position_ids=_indices(mask), use_cache=True)
            window = [rows.clone() for rows in results]
            for _ in range(steps):
                results.clear()
                written = out.logits[:, -1:].argmax(-1)
                mask = torch.cat([mask, torch.ones_like(written)], 1)
                out = self.model(
                    input_ids=written,
                    attention_mask=mask,
                    position_ids=_indices(mask)[:, -1:],
                    use_cache=True,
                    **seam.with_cache({}, seam.cache_in(out)),
                )
                later.append([rows.clone() for rows in results])
        return window, later


def _indices(mask: Tensor) -> Tensor:
    """Position [B, N] of every token among the real ones of its sample."""
    return (mask.cumsum(1) - 1).clamp_min(0)
