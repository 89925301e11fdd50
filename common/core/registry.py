"""Methods by name, adapters by model: classes are found by where they stand, and no list of them is kept.

Imports no torch; a method's module is imported when its class is asked for.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from prunelab.common.core import index
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
    check_options(entry(name), values)
    cls = get(name)
    hints = get_type_hints(cls)
    fitted = {key: _fitted(f"{name}: {key}", value, hints[key]) for key, value in values.items()}
    for option in entry(name).options:
        if option.default is None and option.name not in values:
            raise PrunelabError(f"{name} needs a value for its option '{option.name}'")
    return cls(**fitted)


def check_options(entry: index.Entry, names: Iterable[str]) -> None:
    """Refuse options that a method does not have; imports nothing of it."""
    allowed = [option.name for option in entry.options]
    for name in names:
        if name not in allowed:
            near = get_close_matches(name, allowed, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(allowed) or 'none'}"
            raise PrunelabError(f"{entry.name} has no option '{name}'; {hint}")


def _fitted(what: str, value: Any, hint: Any) -> Any:
    """The value in the form that a field takes, or an error that says which; numbers are left as they were given."""
    check = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
    for form in _forms(value):
        try:
            check.validate_python(form)
            return form
        except ValidationError:
            continue
    raise PrunelabError(f"{what} must be {_words(hint)}, not {value!r}")


def _forms(value: Any) -> Iterator[Any]:
    """A value as given, and what it may have been meant as: a number that YAML takes for a word (1e-8), None, a tuple
    of one, or of the parts of `2,5,8`."""
    whole = _tuples(value)
    yield whole
    if isinstance(value, str):
        if value.lower() == "none":
            yield None
        with suppress(ValueError):
            yield float(value)
        if "," in value:
            yield tuple(yaml.safe_load(part) for part in value.split(",") if part.strip())
    if value is not None and not isinstance(value, list | tuple):
        yield (whole,)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    type(None): "none",
    tuple[int, ...]: "whole numbers such as 2,5",
    tuple[float, ...]: "numbers such as 0.9,0.8",
}


def _words(hint: Any) -> str:
    """A type in words."""
    if hint in _WORDS:
        return _WORDS[hint]
    arguments, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        each = [_words(a) for a in arguments if a is not Ellipsis]
        return f"a list, each {each[0]}" if Ellipsis in arguments else f"{len(each)} values, each {each[0]}"
    if arguments:  # a union
        return " or ".join(_words(a) for a in arguments)
    return str(getattr(hint, "__name__", hint))


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
