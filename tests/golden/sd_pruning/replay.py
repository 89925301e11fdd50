"""Stable Diffusion's components pruned, against the authors' functions: masks, weights, input norms, OWL's shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.weights import prune
from prunelab.common.weights.targets import Decision, Target, WeightSignals
from prunelab.methods.sd_pruning.method import SDPruning, above, keep_ratios, signal_to_noise

TOLERANCE = {"out_snr_db": (0.05, 0.0), "out_scaler": (0.0, 1e-5), "out_(outlier|layer)": (1e-9, 1e-9), "": (0.0, 0.0)}
NOT_APPLICABLE = {"^hp_": "an argument of the model, not an output"}
INNER = "text_model."  # in front of the names of older versions of transformers


@dataclass(frozen=True)
class Watched(SDPruning):
    """Notes what it was shown of every matrix."""

    seen: dict[str, WeightSignals] = field(default_factory=dict, compare=False)

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        self.seen[target.name] = replace(signals, weights={n: w.clone() for n, w in signals.weights.items()})
        return super().solve(target, signals, budget)


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    dtype = getattr(torch, str(inputs["hp_dtype"]))
    state = {n[2:]: torch.from_numpy(a.copy()).to(dtype) for n, a in inputs.items() if n.startswith("w_")}
    way, ratio = str(inputs["hp_method"]), float(inputs["hp_sparsity"])
    text = str(inputs["hp_model"]) == "CLIPTextModel"
    names = [n.removesuffix(".weight") for n, w in state.items() if w.dim() == 2 and n.endswith(".weight")]
    names = [n for n in names if ".layers." in n] if text else names
    found: dict[str, Any] = {}
    if way == "magnitude":  # its index may wrap, which empties matrices and which the engine refuses
        masks = {n: above((w := state[f"{n}.weight"]).abs(), int(w.numel() * ratio) - 1) for n in names}
    else:
        assert text, "the authors prune the U-Net by magnitude alone"
        masks, found = of_text_encoder(inputs, state, names, dtype)
    weights = {n: state[f"{n}.weight"].masked_fill(~masks[n], 0) for n in names}
    gone = sum(int((w == 0).sum()) for w in weights.values())
    removed = [state[f"{n}.weight"].float().masked_fill(masks[n], 0) for n in names]
    found |= {
        "out_pruned_names": np.array(names),
        "out_sparsity": np.float64(gone / sum(w.numel() for w in weights.values())),
        "out_snr_db": np.float64(signal_to_noise([w.float() for w in weights.values()], removed)),
    }
    # Stored as removed are weights that were not zero before.
    found |= {f"out_mask_{n}": (~mask & (state[f"{n}.weight"] != 0)).numpy() for n, mask in masks.items()}
    found |= {f"out_weight_{n}": weight.numpy() for n, weight in weights.items()}
    return found


def of_text_encoder(
    inputs: Mapping[str, np.ndarray], state: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Masks by module, and what was measured."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    config = CLIPTextConfig(
        **{n: int(inputs[f"hp_{n}"]) for n in (*sizes, "vocab_size")}, hidden_act=str(inputs["hp_hidden_act"]),
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = CLIPTextModel(config).to(dtype).eval()
    prefix = INNER if hasattr(model, "text_model") else ""
    model.load_state_dict({prefix + n.removeprefix(INNER): w for n, w in state.items()}, strict=True)
    way, ratio = str(inputs["hp_method"]), float(inputs["hp_sparsity"])
    options = {
        name: float(inputs[f"hp_{key}"])
        for name, key in (("outlier", "outlier_threshold"), ("spread", "lamda")) if f"hp_{key}" in inputs
    }  # fmt: skip
    method = Watched(way=way, wraps=True, **options)  # type: ignore[arg-type]
    ids = torch.from_numpy(inputs["in_token_ids"].copy())[: int(inputs["hp_nsamples"])]
    plan = prune(method, model, Budget(1 - ratio), ids, progress=False)
    own = {n: prefix + n.removeprefix(INNER) for n in names}
    found: dict[str, Any] = {}
    if way.endswith("wanda"):
        found = {f"out_scaler_{n}": method.seen[own[n]]["input_norm"].numpy() for n in names}
    if way.startswith("owl"):
        first = [n for n in names if n.endswith("self_attn.k_proj")]  # one matrix a layer
        outliers = [float(method.seen[own[n]]["outliers"]) for n in first]
        keep = keep_ratios(outliers, ratio, method.spread)
        shares = [float(method.seen[own[n]]["ratio"]) for n in first]
        found |= {"out_outlier_percent": np.array(outliers), "out_layer_keep_ratio": keep}
        found["out_layer_sparsity"] = np.array(shares)
    return {n: plan.decision(own[n]).mask for n in names}, found
