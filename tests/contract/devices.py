"""A device that is not there: every tensor has a label, and operations that mix labels fail as they would on a GPU.

Numbers are computed on the CPU, so that whatever depends on data runs as it does; `tensor.device` says what the label
says, and what is made with `device=tensor.device` bears it. Stricter than CUDA in one thing: indices on the CPU are
taken there, by a copy that waits for the device; here they fail.

`python -m tests.contract.devices` runs every method so and prints how that went: which looks of our code at data on the
device it has to wait for, reports left out. `python -m tests.contract.devices fastv wanda` does so for some.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE, THERE = torch.device("cpu"), torch.device("cuda", 0)
_aten = torch.ops.aten
_MOVES = {_aten.copy_, _aten._to_copy, _aten.lift_fresh, _aten.lift_fresh_copy, _aten.set_}  # from device to device
_SCALARS = {_aten.index_put_, _aten.index_put, _aten.masked_fill, _aten.masked_fill_, _aten.fill_, _aten.fill}
_DEVICE, _IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_UNSEEN = {Tensor.tolist, Tensor.item, Tensor.numel, Tensor.untyped_storage, Tensor.storage_offset}


_LOOKS = {  # operations that a GPU has to be waited for: values, and sizes that depend on data
    _aten._local_scalar_dense: "value", _aten.nonzero: "nonzero", _aten.masked_select: "masked_select",
    _aten._unique2: "unique", _aten.unique_dim: "unique", _aten.unique_consecutive: "unique", _aten.equal: "equal",
    _aten.bincount: "bincount", _aten.repeat_interleave: "repeat_interleave",
}  # fmt: skip
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_}
_REPORTS = {"report", "kept"}  # functions that tell what happened, once it has


class Mixed(AssertionError):
    """An operation met tensors of two devices."""


class Labels:
    """Which device the storages are said to be on."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, torch.device]] = {}  # the reference keeps its number
        self.within = HERE  # of the call at hand, for what it makes inside
        self.looks: Counter[str] = Counter()  # at data there, from our code

    def of(self, tensor: Tensor) -> torch.device | None:
        """None where nobody said."""
        storage = _storage(tensor)
        return None if storage is None else self._known.get(storage._cdata, (None, None))[1]

    def put(self, tensor: Tensor, device: torch.device) -> None:
        storage = _storage(tensor)
        if storage is not None:
            self._known[storage._cdata] = (StorageWeakRef(storage), device)

    def there(self, value: Any) -> bool:
        return any(isinstance(t, Tensor) and self.of(t) == THERE for t in tree_leaves(value))

    def look(self, what: str) -> None:
        """Note a look, with the function of ours that looks."""
        place = _looking()
        if place is not None:
            self.looks[f"{what} in {place}"] += 1


def _storage(tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage()


class _Operations(TorchDispatchMode):
    """Labels what operations give, and refuses those of two devices."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        labels, given = self.labels, [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        with torch._C.DisableTorchFunction():
            found = [(t, labels.of(t) or labels.within) for t in given if not t.is_meta]
            there = any(device == THERE for _, device in found)
            packet = function.overloadpacket
            if there and packet not in _MOVES:
                scalars = torch.Tag.pointwise in function.tags or packet in _SCALARS
                here = [t for t, device in found if device == HERE and not (scalars and t.dim() == 0)]
                if here:
                    shapes = [(tuple(t.shape), device.type) for t, device in found]
                    raise Mixed(f"{function} mixes devices: {shapes}")
                if packet in _LOOKS:
                    labels.look(_LOOKS[packet])
                elif packet in _INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1]):
                    labels.look("mask")
            out = function(*args, **(kwargs or {}))
            first = found[0][1] if found and packet in _MOVES else THERE if there else labels.within
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and labels.of(tensor) is None:
                    labels.put(tensor, first)
        return out


class _Calls(TorchFunctionMode):
    """Says where tensors are, and makes them where they are wanted."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        labels, kwargs = self.labels, dict(kwargs or {})
        if function in (_DEVICE, _IS_CUDA):
            real = function(*args)
            place = real if args[0].is_meta else labels.of(args[0]) or HERE
            return place if function == _DEVICE else place.type == "cuda"
        if function is Tensor.tolist and labels.there(args):
            labels.look("values")
        if getattr(function, "__name__", "") == "__get__" or function in _UNSEEN:
            return function(*args, **kwargs)
        if function in (Tensor.numpy, Tensor.__array__) and labels.there(args):
            raise Mixed("a tensor on the device has no numpy array; bring it to the CPU first")
        wanted = None
        if function in (Tensor.to, Tensor.type_as):
            named = [_place(a) or labels.of(a) if isinstance(a, Tensor) else _place(a) for a in args[1:]]
            wanted = next((place for place in named if place is not None), None)
            args = (
                args[0],
                *(HERE if isinstance(_place(a), torch.device) and _place(a) == THERE else a for a in args[1:]),
            )
        if function is Tensor.cpu:
            wanted = HERE
        if function is Tensor.cuda:
            wanted, function, args, kwargs = THERE, Tensor.clone, args[:1], {}
        if _place(kwargs.get("device")) is not None:
            wanted = _place(kwargs["device"])
            if wanted == THERE:
                kwargs["device"] = HERE
        if wanted == HERE and function in (Tensor.to, Tensor.cpu) and labels.there(args[0]):
            labels.look("copy to the CPU")
        indexed = function in (Tensor.__getitem__, Tensor.__setitem__)
        if indexed and labels.there(args[0]) and _of_a_library():  # they may wait for an index
            args = (args[0], tree_map(self._fetched, args[1]), *args[2:])
        generator, before = kwargs.get("generator"), labels.within
        labels.within = wanted or (THERE if labels.there((args, kwargs)) else HERE)
        if generator is not None and isinstance(generator, Generator) and labels.within != generator.place:
            raise Mixed(f"{function} draws on {labels.within} with a generator of {generator.place}")
        try:
            out = function(*args, **kwargs)
            return out if wanted is None else tree_map(lambda t: self._moved(t, wanted), out)
        finally:
            labels.within = before

    def _fetched(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or self.labels.of(value) != HERE:
            return value
        value = value.clone()
        self.labels.put(value, THERE)
        return value

    def _moved(self, value: Any, place: torch.device) -> Any:
        """What was made or moved, with the label that was wanted; never with that of another's memory."""
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        if self.labels.of(value) not in (None, place):
            with torch._C.DisableTorchFunction():
                value = value.clone()
        self.labels.put(value, place)
        return value


def _of_a_library() -> bool:
    """Whether what is called now is called by code that is not ours."""
    frame = sys._getframe(2)
    while "/torch/" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return "site-packages" in frame.f_code.co_filename


def _looking() -> str | None:
    """The function of ours that calls now, as `common/core/selection:keep`; None for a library's, a test's, and where
    it is to report."""
    frame, place = sys._getframe(2), None
    while frame is not None:
        code = frame.f_code
        if code.co_name in _REPORTS:
            return None
        if place is None and "/torch/" not in code.co_filename and code.co_filename != __file__:
            place = f"{code.co_filename.removesuffix('.py')}:{code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    if place is None or "site-packages" in place or "/prunelab/" not in place:
        return None
    return place.rpartition("/prunelab/")[2]


def _place(value: Any) -> torch.device | None:
    """The device that an argument names; meta tensors are left alone."""
    if isinstance(value, str) and value in ("cpu", "cuda", "cuda:0"):
        value = torch.device(value)
    if isinstance(value, torch.device) and value.type in ("cpu", "cuda"):
        return THERE if value.type == "cuda" else HERE
    return None


class Generator(torch.Generator):
    """A generator that says it is on a device."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = _place(device) or HERE
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


@contextmanager
def pretended() -> Iterator[Labels]:
    """Inside the block devices are told apart; `moved` takes models and inputs to the one that is not there."""
    labels = Labels()
    calls, engine = _Calls(labels), torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def backward(*args: Any, **kwargs: Any) -> Any:
        with calls:  # hooks are called from there
            return engine(*args, **kwargs)

    patches = (
        mock.patch.object(torch.autograd, "_engine_run_backward", backward),
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", _grouped),
    )
    with ExitStack() as stack:
        for entered in (*patches, _Operations(labels), calls):
            stack.enter_context(entered)
        yield labels


def _grouped(lists: list[list[Tensor]]) -> Any:
    """As torch groups tensors to clip their norm, which it does behind the labels' back."""
    return {(lists[0][0].device, lists[0][0].dtype): (lists, list(range(len(lists[0]))))}


def moved(labels: Labels, value: Any) -> Any:
    """A model, labelled as it is with all its parameters and buffers, or a copy of all tensors in a structure."""
    if isinstance(value, nn.Module):
        for tensor in [*value.parameters(), *value.buffers()]:
            labels.put(tensor, THERE)
        return value

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return moved(labels, leaf) if isinstance(leaf, nn.Module) else leaf
        leaf = leaf.clone()
        labels.put(leaf, THERE)
        return leaf

    return tree_map(copied, value)


if __name__ == "__main__":
    from tests.contract.test_devices import table

    for line in table(sys.argv[1:]):
        print(line, flush=True)
