"""HoliTom: every step before the decoder, the whole way through them, and the merge inside it, as the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo
from prunelab.common.tokens.adapters.vlm_prompt import with_newlines
from prunelab.common.tokens.signals import TokenSignals
from prunelab.common.tokens.video import pooled
from prunelab.methods.holitom import method, segmentation
from prunelab.methods.holitom.method import HoliTom

TOLERANCE = {"": (1e-6, 1e-5)}
Arrays = Mapping[str, np.ndarray]


def replay(case: str, inputs: Arrays, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    found = next(run for prefix, run in STEPS.items() if case.startswith(prefix))(inputs)
    return {f"out_{name}": value.numpy() for name, value in found.items()}


def number(inputs: Arrays, name: str) -> float:
    """A scalar, stored in single precision."""
    return round(float(inputs[f"in_{name}"]), 6)


def tensor(inputs: Arrays, name: str) -> Tensor:
    return torch.from_numpy(inputs[f"in_{name}"])


def segments(similarity: Tensor, tau: float, window: int = 1024) -> dict[str, Tensor]:
    cuts, saved = segmentation.segment(segmentation.run_lengths(similarity > tau), window)
    return {"segments": torch.tensor(cuts), "total_reduced": torch.tensor(float(saved))}


def cutting(inputs: Arrays) -> dict[str, Tensor]:
    return segments(tensor(inputs, "feature_sim"), number(inputs, "tau"), int(inputs["in_max_window"]))


def clustering(inputs: Arrays) -> dict[str, Tensor]:
    tokens, noise = tensor(inputs, "tokens"), tensor(inputs, "noise01") * 1e-6
    distance = selection.scaled_distance(tokens)
    centres = selection.density_peaks(distance, int(inputs["in_cluster_num"]), int(inputs["in_K"]), noise)
    found = selection.cluster(distance, centres)
    share = None if int(inputs["in_plain_mean"]) else number(inputs, "beta")
    return {
        "dist": distance,
        "centers_by_score": centres,
        "centers_sorted": found.centres,
        "merged": found.mix(share).apply(tokens),
    }


def ranking(inputs: Arrays) -> dict[str, Tensor]:
    """One segment whose places all change."""
    tokens, attention = tensor(inputs, "tokens"), tensor(inputs, "attn")
    frames, cells, width = tokens.shape
    keep = method.kept_count(cells, number(inputs, "retain_ratio"))
    found = method.dynamic_tokens(attention, torch.arange(cells), (0, frames - 1), keep)
    kept = tokens.flatten(0, 1)[found.source]
    return {"tokens": kept.view(frames, keep, width), "pos": (found.place % cells).view(frames, keep)}


def temporal(inputs: Arrays) -> dict[str, Tensor]:
    tokens, attention = tensor(inputs, "tokens"), tensor(inputs, "attn")
    runs = segmentation.run_lengths(tensor(inputs, "feature_sim") > number(inputs, "tau"))
    found: dict[str, Tensor] = {}
    for i, (first, last) in enumerate(inputs["in_segments"].tolist()):
        static, dynamic = segmentation.split(runs, (first, last))
        part = slice(first, last + 1)
        found |= {
            f"static_feat_{i}": tokens[part, static].mean(0),
            # a lone frame has no row of repeated places in the authors' arrays
            f"static_pos_{i}": static.unsqueeze(0) if last > first else torch.zeros(0, tokens.shape[1]).long(),
            f"dynamic_feat_{i}": tokens[part, dynamic],
            f"dynamic_attn_{i}": attention[part, dynamic],
            f"dynamic_pos_{i}": dynamic.expand(last - first + 1, -1),
        }
    return found


def outer(inputs: Arrays) -> dict[str, Tensor]:
    """The plan for the projected features of a video, carried out on them, with newlines as the adapters put them."""
    features, attention = tensor(inputs, "features").float(), tensor(inputs, "attn")
    frames, patches, width = features.shape
    side = int(inputs["in_grid"][0])
    rows = str(inputs["in_newline_position"]) == "grid"
    pruner = HoliTom(
        similarity=number(inputs, "tau"),
        pooling=str(inputs["in_pool_mode"]),  # type: ignore[arg-type]
        order="grid" if rows else "segment",
        noise=0,
    )
    info = ModelInfo("golden", 1, 1, width, frames * patches)
    (site,) = pruner.sites(info)
    hidden = features.view(1, -1, width)
    signals = TokenSignals(
        {"hidden": lambda: hidden, "received": lambda: attention.view(1, 1, -1)},
        prunable=torch.ones(1, frames * patches, dtype=torch.bool),
        units=frames * patches,
        info=info,
        grids=((side, side),) * frames,
    )
    plan = pruner.plan(site, signals, Budget(number(inputs, "retain_ratio")))
    assert plan.layout is not None
    made = with_newlines(
        plan.reduce.apply(hidden)[0], plan.layout[0], tensor(inputs, "newline"), "row" if rows else "end"
    )
    maps = pooled(features.view(frames, side, side, width), pruner.pooling).flatten(1, 2)
    return {"visual_embeds": made, **segments(segmentation.frame_similarity(maps), pruner.similarity)}


def inner(inputs: Arrays) -> dict[str, Tensor]:
    hidden, row = tensor(inputs, "hidden"), tensor(inputs, "attn_last_query")
    total, start, length = hidden.shape[1], int(inputs["in_image_start"]), int(inputs["in_image_len"])
    prunable = torch.zeros(1, total, dtype=torch.bool)
    prunable[:, start : start + length] = True
    info = ModelInfo("golden", 4, row.shape[1], hidden.shape[2], total)
    pruner = HoliTom(layer=2)
    site = pruner.sites(info)[1]
    sources = {"hidden": lambda: hidden, "last_row": lambda: row}
    signals = TokenSignals(sources, prunable=prunable, units=length, info=info)
    kept = round(length * (1 - number(inputs, "prune_ratio")))  # the authors round half to even
    plan = pruner.plan(site, signals, Budget(kept, "count"))
    index = plan.reduce.index  # type: ignore[union-attr]
    made = pruner.refine(site, plan.reduce.apply(hidden), signals, plan)
    return {"hidden": made, "keep_index": index[0], "position_ids": index}


STEPS = {
    "segment": cutting,
    "dpcknn": clustering,
    "attn": ranking,
    "temporal": temporal,
    "outer": outer,
    "inner": inner,
}
