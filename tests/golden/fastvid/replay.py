"""FastVID: the tokens that the three released versions leave of a video, and SigLIP's pooling head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.plan import Mix
from prunelab.common.tokens.video import pooled
from prunelab.methods.fastvid.method import FastVID, pooling_head

Arrays = Mapping[str, np.ndarray]
RULES = {"ov": "frame", "video": "segment", "qwen": "groups"}


def replay(case: str, inputs: Arrays, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    return head(inputs) if case.startswith("pooling") else video(inputs, RULES[case.split("_")[0]])


def tensor(inputs: Arrays, name: str) -> Tensor:
    return torch.from_numpy(inputs[name]).float()


def head(inputs: Arrays) -> dict[str, np.ndarray]:
    weights = {name.removeprefix("w_"): tensor(inputs, name) for name in inputs if name.startswith("w_")}
    frame, attention = pooling_head(tensor(inputs, "in_normed_features"), weights, int(inputs["hp_heads"]))
    side = int(inputs["hp_side"])
    return {
        "out_frame_global": frame.numpy(),
        "out_probe_attention": attention.unsqueeze(1).numpy(),
        "out_attention_pooled": pooled(attention.view(-1, side, side, 1), "bilinear").flatten().numpy(),
    }


def video(inputs: Arrays, rule: str) -> dict[str, np.ndarray]:
    given = {name: inputs[f"hp_{name}"].item() for name in ("retention", "c", "tau", "d", "p", "beta")}
    ignore = inputs["hp_ignore"].item() if "hp_ignore" in inputs else FastVID.ignore
    method = FastVID(
        count=given["c"], threshold=given["tau"], context=given["d"], period=given["p"], least=given["beta"],
        rule=rule, ignore=ignore,  # type: ignore[arg-type]
    )  # fmt: skip
    tokens, scores = tensor(inputs, "in_video"), tensor(inputs, "in_frame_attention")
    frames, cells, _ = tokens.shape
    per = int(cells * given["retention"])
    left, cuts = method.kept(tokens, scores, tensor(inputs, "in_frame_global"), per, torch.zeros(frames, cells))
    mix = Mix(left.target[None], left.source[None], left.weight[None], len(left.place))
    made, place = mix.apply(tokens.flatten(0, 1)[None])[0], left.place
    if "in_newline" in inputs:  # one behind every row that keeps a token
        side = int(cells**0.5)
        rows = (place // side).unique()
        made = torch.cat([made, tensor(inputs, "in_newline").expand(len(rows), -1)])
        place = torch.cat([place + place // side, rows * (side + 1) + side])
        order = place.argsort()
        made, place, total = made[order], place[order], frames * side * (side + 1)
    else:
        total = frames * cells
    before, after = tensor(inputs, "in_before"), tensor(inputs, "in_after")
    start = len(before)
    positions = torch.cat([torch.arange(start), place + start, torch.arange(len(after)) + start + total])
    return {
        "out_segment_sizes": np.array([last - first + 1 for first, last in cuts]),
        "out_hidden": torch.cat([before, made, after])[None].numpy(),
        "out_position_ids": positions[None].numpy(),
    }
