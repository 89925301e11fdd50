"""The losses of every set of experts of a mixture, and which leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from prunelab.common.weights.adapters.mixture import among
from prunelab.common.weights.leaving import Losses
from prunelab.common.weights.targets import Observation, Routing, Target
from prunelab.methods.expert_sparsity.method import sets

TOLERANCE = {"out_losses": (1e-5, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    gate, gate_up, down, batches = (torch.from_numpy(inputs[f"in_{n}"]) for n in ("gate", "gate_up", "down", "inputs"))
    experts, width = gate.shape
    sizes = {"num_local_experts": experts, "num_experts_per_tok": int(inputs["in_top_k"]), "hidden_size": width}
    router = MixtralTopKRouter(MixtralConfig(**sizes))
    router.load_state_dict({"weight": gate})

    def expert(number: int, x: torch.Tensor) -> torch.Tensor:
        first, second = (x @ gate_up[number].T).chunk(2, -1)
        return (F.silu(first) * second) @ down[number].T

    tried = list(sets(experts, int(inputs["in_kept"])))
    losses = Losses(Target("experts", "", 0, "experts", (experts,)), tried)
    with torch.no_grad():
        for x in batches:
            logits, gates, chosen = router(x)
            outputs = torch.stack([expert(number, x) for number in range(experts)], 1)
            routed = (outputs.take_along_dim(chosen.unsqueeze(-1), 1) * gates.unsqueeze(-1)).sum(1)
            routing = Routing(x, logits, chosen, gates, routed, expert, None, partial(among, router, x))
            losses.update(Observation(x, {}, x, x, x, routing))
    found = losses.value()
    stays = tried[int(found.argmin())].tolist()
    gone = [number for number in range(experts) if number not in stays]
    return {"out_losses": found.numpy(), "out_dropped": np.array(gone)}
