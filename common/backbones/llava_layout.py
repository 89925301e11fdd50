"""Checkpoints in the layout of LLaVA's own code (haotian-liu/LLaVA and what was built on it, Apache-2.0), read into the
classes that transformers has for these models.

Only names differ: tower, projector and decoder are the same modules. A vocabulary that the class has padded, for the
placeholders of its processor, gets the mean of the others in the new rows: it is read nowhere, and as an output it is
never likelier than the likeliest of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from prunelab.common.backbones.checkpoint import fill, read_all

# Where the official checkpoint keeps each part, and where the class has it; the first that fits counts.
NAMES = (
    (r"model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(?=image_newline$)", "model."),
    (r"model\.", "model.language_model."),
)
COUNTED = ("position_ids", "rotary_emb.inv_freq")  # tables that older code saved, and a model makes for itself
VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def official_name(name: str) -> str:
    """The name in the class of transformers of a weight of an official checkpoint."""
    for pattern, here in NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", here, name)
    return name


def padded(weight: Tensor, rows: int) -> Tensor:
    """A table [V, D] of words with as many rows, the new ones the mean of the others."""
    missing = rows - len(weight)
    if missing <= 0:
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


def fitted(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the model's names, without tables that it makes itself, and with a vocabulary as long as its own."""
    results = {name: weight for name, weight in weights.items() if not name.endswith(COUNTED)}
    wanted = model.state_dict()
    for name in VOCABULARY:
        if name in results and name in wanted:
            results[name] = padded(results[name], len(wanted[name]))
    return results


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load an official checkpoint, a .safetensors file or the folder of all its shards, with every name checked."""
    fill(model, fitted(model, {official_name(name): weight for name, weight in read_all(path).items()}), path)
