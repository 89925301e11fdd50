"""How sparse the recommended configuration is, from shapes alone."""

from __future__ import annotations

WIDTH, INNER, LAYERS = 1024, 4096, 23  # of Stable Diffusion 2's text encoder
PARAMETERS = {"text_encoder": 340_387_840, "unet": 865_910_724}
LEVELS = (320, 640, 1280, 1280)  # channels of the U-Net from high to low resolution, of which the last has no attention
CONTEXT, TIME = 1024, 1280


def text_linears() -> dict[int, int]:
    """How many linears of the text encoder have so many weights."""
    return {WIDTH * WIDTH: 4 * LAYERS, WIDTH * INNER: 2 * LAYERS}


def unet_linears() -> dict[int, int]:
    """The same of the U-Net: five transformer blocks at each of three levels and one in the middle, of self attention,
    cross attention, a gated MLP and two projections; the time's embedding, and its projection in every residual block.
    """
    results: dict[int, int] = {LEVELS[0] * TIME: 1, TIME * TIME: 1}

    def add(size: int, count: int) -> None:
        results[size] = results.get(size, 0) + count

    for width, blocks in zip(LEVELS[:3], (5, 5, 6), strict=True):
        add(width * width, 8 * blocks)  # self attention, q and output of cross attention, projections in and out
        add(width * CONTEXT, 2 * blocks)  # k and v of cross attention
        add(8 * width * width, blocks)
        add(4 * width * width, blocks)
    for width, blocks in zip(LEVELS, (5, 5, 5, 7), strict=True):  # two down, three up; two in the middle
        add(TIME * width, blocks)
    return results


def zeros(linears: dict[int, int], ratio: float) -> float:
    """Percent of the weights of all linears that go, each matrix by itself."""
    gone = sum(count * int(size * ratio) for size, count in linears.items())
    return 100 * gone / sum(size * count for size, count in linears.items())


def recommended(text: float = 0.475, unet: float = 0.35) -> dict[str, dict[str, float]]:
    """The headline's figures: of the linears, and of both components as the authors count them."""
    shares = {"text_encoder": zeros(text_linears(), text), "unet": zeros(unet_linears(), unet)}
    overall = sum(shares[name] * size for name, size in PARAMETERS.items()) / sum(PARAMETERS.values())
    columns = {
        "text encoder sparsity": shares["text_encoder"], "U-Net sparsity": shares["unet"],
        "overall sparsity with minimal loss": overall,
    }  # fmt: skip
    return {f"headline/recommended/{name}": {"value": round(value, 4)} for name, value in columns.items()}
