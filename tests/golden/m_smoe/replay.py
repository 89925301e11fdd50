"""Grouping and merging of experts against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.weights.merging import aligned, chosen_counts, merged
from prunelab.methods.m_smoe.method import MSMoE, group_counts, grouped

TOLERANCE = {"out_similarity": (1e-6, 1e-6), "out_w": (1e-6, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(array) for name, array in inputs.items() if array.dtype.kind != "U"}
    out = switch(a) if "in_wi" in a else mixtral(a, str(inputs["hp_similarity_base"]))
    return {name: value.numpy() for name, value in out.items()}


def mixtral(a: Mapping[str, Tensor], base: str) -> dict[str, Tensor]:
    layers, _, experts = a["in_router_logits"].shape
    chosen = a["in_router_logits"].topk(int(a["hp_top_k"])).indices
    counts = torch.stack([chosen_counts(c, experts) for c in chosen]).float()
    usage = counts / counts.sum(1, keepdim=True)
    merging = a["hp_merging_layers"].tolist()
    total = int(a["hp_num_average_groups"]) * len(merging) + experts * (layers - len(merging))
    method = MSMoE(similarity=base)  # type: ignore[arg-type]
    similarity, labels = [], []
    dominant = torch.full((layers, experts), -1)
    groups = group_counts(usage, total, merging)
    for layer in range(layers):
        logits = a["in_router_logits"][layer].double()
        weights = {
            "router": a["in_gate_weight"][layer],
            "gate_up": torch.cat([a["in_w1"][layer], a["in_w3"][layer]], 1),
            "down": a["in_w2"][layer],
        }
        similarity.append(method.alike(logits.T @ logits, weights).float())
        label, leading = grouped(similarity[-1], usage[layer], int(groups[layer]))
        labels.append(label)
        dominant[layer, : len(leading)] = leading
    out = {
        "out_similarity": torch.stack(similarity),
        "out_usage": usage,
        "out_num_groups": groups,
        "out_group_labels": torch.stack(labels),
        "out_dominant": dominant,
    }
    for name in ("w1", "w2", "w3"):
        parts = zip(a[f"in_{name}"], labels, usage, strict=True)
        out[f"out_{name}"] = torch.stack([merged(part, label, used) for part, label, used in parts])
    return out


def switch(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wi, wo, labels = a["in_wi"], a["in_wo"], a["in_group_labels"]
    parts = [wi, wo.transpose(1, 2)]
    both = [aligned([p[0] for p in parts], [p[e] for p in parts]) for e in range(len(wi))]
    alone = [aligned([wi[0]], [wi[e]]) for e in range(len(wi))]
    if bool(a["hp_permute"]):
        wi, wo = wi.clone(), wo.clone()
        for label in labels.unique():
            first, *others = (labels == label).nonzero().flatten().tolist()
            for other in others:
                order = aligned([p[first] for p in parts], [p[other] for p in parts])
                wi[other], wo[other] = a["in_wi"][other][order], a["in_wo"][other][:, order]
    return {
        "out_perm_to_expert0": torch.stack(both),
        "out_perm_to_expert0_without_wo": torch.stack(alone),
        "out_wi": merged(wi, labels, a["in_usage"]),
        "out_wo": merged(wo, labels, a["in_usage"]),
    }
