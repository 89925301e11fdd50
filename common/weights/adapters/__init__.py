"""Weight adapters know one model family each: where its targets are, what they read, and how units leave them.

Like the adapters of token pruning they are found by the class of the model and import no model library.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.registry import defined, resolve
from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.adapters.components import Components, Linears

Model = nn.Module | Mapping[str, nn.Module] | Any  # the last: whatever has `components`


@cache
def weight_adapters() -> dict[str, type[WeightAdapter]]:
    """All weight adapters by family, discovered in this package."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {cls.family: cls for module in modules for cls in defined(module, WeightAdapter)}  # type: ignore[type-abstract]


def weight_adapter(model: Model, names: Sequence[str] = ()) -> WeightAdapter:
    """The adapter of the model's class, else that of its nearest parent class that has one, else one that takes it.

    A model of several components is a mapping of modules by name, or has one as its `components`, as the pipelines of
    diffusers do, and modules may; `names` are those to prune, by default all of a mapping.
    """
    if not isinstance(model, nn.Module) or (names and isinstance(getattr(model, "components", None), Mapping)):
        return _components(model, names)
    if names:
        raise PrunelabError(f"a {type(model).__qualname__} has no components by name; give one budget for all of it")
    adapter = resolve(weight_adapters().values(), model)
    if adapter is not None:
        return adapter(model)
    supported = dict.fromkeys(c.rpartition(".")[2] for a in weight_adapters().values() for c in a.model_classes)
    raise PrunelabError(f"no weight adapter for {type(model).__qualname__}; supported: {', '.join(supported)}")


def _components(model: Any, names: Sequence[str]) -> Components:
    given = model if isinstance(model, Mapping) else getattr(model, "components", None)
    if not isinstance(given, Mapping):
        raise PrunelabError(f"a {type(model).__qualname__} is no model; give a module, or modules by name")
    modules = {name: module for name, module in given.items() if isinstance(module, nn.Module)}
    wanted = names or (list(modules) if isinstance(model, Mapping) else [])
    if not wanted or not modules.keys() >= {*wanted}:
        raise PrunelabError(
            f"name the components to prune as in Budget.by({{...: 0.5}}); this model has {', '.join(modules)}"
        )
    return Components({name: _component(modules[name]) for name in wanted})


def _component(module: nn.Module) -> WeightAdapter:
    """Of a component whose class no adapter names, only the linears are known."""
    adapter = resolve(weight_adapters().values(), module)
    classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    return adapter(module) if adapter is not None and classes & {*adapter.model_classes} else Linears(module)
