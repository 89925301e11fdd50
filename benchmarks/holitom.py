"""HoliTom's segmentation against the search that spells its objective out, its whole decision before the decoder, and
what it saves of LLaVA-OneVision-7B.

`python -m benchmarks.holitom [--frames 32 64 128] [--width 3584] [--rounds 5] [--threads 1] [--model]`. Both ways to
cut a video must give the same segments; in every round each runs once, in turn. Nine tenths of the tokens repeat in the
next frame. `decision` is the plan for a video's projected features of 27 x 27 patches, from pooling on. `--model`
counts MACs and cache bytes of the exact architecture on the meta device instead, for 32 frames and 64 tokens of text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm_prompt import Prompt
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.holitom.method import HoliTom
from prunelab.methods.holitom.segmentation import run_lengths, segment

SIDE, CELLS, FRAMES = 27, 196, 32


def spelled_out(similar: Tensor) -> tuple[list[tuple[int, int]], int]:
    """The same cuts for similar [T - 1, N]: every window's gain by itself, place by place."""
    frames = len(similar) + 1
    best, first = [0], []
    for last in range(frames):
        total, start = best[last], last
        for begin in range(last - 1, -1, -1):
            saved = best[begin] + (last - begin) * int(similar[begin:last].all(0).sum())
            if saved > total:
                total, start = saved, begin
        best.append(total)
        first.append(start)
    cuts, end = [], frames - 1
    while end >= 0:
        cuts.append((first[end], end))
        end = first[end] - 1
    return cuts[::-1], best[-1]


def video(frames: int, width: int) -> TokenSignals:
    """Projected features [1, frames * 729, width] of a scene in which about half of the patches change."""
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(1, SIDE, SIDE, width, generator=generator)
    moving = torch.randn(frames, SIDE, SIDE, width, generator=generator)
    moves = torch.rand(frames, SIDE, SIDE, 1, generator=generator).cumsum(0) % 2 > 1.2  # a patch changes now and then
    hidden = torch.where(moves, moving, still + 0.1 * moving).view(1, -1, width)
    received = torch.rand(1, 16, frames * SIDE**2, generator=generator)
    return TokenSignals(
        {"hidden": lambda: hidden, "received": lambda: received},
        prunable=torch.ones(1, hidden.shape[1], dtype=torch.bool),
        units=hidden.shape[1],
        info=ModelInfo("benchmark", 28, 28, width, hidden.shape[1]),
        grids=((SIDE, SIDE),) * frames,
    )


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what was computed."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(frames: int, width: int, rounds: int) -> dict[str, float]:
    """Median seconds of both ways to cut and of the whole decision (0 where width is 0), and the median ratio."""
    similar = torch.rand(frames - 1, CELLS, generator=torch.Generator().manual_seed(0)) > 0.1
    columns: dict[str, list[float]] = {name: [] for name in ("runs", "plain", "ratio", "decision")}
    method, given = HoliTom(), video(frames, width) if width else None
    (site,) = method.sites(ModelInfo("benchmark", 28, 28, width, frames * SIDE**2))
    for _ in range(rounds):
        fast, result = timed(lambda: segment(run_lengths(similar)))
        plain, wanted = timed(lambda: spelled_out(similar))
        if result != wanted:
            raise SystemExit("the two ways to cut a video differ")
        if given is not None:
            columns["decision"].append(timed(lambda: method.plan(site, given, Budget(0.25)))[0])
        columns["runs"].append(fast)
        columns["plain"].append(plain)
        columns["ratio"].append(plain / fast)
    return {name: statistics.median(values or [0.0]) for name, values in columns.items()}


def onevision_7b() -> Any:
    """LLaVA-OneVision-Qwen2-7B by its shapes, on the meta device. Its tower has lost its last layer."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    decoder = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152000,
        max_position_embeddings=32768,
    )
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(vision_config=tower, text_config=decoder))
    return model.to(torch.bfloat16).eval()


def savings() -> Table:
    """MACs and cache of a prompt of 32 frames, encoder included."""
    model = onevision_7b()
    pixels = {"pixel_values_videos": torch.empty(1, FRAMES, 3, 384, 384, dtype=torch.bfloat16, device="meta")}
    prompt = Prompt(pixels, text=64, modality="video")
    table = Table("ratio", "layer", "TMACs", "of them scoring", "dense TMACs", "saved, %", "cache, MiB", "dense, MiB")
    dense = adapter_for(model).cache_bytes([64 + FRAMES * CELLS + 1] * 28)
    assert dense is not None
    for layer in (None, 18):
        for ratio in (0.25, 0.2, 0.15, 0.1):
            budget = Budget(ratio if layer is None else (ratio, 0.5))
            with apply(HoliTom(layer), model, budget) as handle:
                result = handle.report(prompt)
            assert result.cache_bytes is not None
            figures = [f"{v / 1e12:.2f}" for v in (result.macs, result.scoring_macs, result.dense_macs)]
            sizes = [f"{v / 2**20:.1f}" for v in (result.cache_bytes, dense)]
            table.add_row(f"{ratio:g}", str(layer or "-"), *figures, f"{100 * result.saving:.1f}", *sizes)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--width", type=int, default=3584, help="of the features; 0 leaves the decision out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.model:
        Console().print(savings())
        return
    table = Table("frames", "segmentation, ms", "spelled out, ms", "ratio", "whole decision, ms")
    for frames in options.frames:
        result = measure(frames, options.width, options.rounds)
        times = [f"{1000 * result[name]:.1f}" for name in ("runs", "plain")]
        table.add_row(str(frames), *times, f"{result['ratio']:.0f}x", f"{1000 * result['decision']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
