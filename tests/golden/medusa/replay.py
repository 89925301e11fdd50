"""Medusa: the authors' tree buffers, whole steps of verification, heads and their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prunelab.common.speculative import Reader, trees
from prunelab.common.speculative.trees import Template
from prunelab.methods.medusa.method import candidates, typical
from prunelab.methods.medusa.modules import Heads, losses
from tests.golden.routes import Routes


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    return {"buffers": buffers, "step": step, "heads": heads}[case.split("_")[0]](inputs)


def template_of(inputs: Mapping[str, np.ndarray]) -> Template:
    """The authors sort the nodes by depth and ranks."""
    paths = [tuple(rank for rank in path if rank >= 0) for path in inputs["in_choices"].tolist()]
    return Template.of(sorted(paths, key=lambda path: (len(path), path)))


def buffers(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    template = template_of(inputs)
    places = 1 + int(inputs["hp_topk"]) * (template.tree.depths - 1) + template.ranks
    return Routes.of(template.tree).layout() | {"out_tree_indices": np.array([0, *places.tolist()])}


def step(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    template, before = template_of(inputs), torch.from_numpy(inputs["in_logits"])
    guessed = torch.from_numpy(inputs["in_medusa_logits"])[:, 0, 0]
    tree = template.tree.refill(candidates(guessed, template, int(inputs["hp_topk"])))
    root, logits = before[0].argmax(-1), torch.from_numpy(inputs["in_tree_logits"])[0]
    heat = float(inputs["hp_temperature"])
    limits = {"epsilon": float(inputs["hp_posterior_threshold"]), "alpha": float(inputs["hp_posterior_alpha"])}
    accept = partial(typical, **limits) if heat else trees.greedy
    accepted, nodes, out = Routes.of(tree).verified(root, logits / heat if heat else logits, accept)
    tokens = torch.cat([torch.from_numpy(inputs["in_input_ids"])[0], root])
    kept = entries(torch.from_numpy(inputs["in_kv"]), tokens, tree, nodes)
    longer = torch.cat([tokens, accepted.tokens[:-1]])
    last = int(nodes[-1]) + 1 if len(nodes) else 0
    return out | {
        "out_input_ids": longer[None].numpy(),
        "out_next_logits": logits[None, last:][:, :1].numpy(),
        "out_kv": kept.numpy(),
        "out_current_length": np.array([len(longer)] * 2),
        "out_new_tokens": np.array(len(accepted.tokens)),
    }


def entries(stored: Tensor, tokens: Tensor, tree: trees.DraftTree, nodes: Tensor) -> Tensor:
    """The buffers of keys and values, in which the authors leave standing what no longer counts. Accepted padding is
    the entry before the root's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    heads, size = stored.shape[2], stored.shape[-1]
    model = GPT2LMHeadModel(GPT2Config(n_embd=heads * size, n_head=heads, n_layer=1, vocab_size=64))
    reader, out = Reader(model), stored.clone()
    with torch.inference_mode():
        reader.read(tokens, tree)
        (layer,) = reader.cache.layers
        read = len(tokens) + len(tree.tokens)
        layer.keys, layer.values = (part[:, :, :read].clone() for part in stored)
        reader.keep(nodes)
        out[..., : len(reader.held), :] = torch.stack([layer.keys, layer.values])
    return out


def heads(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    weights = {name: torch.from_numpy(value) for name, value in inputs.items() if name.startswith("w_")}
    count, vocabulary, width = weights["w_head"].shape
    made = Heads(width, vocabulary, count, int(inputs["hp_layers"]))
    for head, block, bias, output in zip(made, weights["w_res_weight"], weights["w_res_bias"], weights["w_head"]):
        head[0].linear.load_state_dict({"weight": block, "bias": bias})
        head[-1].load_state_dict({"weight": output})
    with torch.inference_mode():
        logits = made(torch.from_numpy(inputs["in_hidden"]))
        each = losses(logits, torch.from_numpy(inputs["in_labels"]))
    return {"out_medusa_logits": logits.numpy(), "out_head_losses": each.numpy(), "out_loss": each.sum().numpy()}
