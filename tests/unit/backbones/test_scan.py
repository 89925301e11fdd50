"""The selective scan beyond its golden cases: gaps, gradients, extremes, cost, and what it refuses."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from prunelab.common.backbones import scan
from prunelab.common.backbones.scan import scan_flops_vmamba, scan_macs, selective_scan
from prunelab.common.core.errors import PrunelabError


def inputs(
    batch: int = 2, channels: int = 6, states: int = 4, length: int = 23, groups: int = 0, dtype=torch.float64, seed=0
) -> dict[str, Tensor | bool]:
    """Arguments of a scan with everything in it; groups -1 makes B and C constant, 0 leaves them ungrouped."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    weights = {0: (batch, states, length), -1: (channels, states)}.get(groups, (batch, groups, states, length))
    activations = (batch, channels, length)
    return {
        "u": normal(*activations),
        "delta": normal(*activations),
        "A": -normal(channels, states).exp(),
        "B": normal(*weights),
        "C": normal(*weights),
        "D": normal(channels),
        "z": normal(*activations),
        "delta_bias": normal(channels),
        "softplus": True,
    }


def differentiated(implementation: str, gap: Tensor | None = None, **arguments) -> dict[str, Tensor]:
    """Output, state, and the gradients of a fixed random function of both."""
    leaves = {n: v.clone().requires_grad_() for n, v in arguments.items() if isinstance(v, Tensor)}
    rest = {n: v for n, v in arguments.items() if n not in leaves}
    y, state = selective_scan(**leaves, **rest, gap=gap, return_state=True, implementation=implementation)
    draw = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=draw, dtype=v.dtype)).sum() for v in (y, state))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "state": state, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


# -- implementations agree -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [0, 1, 3, 6, -1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("chunk", [1, 700, 1 << 18])
def test_chunked_equals_the_reference_in_values_and_gradients(groups, dtype, tolerance, chunk, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", chunk)
    case = inputs(groups=groups, dtype=dtype)
    assert_same(differentiated("chunked", **case), differentiated("reference", **case), tolerance)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 70),
    chunk=st.integers(1, 4096),
    batch=st.integers(1, 3),
    states=st.integers(1, 5),
    gapped=st.booleans(),
    optional=st.sets(st.sampled_from(["D", "z", "delta_bias"])),
)
def test_any_length_and_any_chunk_agree(length, chunk, batch, states, gapped, optional):
    case = inputs(batch, 4, states, length, seed=length)
    case |= dict.fromkeys(optional)
    gap = torch.arange(batch * length).view(batch, length) % 3 if gapped else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK", chunk)
        got = differentiated("chunked", gap, **case)
    assert_same(got, differentiated("reference", gap, **case), 1e-9)


def test_b_and_c_may_be_grouped_differently():
    case = inputs(groups=2) | {"C": inputs(groups=3)["C"]}
    assert_same(differentiated("chunked", **case), differentiated("reference", **case), 1e-10)


def test_chunked_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 1)
    case = inputs(1, 2, 2, 9)
    softplus = case.pop("softplus")
    gap = torch.tensor([0, 2, 0, 0, 1, 0, 3, 0, 0])

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(case, values, strict=True))
        return selective_scan(**named, softplus=softplus, gap=gap, return_state=True, implementation="chunked")

    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in case.values()])


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_any_argument_alone_can_be_differentiated(name, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 1)
    case = inputs()

    def gradient(implementation: str) -> Tensor:
        leaf = case[name].clone().requires_grad_()
        y = selective_scan(**case | {name: leaf}, implementation=implementation)
        return torch.autograd.grad(y.square().sum(), leaf)[0]

    torch.testing.assert_close(gradient("chunked"), gradient("reference"), atol=1e-10, rtol=1e-10)


def test_memory_layout_does_not_matter():
    case = inputs()
    strided = {n: v.mT.contiguous().mT if isinstance(v, Tensor) and v.ndim == 3 else v for n, v in case.items()}
    assert not strided["u"].is_contiguous()
    assert_same(differentiated("chunked", **strided), differentiated("chunked", **case), 1e-12)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_half_precision_is_scanned_in_float32(implementation):
    case = inputs(dtype=torch.float32)
    short = {n: v.bfloat16() if n in ("u", "delta", "z", "B", "C") else v for n, v in case.items()}
    wide = {n: v.float() if isinstance(v, Tensor) else v for n, v in short.items()}
    y, state = selective_scan(**short, return_state=True, implementation=implementation)
    want, want_state = selective_scan(**wide, return_state=True, implementation=implementation)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, want.bfloat16())
    assert torch.equal(state, want_state)


def test_autocast_does_not_reach_into_the_scan():
    case = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = differentiated("chunked", **case)
    assert_same(got, differentiated("chunked", **case), 1e-6)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("rate", [-1e-12, -1e4, -1e30])
def test_extreme_decays_stay_finite(implementation, rate):
    case = inputs(length=67, dtype=torch.float32)
    case |= {"A": torch.full_like(case["A"], rate), "delta": 50 * case["delta"].abs(), "gap": torch.full((67,), 1000)}
    got = differentiated(implementation, **case)
    assert all(v.isfinite().all() for v in got.values())
    if rate < -1:  # everything before is forgotten: y = <C, dt u B>
        dt = torch.nn.functional.softplus(case["delta"] + case["delta_bias"][:, None])
        y = (case["C"] * case["B"]).sum(1, keepdim=True) * dt * case["u"] + case["D"][:, None] * case["u"]
        torch.testing.assert_close(got["y"], y * torch.nn.functional.silu(case["z"]), atol=1e-3, rtol=1e-4)


def test_a_growing_state_is_scanned_too():
    case = inputs(dtype=torch.float32)
    case |= {"A": 0.05 * case["A"].abs()}
    assert_same(differentiated("chunked", **case), differentiated("reference", **case), 1e-3)


# -- gaps ------------------------------------------------------------------------------------------------------------


def walk(gap: Tensor, u, delta, A, B, C, D, z, delta_bias, softplus) -> tuple[Tensor, Tensor]:
    """The scan with every removed position walked over by itself, each sample and step in turn."""
    dt = torch.nn.functional.softplus(delta + delta_bias[:, None]) if softplus else delta + delta_bias[:, None]
    outputs, states = torch.zeros_like(u), []
    for b in range(len(u)):
        state = torch.zeros_like(A)
        for t in range(u.shape[2]):
            for _ in range(int(gap[b, t])):
                state = torch.exp(dt[b, :, max(t - 1, 0), None] * A) * state  # nothing comes in, the last width stays
            state = torch.exp(dt[b, :, t, None] * A) * state + (dt[b, :, t] * u[b, :, t])[:, None] * B[b, :, t]
            outputs[b, :, t] = (state @ C[b, :, t] + D * u[b, :, t]) * torch.nn.functional.silu(z[b, :, t])
        states.append(state)
    return outputs, torch.stack(states)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_gaps_decay_as_if_every_removed_position_were_walked_over(implementation, softplus, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 200)  # gaps at the borders of chunks too
    case = inputs(length=31)
    case |= {"softplus": softplus, "delta": case["delta"] if softplus else case["delta"].abs() / 4}
    gap = torch.randint(0, 4, (2, 31), generator=torch.Generator().manual_seed(3))
    got = selective_scan(**case, gap=gap, return_state=True, implementation=implementation)
    torch.testing.assert_close(got, walk(gap, **case), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(got[0], selective_scan(**case, implementation=implementation), atol=1e-2)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_one_gap_for_all_samples_no_gap_and_a_gap_at_the_start(implementation):
    case = inputs()
    gap = torch.arange(23) % 4
    both = selective_scan(**case, gap=gap.expand(2, -1), implementation=implementation)
    assert torch.equal(selective_scan(**case, gap=gap, implementation=implementation), both)
    plain = selective_scan(**case, implementation=implementation)
    torch.testing.assert_close(selective_scan(**case, gap=0 * gap, implementation=implementation), plain)
    start = torch.zeros(23).index_fill(0, torch.tensor(0), 7.0)
    torch.testing.assert_close(selective_scan(**case, gap=start, implementation=implementation), plain)


# -- kernel ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch):
    """mamba_ssm's function as it is documented, by the reference; returns the calls it got."""
    calls = []

    def run(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        calls.append((u, delta, A, B, C, D, z, delta_bias, delta_softplus))
        return selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_state=True, implementation="reference"
        )

    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", SimpleNamespace(selective_scan_fn=run))
    monkeypatch.setattr(scan, "_choose", lambda name, *_: name or "kernel")  # as on a machine that has it
    return calls


@pytest.mark.parametrize("gap", [None, torch.arange(23) % 3])
def test_the_kernel_gets_what_it_can_do_and_gaps_by_scaling_the_input(kernel, gap):
    case = inputs(dtype=torch.float32)
    y, state = selective_scan(**case, gap=gap, return_state=True)
    want, want_state = selective_scan(**case, gap=gap, return_state=True, implementation="reference")
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, want_state, atol=1e-4, rtol=1e-4)
    assert len(kernel) == 1
    assert (kernel[0][6] is not None) == (gap is None)  # fused with its gate where nothing keeps it from that


def test_the_kernel_gets_the_types_it_wants(kernel):
    case = {n: v.bfloat16() if isinstance(v, Tensor) else v for n, v in inputs(groups=3).items()}
    constant = case | {"B": inputs(groups=-1)["B"].bfloat16()}
    for arguments, b in ((case, torch.bfloat16), (constant, torch.float32)):
        assert selective_scan(**arguments).dtype == torch.bfloat16
        dtypes = [v.dtype for v in kernel.pop()[:-1]]
        assert dtypes == [torch.bfloat16] * 2 + [torch.float32, b] + [torch.bfloat16, torch.float32] * 2


def test_default_is_chunked_without_a_gpu_and_the_kernel_says_what_it_needs():
    case = inputs()
    assert torch.equal(selective_scan(**case), selective_scan(**case, implementation="chunked"))
    with pytest.raises(PrunelabError, match="mamba-ssm"):
        selective_scan(**case, implementation="kernel")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_all_agree():
    case = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in inputs(dtype=torch.float32).items()}
    gap = torch.arange(23, device="cuda") % 3
    want = selective_scan(**case, gap=gap, implementation="reference")
    for implementation in ("chunked", None):
        got = selective_scan(**case, gap=gap, implementation=implementation)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# -- cost ------------------------------------------------------------------------------------------------------------


def test_macs_by_hand():
    assert scan_macs(1, 1, 1, gated=False, skip=False) == 4
    assert scan_macs(197, 384, 16) == 197 * 384 * 66
    assert scan_macs(197, 384, 16, gated=False) == 197 * 384 * 65
    assert scan_flops_vmamba(197, 384, 16) == 9 * 197 * 384 * 16 + 2 * 197 * 384
    assert scan_flops_vmamba(197, 384, 16, gated=False, skip=False) == 9 * 197 * 384 * 16


@pytest.mark.parametrize(
    ("left_out", "gated", "skip"), [((), True, True), (("z",), False, True), (("D",), True, False)]
)
def test_flop_counters_book_the_formula_on_the_meta_device(left_out, gated, skip):
    case = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in inputs(3, 6, 4, 50).items()}
    case |= dict.fromkeys(left_out)
    with FlopCounterMode(display=False) as counter:
        y, state = selective_scan(**case, gap=torch.ones(50, device="meta"), return_state=True)
    assert (y.shape, state.shape, y.device.type) == ((3, 6, 50), (3, 6, 4), "meta")
    assert counter.get_total_flops() == 2 * 3 * scan_macs(50, 6, 4, gated, skip)


class Tally(TorchDispatchMode):
    """Operations run, and the numbers in the largest of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_chunked_neither_steps_through_time_nor_holds_all_states():
    case = inputs(1, 64, 16, 8192, dtype=torch.float32)
    with Tally() as tally, torch.no_grad():
        selective_scan(**case, implementation="chunked")
    assert tally.operations < 8192 / 8
    assert tally.largest < 64 * 16 * 8192 / 8


# -- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 6)}, "takes u"),
        ({"u": torch.zeros(2, 6, 0)}, "none of them 0"),
        ({"A": torch.zeros(5, 4)}, "A must be real"),
        ({"A": torch.zeros(6, 4, dtype=torch.complex64)}, "A must be real"),
        ({"B": torch.zeros(2, 4, 22)}, "B must be"),
        ({"C": torch.zeros(2, 3, 5, 23)}, "C must be"),
        ({"C": torch.zeros(2, 0, 4, 23)}, "C must be"),
        ({"B": torch.zeros(2, 4, 4, 23)}, "6 channels do not divide into the 4 groups of B"),
        ({"delta": torch.zeros(2, 6, 1)}, "delta must be"),
        ({"z": torch.zeros(2, 6)}, "z must be"),
        ({"D": torch.zeros(1)}, "D must be"),
        ({"delta_bias": torch.zeros(6, 1)}, "delta_bias must be"),
        ({"gap": torch.zeros(22)}, "gap must be"),
        ({"gap": torch.full((23,), -1)}, "cannot be negative"),
        ({"implementation": "fast"}, "no scan implementation 'fast'"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    with pytest.raises(PrunelabError, match=message) as error:
        selective_scan(**inputs() | change)
    assert "\n" not in str(error.value)
