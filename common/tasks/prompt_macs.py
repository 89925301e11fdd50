"""Exact cost of a prompt to an image or video language model, counted on the meta device: no weights, no data, no
scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core import files, registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter
from prunelab.common.experiments.run import Run
from prunelab.common.models import loading
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner

# MACs of encoders by what decides them, so that a process which makes many runs counts them once.
_ENCODERS: dict[str, float] = {}


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics in G (1e9) of a prompt with one image or video: `macs` of encoder and decoder; `encoder_macs`, with the
    projector; `decoder_macs`, the rest, with the output layer for one token and with `scoring_macs`, what the method's
    decisions take; `saving` and `decoder_saving` in percent; `cache_mib`, what the decoder's cache then holds, in MiB
    (2^20 bytes), and `cache_saving`.

    Settings: `text`, the tokens of the prompt that are not visual; `frames` of a video, else it is an image. What a
    method decides by values is counted as for a video that repeats nothing and whose frames matter alike.
    """
    settings, model = run.settings, loading.architecture(run.ids["model"])
    adapter = adapter_for(model)
    if not isinstance(adapter, VisionLanguage):
        raise PrunelabError(f"prompts are counted of image and video language models; {adapter.family} is none")
    example = adapter.prompt(int(settings.get("frames", 0)), settings.get("text"))
    key = files.digest([run.ids["model"], dict(settings)])
    if key not in _ENCODERS:
        _ENCODERS[key] = meter.macs(model, example.encoding())
    encoder, scoring = _ENCODERS[key], 0.0
    visual = adapter.visual_tokens(example)
    held = full = adapter.cache_bytes([example.text + visual] * adapter.info.depth)
    if run.method is None:
        total = dense = meter.macs(model, example)
    else:
        method = registry.create(run.method, **run.options)
        assert isinstance(method, TokenPruner)
        services = {"frame_scores": even_scores}
        with applied(method, model, Budget.parse(str(run.budget)), services=services) as handle:
            report = handle.report(example)
        total, dense, scoring, held = report.macs, report.dense_macs, report.scoring_macs, report.cache_bytes or 0
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
