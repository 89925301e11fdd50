"""Bits of experts, what they follow from, and dynamic pruning against the authors' code and shipped data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.experts.role import ExpertSignals
from prunelab.common.weights.merging import chosen_counts
from prunelab.common.weights.targets import Observation, Routing, Target
from prunelab.methods.mc_moe.allocation import QuantisationErrors, allocated, fake_quantised, router_mass
from prunelab.methods.mc_moe.method import MixtureCompressor, OnlineDynamicPruning

TOLERANCE = {"out_quant_loss": (1e-4, 1e-4), "out_": (1e-5, 1e-5)}
TOP, BITS = 2, (1, 2, 3)
EXPONENTS = {"in_alpha": "alpha", "in_beta": "beta"}  # where a case says so; the release's `gama` has no effect


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    if "in_quant_loss" in a:
        out = allocation(a, wanted)
    elif "in_w1_int8" in a:
        out = losses(a)
    else:
        out = statistics(a) if "in_attn" not in a else dynamic(a)
    return {name: np.asarray(value) for name, value in out.items()}


def expert(a: Mapping[str, Tensor], e: int, x: Tensor) -> Tensor:
    return linear(silu(linear(x, a["in_w1"][e])) * linear(x, a["in_w3"][e]), a["in_w2"][e])


def routed(a: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the chosen experts, and their weights in the layer."""
    logits = linear(x, a["in_gate_weight"])
    weights, chosen = logits.softmax(-1).topk(int(a.get("in_top_k", torch.tensor(TOP))))
    return logits, chosen, weights / weights.sum(-1, keepdim=True)


def mixture(a: Mapping[str, Tensor], x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(len(a["in_w1"])):
        token, slot = torch.where((chosen == e) & (weights != 0))
        out.index_add_(0, token, weights[token, slot, None] * expert(a, e, x[token]))
    return out


def allocation(a: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    given = {ours: round(float(a[theirs]), 6) for theirs, ours in EXPONENTS.items() if theirs in a}
    choices = tuple(a["in_x_space"].tolist()) if "in_x_space" in a else BITS
    method, out = MixtureCompressor(choices=choices, **given), {}
    for name in wanted:
        total = int(name.rpartition("_")[2])
        layers = zip(a["in_act_frequency"], a["in_act_weight"], a["in_quant_loss"], strict=True)
        out[name] = torch.tensor([
            allocated(method.cost(f, w, e), method.choices, total, method.least_one) for f, w, e in layers
        ])  # fmt: skip
    return out


def losses(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    scaled = {name.replace("_int8", ""): value.float() / 64 for name, value in a.items() if name.endswith("_int8")}
    scaled["in_gate_weight"] = scaled.pop("in_gate")
    x = a["in_hidden"].flatten(0, 1)
    logits, chosen, gates = routed(scaled, x)
    gate_up, down = torch.cat([scaled["in_w1"], scaled["in_w3"]], 1), scaled["in_w2"]

    def computed(fused: Tensor, last: Tensor, tokens: Tensor) -> Tensor:
        gate, up = linear(tokens, fused).chunk(2, -1)
        return linear(silu(gate) * up, last)

    routing = Routing(x, logits, chosen, gates, x, lambda e, tokens: expert(scaled, e, tokens), computed)
    group = int(a.get("in_groupsize", torch.tensor(MixtureCompressor().group)))
    errors = QuantisationErrors(Target("experts", "m", 0, "experts", (len(down),)), BITS, group=group, batch=8)
    errors.update(Observation(x, {"gate_up": gate_up, "down": down}, x, x, x, routing))
    out = {"out_quant_loss": errors.value()}
    first = scaled["in_w1"][0][:16]
    return out | {f"out_w1e0_rows16_q{bits}": fake_quantised(first, bits, group) for bits in BITS}


def statistics(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    experts = len(a["in_w1"])
    counts, mass = torch.zeros(experts), torch.zeros(experts)
    hidden = []
    for batch in a["in_hidden"]:
        x = batch.flatten(0, 1)
        logits, chosen, gates = routed(a, x)
        counts, mass = counts + chosen_counts(chosen, experts), mass + router_mass(logits, chosen)
        hidden.append(mixture(a, x, chosen, gates).view_as(batch))
    return {"out_freq": counts, "out_weight": mass, "out_hidden": torch.stack(hidden)}


def dynamic(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    x = a["in_hidden"].flatten(0, 1)
    logits, chosen, gates = routed(a, x)
    beta, protect, drop = (round(float(a[f"in_{name}"]), 6) for name in ("beta", "tau_h", "tau_l"))
    method = OnlineDynamicPruning((beta,), protect, drop)
    signals = ExpertSignals(
        {"norms": lambda: x.abs().sum(-1)}, weights=gates, experts=chosen, prefill=len(x) > 1, valid=None,
        info=ModelInfo("mixture", 1, 1, x.shape[1], len(x)), rng=torch.Generator(), required=frozenset({"norms"}),
    )  # fmt: skip
    kept = torch.ones_like(chosen, dtype=torch.bool)
    if int(a["in_loss_index"]) < int(a["in_block_range"]):
        kept = method.plan(Site(0, "after_attention"), signals, Budget(1.0))
    left = gates * kept
    weights = left / left.sum(-1, keepdim=True).clamp_min(1e-30)
    sent = torch.bincount(chosen[kept], minlength=logits.shape[1])
    return {
        "out_hidden": mixture(a, x, chosen, weights).view_as(a["in_hidden"]),
        "out_router_logits": logits,
        "out_tokens_per_expert": sent,
    }
