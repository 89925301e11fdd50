"""The cost ratio that the abstract starts from: Deformable DETR's encoder against its decoder, by formula."""

from __future__ import annotations

WIDTH, FEEDFORWARD, HEADS, LEVELS, POINTS, LAYERS, QUERIES = 256, 1024, 8, 4, 4, 6, 300
SAMPLES = HEADS * LEVELS * POINTS
# Levels at strides 8 to 64 of a COCO photograph of 480 x 640 pixels, scaled to 800 x 1066 as in testing.
# assumption: the paper does not give the image size of its ratio.
TOKENS = 100 * 134 + 50 * 67 + 25 * 34 + 13 * 17


def deformable(queries: int, tokens: int) -> float:
    """MACs of deformable attention: values of all tokens; sampling points, weights, samples and output of a query.
    A sampled value costs five."""
    head = WIDTH // HEADS
    return tokens * WIDTH**2 + queries * (WIDTH * 2 * SAMPLES + WIDTH * SAMPLES + WIDTH**2 + 5 * SAMPLES * head)


def encoder_ratio() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    mlp = 2 * WIDTH * FEEDFORWARD
    encoder = LAYERS * (deformable(TOKENS, TOKENS) + TOKENS * mlp)
    attention = QUERIES * 4 * WIDTH**2 + 2 * QUERIES**2 * WIDTH
    decoder = LAYERS * (attention + deformable(QUERIES, TOKENS) + QUERIES * mlp)
    place = "headline/Deformable DETR encoder vs decoder/encoder cost ratio"
    return {place: {"value": round(encoder / decoder, 3)}}
