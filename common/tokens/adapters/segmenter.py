"""Plain-ViT segmenters (`common.backbones.segvit`): tokens leave behind a head, with what that head says of them.

Sites are `block_output` of the blocks that have a head behind them, but for the last. The signal `class_confidence`
[B, N, C] is that head's confidence in each class for every token still there; the head's work counts as scoring. A
plan with rest `halt` takes the other tokens out for good: nothing attends to them any more, and in the final map they
keep the masks they left with. What they leave with is written to a canvas of the whole grid, which every later head
overwrites where tokens are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, before, run_all
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.tokens.adapters.passes import Application
from prunelab.common.tokens.adapters.timm_vit import TimmViT, ViTPass
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.backbones.segvit import Prediction, Segmenter


@dataclass
class SegmenterPass(ViTPass):
    """prediction: what the last head said of the tokens it saw. stages: what each head said of the whole grid, with
    gradients."""

    prediction: Prediction | None = None
    stages: list[Prediction] = field(default_factory=list)


class SegmenterViT(TimmViT):
    """`stages` holds what each head said of the whole grid in the last forward pass: train on it."""

    family = "segmenter"
    model_classes = ("prunelab.common.backbones.segvit.Segmenter",)
    signals = {"block_output": TimmViT.signals["block_output"] | {"class_confidence"}}
    rest = frozenset({"halt"})
    gates = False

    model: Segmenter

    def started(self) -> SegmenterPass:
        return SegmenterPass()

    @property
    def stages(self) -> list[Prediction]:
        results: list[Prediction] = self.running.stages
        return results

    @property
    def blocks(self) -> Any:
        return self.model.backbone.blocks

    @property
    def info(self) -> ModelInfo:
        vit, embed = self.model.backbone, self.model.patch_embed
        return ModelInfo(
            family=self.family,
            depth=len(self.blocks),
            heads=self.blocks[0].attn.num_heads,
            width=vit.embed_dim,
            tokens=embed.num_patches + vit.num_prefix_tokens,
            special=vit.num_prefix_tokens,
            class_token=vit.cls_token is not None,
            grid=tuple(embed.grid_size),
        )

    def example(self) -> Tensor:
        weight = self.model.patch_embed.proj.weight
        return torch.empty(1, weight.shape[1], *self.model.window, dtype=weight.dtype, device="meta")

    def check(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        super().check(method, sites)
        blocks = self.model.head_blocks[:-1]
        for site in sites:
            if site.layer not in blocks:
                raise PrunelabError(
                    f"{method.name} stops tokens behind block {site.layer}, but this model has heads to leave by behind"
                    f" blocks {', '.join(map(str, blocks)) or 'none'}; set the method's layers"
                )

    def check_plan(self, plan: Plan) -> None:
        super().check_plan(plan)
        if not isinstance(plan.reduce, Gather):
            raise PrunelabError("a segmenter's tokens cannot be mixed, since each place of the map needs its own token")

    def install(self, application: Application) -> Callable[[], None]:
        remove = super().install(application)
        removers = [remove]
        for head in self.model.heads:
            removers += [before(head, self._hide_padding, kwargs=True), after(head, self._join)]
        return lambda: run_all(removers)

    def reduce(self, application: Application, site: Site, x: Tensor) -> Tensor:
        head = self.model.heads[self.model.head_blocks.index(site.layer)]
        with application.trace.scoring():
            head(x[:, self.info.special :])
        return super().reduce(application, site, x)

    def sources(self, site: Site, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        special = self.info.special

        def confidence() -> Tensor:
            prediction = self.running.prediction  # reduce has just run the head of this site
            return F.pad(prediction.confidence.transpose(1, 2), (0, 0, special, 0))  # prefix tokens have none

        return super().sources(site, x) | {"class_confidence": confidence}

    # -- hooks on the heads --------------------------------------------------------------------------------------

    def _hide_padding(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        valid = self.running.tokens.valid
        return None if valid is None else (args, kwargs | {"valid": valid[:, self.info.special :]})

    def _join(self, head: nn.Module, args: tuple[Tensor, ...], prediction: Prediction) -> Prediction:
        """What a head says of the tokens it saw becomes what is known of the whole grid."""
        special, running = self.info.special, self.running
        tokens, stages = running.tokens, running.stages
        indices = tokens.indices(torch.empty(len(args[0]), args[0].shape[1] + special, device=args[0].device))
        assert indices is not None  # a segmenter's plans only gather
        running.prediction = prediction
        known = stages[-1] if stages else None
        here = indices[:, special:] - special
        grid = self.model.patch_embed.num_patches
        seen = None if tokens.valid is None else tokens.valid[:, special:]
        stages.append(join(known, prediction, here, grid, seen, exit_presence=self.model.presence == "exit"))
        return stages[-1]


def join(
    before: Prediction | None,
    prediction: Prediction,
    indices: Tensor,
    grid: int,
    valid: Tensor | None = None,
    *,
    exit_presence: bool = False,
) -> Prediction:
    """The prediction of all `grid` tokens: `prediction` at indices [B, N], where `valid` [B, N], and elsewhere that of
    `before`.

    The presence of the classes is that of the head that spoke last; with `exit_presence` each token keeps that of the
    head that saw it last.
    """
    masks = _write(None if before is None else before.masks, prediction.masks, indices, grid, valid)
    presence = prediction.presence
    if exit_presence and presence is not None:
        known = None if before is None else before.presence
        presence = _write(known, presence.expand_as(prediction.masks), indices, grid, valid)
    return type(prediction)(masks, presence)


def _write(canvas: Tensor | None, values: Tensor, indices: Tensor, grid: int, valid: Tensor | None) -> Tensor:
    """The canvas [B, C, grid] (None: zeros) with values [B, C, N] at indices [B, N]."""
    canvas = values.new_zeros(*values.shape[:2], grid) if canvas is None else canvas
    if valid is not None:
        indices = indices.masked_fill(~valid, grid)  # padding goes to a column of its own, cut off again
    index = indices.unsqueeze(1).expand_as(values)
    return F.pad(canvas, (0, 1)).scatter(2, index, values)[..., :grid]
