"""The learned parts of a method (`Method.build`): where a model carries them, and whether they fit it."""

from __future__ import annotations

import torch
from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.core.plan import ModelInfo

PARTS = "pruning_parts"  # name of the learned parts among the model's modules while a method is applied


def fitting(method: Method, info: ModelInfo, given: nn.Module | None, own: nn.Module | None) -> nn.Module | None:
    """The learned parts to use: those given, else the model's own. Refuses parts that are missing or do not fit."""
    with torch.device("meta"):
        built = method.build(info)
    if built is None:
        if given is not None:
            raise PrunelabError(f"{method.name} has no learned parts; leave `parts` out")
        return None
    parts = own if given is None else given
    if parts is None:
        raise PrunelabError(
            f"{method.name} has learned parts; pass parts=method.build(info) with trained weights, see its README"
        )
    wanted = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    results = {name: tuple(value.shape) for name, value in parts.state_dict().items()}
    if wanted != results:
        wrong = sorted(name for name in wanted.keys() | results.keys() if wanted.get(name) != results.get(name))
        raise PrunelabError(f"the parts do not fit {method.name} on this model: {', '.join(wrong[:8])}")
    return parts
