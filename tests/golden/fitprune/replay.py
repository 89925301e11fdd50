"""FitPrune: decoder runs by the shipped recipes, and the search for one, through our LLaVA adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from prunelab.common.apply import apply
from prunelab.methods.fitprune.fitting import Fitting, search
from prunelab.methods.fitprune.method import FitPrune
from tests.golden.llava import entering, llava

TOLERANCE = {"": (1e-5, 1e-4)}


@torch.no_grad()
def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    return fitted(inputs) if "hp_ratio" in inputs else forward(inputs)


def forward(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    span = int(inputs["hp_system"]), int(inputs["hp_image"])
    model, prompt = llava(inputs, torch.from_numpy(inputs["in_inputs_embeds"]), [span])
    cache = DynamicCache(config=model.config.text_config)
    with apply(FitPrune(), model, 1 - int(inputs["hp_ratio_percent"]) / 100), entering(model) as seen:
        output = model.model(**prompt, past_key_values=cache, use_cache=True)
    return {
        "out_length_before_layer": np.array([call["x"].shape[1] for call in seen]),
        "out_position_ids_last_layer": seen[-1]["position_ids"][0].numpy(),
        "out_last_hidden": output.last_hidden_state.numpy(),
        "out_cache_lengths": np.array([cache.get_seq_length(layer) for layer in range(len(seen))]),
    }


def fitted(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A layer of zeros stands behind the last, so that what the last one's attention says is seen, too."""
    weights = {
        name: np.concatenate([value, np.zeros_like(value[:1])]) if value.ndim > 1 and name.startswith("w_") else value
        for name, value in inputs.items()
    }
    embeds = torch.from_numpy(inputs["in_inputs_embeds"])
    span, depth = (int(inputs["hp_system"]), int(inputs["hp_image"])), len(inputs["w_q"])
    samples = [llava(weights, one.unsqueeze(0), [span]) for one in embeds]

    def run(method: Fitting, sample: int) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
        model, prompt = samples[sample]
        with apply(method, model, 1.0) as handle:
            model.model(**prompt)
            return dict(handle.memory)

    sums = [run(Fitting(), sample)["sums"] for sample in range(len(embeds))]

    def deleted(alpha: float) -> Tensor:
        runs = [run(Fitting(alpha, known), sample)["deleted"] for sample, known in enumerate(sums)]
        return torch.tensor([[gone[layer] for layer in range(depth)] for gone in runs])

    trials = search(deleted, float(inputs["hp_ratio"]), span[1])
    return {
        "out_cross_sum": np.array([[float(known[layer][1]) for layer in range(depth)] for known in sums]),
        "out_self_sum": np.array([[float(known[layer][0]) for layer in range(depth)] for known in sums]),
        "out_alpha_tried": np.array([trial.alpha for trial in trials]),
        "out_budget_reached": np.array([trial.reached for trial in trials]),
        "out_scheme_tried": np.array([trial.recipe for trial in trials]),
        "out_scheme": np.array(trials[-1].recipe),
    }
