"""Sensitivities and step-wise masks against the authors' code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.weights import masks
from prunelab.methods.loraprune.method import averaged, by_unit, estimated_gradient, importance

TOLERANCE = {"sens": (1e-5, 1e-4), "out_": (1e-5, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(v)) for name, v in inputs.items() if v.dtype.kind != "U"}
    out = iterative(a) if "hp_ratios" in a else {"out_sensitivity": single(a, str(inputs["hp_metric"]))}
    return {name: value.numpy() for name, value in out.items()}


def single(a: Mapping[str, Tensor], metric: str) -> Tensor:
    weight = float(a["hp_scaling"]) * a["in_B"] @ a["in_A"] + a["in_weight"]
    gradient = {
        "magnitude": None,
        "grad": a.get("in_grad_weight"),
        "lora": estimated_gradient(a["in_B"], a["in_A"], a["in_grad_B"], a["in_grad_A"]),
    }[metric]
    scores, inputs = importance(weight, gradient), bool(a["hp_transpose"])
    units = int(a["hp_num_heads"]) if bool(a["hp_is_attn"]) else scores.shape[int(inputs)]
    return by_unit(scores, units, inputs, bool(a["hp_norm"]))


def iterative(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [match[1] for name in a if (match := re.fullmatch(r"in_(layers\.\d+\.\w+\.\w+)\|weight", name))]
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(name.rpartition(".")[0], []).append(name)
    scale, keep, heads = float(a["hp_scaling"]), round(float(a["hp_ema"]), 6), int(a["hp_num_heads"])
    memory: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    out: dict[str, Tensor] = {}
    for step, ratio in enumerate(a["hp_ratios"].tolist()):
        for block, linears in blocks.items():
            attention = block.endswith("self_attn")
            parts = []
            for name in linears:
                up, down, up_g, down_g = (a[f"in_step{step}_{name}|{part}"] for part in ("B", "A", "gB", "gA"))
                scores = importance(
                    scale * up @ down + a[f"in_{name}|weight"], estimated_gradient(up, down, up_g, down_g)
                )
                inputs = name.endswith(("o_proj", "down_proj"))
                parts.append(by_unit(scores, heads if attention else scores.shape[int(inputs)], inputs))
            now = torch.stack(parts).sum(0)
            memory[block] = averaged(memory.get(block, torch.zeros_like(now)), now, keep)
            mask = kept.get(block, torch.ones_like(now, dtype=torch.bool))
            scores = memory[block].masked_fill(~mask, -1.0)
            kept[block] = masks.per_row(scores, Budget(1 - round(ratio, 6)))
            out[f"out_step{step}_sens_{block}"] = memory[block]
            for name in linears:
                if not name.endswith(("o_proj", "down_proj")):
                    rows = len(a[f"in_{name}|weight"]) // len(now)
                    out[f"out_step{step}_mask_{name}"] = kept[block].repeat_interleave(rows).float()
    return out
