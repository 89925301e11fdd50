"""Exact cost of a prompt to an image or video language model, counted on the meta device: no weights, no data, no
scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.prompt_macs import PromptMacs


# MACs of encoders, and of whole unpruned models, by what decides them, so that a process which makes many runs
# counts them once.
_UNPRUNED: dict[str, tuple[float, float]] = {}


def measure(bench: Bench[PromptMacs.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.prompt_macs`."""
    settings, model = bench.settings, loading.architecture(bench.ids["model"])
    adapter = adapter_for(model)
    if not isinstance(adapter, VisionLanguage):
        raise PrunelabError(f"prompts are counted of image and video language models; {adapter.family} is none")
    example = adapter.prompt(settings.frames, settings.text)
    key = files.digest([bench.ids["model"], settings.frames, settings.text])
    if key not in _UNPRUNED:
        _UNPRUNED[key] = meter.macs(model, example.encoding()), meter.macs(model, example)
    encoder, dense = _UNPRUNED[key]
    total, scoring = dense, 0.0
    visual = adapter.visual_tokens(example)
    held = full = adapter.cache_bytes([example.text + visual] * adapter.info.depth)
    method = bench.method(TokenPruner)
    if method is not None:
        with applied(
            method, model, bench.budget, services={"frame_scores": even_scores, "text_similarity": even_likeness}
        ) as handle:
            report = handle.report(example, dense)
        total, scoring, held = report.macs, report.scoring_macs, report.cache_bytes or 0
    figures = {
        "macs": total,
        "encoder_macs": encoder,
        "decoder_macs": total - encoder,
        "scoring_macs": scoring,
    }
    savings = {
        "saving": 1 - total / dense,
        "decoder_saving": 1 - (total - encoder) / (dense - encoder),
        "cache_saving": 1 - held / full,
    }
    metrics: dict[str, Any] = {name: {"value": round(value / 1e9, 5)} for name, value in figures.items()}
    metrics |= {name: {"value": round(100 * value, 3)} for name, value in savings.items()}
    metrics["cache_mib"] = {"value": round(held / 2**20, 3)}
    counted = (
        f"{example.text} text tokens and {visual} visual ones before pruning;"
        f" the encoder's {encoder / 1e9:.0f} GMACs come on top"
    )
    metrics["decoder_macs"]["protocol"] = metrics["cache_mib"]["protocol"] = counted
    return metrics


def even_scores(videos: int, frames: int) -> Tensor:
    """Scores [V, T] of frames that matter alike."""
    return torch.ones(videos, frames)


def even_likeness(patches: Tensor, **_: Any) -> Tensor:
    """Likeness [B, N] of patches [B, N, C] that are all as like the text."""
    return torch.zeros_like(patches[..., 0], dtype=torch.float32)
