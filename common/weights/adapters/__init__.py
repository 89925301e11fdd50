"""Weight adapters know one model family each: where its targets are, what they read, and how units leave them.

Like the adapters of token pruning they are found by the class of the model and import no model library.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.registry import defined, resolve
from prunelab.common.weights.adapters.base import WeightAdapter


@cache
def weight_adapters() -> dict[str, type[WeightAdapter]]:
    """All weight adapters by family, discovered in this package."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {cls.family: cls for module in modules for cls in defined(module, WeightAdapter)}  # type: ignore[type-abstract]


def weight_adapter(model: nn.Module) -> WeightAdapter:
    """The adapter of the model's class, else that of its nearest parent class that has one, else one that takes it."""
    adapter = resolve(weight_adapters().values(), model)
    if adapter is not None:
        return adapter(model)
    supported = ", ".join(c.rpartition(".")[2] for a in weight_adapters().values() for c in a.model_classes)
    raise PrunelabError(f"no weight adapter for {type(model).__qualname__}; supported: {supported}")
