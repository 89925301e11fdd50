"""TransPrune: transitions, and single cuts through our LLaVA adapter, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.transprune.method import TransPrune, guidance, normalised, transition
from tests.golden.llava import entering, llava

TOLERANCE = {"out_hidden": (1e-6, 1e-5), "": (1e-6, 1e-4)}


@torch.no_grad()
def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_before" in inputs:
        before, after = torch.from_numpy(inputs["in_before"]), torch.from_numpy(inputs["in_after"])
        return {"out_transf_weight": transition(before, after).numpy()}
    return cut(inputs)


@dataclass(frozen=True)
class Cut(TransPrune):
    """One cut, before a decoder's only layer, with the transitions of the layers before it given."""

    given: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "input")]

    def seen(self, site: Site) -> Sequence[int]:
        return []

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        self.given["rows"] = signals.coming_text
        return super().plan(site, signals, budget)

    def transitions(self, site: Site, signals: TokenSignals) -> Tensor:
        return self.given["transitions"].sum(0, keepdim=True)


def cut(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    hidden = torch.from_numpy(inputs["in_hidden"])
    start, now, total = (int(inputs[f"in_{name}"]) for name in ("image_start", "n_image_now", "n_image_total"))
    width, zero = hidden.shape[2], np.zeros((1, hidden.shape[2], hidden.shape[2]), dtype=np.float32)
    weights = {
        "w_q": inputs["in_q_weight"][None], "w_k": inputs["in_k_weight"][None], "w_v": zero, "w_o": zero,
        "w_gate": zero, "w_up": zero, "w_down": zero, "w_ln_attn": inputs["in_rmsnorm_weight"][None],
        "w_ln_mlp": np.ones((1, width), dtype=np.float32), "hp_heads": inputs["in_num_heads"],
    }  # fmt: skip
    model, prompt = llava(weights, hidden, [(start, now)])
    model.model.language_model.layers[0].input_layernorm.variance_epsilon = float(inputs["in_rms_eps"])
    head, theta = width // int(inputs["in_num_heads"]), float(inputs["in_rope_theta"])
    model.model.language_model.rotary_emb.inv_freq.copy_(theta ** -(torch.arange(0, head, 2) / head))
    given = {"transitions": torch.from_numpy(inputs["in_transf_weights"])}
    keep = int(total * float(inputs["in_ratio_list"][int(inputs["in_stage"]) + 1]))
    with apply(Cut(given=given), model, Budget(keep, "count")) as handle, entering(model) as seen:
        model.model(**prompt)
        (_, index), *_ = handle.kept()
        positions = handle.adapter.running.positions  # type: ignore[attr-defined]
    image = slice(start, start + now)
    moved = normalised(given["transitions"].sum(0)[image])
    guided = normalised(guidance(given["rows"])[0, image])
    return {
        "out_ttv_normalised": moved.numpy(),
        "out_iga_normalised": guided.numpy(),
        "out_score": (moved + guided).numpy(),
        "out_kept_absolute_indices": index[0, (index[0] >= start) & (index[0] < start + now)].numpy(),
        "out_hidden": seen[0]["x"].numpy(),
        "out_position_ids": positions.numpy(),
        "out_transf_weights_after": given["transitions"][:, index[0]].numpy(),
    }
