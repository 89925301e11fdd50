"""Adapters know one model family each: where its sites are and how tokens leave it. They know no method.

An adapter is found by the class of the model. Modules in this package import no model library at the top, so that
looking one up stays cheap.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.registry import defined, resolve
from prunelab.common.tokens.adapters.base import Adapter

# Classes that tokens cannot leave, and why.
REFUSED = {
    "timm.models.swin_transformer.SwinTransformer": "its layers attend within windows of a full grid",
    "timm.models.swin_transformer_v2.SwinTransformerV2": "its layers attend within windows of a full grid",
    "timm.models.hiera.Hiera": "its layers attend within windows, and pool fixed squares of their tokens",
    "transformers.models.gemma3.modeling_gemma3.Gemma3ForConditionalGeneration": (
        "some of its decoder's layers see windows of the text, and their caches drop entries by their number"
    ),
}


@cache
def adapters() -> dict[str, type[Adapter[Any]]]:
    """All adapters by family, discovered in this package. A class that names no family is a base of some."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [cls for module in modules for cls in defined(module, Adapter)]  # type: ignore[type-abstract]
    return {cls.family: cls for cls in found if hasattr(cls, "family")}


def adapter_for(model: nn.Module) -> Adapter[Any]:
    """The adapter of the model's class, else that of its nearest parent class that has one."""
    adapter = resolve(adapters().values(), model)
    if adapter is not None:
        return adapter(model)
    for cls in type(model).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in REFUSED:
            raise PrunelabError(f"tokens cannot leave a {cls.__qualname__}: {REFUSED[name]}")
    supported = ", ".join(c for a in adapters().values() for c in a.model_classes)
    raise PrunelabError(f"no adapter for {type(model).__module__}.{type(model).__qualname__}; supported: {supported}")
