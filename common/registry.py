"""Methods by discovery: every concrete `Method` defined in `methods/<slug>/method.py` is registered under its name.

There is no list to edit. Papers (`paper.yaml`) can be listed without importing torch; see `common.papers`.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from common.discovery import choose, defined
from common.errors import PrunelabError
from common.roles import Method

METHODS = Path(__file__).resolve().parent.parent / "methods"


@cache
def load() -> dict[str, type[Method]]:
    """All methods by name. Raises where two share a name."""
    found: dict[str, type[Method]] = {}
    for path in sorted(METHODS.glob("*/method.py")):
        for cls in defined(importlib.import_module(f"methods.{path.parent.name}.method"), Method):
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
    return cls.__module__.split(".")[1]


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
