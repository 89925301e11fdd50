"""STUN's first stage against the authors' functions, and the allocation of its second against OWL's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.methods.stun.method import cluster, cluster_means, coactivation_distance, representatives, router_distance
from prunelab.methods.stun.outliers import block_ratios, importance, outlier_share

TOLERANCE = {"out_shares|out_ratios": (1e-7, 1e-6), "out_": (1e-6, 1e-6)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    out = owl(a) if case.startswith("owl") else experts(a)
    return {name: value.numpy() for name, value in out.items()}


def owl(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outlier shares (percent) of blocks of two linears each, and the ratios the blocks keep."""
    shares, sizes = [], []
    for first, second, x, y in zip(a["in_weight_a"], a["in_weight_b"], a["in_norms_a"], a["in_norms_b"], strict=True):
        scores = [importance(first, x), importance(second, y)]
        shares.append(outlier_share(scores, float(a["hp_outlier"])))
        sizes.append(sum(score.numel() for score in scores))
    keep, spread = 1 - round(float(a["hp_sparsity"]), 6), round(float(a["hp_spread"]), 6)
    ratios = block_ratios(torch.tensor(shares), torch.tensor(sizes), keep, spread)
    return {"out_shares": 100 * torch.tensor(shares, dtype=torch.float64), "out_ratios": ratios}


def experts(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    router, mix = a["in_gate_weight"], round(float(a["in_mix_weight"]), 6)
    distance = router_distance(router, bool(a["in_division_by_norm"]))
    if "in_coactivation" in a:
        used = coactivation_distance(a["in_coactivation"])
        distance = used if mix < 0 else mix * used + distance
    labels = cluster(distance, float(a["in_threshold"]), len(router) - int(a["in_top_k"]))
    labels = in_released_order(labels)
    parts = {name: a[f"in_{name}"] for name in ("w1", "w2", "w3")}
    clusters = int(labels.max()) + 1
    out = {"out_cluster_of_expert": labels, "out_num_clusters": torch.tensor(clusters)}
    if clusters <= int(a["in_merge_max_clusters"]):
        out["out_representative"] = torch.full((clusters,), -1)
        out["out_new_gate"] = cluster_means(router, labels)
        return out | {f"out_new_{name}": cluster_means(part, labels) for name, part in parts.items()}
    chosen = representatives(list(parts.values()), labels)
    out |= {"out_representative": chosen, "out_new_gate": router[chosen]}
    return out | {f"out_new_{name}": part[chosen] for name, part in parts.items()}


def in_released_order(labels: Tensor) -> Tensor:
    """The same clusters, numbered by CPython's order of a set of tuples, as the release puts them; it depends on the
    order in which the tuples come, which is that of the experts."""
    members = [tuple((labels == label).nonzero().flatten().tolist()) for label in labels.tolist()]
    order = [labels[group[0]] for group in set(members)]
    place = torch.zeros(len(order), dtype=torch.int64)
    place[torch.stack(order)] = torch.arange(len(order))
    return place[labels]
