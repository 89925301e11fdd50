"""Deformable encoders over feature pyramids: our DINO and transformers' Deformable DETR.

One kind of site, `input` of a layer, and one fate for the tokens left out, `bypass`: the tokens kept are the queries
of that layer (attention, norms, MLP) and are written back, all others pass by unchanged. What attention reads stays
the model's own choice: the tokens as they are at that layer (Deformable DETR), or the features that entered the first
layer (`DINO(value="features")`, Focus-DETR).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, before, replaced, run_all
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site, take
from prunelab.common.tokens.adapters.passes import Application, Pass, Tokens, write_back
from prunelab.common.tokens.adapters.sequence import SequenceAdapter
from prunelab.common.tokens.role import TokenPruner

_CLASSES = frozenset({"class_logits", "class_weight", "class_bias"})
_FIRST_STAGE = frozenset({"encoder_memory", "proposal_logits"})


@dataclass
class EncoderPass(Pass):
    """levels: arguments of the layer at work. worked: [B, K] which of its queries count, None for all.
    valid: [B, N] the tokens that are no padding, None for all."""

    levels: dict[str, Any] = field(default_factory=dict)
    valid: Tensor | None = None
    worked: Tensor | None = None


def real(mask: Tensor | None) -> Tensor | None:
    """The mask [B, N] of what is no padding; None where all is, or where values are not known."""
    if mask is None or mask.device.type == "meta" or bool(mask.all()):
        return None
    return mask.bool()


class DeformableEncoder(SequenceAdapter[EncoderPass]):
    """Signals: `hidden` and `positions` [B, N, D] (sine plus level embedding); `class_logits` [B, N, classes], the
    encoder's class head on the tokens as they are, and its `class_weight` and `class_bias`; with a two-stage detector
    `encoder_memory` [B, N, D] (tokens plus positions behind the first stage's projection and norm) and
    `proposal_logits` [B, N, classes] (the first stage's scores, were this the encoder's end). While training they
    carry gradients."""

    family = "deformable_encoder"
    model_classes = (
        "prunelab.common.backbones.dino.DINO",
        "transformers.models.deformable_detr.modeling_deformable_detr.DeformableDetrForObjectDetection",
    )
    signals = {"input": frozenset({"hidden", "sizes", "positions"}) | _CLASSES | _FIRST_STAGE}
    rest = frozenset({"bypass"})

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.stock = hasattr(model, "model")  # transformers nests the detector below its heads
        owner: Any = model
        self.body: Any = owner.model if self.stock else owner
        self.two_stage = self.body.config.two_stage if self.stock else True

    def started(self) -> EncoderPass:
        return EncoderPass()

    @property
    def blocks(self) -> Any:
        return self.body.encoder.layers

    @property
    def info(self) -> ModelInfo:
        attention = self.blocks[0].self_attn
        return ModelInfo(
            family=self.family,
            depth=len(self.blocks),
            heads=attention.n_heads,
            width=attention.d_model,
            tokens=sum(height * width for height, width in self._standard()),
            levels=attention.n_levels,
        )

    def example(self) -> Tensor:
        weight = next(p for p in self.model.parameters() if p.dim() == 4)
        height, width = (800, 1333) if self.stock else self.body.image_size
        return torch.empty(1, weight.shape[1], height, width, dtype=weight.dtype, device="meta")

    def _standard(self) -> list[tuple[int, int]]:
        """Shapes of the levels at the standard input size."""
        if not self.stock:
            return self.body.grids()
        from prunelab.common.backbones.dino import level_shapes

        count = self.body.config.num_feature_levels
        return level_shapes((800, 1333), 8 if count > 1 else 32, count)

    def grids(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each level of the input at work."""
        return tuple((int(h), int(w)) for h, w in self.running.levels["spatial_shapes_list"])

    # -- hooks ---------------------------------------------------------------------------------------------------

    def check(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        super().check(method, sites)
        for site in sites:
            missing = method.requires(site) & _FIRST_STAGE
            if missing and not self.two_stage:
                raise PrunelabError(
                    f"{method.name} reads {', '.join(sorted(map(str, missing)))}, which only a two-stage detector has"
                )
        if len({site.layer for site in sites}) < len(sites):
            raise PrunelabError(f"{method.name} prunes twice at one layer; a deformable encoder has one site a layer")

    def check_plan(self, plan: Plan) -> None:
        super().check_plan(plan)
        if not isinstance(plan.reduce, Gather):
            raise PrunelabError("a deformable encoder writes tokens back, so it carries out Gather plans only, no Mix")

    def install(self, application: Application) -> Callable[[], None]:
        removers: list[Callable[[], Any]] = []
        try:
            removers.append(before(self.model, self._note_size, kwargs=True))
            removers.append(before(self.blocks[0], self.begin, first=True))
            for layer, block in enumerate(self.blocks):
                removers.append(before(block.mlp, self._count_layer(application, layer)))
            for site in application.sites:
                removers.append(self._install_site(application, site))
            removers.append(after(self.blocks[-1], self.end))
        except BaseException:
            run_all(removers)
            raise
        return lambda: run_all(removers)

    def _note_size(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.dim() == 4), None)
        self._own.size = None if images is None else tuple(images.shape[1:])

    def _count_layer(self, application: Application, layer: int) -> Callable[..., None]:
        """Attention and MLP of a layer work on the same queries."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            trace, batch, queries = application.trace, args[0].shape[0], args[0].shape[1]
            if layer == 0:
                trace.begin(batch)
                trace.saw(getattr(self._own, "size", None), batch)
            worked = self.running.worked
            for part in ("attention", "mlp"):
                trace.add(part, layer, batch * queries if worked is None else worked.sum())
            self.running.worked = None

        return hook

    def _install_site(self, application: Application, site: Site) -> Callable[[], Any]:
        from prunelab.common.backbones.dino import update

        layer = self.blocks[site.layer]
        if "forward" in vars(layer):
            raise PrunelabError(
                f"layer {site.layer} of the encoder already has a forward of its own; take it out first"
            )

        # Queries and values are one tensor in the layer's own forward, so its parts are called one by one.
        def forward(
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            spatial_position_embeddings: Tensor | None = None,
            *,
            value: Tensor | None = None,
            reference_points: Tensor,
            spatial_shapes: Tensor,
            spatial_shapes_list: Any,
            level_start_index: Tensor,
            **unused: Any,
        ) -> Tensor:
            positions: Any = spatial_position_embeddings
            levels = {
                "spatial_shapes": spatial_shapes,
                "spatial_shapes_list": spatial_shapes_list,
                "level_start_index": level_start_index,
            }
            running = self.running
            running.levels = {**levels, "positions": positions}
            if site.index == 0:
                running.valid = real(attention_mask)
            running.tokens = Tokens(valid=running.valid)
            plan, signals = self.decide(application, site, hidden_states)
            assert isinstance(plan.reduce, Gather)  # as check_plan saw to
            index, kept = plan.reduce.index, plan.reduce.valid
            queries = application.method.refine(site, plan.reduce.apply(hidden_states), signals, plan)
            running.worked = kept
            self.note(application, site, index if kept is None else index.masked_fill(~kept, -1))
            queries = update(
                layer,
                queries,
                hidden_states if value is None else value,
                attention_mask,
                take(positions.expand(index.shape[0], -1, -1), index),
                reference_points=take(reference_points.expand(index.shape[0], -1, -1, -1), index),
                **levels,
            )
            return write_back(hidden_states, queries, index, kept)

        return replaced(layer, "forward", forward)

    # -- signals -------------------------------------------------------------------------------------------------

    def sources(self, site: Site, x: Tensor) -> Mapping[str, Callable[[], Tensor]]:
        body, tokens, positions = self.body, self.running.tokens, self.running.levels["positions"]
        # assumption: a one-stage detector has no class head of the encoder, its last decoder layer's stands in
        owner: Any = self.model
        head = owner.class_embed[-1]

        def memory(hidden: Tensor) -> Tensor:
            if self.stock:
                valid = torch.ones_like(x[..., 0], dtype=torch.bool) if tokens.valid is None else tokens.valid
                return body.gen_encoder_output_proposals(hidden, ~valid, self.grids())[0]
            from prunelab.common.backbones.dino import Pyramid

            pyramid = Pyramid(hidden, positions, tokens.valid, list(self.grids()))
            return body.memory(hidden, pyramid.anchors()[1])

        def learning(source: Callable[[], Tensor]) -> Callable[[], Tensor]:
            """Scores are trained on these signals, so they keep their gradients although plans are made without."""

            def compute() -> Tensor:
                with torch.set_grad_enabled(self.model.training):
                    return source()

            return compute

        return {
            "positions": lambda: positions,
            "class_logits": learning(lambda: head(x)),
            "class_weight": lambda: head.weight,
            "class_bias": lambda: head.bias,
            "encoder_memory": learning(lambda: memory(x + positions)),
            "proposal_logits": learning(lambda: head(memory(x))),
        }
