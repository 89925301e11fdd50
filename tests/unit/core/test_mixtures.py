"""A mixture is one product, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunelab.common.core.plan import Mix


def entry_by_entry(mix: Mix, x: Tensor) -> Tensor:
    """By the definition, each entry added where it goes."""
    entries = x.gather(1, mix.source.unsqueeze(-1).expand(-1, -1, x.shape[-1])) * mix.weight.unsqueeze(-1).to(x.dtype)
    out = x.new_zeros(x.shape[0], mix.outputs, x.shape[-1])
    return out.scatter_add(1, mix.target.unsqueeze(-1).expand_as(entries), entries)


def drawn(batch: int, units: int, outputs: int, entries: int, seed: int) -> tuple[Mix, Tensor]:
    g = torch.Generator().manual_seed(seed)
    target, source = (torch.randint(n, (batch, entries), generator=g) for n in (outputs, units))
    mix = Mix(target, source, torch.rand(batch, entries, generator=g), outputs)
    return mix, torch.randn(batch, units, 24, generator=g)


def same(found, want):
    """But for what a processor that fuses products and sums rounds once less."""
    torch.testing.assert_close(found, want, rtol=1e-5, atol=16 * torch.finfo(want.dtype).eps)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 40), st.integers(0, 3), st.integers(0, 99))
def test_what_entries_add_up_to(batch, units, outputs, each, seed):
    mix, x = drawn(batch, units, outputs, each * units, seed)
    same(mix.apply(x), entry_by_entry(mix, x))
    same(mix.apply(x.double()), entry_by_entry(mix, x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_gradients(dtype):
    mix, x = drawn(2, 30, 20, 60, 1)
    x = x.to(dtype).requires_grad_()
    mix.apply(x).float().square().sum().backward()
    gradient, x.grad = x.grad, None
    entry_by_entry(mix, x).float().square().sum().backward()
    assert torch.equal(gradient, x.grad)
    with torch.no_grad():
        assert mix.apply(x).dtype == dtype
    weighted = Mix(mix.target, mix.source, mix.weight.clone().requires_grad_(), mix.outputs)
    weighted.apply(x.detach()).float().sum().backward()
    assert float(weighted.weight.grad.abs().sum()) > 0
    with torch.inference_mode():
        same(mix.apply(x.detach()), entry_by_entry(mix, x.detach()))


def test_on_the_meta_device_and_without_outputs():
    mix, x = drawn(2, 30, 20, 60, 1)
    meta = Mix(*(t.to("meta") for t in (mix.target, mix.source, mix.weight)), 20)
    assert meta.apply(x.to("meta")).shape == (2, 20, 24)
    nothing = torch.zeros(1, 0, dtype=torch.long)
    assert Mix(nothing, nothing, nothing.float(), 0).apply(x[:1]).shape == (1, 0, 24)
