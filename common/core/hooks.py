"""Hooks that come out again, what they share, and which methods a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.core.plan import Gather, Mix

_METHODS = "_prunelab_methods"  # attribute of a model: the methods at work on it, the outermost first


def at_work(model: nn.Module) -> tuple[Method, ...]:
    """The methods that are applied to a model now, the outermost first."""
    methods: tuple[Method, ...] = vars(_bare(model)).get(_METHODS, ())
    return methods


def runs(model: nn.Module, role: str) -> bool:
    """Whether a method of that role is applied to the model now."""
    return any(method.role == role for method in at_work(model))


@contextmanager
def claimed(method: Method, model: nn.Module, services: Mapping[str, Any] | None = None) -> Iterator[None]:
    """The model runs the method inside the block, beside those of other roles that it runs already.

    Raises where a service is missing, the model is compiled, or the method has no meaning beside one at work.
    """
    missing = set(method.services) - set(services or {})
    if missing:
        raise PrunelabError(f"{method.name} needs the services {', '.join(sorted(missing))}; pass services={{...}}")
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise PrunelabError(
            f"this model is compiled and would run past the hooks of {method.name}; apply it to the model as it was"
            " before torch.compile"
        )
    before = at_work(model)
    for other in before:
        if other.role == method.role:
            raise PrunelabError(f"this model already runs {other.name}; leave that `with` block first")
        reason = method.beside(other) or other.beside(method)
        if reason is not None:
            raise PrunelabError(f"{method.name} and {other.name} cannot run on one model: {reason}")
    bare = _bare(model)
    object.__setattr__(bare, _METHODS, (*before, method))
    try:
        yield
    finally:
        left = tuple(other for other in at_work(model) if other is not method)
        object.__setattr__(bare, _METHODS, left)
        if not left:
            object.__delattr__(bare, _METHODS)


def _bare(model: nn.Module) -> nn.Module:
    """The model within an adapter of `peft`."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


@contextmanager
def overridden(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give the instance an attribute inside the block; one of its own is put back."""
    own, before = name in vars(model), vars(model).get(name)
    object.__setattr__(model, name, value)
    try:
        yield
    finally:
        if own:
            object.__setattr__(model, name, before)
        else:
            object.__delattr__(model, name)


def run_all(removers: list[Callable[[], Any]]) -> None:
    """Call every function of the list, the last first, and empty it."""
    while removers:
        removers.pop()()


def padded_first(reduce: Gather | Mix) -> Gather | Mix:
    """The same outputs in the same order, but with those that do not count in front: the last one is then last in
    every sample, which is where `generate` reads the next token."""
    if reduce.valid is None:
        return reduce
    order = reduce.valid.int().argsort(dim=1, stable=True)
    valid = reduce.valid.gather(1, order)
    if isinstance(reduce, Gather):
        return Gather(reduce.index.gather(1, order), valid)
    return replace(reduce, target=order.argsort(1).gather(1, reduce.target), valid=valid)
