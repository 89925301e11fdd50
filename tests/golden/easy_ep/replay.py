"""EASY-EP against the authors' scripts and their model's mixture-of-experts block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from prunelab.common.core.budget import Budget
from prunelab.common.weights import masks
from prunelab.common.weights.targets import Routing
from prunelab.methods.easy_ep.method import contribution, expert_scores, longest, mix, output_norms, similarity

DEMONSTRATIONS = 25  # fixed in the release


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {name: torch.from_numpy(a) for name, a in inputs.items() if a.dtype.kind != "U"}
    if case.startswith("block"):
        out = block(arrays, str(inputs["in_score_func"]))
    elif case.startswith("mix"):
        scores = torch.stack([mix(layer) for layer in arrays["in_scores"].unbind(1)])
        out = {"out_mask": kept(scores, arrays)}
    else:
        out = select(arrays)
    return {name: value.numpy() for name, value in out.items()}


def kept(scores: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    return masks.per_row(scores, Budget(int(a["in_target_number"]), "count"))


def select(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the recorded routing of every demonstration to the mask."""
    layers, experts = a["in_idxs"].shape[1], 256
    scores = torch.zeros(layers, experts)
    for sample in longest(a["in_json_line_len"].tolist(), DEMONSTRATIONS):
        tokens = slice(int(a["in_lengths"][sample]))
        moved = contribution(a["in_simibr"][sample, :, tokens])
        terms = a["in_weights"][sample, :, tokens] * a["in_norms"][sample, :, tokens] * moved.unsqueeze(-1)
        chosen = a["in_idxs"][sample, :, tokens]
        scores += torch.stack([expert_scores(c, t, experts) for c, t in zip(chosen, terms, strict=True)])
    return {"out_scores": scores, "out_mask": kept(scores, a)}


def block(a: Mapping[str, Tensor], score_function: str) -> dict[str, Tensor]:
    """One block without attention; the model's own arithmetic is written out, the method's is called."""
    residual = a["in_residual"][0]
    x = rms_norm(residual, residual.shape[-1:], a["in_ffn_norm_gain"], 1e-6)
    logits, gates, chosen = route(x, a, score_function)

    def expert(index: int, x: Tensor) -> Tensor:
        return mlp(x, *(a[f"in_w{i}"][index] for i in (1, 2, 3)))

    routed = torch.zeros_like(x)
    routing = Routing(residual, logits, chosen, gates, routed, expert)
    for index in chosen.unique().tolist():
        token, slot, outputs = routing.outputs(index, x)
        routed[token] += outputs * gates[token, slot, None]
    shared = mlp(x, *(a[f"in_shared_w{i}"] for i in (1, 2, 3)))
    whole = residual + routed + shared
    return {
        "out_weights": gates,
        "out_idxs": chosen,
        "out_norms": output_norms(routing, x),
        "out_simibr": similarity(residual, residual + routed)[None],
        "out_simisf": similarity(residual + shared, whole)[None],
        "out_simirf": similarity(residual + routed, whole)[None],
        "out_routed": routed[None],
        "out_shared": shared[None],
        "out_block": whole[None],
    }


def mlp(x: Tensor, gate: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def route(x: Tensor, a: Mapping[str, Tensor], score_function: str) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek's router: logits, gates and choice. A bias and a limit of groups steer the choice, not the gates."""
    experts, k, groups, limit, _ = a["in_config"].tolist()
    logits = linear(x, a["in_gate_weight"])
    scores = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    steered = scores + a["in_gate_bias"] if "in_gate_bias" in a else scores
    if groups > 1:
        grouped = steered.view(-1, groups, experts // groups)
        best = grouped.topk(2, -1).values.sum(-1) if "in_gate_bias" in a else grouped.amax(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(limit).indices, True)
        steered = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
    chosen = steered.topk(k).indices
    gates = scores.gather(1, chosen)
    if score_function == "sigmoid":
        gates = gates / gates.sum(-1, keepdim=True)
    return logits, gates * a["in_route_scale"], chosen
