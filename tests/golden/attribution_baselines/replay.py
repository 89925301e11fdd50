"""Attribution by attention, and by the gradients of a tiny GPT-2, in the two conventions that the authors' tables mix.

The biases of c_attn are not stored: their names end as that of the causal mask does, which was left out. They were
drawn as all other parameters were, whose stored values tell the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prunelab.common.ranking.attribution import Explained
from prunelab.methods.attribution_baselines.method import (
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    OwnGradients,
    attention_importance,
    by_norm,
    gradients,
)

TOLERANCE = {r"out_importance|out_(norm|signed|last|rollout|all)": (1e-7, 1e-4), "out_": (1e-6, 1e-3)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_attentions" in inputs:
        maps = torch.from_numpy(inputs["in_attentions"])
        return {
            f"out_{rows}": attention_importance(maps, rows).softmax(-1).numpy() for rows in ("last", "rollout", "all")
        }
    model = explained(inputs)
    tokens, target = torch.from_numpy(inputs["in_ids"][0]), int(inputs["in_target"][0])
    return own(model, tokens, target, inputs) if "out_norm" in wanted else library(model, tokens, target, inputs)


def explained(inputs: Mapping[str, np.ndarray]) -> Explained:
    weights = {n[6:].replace("__", "."): torch.from_numpy(a) for n, a in inputs.items() if n.startswith("in_sd_")}
    vocabulary, width = weights["transformer.wte.weight"].shape
    layers = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=int(inputs["hp_heads"]), initializer_range=0.3,
        n_positions=len(weights["transformer.wpe.weight"]), bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    for seed in range(100):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
        if torch.equal(model.transformer.wte.weight, weights["transformer.wte.weight"]):
            break
    else:
        raise AssertionError("no seed gives the stored weights")
    drawn = {n: torch.randn(p.shape) for n, p in model.named_parameters() if p.dim() == 1}
    weights |= {n: 0.1 * draw for n, draw in drawn.items() if n.endswith("c_attn.bias")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return Explained(model, int(inputs.get("hp_baseline_token", 0)))


def own(model: Explained, tokens: torch.Tensor, target: int, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    steps = int(inputs["hp_ig_steps"])
    names = {"out_norm": "norm", "out_signed": "signed", "out_integrated_gradients": "integrated"}
    found = {name: OwnGradients(kind, steps).read(model, tokens, target)[None].numpy() for name, kind in names.items()}
    return {**found, "out_logits_last": model.next_token_logits(tokens[None]).numpy()}


def library(
    model: Explained, tokens: torch.Tensor, target: int, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    path = IntegratedGradients(int(inputs["hp_ig_steps"]), str(inputs["hp_ig_rule"]))
    places = torch.from_numpy(inputs["in_shap_alphas"]).float()
    raw = {
        "input_x_gradient": InputXGradient().raw(model, tokens, target),
        "integrated_gradients": path.raw(model, tokens, target),
        "gradient_shap": GradientShap(len(places)).raw(model, tokens, target, places),
    }
    ends = torch.stack([model.embed(tokens), model.embed(model.without(tokens))])
    (whole, blank), _ = gradients(model, ends, target)
    delta = raw["integrated_gradients"].sum() - (whole - blank)
    return (
        {f"out_{name}": value[None].numpy() for name, value in raw.items()}
        | {f"out_importance_{name}": by_norm(value)[None].numpy() for name, value in raw.items()}
        | {"out_probability": whole[None].numpy(), "out_probability_baseline": blank[None].numpy()}
        | {"out_ig_delta": delta[None].numpy()}
    )
