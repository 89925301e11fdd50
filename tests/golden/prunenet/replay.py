"""PruneNet against the authors' policy, rewards and slicing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from prunelab.common.core.budget import Budget
from prunelab.common.weights.adapters.projections import IN, OUT, Projection, remove
from prunelab.common.weights.targets import Target
from prunelab.methods.prunenet.method import (
    Policy,
    PruneNet,
    discounted,
    divergence,
    keep_logits,
    policy_loss,
    reward,
    rounded,
)  # fmt: skip

TOLERANCE = {"": (1e-5, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    weight = torch.from_numpy(inputs["in_weight"])
    policy = Policy(*weight.shape)
    names = {"proj.weight": "proj_weight", "proj.bias": "proj_bias", "row_sparsities": "row_sparsities"}
    policy.load_state_dict({name: torch.from_numpy(inputs[f"in_{array}"]) for name, array in names.items()})
    method = PruneNet(gamma=float(inputs.get("in_gamma", PruneNet.gamma)))
    with torch.no_grad():
        alpha = rounded(policy(weight))  # infinite where the release's is
        chance = keep_logits(alpha, torch.from_numpy(inputs["in_eps"]))
    rows, most = torch.from_numpy(inputs["in_sampled_rows"]), torch.from_numpy(inputs["in_topk_rows"])
    values = torch.linalg.svdvals(weight)
    returns = discounted(inputs["in_rewards"].tolist(), method.gamma)
    target = Target("channels", "mlp", 0, "channels", (len(weight),), read=weight.shape[1])
    out = {
        "out_alpha": torch.sigmoid(alpha), "out_keep_probs": torch.sigmoid(chance), "out_kld": divergence(alpha),
        "out_keep_count": torch.tensor(method.count(target, Budget(1 - float(inputs["hp_ratio"])))),
        "out_singular_values": values, "out_reward_sampled": torch.tensor(reward(values, weight[rows])),
        "out_reward_topk": torch.tensor(reward(values, weight[most])),
        "out_reward_identity": torch.tensor(reward(values, weight)), "out_discounted": torch.tensor(returns),
        "out_policy_loss": policy_loss(chance, rows, returns[0]), **sliced(inputs, rows),
    }  # fmt: skip
    return {name: value.detach().numpy() for name, value in out.items()}


def sliced(inputs: Mapping[str, np.ndarray], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The MLP's projections once the other rows have left."""
    count, width = inputs["in_weight"].shape
    parts = {"gate": nn.Linear(width, count), "up": nn.Linear(width, count), "down": nn.Linear(count, width)}
    for role, name in (("gate", "in_weight"), ("up", "in_up"), ("down", "in_down")):
        parts[role].weight.data = torch.from_numpy(inputs[name].copy())
    entries = torch.arange(count).unsqueeze(1)
    remove([Projection(m, IN if role == "down" else OUT, entries) for role, m in parts.items()], rows)
    return {f"out_sliced_{role}": module.weight for role, module in parts.items()}
