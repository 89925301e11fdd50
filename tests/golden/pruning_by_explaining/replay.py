"""Pruning by explaining against the authors' relevance rules and filter pruner."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.corpora import Corpus, Labelled
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.relevance import Rule
from prunelab.methods.pruning_by_explaining.method import PruningByExplaining, least, weight_size

TOLERANCE = {"": (1e-6, 1e-4)}
CRITERIA = {"lrp": "lrp", "ICLR": "taylor", "grad": "gradient", "weight": "weight"}
RULES = {
    "z": "z+", "epsilon": "z+", "simple": "simple", "none": "simple", "alphabeta": "alphabeta", "alpha": "alphabeta",
    "first": "zB",
}  # fmt: skip


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "hp_rule" in inputs:
        return {"out_R": of_rule(inputs).numpy()}
    model = network(inputs)
    batches = [
        Labelled(x, y) for xs, ys in zip(inputs["in_x"], inputs["in_y"], strict=True)
        for x, y in zip(torch.from_numpy(xs), torch.from_numpy(ys), strict=True)
    ]  # fmt: skip
    method = PruningByExplaining(
        CRITERIA[str(inputs["hp_method"])],  # type: ignore[arg-type]
        normalise=bool(inputs["hp_norm"]), batch=inputs["in_x"].shape[1], spare=("classifier.*",),
    )  # fmt: skip
    adapter = weight_adapter(model)
    targets = [target for target in adapter.targets("channels") if method.covers(target)]
    probe = ModelProbe(adapter, targets, [b.inputs for b in batches], corpora={"": Corpus(tuple(batches))})
    statistics = method.precompute(probe)
    signals = [probe.signals(target) for target in targets]
    out: dict[str, np.ndarray] = {}
    scores = []
    for i, (target, seen) in enumerate(zip(targets, signals, strict=True)):
        known = dict(statistics.get(target.name, {}))
        raw = known["raw.0"] if known else weight_size(seen.weights["up"])
        out[f"out_raw_rank_conv{i}"] = raw.detach().numpy()
        object.__setattr__(seen, "statistics", known)
        scores.append(method.score(target, seen))
        out[f"out_norm_rank_conv{i}"] = scores[-1].detach().numpy()
    lowest = least(scores, int(inputs["hp_num_prune"]))
    modules = [int(target.name.split(".")[1]) for target in targets]
    out["out_lowest_layer_filter"] = np.array([(modules[layer], unit) for layer, unit in lowest])
    plan = []
    for layer in dict.fromkeys(layer for layer, _ in lowest):  # removed one by one, those behind have moved up
        gone = sorted(unit for at, unit in lowest if at == layer)
        plan += [(modules[layer], unit - place) for place, unit in enumerate(gone)]
    out["out_plan_shifted"] = np.array(plan)
    return out


def of_rule(inputs: Mapping[str, np.ndarray]) -> Tensor:
    x, weight, relevance = (torch.from_numpy(inputs[f"in_{name}"]) for name in ("x", "weight", "R"))
    name, alpha = RULES[str(inputs["hp_rule"])], float(inputs["hp_alpha"])
    rule = Rule(name, alpha) if name == "alphabeta" else Rule(name)  # type: ignore[arg-type]
    if weight.dim() == 2:
        return rule(F.linear, x, weight, relevance)
    stride, padding = int(inputs["hp_stride"]), weight.shape[-1] // 2
    return rule(lambda x, w: F.conv2d(x, w, None, stride, padding), x, weight, relevance)


def network(inputs: Mapping[str, np.ndarray]) -> nn.Module:
    state = {k.removeprefix("in_param_"): torch.from_numpy(v) for k, v in inputs.items() if k.startswith("in_param_")}

    def conv(at: int) -> nn.Conv2d:
        return nn.Conv2d(*reversed(state[f"features.{at}.weight"].shape[:2]), 3, padding=1)

    def linear(at: int) -> nn.Linear:
        return nn.Linear(*reversed(state[f"classifier.{at}.weight"].shape))

    features = nn.Sequential(conv(0), nn.ReLU(), nn.MaxPool2d(2), conv(3), nn.ReLU(), nn.MaxPool2d(2))
    classifier = nn.Sequential(nn.Dropout(0.0), linear(1), nn.ReLU(), linear(3))
    parts = [("features", features), ("flat", nn.Flatten()), ("classifier", classifier)]
    model = nn.Sequential(OrderedDict(parts))
    model.load_state_dict(state)
    return model.eval()
