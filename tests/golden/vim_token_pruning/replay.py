"""Vision Mamba: both backbones against the official code, and the released pruning step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.common.apply import apply
from prunelab.common.backbones import plain_mamba, vim
from prunelab.common.core.budget import Budget
from prunelab.methods.vim_token_pruning.method import VimTokenPruning, released_choice, released_importance

TOLERANCE = {"": (1e-4, 1e-4)}
RELEASED_SHARE = 0.8  # the literal in the released forward pass, behind the fifth block


@torch.no_grad()
def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {name: torch.from_numpy(array) for name, array in inputs.items()}
    family = next(name for name in FAMILIES if case.startswith(name))
    return {name: value.numpy() for name, value in FAMILIES[family](arrays).items()}


def weights(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[2:]: value for name, value in arrays.items() if name.startswith("w_")}


def loaded(module: nn.Module, arrays: Mapping[str, Tensor]) -> Any:
    module.load_state_dict(weights(arrays), strict=True)
    return module.eval()


def vim_mixer(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    mixer = loaded(vim.Mixer(arrays["in_x"].shape[-1], arrays["w_A_log"].shape[1]), arrays)
    return {"out_y": mixer(arrays["in_x"])}


def tiny_vim(arrays: Mapping[str, Tensor], pruned: bool = False) -> dict[str, Tensor]:
    size, patch, width, depth, classes = arrays["cfg_img_patch_dim_depth_ncls"].tolist()
    states = arrays["w_layers.0.mixer.A_log"].shape[1]
    model = loaded(vim.Vim(size, patch, width, depth, states, classes), arrays)
    tokens, scans = [], {}
    for index, layer in enumerate(model.layers):
        layer.norm.register_forward_hook(lambda _, args, out: tokens.append(out.shape[1]))
        layer.mixer.scans.register_forward_hook(lambda _, args, out, index=index: scans.update({index: out}))
    method = VimTokenPruning(layers=(4,), released=True)
    with apply(method, model, Budget(RELEASED_SHARE)) if pruned else nullcontext():
        features = model.features(arrays["in_image"])
    return {
        "out_features": features,
        "out_logits": model.head(features),
        "out_tokens_per_block": torch.tensor(tokens),
        "out_block5_mixer_backward_y": scans[4][:, 1].flip(-1),
    }


def select(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    y = arrays["in_backward_y"].transpose(1, 2).flip(1)  # stored in the order of the backward scan
    scores = released_importance(y.unsqueeze(1))
    choice = released_choice(scores, Budget(round(float(arrays["in_keep_ratio"]), 6)))
    half = choice.outputs // 2  # the class token
    return {
        "out_score": scores,
        "out_kept_patch_idx": torch.cat([choice.index[:, :half], choice.index[:, half + 1 :]], 1),
        "out_hidden": choice.apply(arrays["in_hidden"]),
        "out_residual": choice.apply(arrays["in_residual"]),
    }


def orders(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for height, width in arrays["in_grids"].tolist():
        for name, value in zip(("order", "inverse", "direction"), plain_mamba.scan_orders(height, width), strict=True):
            found[f"out_{name}_{height}x{width}"] = value
    return found


def plain_mixer(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    x, (height, width) = arrays["in_x"], arrays["in_hw"].tolist()
    mixer = loaded(plain_mamba.Mixer(x.shape[-1], arrays["w_A_log"].shape[1]), arrays)
    kept: list[Tensor] = []
    original = mixer.scan
    mixer.scan = lambda *given: kept.append(original(*given)) or kept[-1]
    y = mixer(x, (height, width))
    order = plain_mamba.scan_orders(height, width)[0]
    steps = torch.stack([kept[0][:, k, :, order[k]] for k in range(4)])
    return {"out_y": y, "out_scan_step_order": steps}


def plain_layer(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    states, depthwise = arrays["w_mamba.A_log"].shape[1], "w_dw.0.weight" in arrays
    layer = loaded(plain_mamba.Layer(arrays["in_x"].shape[-1], states, depthwise, False), arrays)
    return {"out_y": layer(arrays["in_x"], tuple(arrays["in_hw"].tolist()))}


def plain_model(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = ("size", "patch", "width", "depth", "states", "classes", "convolutions")
    sizes = dict(zip(names, arrays["cfg_img_patch_dim_depth_dstate_ncls_nconv"].tolist(), strict=True))
    depthwise = arrays["cfg_layers_with_dwconv"].tolist()
    model = loaded(plain_mamba.PlainMambaClassifier(**sizes, depthwise=depthwise), arrays)
    found = {}
    for name in [name for name in arrays if name.startswith("in_image")]:
        which, tokens = name.removeprefix("in_image"), model.backbone(arrays[name])
        found[f"out_patch_tokens{which}"] = model.patch_embed(arrays[name]).flatten(2).transpose(1, 2)
        found[f"out_tokens{which}"] = tokens
        found[f"out_features{which}"] = tokens.mean(1)
        found[f"out_logits{which}"] = model(arrays[name])
    return found


FAMILIES = {
    "vim_mixer": vim_mixer,
    "tiny_vim_dense": tiny_vim,
    "tiny_vim_pruned": lambda arrays: tiny_vim(arrays, pruned=True),
    "select": select,
    "plainmamba_scan_orders": orders,
    "plainmamba_mixer": plain_mixer,
    "plainmamba_layer": plain_layer,
    "plainmamba_tiny_model": plain_model,
}
