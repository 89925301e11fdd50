"""LaCo against the authors' notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.weights import prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.methods.laco.method import LaCo, Similarity, dense_layers, walk
from tests.golden.llama import llama, logits, sequences

TOLERANCE = {"logits": (1e-4, 1e-4), "similarity": (1e-5, 0.0), "": (1e-6, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    model, sentences = llama(inputs), sequences(inputs["in_ids"])
    threshold, merge, interval = (
        float(inputs["hp_threshold"]),
        int(inputs["hp_merge_layers"]),
        int(inputs["hp_interval"]),
    )
    lowest, highest = int(inputs["hp_lowest_layer"]), int(inputs["hp_highest_layer"])
    method = LaCo(threshold, merge, interval, lowest, highest)
    adapter = weight_adapter(model)
    targets = adapter.targets("layers")
    probe = ModelProbe(adapter, targets, sentences)
    with torch.no_grad():
        similarity = Similarity(method, probe)
        steps = list(walk(dense_layers(len(targets)), similarity, threshold, merge, interval, lowest, highest))
    prune(method, model, Budget(1, "count"), sentences, progress=False)
    layers = model.model.layers
    return {
        "out_trace_layer": np.array([step.place for step in steps]),
        "out_trace_layers_before": np.array([len(step.before) for step in steps]),
        "out_trace_layers_candidate": np.array([len(step.candidate) for step in steps]),
        "out_trace_similarity": np.array([step.similarity for step in steps]),
        "out_num_layers": np.array(len(layers)),
        "out_logits": logits(model, sentences[0][None]),
        "out_q_weight": np.stack([layer.self_attn.q_proj.weight.detach().numpy() for layer in layers]),
        "out_down_weight": np.stack([layer.mlp.down_proj.weight.detach().numpy() for layer in layers]),
        "out_input_norm": np.stack([layer.input_layernorm.weight.detach().numpy() for layer in layers]),
    }
