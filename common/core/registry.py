"""Methods by name, adapters by model: classes are found by where they stand, and no list of them is kept.

Imports no torch; a method's module is imported when its class is asked for.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from prunelab.common.core import index, options
from prunelab.common.core.errors import PrunelabError

if TYPE_CHECKING:
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
    if not isinstance(name, str):
        raise PrunelabError(f"a {what} has a name, and {name!r} is none")
    if name not in known:
        near = get_close_matches(name, known, 3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
        raise PrunelabError(f"there is no {what} '{name}'; {hint}")
    return known[name]


def resolve(adapters: Iterable[type[T]], model: object) -> type[T] | None:
    """The adapter of the model's class, else of its nearest parent class that has one (by `model_classes`), else the
    first that `accepts` the model."""
    adapters = list(adapters)
    known = {name: adapter for adapter in adapters for name in getattr(adapter, "model_classes", ())}
    for cls in type(model).__mro__:
        if adapter := known.get(f"{cls.__module__}.{cls.__qualname__}"):
            return adapter
    return next((a for a in adapters if getattr(a, "accepts", lambda model: False)(model)), None)


# -- methods ---------------------------------------------------------------------------------------------------------


def entry(name: str) -> index.Entry:
    """What is known of the method of that name without importing it."""
    return choose(index.entries(), name, "method")


def get(name: str) -> type[Method]:
    """The method class of that name, or an error that suggests the nearest names."""
    return _imported(entry(name))


@cache
def _imported(entry: index.Entry) -> type[Method]:
    cls: type[Method] = getattr(importlib.import_module(entry.module), entry.class_name)
    return cls


def load() -> dict[str, type[Method]]:
    """All methods by name."""
    return {name: get(name) for name in index.entries()}


def create(name: str, **values: Any) -> Method:
    """A method with the given hyper-parameters, read by the types of its fields: lists become tuples, and a single
    value of a tuple field a tuple of one, so that values from YAML and the command line can be passed as they are."""
    fitted = fit(entry(name), values)
    for option in entry(name).options:
        if option.default is None and option.name not in values:
            raise PrunelabError(f"{name} needs a value for its option '{option.name}'")
    return get(name)(**fitted)


def fit(entry: index.Entry, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the form that a method's fields take. Raises PrunelabError for one that it does not have, or a value
    that it may not have; imports nothing of it."""
    types = {option.name: option.hint for option in entry.options}
    for name in values:
        if name not in types:
            near = get_close_matches(name, types, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(types) or 'none'}"
            raise PrunelabError(f"{entry.name} has no option '{name}'; {hint}")
    return {name: options.fitted(f"{entry.name}: {name}", value, types[name]) for name, value in values.items()}


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
    except (SyntaxError, ValueError):
        raise PrunelabError(f"cannot read the method '{text}'; write it as its repr shows it") from None
    by_class = {entry.class_name: name for name, entry in index.entries().items()}
    return create(by_class.get(call.func.id, call.func.id), **values)
