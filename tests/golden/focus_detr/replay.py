"""Focus-DETR: scorer, selection, label assignment and encoder against the release."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.backbones.dino import DINO, Pyramid
from prunelab.common.backbones.pyramid import ConvPyramid
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.focus_detr.checkpoint import PARTS, convert
from prunelab.methods.focus_detr.method import FocusDETR, focus_counts
from prunelab.methods.focus_detr.modules import FocusParts
from prunelab.methods.focus_detr.supervision import focal_sums, foreground_targets

TOLERANCE = {"": (2e-5, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    given = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    family = {"mask_predictor": scorer, "selector": selector, "encoder": encoder, "foreground": supervision}
    run = next(run for prefix, run in family.items() if case.startswith(prefix))
    with torch.no_grad():
        return {name: value.numpy() for name, value in run(given).items()}


def weights(given: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The stored weights under our names; `prefix` is what the authors' full names start with."""
    return convert({prefix + name[2:]: value for name, value in given.items() if name.startswith("w_")})[0]


def parts_of(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(PARTS) :]: value for name, value in found.items() if name.startswith(PARTS)}


def scalar(value: Tensor) -> float:
    return round(float(value), 6)


def shapes_of(value: Tensor) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in value]


def scorer(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    x = given["in_x"]
    parts = FocusParts(x.shape[-1], 1, 0, 1).eval()
    parts.load_state_dict(parts_of(weights(given, "transformer.enc_mask_predictor.")) | {"alpha": torch.empty(0)})
    return {"out_score": parts.scorer(x).unsqueeze(-1)}


def selector(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = weights(given, "transformer.")
    shapes = shapes_of(given["in_spatial_shapes"])
    levels = range(len(shapes))
    features = torch.cat([given[f"in_feat{i}"].flatten(2).transpose(1, 2) for i in levels], 1)
    places = [given[f"in_pos{i}"].flatten(2).transpose(1, 2) + found["level_embed"][i] for i in levels]
    valid = ~torch.cat([given[f"in_padmask{i}"].flatten(1) for i in levels], 1)
    pyramid = Pyramid(features, torch.cat(places, 1), valid, shapes)

    width = features.shape[-1]
    backbone = ConvPyramid(1, (width,))
    detector = DINO(backbone, (width,), 2, width=width, heads=1, encoder_layers=0, decoder_layers=1, groups=1)
    detector.load_state_dict({n: v for n, v in found.items() if n.startswith("enc_output")}, strict=False)
    parts = FocusParts(width, 1, 0, len(shapes)).eval()
    parts.load_state_dict(parts_of(found))

    method = FocusDETR(cascade=tuple(scalar(share) for share in given["in_cascade"]), objects=0)
    budget, carry = Budget(scalar(given["in_rho"])), {}
    outputs = {"out_reference_points": pyramid.references(), "out_valid_ratios": pyramid.ratios()}
    for layer in range(len(method.cascade)):
        signals = TokenSignals(
            {"encoder_memory": lambda: detector.memory(pyramid.features + pyramid.positions, pyramid.anchors()[1])},
            prunable=valid,
            units=valid.shape[1],
            info=ModelInfo("golden", len(method.cascade), 1, width, valid.shape[1], levels=len(shapes)),
            valid=None if bool(valid.all()) else valid,
            required=method.requires(Site(layer)),
            parts=parts,
            grids=shapes,
            state=carry,
        )
        index = method.plan(Site(layer, "input", layer), signals, budget).reduce.index
        scores = carry["foreground"]
        ties = scores.topk(index.shape[1]).indices  # padding shares one score, and its order is the sort routine's
        same = scores.gather(1, ties) == scores.gather(1, index)
        outputs[f"out_inds_layer{layer}"] = torch.where(same, ties, index)
    counts = focus_counts(budget, valid.sum(1).tolist())
    outputs["out_focus_token_nums"] = torch.tensor(counts)
    outputs["out_valid_token_nums"] = valid.sum(1)
    outputs["out_foreground_score"] = carry["foreground"]
    return outputs


@dataclass(frozen=True)
class Stored(Pyramid):
    """A pyramid with the reference points of the case."""

    points: Tensor = None  # type: ignore[assignment]

    def references(self) -> Tensor:
        return self.points


@dataclass(frozen=True)
class Selected(FocusDETR):
    """Focus-DETR with the selection of the case in place of its own."""

    given: object = None

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.state["foreground"] = self.given["in_foreground_score"]  # type: ignore[index]
        index, counts = self.given[f"in_inds_layer{site.layer}"], self.given["in_focus_token_nums"]  # type: ignore[index]
        kept = torch.arange(index.shape[1]) < counts.unsqueeze(1)
        return Plan(Gather(index, kept), rest="bypass")


def encoder(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = weights(given, "transformer.encoder.")
    query, shapes = given["in_query"], shapes_of(given["in_spatial_shapes"])
    width, heads, points = query.shape[-1], int(given["in_num_heads"]), int(given["in_n_points"])
    depth = 1 + max(int(m[1]) for n in given if (m := re.match(r"w_layers\.(\d+)\.", n)))
    detector = DINO(
        ConvPyramid(1, (width,)),
        (width,),
        len(given["w_class_head_bias"]),
        width=width,
        heads=heads,
        points=points,
        feedforward=len(found["encoder.layers.0.mlp.fc1.bias"]),
        encoder_layers=depth,
        decoder_layers=1,
        groups=1,
        value="features",
    ).eval()
    own = {name: value for name, value in found.items() if name.startswith("encoder.")}
    own |= {f"class_embed.1.{part}": given[f"w_class_head_{part}"] for part in ("weight", "bias")}
    detector.load_state_dict(own, strict=False)
    parts = FocusParts(width, heads, depth, len(shapes)).eval()
    parts.load_state_dict(parts_of(found), strict=False)

    padding = given.get("in_padmask")
    valid = None if padding is None or not bool(padding.any()) else ~padding
    pyramid = Stored(query, given["in_pos"], valid, shapes, points=given["in_reference_points"])
    method = Selected(cascade=(1.0,) * depth, objects=int(given["in_topk_sa"]), given=given)
    with apply(method, detector, 0.5, parts=parts):
        return {"out_memory": detector.encoder(pyramid)}


def supervision(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    limits = [(float(low), float(high)) for low, high in given["in_limit_range"]]
    targets = foreground_targets(
        given["in_boxes_xyxy"], shapes_of(given["in_level_shapes"]), given["in_strides"].tolist(), limits
    )
    losses = focal_sums(given["in_logits"], targets)
    return {"out_targets": targets, "out_loss_per_image": losses, "out_select_loss_unweighted": losses.mean()}
