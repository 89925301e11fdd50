"""Costs: multiply-accumulates counted on the meta device.

One MAC is one multiply-add, so FLOPs = 2 MACs. Counted are matrix products, convolutions, attention, selective scans
(`backbones.scan`) and the sampling of deformable attention; softmax, norms, activations and sorting are not, as in
every counter the field uses. On the meta device attention decomposes into its two products, which the counters miss in
the fused CPU kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import replaced, run_all


@register_flop_formula(torch.ops.aten.grid_sampler_2d)
def _sampling_flops(*shapes: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    """Five MACs a sampled value: four weighted neighbours and the attention weight (Deformable DETR, appendix A.1)."""
    return 2 * 5 * math.prod(out_shape)


class _Pass(nn.Module):
    """One forward pass of an input that knows how a model reads it."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model, self.example = model, example

    def forward(self) -> Any:
        return self.example.run(self.model)


def on_meta(model: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
    """Run the model's own forward, hooks included, with shapes only: no weight is copied and nothing computed.

    An input is a tensor, or one object with `to(device)` and `run(model)` where a model takes more than that."""
    if len(inputs) == 1 and not isinstance(inputs[0], Tensor):
        return on_meta(_Pass(model, inputs[0].to("meta")))
    shared: dict[int, Tensor] = {}  # by the weight's id: tied ones stay tied
    meta = {}
    for path, module in model.named_modules():  # each once: one that has two names would not get its own weights back
        for name, value in (*module.named_parameters(path, False), *module.named_buffers(path, False)):
            meta[name] = shared.setdefault(id(value), torch.empty_like(value, device="meta"))
    with torch.no_grad(), plain(model):
        return functional_call(model, meta, tuple(x.to("meta") for x in inputs), kwargs, tie_weights=False)


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Without what accelerate does around the modules of a dispatched or offloaded model, which needs real weights."""
    modules = [m for m in model.modules() if hasattr(m, "_hf_hook") and hasattr(m, "_old_forward")]
    removers = [replaced(module, "forward", vars(module)["_old_forward"]) for module in modules]
    try:
        yield
    finally:
        run_all(removers)


class Watcher(Protocol):
    """Reads the counter while it runs, for instance to book the FLOPs of scoring apart."""

    counter: FlopCounterMode | None


def flops(run: Callable[[], Any], watcher: Watcher | None = None) -> int:
    """FLOPs of `run()`; a watcher sees the counter meanwhile."""
    with FlopCounterMode(display=False) as counter:
        if watcher is not None:
            watcher.counter = counter
        run()
    return counter.get_total_flops()


def macs(model: nn.Module, example: Any) -> float:
    """MACs of one forward pass of the example, a batch of 1."""
    return flops(lambda: on_meta(model, example)) / 2


def module_macs(model: nn.Module, example: Tensor, module: str) -> float:
    """MACs of one submodule, by its path, in a forward pass of the whole model."""
    with FlopCounterMode(display=False) as counter:
        on_meta(model, example)
    counts = counter.get_flop_counts()
    path = f"{type(model).__name__}.{module}"
    if path not in counts:
        raise PrunelabError(f"{type(model).__name__} spends nothing in a module '{module}'; name one of its own")
    return sum(counts[path].values()) / 2


def norm_elements(model: nn.Module, example: Tensor) -> int:
    """Elements that pass through LayerNorm in one forward pass."""
    total = 0

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        total += args[0].numel()

    hooks = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, nn.LayerNorm)]
    try:
        on_meta(model, example)
    finally:
        for h in hooks:
            h.remove()
    return total
