"""The FLOPs and prefill columns, counted as the paper does: every step of a decoder's layer by a roofline.

The paper measures neither. It takes the number of tokens of every layer to LLM-Viewer, an analyser that counts two
operations a multiplication, elementwise steps included, and gives each step the longer of two times: its operations at
the card's peak, or its traffic, in 16 bits and without fused attention, at the card's bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PEAK, BANDWIDTH = 312e12, 1555e9  # an A100 of 40 GB: operations and bytes a second
BYTES = 2
FRAME, IMAGE = 196, 576  # tokens of a LLaVA-OneVision frame and of a LLaVA-1.5 image


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, and what else its costs are counted with.

    text: text tokens; 100 in the released script, 40 of an image's question is an assumption: it alone gives both of
    the unpruned model's digits. sums: residual sums of a layer that are counted; assumption: one for Qwen2 and both for
    Vicuna, since so every printed time comes out, and else it is 0.4 % off.
    """

    width: int
    inner: int
    heads: int
    shared: int  # key-value heads
    layers: int
    vocabulary: int
    text: int
    sums: int


QWEN2_7B = Shape(3584, 18944, 28, 4, 28, 152064, text=100, sums=1)
VICUNA_7B = Shape(4096, 11008, 32, 32, 32, 32000, text=40, sums=2)


def steps(tokens: int, shape: Shape) -> list[tuple[float, float]]:
    """(operations, bytes) of every step of one layer with `tokens` tokens."""
    n, d, m, maps = tokens, shape.width, shape.inner, shape.heads * tokens**2
    kv = d // shape.heads * shape.shared
    results = [
        (2.0 * n * a * b, float(a * b + n * a + n * b))
        for a, b in ((d, d), (d, kv), (d, kv), (d, d), (d, m), (d, m), (m, d))
    ]
    results += [(2.0 * n * n * d, float(maps + 2 * n * kv)), (5.0 * maps, 2.0 * maps)]  # logits, softmax
    results += [(2.0 * n * n * d, float(maps + n * d + n * kv))]  # values
    results += [(7.0 * n * d, 2.0 * n * d)] * 2  # norms
    results += [(1.0 * n * d, 2.0 * n * d)] * shape.sums + [(2.0 * n * d, 3.0 * n * d)]  # residual sums, gate
    return [(operations, elements * BYTES) for operations, elements in results]


def prefill(counts: Sequence[int], shape: Shape = QWEN2_7B) -> tuple[float, float]:
    """Tera-operations and milliseconds of a prefill whose layers see `counts` tokens, with one row of the output
    layer, a single operation a weight there."""
    every = [step for tokens in counts for step in steps(tokens, shape)]
    output = shape.width * shape.vocabulary
    every.append((float(output), float(output * BYTES)))
    return sum(o for o, _ in every) / 1e12, 1e3 * sum(max(o / PEAK, b / BANDWIDTH) for o, b in every)


def scheduled(visual: int, first: int, last: int, shape: Shape = QWEN2_7B) -> list[int]:
    """Tokens that each layer is charged for. The paper charges a layer for what it passes on, though it still works on
    what it was given: a layer's pruning pays one layer early. Its rate falls by a step rounded to four decimals."""
    step = round(1 / (last - first), 4)
    rates = (1.0 if layer < first else max(0.0, 1 - (layer - first + 1) * step) for layer in range(shape.layers))
    return [int(round(visual * rate, 6)) + shape.text for rate in rates]


def staged(shape: Shape, *stages: tuple[int, int]) -> list[int]:
    """Tokens of each layer for (first layer, visual tokens from there on), the first stage starting at layer 0."""
    return [[v for start, v in stages if start <= layer][-1] + shape.text for layer in range(shape.layers)]


def rows() -> dict[str, tuple[Shape, list[int]]]:
    """Decoder and tokens of each layer for every row whose setting is known or follows from its two figures."""
    q, v, video, quarter = QWEN2_7B, VICUNA_7B, 32 * FRAME, 32 * FRAME // 4
    base = (q, staged(q, (0, video)))
    results = {
        "video/base (LLaVA-OV-7B)": base,
        "video/LongVA-7B": (q, staged(q, (0, 128 * 144))),
        "video/VTW": (q, staged(q, (0, video), (6, 0))),  # assumption: the layer that gives the printed operations
        "video/AIM": (q, scheduled(quarter, 14, 22)),
        "long video/AIM 192 frames": (q, scheduled(192 * FRAME // 4, 14, 22)),
        "image LLaVA-1.5-7B/base": (v, staged(v, (0, IMAGE))),
        "merge ratio/100%": base,
        "merge ratio/50% (without pruning)": (q, staged(q, (0, video // 2))),
        "merge ratio/25%": (q, scheduled(quarter, 14, 22)),
    }
    for share in ("12.5", "6.3", "3.1", "1.6"):  # assumption: the released schedule, which does not give these figures
        results[f"merge ratio/{share}%"] = q, scheduled(round(video * float(share) / 100), 14, 22)
    # assumption: what each method keeps of an image, and VTW's layers, are those that give both printed digits; the
    # schedule of AIM starts at layer 13 as a comment of the released script has it for this decoder.
    results |= {
        "image LLaVA-1.5-7B/VTW": (v, staged(v, (0, IMAGE), (8, 0))),
        "image LLaVA-1.5-7B/FastV": (v, staged(v, (0, IMAGE), (1, IMAGE // 4))),
        "image LLaVA-1.5-7B/AIM": (v, scheduled(IMAGE * 7 // 16, 13, 21, v)),
        "image LLaVA-1.5-7B low budget/VTW": (v, staged(v, (0, IMAGE), (3, 0))),
        "image LLaVA-1.5-7B low budget/FastV": (v, staged(v, (0, IMAGE), (1, round(0.05 * IMAGE)))),
        "image LLaVA-1.5-7B low budget/LLaVA-Prumerge": (v, staged(v, (0, 40))),
        "image LLaVA-1.5-7B low budget/AIM": (v, scheduled(IMAGE // 8, 13, 21, v)),
    }
    for first in (28, 21, 14, 7):
        for last in (8, 15, 22, 29):
            if last > first:
                results[f"schedule l1-l2/{first}-{last}"] = q, scheduled(quarter, first, last)
    return results


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    results: dict[str, dict[str, float]] = {}
    for row, (shape, counts) in rows().items():
        operations, milliseconds = prefill(counts, shape)
        results |= {
            f"{row}/FLOPs": {"value": round(operations, 4)},
            f"{row}/prefill": {"value": round(milliseconds, 4)},
        }
    return results
