"""Sizes of Mixtral at the bits of table 4, from its architecture alone.

Codes are packed; every group of 128 columns of a row has a scale and a zero of 16 bits each; embeddings, head and
routers stay at 16 bits. A token uses attention, embeddings and two experts of the mean size, or as many as dynamic
pruning leaves it on average. The printed sizes follow no one rule: uniform 2 bits of the small model are these to
0.2 %, those of the large one have half the scales and zeros, and mixed bits lie 3 to 8 % below.
"""

from __future__ import annotations

from collections.abc import Mapping

from prunelab.common.catalogue import lookup

GROUP, SIDE = 128, 16  # columns of a grid, and bits of its scale and of its zero
LEFT = 1 - 20 / 32 / 4  # of two experts: half the tokens lose one of two in 20 of 32 layers
ROWS = {"Uniform 2.00": (2.0, 2), "PMQ 2.54": (2.5, 4), "PMQ 2.05": (2.0, 4), "PMQ 1.57": (1.5, 4)}
MODELS = {"T4 Mixtral-8x7B": "mixtral_8x7b", "T4 Mixtral-8x22B": "mixtral_8x22b"}


def parameters(of: Mapping[str, int]) -> tuple[int, int, int]:
    """Parameters of the experts, of attention, and of what stays as it is."""
    width, inner, layers = of["hidden_size"], of["intermediate_size"], of["num_hidden_layers"]
    head = width // of["num_attention_heads"]
    attention = 2 * width * head * (of["num_attention_heads"] + of["num_key_value_heads"])
    rest = 2 * of["vocab_size"] * width + layers * (of["num_local_experts"] * width + 2 * width) + width
    return layers * of["num_local_experts"] * 3 * width * inner, layers * attention, rest


def gigabytes(of: Mapping[str, int], bits: float, attention: float, share: float = 1.0) -> float:
    """Bytes in G (1e9) of a Mixtral, or with a `share` of its experts, whose weights have these bits on average."""
    experts, own, rest = parameters(of)
    side = 2 * SIDE / GROUP if bits < SIDE else 0
    return (share * experts * (bits + side) + own * (attention + side) + rest * SIDE) / 8e9


def sizes() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    results = {}
    for table, model in MODELS.items():
        of = lookup.architecture(model)["arguments"]
        two = of["num_experts_per_tok"] / of["num_local_experts"]
        rows = {"16.00 bit": (16.0, 16.0, two), **{row: (*bits, two) for row, bits in ROWS.items()}}
        rows |= {f"{row} + ODP": (*bits, two * LEFT) for row, bits in ROWS.items() if row.startswith("PMQ")}
        for row, (bits, attention, share) in rows.items():
            results[f"{table}/{row}/Params GB"] = {"value": round(gigabytes(of, bits, attention), 3)}
            results[f"{table}/{row}/Act GB"] = {"value": round(gigabytes(of, bits, attention, share), 3)}
    return results
