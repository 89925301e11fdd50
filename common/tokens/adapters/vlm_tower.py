"""The image encoder of a language model, the tower: what its layers give of the patches, and the patches that leave it
on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from prunelab.common.core.attention_interface import Recorder
from prunelab.common.core.plan import Gather
from prunelab.common.tokens.adapters.base import Pass
from prunelab.common.tokens.adapters.recorded import sources

FEATURES = frozenset({"cls_row", "received"})  # of the layer that gives the features, at later sites by name alone
READ = FEATURES | {"hidden", "queries", "keys", "values"}  # of any layer of the tower


@dataclass
class TowerPass(Pass):
    """One run of the encoder on crops [C, N, D]. left: [C, K] the tokens that are still there, None for all; total: how
    many there were."""

    left: Tensor | None = None
    total: int = 0
    modality: str = "image"
    recorders: dict[int, Recorder] = field(default_factory=dict)

    def reduce(self, reduce: Gather) -> None:
        """Tokens leave."""
        self.left = reduce.index if self.left is None else self.left.gather(1, reduce.index)
        for seen in self.seen.values():
            seen.follow(reduce)

    def patches(self, special: int) -> Tensor | None:
        """[C, K] the patches that are still there, None for all."""
        return None if self.left is None else self.left[:, special:] - special

    def signal(self, name: str, layer: int, head: int, special: int) -> Tensor:
        """A signal of a layer of every patch, channels last: [C, patches, channels]; of those that left, zero."""
        seen = self.seen[layer]
        value = seen.now(sources(seen, self.recorders[layer], head)[name](), name)
        if name == "hidden":
            value = value[:, special:]
        elif value.dim() == 3:
            value = value[..., special:].transpose(1, 2)
        else:
            value = value[:, :, special:].transpose(1, 2).flatten(2)
        return spread_out(value, self.patches(special), self.total - special)


def shaped(value: Tensor, name: str, head: int) -> Tensor:
    """A signal with its channels last, [B, N, channels], in the shape that it has at a site."""
    if name == "hidden":
        return value
    if name in FEATURES:
        return value.transpose(1, 2)
    return value.unflatten(2, (-1, head)).transpose(1, 2)


def spread_out(value: Tensor, index: Tensor | None, total: int) -> Tensor:
    """Rows [C, K, channels] at the places index [C, K] of `total`, zeros elsewhere; unchanged without an index."""
    if index is None:
        return value
    out = value.new_zeros(len(value), total, value.shape[2])
    return out.scatter(1, index.unsqueeze(-1).expand_as(value), value)
