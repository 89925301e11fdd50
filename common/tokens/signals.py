"""What a site lets a token pruner see, and how it says which tokens go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, ModelInfo
from prunelab.common.core.signals import Reading, Signals


@dataclass(frozen=True)
class View:
    """The tokens of one site as the adapter sees them; see `TokenSignals` for the fields."""

    sources: Mapping[Any, Callable[[], Tensor]]  # how each signal is computed, by name
    prunable: Tensor
    units: int
    valid: Tensor | None = None
    indices: Tensor | None = None
    grids: Sequence[tuple[int, int]] = ()
    mosaic: tuple[int, int] | None = None
    order: Tensor | None = None
    pixels: Tensor | None = None
    pack: Callable[[Tensor], Tensor] | None = None
    modality: str | None = None
    packed: int | None = None
    groups: Tensor | None = None
    info: ModelInfo | None = None  # None: the model's
    other: Callable[[Reading], Tensor] | None = None  # computes readings, where the adapter's `read` does not


class TokenSignals(Signals):
    """What a site lets a token pruner see of its tokens [B, N].

    Always at hand, beside what `Signals` has: `prunable` [B, N] bool (False for class, register, text and padding
    tokens), `indices` [B, N] of the tokens in the full sequence (None once tokens were mixed), `grids` (height and
    width of every feature map of the unpruned input, or of each crop or frame of an image or video), `mosaic` (rows and
    columns of the crops that stand behind the thumbnail of a large image, None elsewhere), `order` (where one image is
    by itself: the patch, on the CPU, behind each token that a decoder would read of it, -1 for newlines; None where
    tokens are mixtures of patches), `pixels` [B, crops, 3, H, W] (there, as the encoder was given them, where it takes
    whole crops), `pack` (there: values [B, N] of units as those of the tokens that a decoder would read, 0 for
    newlines), `pictures` (at a `packed` site: the images and videos of each sample in their order, as a `projected`
    site sees one of them alone), `modality` (what the prunable tokens of a language model show: `image`, `video`, or
    None where it is both or neither), `packed` (how many tokens a decoder would read of the units of a `projected`
    site, newlines apart; elsewhere `units`), `groups` ([B, N] in a decoder
    behind plans for single images that name groups: equal ones are of one image and one group, -1 is in none; None
    elsewhere), `parts` (the method's learned ones, handed to `apply`), `training`
    (whether gradients are wanted: a plan is made without unless the method enables them), and two dictionaries for what
    the method leaves: `state` lives for one forward pass and is for its later sites, `memory` outlives it (it is the
    handle's, which resets it).

    Signals by name: `hidden` [B, N, D], `normed` (the same under a decoder's last norm), `queries` / `keys` / `values`
    [B, H, N, d] (keys as attention uses them), `attention_logits` [B, H, N, N] (scaled, with biases; padding columns at
    -inf), `attention` (their softmax), `cls_row` [B, H, N] (attention of the class token), `last_row` (of the last
    token), `coming_row` (of the last token in the layer that the site stands before, where the others are of the one
    behind it), `coming_text` [B, H, R, N] (there, of the text behind the visual tokens; as `Reading`'s),
    `received` [B, H, N] (column sums of attention), `sizes` [B, N] (original units each unit stands for),
    `text` [B, D] (at a `projected` site: the mean embedding of the words around the picture). Some families have more:
    `scans` [B, S, N, E] (a vision Mamba's scan outputs in token order), `class_confidence` [B, N, C] (a segmenter's
    head), `positions`, `encoded`, `class_logits` ... (a deformable encoder's); each adapter says what it gives.
    """

    def __init__(
        self,
        sources: Mapping[Any, Callable[[], Tensor]],
        *,
        indices: Tensor | None = None,
        grids: Sequence[tuple[int, int]] = (),
        mosaic: tuple[int, int] | None = None,
        order: Tensor | None = None,
        pixels: Tensor | None = None,
        pack: Callable[[Tensor], Tensor] | None = None,
        modality: str | None = None,
        packed: int | None = None,
        groups: Tensor | None = None,
        parts: nn.Module | None = None,
        state: dict[str, Any] | None = None,
        training: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(sources, **common)
        self._readings: dict[Reading, Tensor] = {}
        self.indices = indices
        self.grids = tuple(grids)
        self.mosaic = mosaic
        self.order = order
        self.pixels = pixels
        self.pack = pack
        self.pictures: Callable[[], list[list[TokenSignals]]] | None = None
        self.modality = modality
        self.packed = self.units if packed is None else packed
        self.groups = groups
        self.parts: Any = parts
        self.training = training
        self.state: dict[str, Any] = {} if state is None else state

    def at(self, reading: Reading) -> Tensor:
        """A required signal of another layer, of the tokens at hand: in the shape that it has at a site."""
        if reading not in self._required:
            raise AttributeError(f"'{reading}' was not required at this site; name it in requires()")
        if reading not in self._readings:
            self._readings[reading] = self._read(reading)
        return self._readings[reading]

    def one_length(self, method: str) -> None:
        """Refuse padded samples, for methods that are defined on one length only."""
        if self.valid is not None:
            raise PrunelabError(f"{method} works on samples of one length only; run padded samples one by one")

    def candidates(self) -> Tensor:
        """Indices [B, units] of the prunable tokens, in order; a sample that has fewer ends with others of its own."""
        return self.prunable.int().argsort(dim=1, descending=True, stable=True)[:, : self.units]

    def available(self) -> list[int]:
        """How many tokens of each sample are prunable."""
        return [self.units] * len(self.prunable) if self.valid is None else self.prunable.sum(1).tolist()

    def keep(
        self,
        budget: Budget | Sequence[int] | None = None,
        *,
        scores: Tensor | None = None,
        order: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Gather:
        """The tokens that go on, ascending: as many prunable ones as the budget says (or as are counted for each
        sample), and all protected ones.

        Which ones is said in one of three ways. scores [B, N]: the largest, equal ones in their order; those of
        protected tokens are ignored. order [B, K]: indices from the best on, at least as many as the budget keeps; of
        one that comes twice the first time counts. mask [B, N] bool: those where it holds, without a budget all of
        them, so that samples may keep different numbers.
        """
        if budget is None:
            return self._marked(mask)
        if order is not None:
            rank = torch.arange(order.shape[1], 0, -1, device=order.device, dtype=torch.float32).expand_as(order)
            scores = rank.new_zeros(self.prunable.shape).scatter_reduce(1, order, rank, "amax")
        elif scores is None:
            assert mask is not None, "say what stays by scores, an order or a mask"
            scores = mask.float()
        return selection.top_k_units(scores, self.prunable, self.units, budget, self.valid)

    def _marked(self, mask: Tensor | None) -> Gather:
        assert mask is not None, "without a budget only a mask says what stays"
        if mask.device.type == "meta":  # how many it marks is not a matter of shapes: none is taken to go
            return Gather(torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1))
        stays = mask | ~self.prunable
        return selection.compact(stays if self.valid is None else stays & self.valid)
