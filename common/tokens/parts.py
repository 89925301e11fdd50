"""Learned parts that a checkpoint brings: those of the method it was trained with."""

from __future__ import annotations

from torch import nn

from prunelab.common.core import registry
from prunelab.common.core.learned import PARTS
from prunelab.common.tokens.adapters import adapter_for


def add(model: nn.Module, method: str) -> None:
    """Make a method's parts, untrained as yet, modules of the model, so that a checkpoint can fill them."""
    parts = registry.create(method).build(adapter_for(model).info)
    if parts is not None:
        model.add_module(PARTS, parts)
