"""Hooks that come out again, that copies of a model are free of; what the roles' hooks share, and which methods a model
runs."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.core.plan import Gather, Mix
from prunelab.common.core.versions import warn_outside

Remove = Callable[[], Any]
_METHODS: WeakKeyDictionary[nn.Module, tuple[Method, ...]] = WeakKeyDictionary()  # at work on a model, outermost first


def at_work(model: nn.Module) -> tuple[Method, ...]:
    """The methods that are applied to a model now, the outermost first."""
    return _METHODS.get(bare(model), ())


def runs(model: nn.Module, role: str) -> bool:
    """Whether a method of that role is applied to the model now."""
    return any(method.role == role for method in at_work(model))


@contextmanager
def claimed(method: Method, model: nn.Module, services: Mapping[str, Any] | None = None) -> Iterator[None]:
    """The model runs the method inside the block, beside those of other roles that it runs already, and uncompiled.

    Raises where a service is missing, or the method has no meaning beside one at work.
    """
    for library in ("torch", "transformers"):
        if library in sys.modules:
            warn_outside(library)
    missing = set(method.services) - set(services or {})
    if missing:
        raise PrunelabError(f"{method.name} needs the services {', '.join(sorted(missing))}; pass services={{...}}")
    before = at_work(model)
    for other in before:
        if other.role == method.role:
            raise PrunelabError(f"this model already runs {other.name}; leave that `with` block first")
        reason = method.beside(other) or other.beside(method)
        if reason is not None:
            raise PrunelabError(f"{method.name} and {other.name} cannot run on one model: {reason}")
    inner = bare(model)
    _METHODS[inner] = (*before, method)
    try:
        with _uncompiled():
            yield
    finally:
        left = tuple(other for other in at_work(model) if other is not method)
        _METHODS[inner] = left
        if not left:
            del _METHODS[inner]


_EAGER: list[Any] = []  # for each block that is open now, the first one's holding the stance before
_COUNTING = threading.Lock()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Let every model run as it is written inside the block: a graph that `torch.compile` made, of a model or of its
    parts, before the block or in it, would run past the hooks."""
    with _COUNTING:
        _EAGER.append(None if _EAGER else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _COUNTING:  # blocks of several threads may end in any order: the last one brings the stance back
            stance = _EAGER.pop()
            if stance is not None:
                stance.__exit__(None, None, None)


def plain(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def bare(model: nn.Module) -> nn.Module:
    """The model within an adapter of `peft`, or that was compiled."""
    model = plain(model)
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def run_all(removers: list[Remove]) -> None:
    """Call every function of the list, the last first, and empty it."""
    while removers:
        removers.pop()()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a copied hook does."""


def _inert() -> Callable[..., None]:
    return _nothing


class Hook:
    """A function for a module's hooks. A copy of the module, and what is saved of it, do without."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> Any:
        return _inert, ()


class _Replacement(Hook):
    """A function in place of a method of one instance, of whose copies it is none."""

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        super().__init__(call)
        functools.update_wrapper(self, call)  # whoever looks at its signature sees the method's
        self._owner, self._name, self._before = owner, name, vars(owner).get(name)
        self.__code__ = getattr(inspect.unwrap(call), "__code__", None)  # where torch.export says that it is

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self._owner), self._owner)
        return _method(owner, self._name) if self._before is None else copy.deepcopy(self._before, memo)

    def __reduce__(self) -> Any:
        if self._before is None:
            return _method, (self._owner, self._name)
        return _same, (self._before,)


def _method(owner: Any, name: str) -> Any:
    return types.MethodType(getattr(type(owner), name), owner)


def _same(value: Any) -> Any:
    return value


def before(module: nn.Module, call: Callable[..., Any], *, kwargs: bool = False, first: bool = False) -> Remove:
    """`call` before every forward of the module, as `register_forward_pre_hook` has it; returns what takes it out."""
    return module.register_forward_pre_hook(Hook(call), with_kwargs=kwargs, prepend=first).remove


def after(module: nn.Module, call: Callable[..., Any], *, kwargs: bool = False) -> Remove:
    """`call` after every forward of the module, as `register_forward_hook` has it; returns what takes it out."""
    return module.register_forward_hook(Hook(call), with_kwargs=kwargs).remove


def replaced(owner: Any, name: str, call: Callable[..., Any]) -> Remove:
    """`call` in place of a method of one instance. Returns what brings back the method, or what the instance had in
    its place (a wrapper of its own)."""
    values = vars(owner)
    had, own = name in values, values.get(name)
    values[name] = _Replacement(owner, name, call)

    def restore() -> None:
        if had:
            values[name] = own
        else:
            values.pop(name, None)

    return restore


def wrapped(owner: Any, name: str) -> bool:
    """Whether an instance has something in place of its class's method; a copy that was made inside a block has the
    method itself there."""
    own = vars(owner).get(name)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(owner), name)


def arguments(owner: Any, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """What a call of a method means by the class's signature, whatever wrapper the instance has around it."""
    given = inspect.signature(getattr(type(owner), name)).bind(owner, *args, **kwargs).arguments
    more = given.pop("kwargs", {})
    return {**given, **more}


def refuse_checkpointing(model: nn.Module) -> None:
    """Gradient checkpointing runs layers again in the backward pass, one by one and the last first, when what the
    method decided for them is gone."""
    if not torch.is_grad_enabled():
        return
    for module in model.modules():
        again = getattr(module, "grad_checkpointing", False) is True
        again = again or (getattr(module, "gradient_checkpointing", False) is True and module.training)
        if again:
            raise PrunelabError(
                "gradient checkpointing runs layers again in another order, in which a pruned model cannot be run; turn"
                " it off (set_grad_checkpointing(False), gradient_checkpointing_disable()) inside the block"
            )


def refuse_chunks(name: str, model: Any, options: Mapping[str, Any]) -> None:
    """A prompt that `generate` would read in pieces is decided about before all of it was read."""
    config = options.get("generation_config") or model.generation_config
    if options.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) is not None:
        raise PrunelabError(f"{name} decides when the whole prompt was read; generate without prefill_chunk_size")


def refuse_tracing() -> None:
    """A trace would hold one input's decisions for good."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise PrunelabError(
            "a pruned model cannot be traced or exported, since what is kept depends on the input; do so with the model"
            " as it is, outside the block"
        )


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
