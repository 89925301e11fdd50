"""Bytes of tensors alive at once: exact and the same in every run, where a process's resident size is neither."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Inside `with`, counts the storages that operations return, from when they are made until they are freed.

    `own` are the bytes of the models given, `peak` the most that was alive, theirs included. What a kernel needs inside
    itself (the workspace of a factorisation, say) is not seen.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for model in models:
            for tensor in model.state_dict().values():
                self.track(tensor)
        self.own = self.peak = self.now

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.track(tensor)
        return out

    def track(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":  # a shape without memory
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
