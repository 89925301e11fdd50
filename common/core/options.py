"""What a hyper-parameter may be: the types of a method's fields, which carry their ranges.

Numbers are annotated with one of these: `layer: NonNegativeInt = 2`, `shares: tuple[Share, ...]`. Values are checked
when a method is made, whichever way, and before its code is imported where a paper.yaml or the command line names them.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, partial
from numbers import Number
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic import (
    AfterValidator,
    ConfigDict,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from prunelab.common.core.errors import PrunelabError

if TYPE_CHECKING:
    from prunelab.common.core.method import Method

__all__ = [
    "AnyInt", "Cosine", "FiniteFloat", "NonNegativeFloat", "NonNegativeInt", "PositiveFloat", "PositiveInt",
    "PositiveShare", "Share", "Within", "check", "fitted", "unbounded", "words",
]  # fmt: skip

AnyInt = Annotated[int, Interval()]  # such as a layer, counted from the end where it is negative
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
Within = Annotated[float, Interval(gt=0, lt=1)]  # a share that is neither nothing nor all
Cosine = Annotated[float, Interval(ge=-1, le=1)]


def check(method: Method) -> None:
    """Raise PrunelabError where a field of a method (a dataclass) holds what it may not."""
    for name, allowed in _allowed(type(method)).items():
        value = getattr(method, name)
        if not _admits(allowed[1], _plain(value)):
            raise PrunelabError(f"{method.name}: {name} must be {words(allowed[0])}, not {value!r}")


@cache
def _allowed(cls: type[Method]) -> Mapping[str, tuple[Any, TypeAdapter[Any]]]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: (hints[field.name], _adapter(hints[field.name])) for field in fields(cls)}  # type: ignore[arg-type]


def _adapter(hint: Any) -> TypeAdapter[Any]:
    if is_dataclass(hint):  # which has checked itself
        return TypeAdapter(Annotated[Any, AfterValidator(partial(_instance, hint))])
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False))


def _instance(cls: type, value: Any) -> Any:
    if not isinstance(value, cls):
        raise ValueError
    return value


def _admits(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's, a list as a tuple."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def fitted(what: str, value: Any, hint: Any) -> Any:
    """The value in the form that a field takes, or an error that says which; numbers are left as they were given."""
    adapter = _adapter(hint)
    for form in _forms(value):
        if _admits(adapter, form):
            return form
    raise PrunelabError(f"{what} must be {words(hint)}, not {value!r}")


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


# -- types in words --------------------------------------------------------------------------------------------------

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    type(None): "none",
    Any: "a value of the method's own",
}
_SUCH_AS = {int: "whole numbers such as 2,5", float: "numbers such as 0.9,0.8"}
_SIGNS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


def words(hint: Any) -> str:
    """A type in words."""
    if hint in _WORDS:
        return _WORDS[hint]
    arguments, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        bounds = _bounds(arguments[1:])
        if arguments[0] is int and "gt" in bounds:
            bounds["ge"] = bounds.pop("gt") + 1
        return f"{words(arguments[0])} {_range(bounds)}".strip()
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        each = [words(a) for a in arguments if a is not Ellipsis]
        if Ellipsis not in arguments:
            return f"{len(each)} values, each {each[0]}"
        number = _number(arguments[0])
        if number not in _SUCH_AS:
            return f"a list, each {each[0]}"
        limits = each[0].removeprefix(_WORDS[number]).strip()
        return _SUCH_AS[number] + (f", each {limits}" if limits else "")
    if arguments:  # a union
        return " or ".join(words(a) for a in arguments)
    return str(getattr(hint, "__name__", hint))


def _bounds(metadata: Iterable[Any]) -> dict[str, float]:
    results: dict[str, float] = {}
    for part in metadata:
        for kind in (Ge, Gt, Le, Lt):
            name = kind.__name__.lower()
            if isinstance(part, kind | Interval) and getattr(part, name) is not None:
                results[name] = getattr(part, name)
    return results


def _range(bounds: Mapping[str, float]) -> str:
    if bounds.keys() == {"ge", "le"}:
        return f"from {bounds['ge']:g} to {bounds['le']:g}"
    if bounds.keys() == {"gt", "lt"}:
        return f"between {bounds['gt']:g} and {bounds['lt']:g}"
    return " and ".join(f"{_SIGNS[kind]} {bound:g}" for kind, bound in bounds.items())


def _number(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def unbounded(hint: Any) -> bool:
    """Whether a type admits numbers of whose range nothing is said."""
    if get_origin(hint) is Annotated:
        return False
    return hint in (int, float) or any(map(unbounded, () if get_origin(hint) is Literal else get_args(hint)))
