"""Signals: what a site of a network lets a method see, computed when it is first read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo


class Signals:
    """What a site lets a method see. Every signal is computed when it is first read, and only if it was required.

    Always at hand: `prunable` [B, N] bool (False for class, register and padding tokens), `units` (how many are
    prunable, the same for all samples unless `valid` says otherwise), `valid` [B, N] bool or None (False marks
    padding), `places` [B, N] of the units in the full sequence (None once units were mixed), `grids` (height and width
    of every feature map of the unpruned input, or of each crop or frame of an image or video), `modality` (what the
    prunable units of a language model show: `image`, `video`, or None where it is both or neither), `packed` (how many
    tokens a decoder would read of the units of a `projected` site, newlines apart; elsewhere `units`), `rng` for
    methods that draw, `info` of the model, `services` and `parts` handed to `apply`, and `carry`, a dictionary that
    lives for one forward pass: what the method leaves for its later sites.

    Signals by name: `hidden` [B, N, D], `queries` / `keys` / `values` [B, H, N, d] (keys as attention uses them),
    `attention_logits` [B, H, N, N] (scaled, with biases; padding columns at -inf), `attention` (their softmax),
    `cls_row` [B, H, N] (attention of the class token), `last_row` (of the last token), `received` [B, H, N]
    (column sums of attention), `sizes` [B, N] (original units each unit stands for). Some families have more: `scans`
    [B, S, N, E] (a vision Mamba's scan outputs in token order), `class_confidence` [B, N, C] (a segmenter's head),
    `positions`, `memory`, `class_logits` ... (a deformable encoder's); each adapter says what it gives.
    """

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Tensor]],
        *,
        prunable: Tensor,
        units: int,
        info: ModelInfo,
        valid: Tensor | None = None,
        rng: torch.Generator | None = None,
        required: frozenset[str] | None = None,
        services: Mapping[str, Any] | None = None,
        parts: nn.Module | None = None,
        places: Tensor | None = None,
        grids: Sequence[tuple[int, int]] = (),
        modality: str | None = None,
        packed: int | None = None,
        carry: dict[str, Any] | None = None,
    ) -> None:
        self._sources = dict(sources)
        self._required = frozenset(sources) if required is None else required
        self.prunable = prunable
        self.units = units
        self.info = info
        self.valid = valid
        self.rng = rng
        self.services = services or {}
        self.parts: Any = parts
        self.places = places
        self.grids = tuple(grids)
        self.modality = modality
        self.packed = units if packed is None else packed
        self.carry: dict[str, Any] = {} if carry is None else carry
        missing = self._required - set(self._sources)
        if missing:
            raise PrunelabError(f"this site cannot give the signals {', '.join(sorted(missing))} that the method reads")

    def one_length(self, method: str) -> None:
        """Refuse padded samples, for methods that are defined on one length only."""
        if self.valid is not None:
            raise PrunelabError(f"{method} works on samples of one length only; run padded samples one by one")

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_") or name not in self._sources or name not in self._required:
            raise AttributeError(f"signal '{name}' was not required at this site; name it in requires()")
        value = self._sources[name]()
        if value.device.type != "meta" and not _bounded(value, name):
            raise PrunelabError(f"the signal '{name}' holds NaN or infinite values; check the input and the weights")
        setattr(self, name, value)
        return value


def _bounded(value: Tensor, name: str) -> bool:
    """No NaN and no infinity, in one pass (extremes carry NaN); logits may be -inf where a column is masked."""
    if value.numel() == 0:
        return True
    low, high = value.aminmax()
    return bool(high < float("inf")) and (name == "attention_logits" or bool(low > float("-inf")))
