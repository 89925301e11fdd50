"""The formula by which papers on visual tokens count a decoder's prefill, and the decoders that they count.

FastV (ECCV 2024) counts a layer with n tokens, width d and MLP width m as 4nd^2 + 2n^2d + 2ndm, and later papers do
as it does. It is a count of multiply-accumulates for four square projections, the two products of attention without
causality, and an MLP of two matrices; some (PyramidDrop, CATP) count the gate as a third, 3ndm. The decoders in
question share keys and values among heads in part, and have an output layer: `prunelab.common.costs.meter` counts
those, and so the two counts differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder: its width d, the width m of its MLPs, and its number of layers."""

    width: int
    inner: int
    layers: int


LLAVA_7B = Decoder(4096, 11008, 32)
LLAVA_13B = Decoder(5120, 13824, 40)
ONEVISION_7B = Decoder(3584, 18944, 28)


def layer_flops(tokens: float, decoder: Decoder, matrices: int = 2) -> float:
    """4nd^2 + 2n^2d + 2ndm of one layer with n tokens; `matrices` of the MLP are counted."""
    n, d, m = tokens, decoder.width, decoder.inner
    return 4 * n * d**2 + 2 * n**2 * d + matrices * n * d * m


def prefill_flops(decoder: Decoder, stages: Sequence[tuple[int, float]], matrices: int = 2) -> float:
    """Of the whole decoder: `stages` are (first layer, tokens from there on), the first one starting at layer 0."""
    starts = [start for start, _ in stages]
    ends = [*starts[1:], decoder.layers]
    parts = zip(starts, ends, stages, strict=True)
    return sum((end - start) * layer_flops(tokens, decoder, matrices) for start, end, (_, tokens) in parts)
