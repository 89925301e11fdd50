"""Finding classes by where they stand and choosing one by name: methods, adapters and testbeds keep no list.

Every concrete `Method` defined in `methods/<slug>/method.py` is registered under its name. Papers (`paper.yaml`) can be
listed without importing torch; see `prunelab.common.experiments.papers`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT
from prunelab.common.core.method import Method

T = TypeVar("T")


def defined(module: ModuleType, base: type[T]) -> Iterator[type[T]]:
    """The concrete subclasses of `base` that a module itself defines."""
    for value in vars(module).values():
        own = inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
        if own and not inspect.isabstract(value):
            yield value


def choose(known: Mapping[str, T], name: str, what: str) -> T:
    """The entry of that name, or an error that suggests the nearest names."""
    if name not in known:
        near = get_close_matches(name, known, 3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
        raise PrunelabError(f"there is no {what} '{name}'; {hint}")
    return known[name]


METHODS = ROOT / "methods"


@cache
def load() -> dict[str, type[Method]]:
    """All methods by name. Raises where two share a name."""
    found: dict[str, type[Method]] = {}
    for path in sorted(METHODS.glob("*/method.py")):
        for cls in defined(importlib.import_module(f"prunelab.methods.{path.parent.name}.method"), Method):
            if "name" in vars(cls):
                if cls.name in found:
                    raise PrunelabError(f"two methods are named '{cls.name}': {found[cls.name]} and {cls}")
                found[cls.name] = cls
    return found


def get(name: str) -> type[Method]:
    """The method class of that name, or an error that suggests the nearest names."""
    return choose(load(), name, "method")


def create(name: str, **values: Any) -> Method:
    """A method with the given hyper-parameters; lists become tuples, so that YAML values can be passed as they are."""
    cls = get(name)
    allowed = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise PrunelabError(f"{name} has no option '{unknown[0]}'; it has {', '.join(allowed) or 'none'}")
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def slug(method: type[Method] | Method) -> str:
    """The folder below `methods/` that defines the method."""
    cls = method if isinstance(method, type) else type(method)
    return cls.__module__.split(".")[2]


def parse(text: str) -> Method:
    """The method whose repr is `text`, for example `ToMe(proportional=True)`."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        values = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        by_class = {cls.__name__: name for name, cls in load().items()}
        name = by_class.get(call.func.id, call.func.id)
    except (SyntaxError, ValueError):
        raise PrunelabError(f"cannot read the method '{text}'; write it as its repr shows it") from None
    return create(name, **values)
