"""DToP: the selection on stored confidences, and two heads in a row on stored features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.backbones.segvit import ATMHead, Prediction
from prunelab.common.core import selection
from prunelab.common.tokens.adapters.segmenter import join
from prunelab.methods.dtop.method import leaving

TOLERANCE = {"": (1e-5, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    threshold = round(float(inputs["in_thresh"]), 6)
    if "in_prob" in inputs:
        return select(inputs, threshold)
    return two_heads(inputs, threshold)


def select(inputs: Mapping[str, np.ndarray], threshold: float) -> dict[str, np.ndarray]:
    """One selection. What a head says of tokens that left before does not count, so only the others are handed on."""
    before, confidence, masks, canvas = (
        torch.from_numpy(inputs[f"in_{name}"]) for name in ("pruned_before", "prob", "attn_logits", "canvas")
    )
    kept = selection.compact(~before)
    valid = torch.ones_like(kept.index, dtype=torch.bool) if kept.valid is None else kept.valid
    keep = int(inputs["in_topk_per_class"])
    gone = leaving(kept.apply(confidence.transpose(1, 2)), valid, threshold, keep)
    active = Prediction(kept.apply(masks.transpose(1, 2)).transpose(1, 2))
    joined = join(Prediction(canvas), active, kept.index, before.shape[1], valid)
    return {"out_pruned_after": marked(before, gone, kept.index, valid).numpy(), "out_canvas": joined.masks.numpy()}


def two_heads(inputs: Mapping[str, np.ndarray], threshold: float) -> dict[str, np.ndarray]:
    """Two ATM heads, each on the tokens that the one before left over, padded to the longest image."""
    features = [torch.from_numpy(inputs[f"in_x{i}"]) for i in (1, 2)]
    batch, tokens, width = features[0].shape
    gone = torch.zeros(batch, tokens, dtype=torch.bool)
    known: Prediction | None = None
    out: dict[str, np.ndarray] = {}
    for i, x in enumerate(features, 1):
        state = {n.removeprefix(f"w{i}_"): torch.from_numpy(a) for n, a in inputs.items() if n.startswith(f"w{i}_")}
        classes, inner = state["q.weight"].shape
        head = ATMHead(width, classes, inner, int(inputs["in_num_heads"]), int(inputs["in_dec_layers"])).eval()
        head.load_state_dict(state)
        kept = selection.compact(~gone)
        valid = torch.ones_like(kept.index, dtype=torch.bool) if kept.valid is None else kept.valid
        with torch.no_grad():
            said = head(kept.apply(x), kept.valid)
        known = join(known, said, kept.index, tokens, kept.valid)
        gone = marked(gone, leaving(said.confidence.transpose(1, 2), valid, threshold), kept.index, valid)
        out |= {f"out_pruned{i}": gone.numpy(), f"out_canvas{i}": known.masks.numpy()}
        out[f"out_pred{i}"] = known.confidence.numpy()
    assert known is not None
    side = round(tokens**0.5)
    size = inputs_side(inputs)
    grid = known.confidence.unflatten(-1, (side, side))
    out["out_upsampled_pred2"] = F.interpolate(grid, (size, size), mode="bilinear", align_corners=False).numpy()
    return out


def inputs_side(inputs: Mapping[str, np.ndarray]) -> int:
    """Pixels a side of the final map: four a token, as in the stored case."""
    return 4 * round(inputs["in_x1"].shape[1] ** 0.5)


def marked(before: Tensor, gone: Tensor, places: Tensor, valid: Tensor) -> Tensor:
    """The mask [B, HW] of all that left, with `gone` [B, N] of the tokens at `places` [B, N] added."""
    total = before.shape[1]
    padded = F.pad(before, (0, 1)).scatter(1, places.masked_fill(~valid, total), gone)
    return padded[:, :total]
