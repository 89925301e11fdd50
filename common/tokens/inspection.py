"""What an image or video language model answers with and without pruning, and which patches its tokens stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Report
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner

FRAMES = "frame_scores"  # the service of methods that weigh the frames of a video


@dataclass(frozen=True)
class Query:
    """A question about one image or video as the model's forward takes it.

    inputs: arguments of `generate`, batch 1. decode: the words of new tokens [N]. words: how many at most.
    """

    inputs: Mapping[str, Tensor]
    decode: Callable[[Tensor], str]
    words: int

    @property
    def modality(self) -> str:
        return "video" if "pixel_values_videos" in self.inputs else "image"


@dataclass(frozen=True)
class Stage:
    """What is left behind one site. tokens: of each frame (or crop), fractions where tokens were merged over several.
    shares: for each frame [height, width] what its patches have left, 1 where as much as without pruning."""

    name: str
    tokens: list[float]
    shares: list[Tensor]


@dataclass(frozen=True)
class Inspection:
    """Both answers; the tokens of each frame without pruning; what is left, site by site; and, where it was counted,
    what it cost."""

    dense: str
    pruned: str
    tokens: list[float]
    stages: list[Stage]
    report: Report | None


class _FramesWanted(Exception):
    """A method asks for frame scores that nobody has made yet."""

    def __init__(self, frames: int) -> None:
        self.frames = frames


@dataclass
class _Weights:
    """Stands for the service `frame_scores` until it is known whether a method asks for it."""

    rows: list[Tensor] = field(default_factory=list)

    def __call__(self, videos: int, frames: int) -> Sequence[Tensor]:
        if not self.rows:
            raise _FramesWanted(frames)
        return self.rows


@torch.inference_mode()
def inspect(
    model: nn.Module, query: Query, method: TokenPruner, budget: Budget, seed: int = 0, counted: bool = False
) -> Inspection:
    """Ask twice, and follow the tokens that are left back to the patches they are made of. `counted`: with the cost.

    A method that weighs frames gets `certainty` as scores. Raises PrunelabError as `apply` does, and for models that
    are no image or video language models.
    """
    adapter = adapter_for(model)
    if not isinstance(adapter, VisionLanguage):
        raise PrunelabError(f"{adapter.family} answers no questions; give an image or video language model")
    dense, weights = answer(model, query), _Weights()
    try:
        return _pruned(model, query, method, budget, weights, dense, seed, counted)
    except _FramesWanted as wanted:
        if query.modality != "video":
            raise PrunelabError(f"{method.name} weighs the frames of a video; give one, or another method") from None
        weights.rows = [certainty(model, query, wanted.frames)]
    return _pruned(model, query, method, budget, weights, dense, seed, counted)


def _pruned(
    model: nn.Module,
    query: Query,
    method: TokenPruner,
    budget: Budget,
    weights: _Weights,
    dense: str,
    seed: int,
    counted: bool,
) -> Inspection:
    with applied(method, model, budget, services={FRAMES: weights}, seed=seed) as handle:
        pruned = answer(model, query)
        attribution = handle.application.trace.attribution
        adapter = handle.adapter
        assert isinstance(adapter, VisionLanguage)
        report = handle.report(adapter.shaped(query.inputs)) if counted else None
    whole = [crops for modality in attribution.encoded for crops in attribution.dense(0)[modality]]
    grids = [grid for encoded in attribution.encoded.values() for grid in encoded.grids]
    stages = []
    for site, masses in attribution.behind(0):
        left = [crops for modality in attribution.encoded for crops in masses[modality]]
        shares = [
            (part / full.clamp_min(1e-9)).view(grid)
            for crops, before, grid in zip(left, whole, grids, strict=True)
            for part, full in zip(crops, before, strict=True)
        ]
        stages.append(Stage(named(site.where, site.layer), per_frame(left), shares))
    return Inspection(dense, pruned, per_frame(whole), stages, report)


def per_frame(masses: Sequence[Tensor]) -> list[float]:
    """The sum over each crop or frame of masses [crops, patches], to what single precision knows of it."""
    return [round(float(frame.sum()), 3) for crops in masses for frame in crops]


def named(where: str, layer: int) -> str:
    """A site in words."""
    return f"from layer {layer} on" if where == "input" else "before the decoder"


def answer(model: Any, query: Query) -> str:
    """The likeliest answer, word by word."""
    output = model.generate(**query.inputs, max_new_tokens=query.words, do_sample=False, num_beams=1)
    return query.decode(output[0, query.inputs["input_ids"].shape[1] :]).strip()


def certainty(model: Any, query: Query, frames: int) -> Tensor:
    """[T] how sure the unpruned model is of its first word, the probability of the likeliest one, when a video stands
    still at each of its `frames`: the frames' worth to the question, by the model itself."""
    results = []
    for frame in range(frames):
        logits = model(
            **{**query.inputs, "pixel_values_videos": still(query.inputs["pixel_values_videos"], frame, frames)}
        )
        results.append(logits.logits[0, -1].float().softmax(-1).max().cpu())
    return torch.stack(results)


def still(pixels: Tensor, frame: int, frames: int) -> Tensor:
    """Pixels of a video that shows one frame throughout, [1, T, 3, H, W], or patches [T * N, C] frame by frame."""
    if pixels.dim() == 5:
        return pixels[:, frame : frame + 1].expand_as(pixels)
    return pixels.unflatten(0, (frames, -1))[frame : frame + 1].expand(frames, -1, -1).flatten(0, 1)
