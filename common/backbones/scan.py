"""The selective scan of Mamba, the recurrence every vision Mamba spends its time in.

With step widths dt [B, E, L], a state of N numbers per channel follows

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,    y_t = <C_t, h_t> + D u_t,    out_t = y_t silu(z_t),    h_0 = 0

(Gu & Dao 2023, "Mamba", algorithm 2). `selective_scan` is the one entry point; three implementations agree:

- `reference`: the recurrence as written, one step after the other;
- `chunked`: a work-efficient parallel scan (Blelloch 1990) inside chunks that fit the cache, with its own backward
  pass that recomputes the states chunk by chunk. All decays are at most 1 where A <= 0, so nothing can overflow;
- `kernel`: the CUDA kernel of mamba_ssm, if that package is there.

On the meta device nothing is computed and FLOP counters book `scan_macs`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from prunelab.common.core.errors import PrunelabError

Implementation = Literal["reference", "chunked", "kernel"]
CHUNK = 1 << 18  # numbers of state worked on at a time, 1 MiB in float32: chunked lives in the cache


# -- cost ------------------------------------------------------------------------------------------------------------


def scan_macs(length: int, channels: int, states: int, gated: bool = True, skip: bool = True) -> int:
    """Multiply-accumulates of one scan of one sequence.

    Four per position, channel and state: dt A, (dt u) B, the update of the state, the read-out with C. Skip (D u) and
    gate (silu(z)) add one each per position and channel. `scan_flops_vmamba` is the other count in use.
    """
    return length * channels * (4 * states + gated + skip)


def scan_flops_vmamba(length: int, channels: int, states: int, gated: bool = True, skip: bool = True) -> int:
    """FLOPs of one scan of one sequence as VMamba's repository counts them, and papers after it: 9 L E N + L E (+ L E).

    Nine operations per position, channel and state where `scan_macs` has four multiply-adds, i.e. eight. Papers that
    use it add the result to a number of MACs from fvcore, unhalved.
    """
    return length * channels * (9 * states + gated + skip)


torch.library.define("prunelab::selective_scan", "(Tensor u, Tensor A, bool gated, bool skip) -> (Tensor, Tensor)")


@torch.library.impl("prunelab::selective_scan", "Meta")
def _meta_scan(u: Tensor, A: Tensor, gated: bool, skip: bool) -> tuple[Tensor, Tensor]:
    """Shapes alone, for the meta device: output like u [B, E, L] and state [B, E, N]."""
    return torch.empty_like(u), A.new_empty(u.shape[0], *A.shape)


@register_flop_formula(torch.ops.prunelab.selective_scan)
def _scan_flops(u: Sequence[int], A: Sequence[int], gated: bool, skip: bool, *_: Any, **__: Any) -> int:
    return 2 * u[0] * scan_macs(u[2], u[1], A[1], gated, skip)


# -- entry point -----------------------------------------------------------------------------------------------------


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    *,
    gap: Tensor | None = None,
    return_state: Literal[False] = False,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    *,
    gap: Tensor | None = None,
    return_state: Literal[True],
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    *,
    gap: Tensor | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan u [B, E, L] along its last axis; returns y [B, E, L] in u's dtype, and on request the last state [B, E, N].

    Args:
        delta: step widths [B, E, L] before delta_bias [E] is added and softplus applied.
        A: real [E, N], negative for a state that decays.
        B, C: [B, N, L], grouped [B, G, N, L] (channel e reads group e // (E / G)), or constant [E, N].
        D: skip [E]. z: gate [B, E, L], through silu.
        gap: [B, L] or [L], how many positions were removed right before each step. The state decays over them with
            the step width of the position kept before: h <- exp(gap_t dt_{t-1} A) h before step t. The gap before the
            first step has no state to decay.
        implementation: "reference", "chunked" or "kernel"; None takes the kernel on CUDA where mamba_ssm is
            installed, else chunked. The kernel's last state carries no gradient.

    Raises:
        PrunelabError: for shapes that do not fit, negative gaps, an unknown or unavailable implementation.
    """
    _check(u, A, B, C, delta=delta, D=D, z=z, delta_bias=delta_bias, gap=gap)
    chosen = _choose(implementation, u, return_state)
    if u.device.type == "meta":
        y, state = torch.ops.prunelab.selective_scan(u, A, z is not None, D is not None)
        return (y, state) if return_state else y
    if chosen == "kernel" and gap is None:
        y, state = _kernel(u, delta, A, B, C, D, z, delta_bias, softplus)
        return (y, state) if return_state else y

    kind, dtype = u.dtype, torch.promote_types(u.dtype, torch.float32)
    if chosen == "chunked":
        u, delta, z = _time_first(u), _time_first(delta), None if z is None else _time_first(z)
    u, delta, A, B, C = (v.to(dtype) for v in (u, delta, A, B, C))
    dt, time = _widths(delta, delta_bias, softplus, gap)
    match chosen:
        case "reference":
            y, state = _reference(time, dt * u, A, B, C)
        case "chunked":
            y, state = _chunked(time, dt * u, A, B, C)
        case "kernel":  # it drives and decays with one width, so the input is divided by what it would get too much
            y, state = _kernel(dt * u / time.masked_fill(time == 0, 1), time, A, B, C)
    if D is not None:
        y = torch.addcmul(y, u, D.to(dtype)[:, None])
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(kind)
    return (y, state) if return_state else y


def _widths(delta: Tensor, bias: Tensor | None, softplus: bool, gap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Step widths dt [B, E, L], and the time that passes to each step's state: more than dt where there is a gap."""
    dt = delta if bias is None else delta + bias.to(delta.dtype)[:, None]
    if softplus:
        dt = F.softplus(dt)
    if gap is None:
        return dt, dt
    time = dt.clone()  # exp(dt_t A) exp(gap_t dt_{t-1} A) = exp((dt_t + gap_t dt_{t-1}) A)
    time[..., 1:] += gap.to(dt.dtype).reshape(-1, 1, gap.shape[-1])[..., 1:] * dt[..., :-1]
    return dt, time


def _choose(implementation: str | None, u: Tensor, return_state: bool) -> Implementation:
    """The implementation that will run: not the kernel by default where its state may be differentiated."""
    if implementation not in (None, "reference", "chunked", "kernel"):
        raise PrunelabError(f"no scan implementation {implementation!r}; use reference, chunked or kernel")
    usable = u.device.type == "cuda" and u.dtype != torch.float64 and importlib.util.find_spec("mamba_ssm") is not None
    if implementation == "kernel" and not usable and u.device.type != "meta":
        raise PrunelabError("the scan kernel needs mamba-ssm and float32 or shorter on CUDA; use chunked anywhere else")
    if implementation is None:
        return "kernel" if usable and not (return_state and torch.is_grad_enabled()) else "chunked"
    return cast(Implementation, implementation)


def _check(u: Tensor, A: Tensor, B: Tensor, C: Tensor, **others: Tensor | None) -> None:
    """Refuse shapes that do not belong together; see `selective_scan`."""
    if u.ndim != 3 or 0 in u.shape:
        raise PrunelabError(f"a scan takes u [batch, channels, length], none of them 0, not {tuple(u.shape)}")
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.is_complex():
        raise PrunelabError(f"A must be real [channels={channels}, states], not {A.dtype} {tuple(A.shape)}")
    states = A.shape[1]
    for name, weight in (("B", B), ("C", C)):
        groups = max(weight.shape[1], 1) if weight.ndim == 4 else 1
        fits = {(channels, states), (batch, states, length), (batch, groups, states, length)}
        if tuple(weight.shape) not in fits:
            raise PrunelabError(
                f"{name} must be [{batch}, {states}, {length}], [{batch}, groups, {states}, {length}] or "
                f"[{channels}, {states}], not {tuple(weight.shape)}"
            )
        if channels % groups:
            raise PrunelabError(f"{channels} channels do not divide into the {groups} groups of {name}")
    shapes: dict[str, list[tuple[int, ...]]] = {
        "delta": [(batch, channels, length)],
        "z": [(batch, channels, length)],
        "D": [(channels,)],
        "delta_bias": [(channels,)],
        "gap": [(batch, length), (length,)],
    }
    for name, value in others.items():
        if value is not None and tuple(value.shape) not in shapes[name]:
            raise PrunelabError(f"{name} must be {' or '.join(map(str, shapes[name]))}, not {tuple(value.shape)}")
    gap = others["gap"]
    if gap is not None and gap.device.type == "cpu" and bool((gap < 0).any()):  # a look would stop other devices
        raise PrunelabError("gap counts the positions removed before each step; it cannot be negative")


def _grouped(weights: Tensor, batch: int, length: int) -> Tensor:
    """B or C in any of its forms as a view [B, G, N, L]."""
    if weights.ndim == 2:  # constant: every channel a group of its own
        return weights[None, :, :, None].expand(batch, -1, -1, length)
    return weights[:, None] if weights.ndim == 3 else weights


# -- reference -------------------------------------------------------------------------------------------------------


def _reference(time: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence step by step: time (decay) and drive (dt u) [B, E, L], A [E, N]; returns y and the last state."""
    batch, channels, length = drive.shape
    B, C = (
        w.repeat_interleave(channels // w.shape[1], 1) for w in (_grouped(B, batch, length), _grouped(C, batch, length))
    )
    state = drive.new_zeros(batch, *A.shape)
    outputs = []
    for dt, x, b, c in zip(*(v.unbind(-1) for v in (time, drive, B, C)), strict=True):
        state = torch.exp(dt[..., None] * A) * state + x[..., None] * b
        outputs.append((state * c).sum(-1))
    return torch.stack(outputs, -1), state


# -- kernel ----------------------------------------------------------------------------------------------------------


def _kernel(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """All but gaps by mamba_ssm, which wants activations of one type and weights in float32."""
    run = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    B, C = (w.to(u.dtype) if w.ndim > 2 else w.float() for w in (B, C))
    D, delta_bias = (None if w is None else w.float() for w in (D, delta_bias))
    z = None if z is None else z.to(u.dtype)
    y, state = run(u, delta.to(u.dtype), A.float(), B, C, D, z, delta_bias, softplus, True)
    return y, state.detach()  # its backward pass leaves this one's gradient out


# -- chunked ---------------------------------------------------------------------------------------------------------


def _time_first(value: Tensor) -> Tensor:
    """The same [B, E, L] laid out in memory as [L, B, E]: a step is contiguous, and elementwise results keep that."""
    if value.is_contiguous():  # a matrix is transposed in blocks, many times faster than any other permutation
        return value.flatten(0, 1).t().contiguous().unflatten(1, value.shape[:2]).permute(1, 2, 0)
    return value.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def _chunked(time: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The same by chunks; splits the channels into the groups that share B and C."""
    batch, channels, length = drive.shape
    B, C = _grouped(B, batch, length), _grouped(C, batch, length)
    groups = math.lcm(B.shape[1], C.shape[1])
    B, C = (w if w.shape[1] == groups else w.repeat_interleave(groups // w.shape[1], 1) for w in (B, C))
    split = (groups, channels // groups)
    y, state = _Chunked.apply(
        *(v.permute(2, 0, 1).unflatten(2, split).contiguous() for v in (time, drive)),
        A.unflatten(0, split).transpose(1, 2).contiguous(),
        *(w.permute(3, 0, 1, 2).contiguous() for w in (B, C)),
    )
    return y.flatten(2).permute(1, 2, 0), state.transpose(2, 3).flatten(1, 2)


class _Workspace:
    """Room for a chunk of T steps and the operations that solve it, laid out once for all chunks.

    `rows` [T + 1, B, G, N, E] are the states, first the one that enters, and `links` [T, B, G, N, E] the decays between
    them. Channels come last so that every operation runs over contiguous memory.

    The recurrence rows[i + 1] += links[i] rows[i] is solved for every second row from its neighbour, for those by
    themselves, and for the others from them: 2 log2(T) operations on tensors instead of T. One fused operation a step
    instead was 15 % faster on one thread and half as fast on two, for a step is too little work to share.
    """

    def __init__(self, steps: int, like: Tensor, grad: bool = False) -> None:
        self.rows = like.new_empty(steps + 1, *like.shape)
        self.links = like.new_empty(steps, *like.shape)
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []  # links between every second row, every fourth, ...
        ladder = [self.links]
        while len(ladder[-1]) > 1:
            first, second = ladder[-1][1:-1:2], ladder[-1][2::2]
            ladder.append(torch.empty_like(second))
            self.products.append((first, second, ladder[-1]))
        self.forward = _sweep(self.rows, ladder)
        if grad:
            self.grads = torch.empty_like(self.rows)
            self.backward = _sweep(self.grads, ladder, reverse=True)

    def solve(self, state: Tensor, binary: Tensor, time: Tensor, drive: Tensor, b: Tensor) -> None:
        """The states of a chunk, from the one that enters [B, G, N, E] and time, drive [T, B, G, E], b [T, B, G, N].

        binary: A [G, N, E] in units of ln 2, for a power of two takes a quarter of the time of exp on the CPU.
        """
        torch.mul(time.unsqueeze(-2), binary, out=self.links).exp2_()
        torch.mul(drive.unsqueeze(-2), b.unsqueeze(-1), out=self.rows[1:])
        self.rows[0] = state
        for first, second, product in self.products:
            torch.mul(first, second, out=product)
        for target, link, source in self.forward:
            target.addcmul_(link, source)


def _sweep(rows: Tensor, ladder: Sequence[Tensor], reverse: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Operations target += link * source that solve the rows in place, in order; see `_Workspace`.

    reverse: those of rows[i] += links[i] rows[i + 1], from the last row to the first.
    """
    if len(rows) < 2:
        return []
    even, odd = rows[0::2], rows[1::2]
    down, up = ladder[0][0::2], ladder[0][1::2]  # down[i] joins even[i] and odd[i], up[i] joins odd[i] and even[i + 1]
    before, after = (odd, down, even[: len(odd)]), (even[1:], up, odd[: len(up)])
    if reverse:
        before, after = (odd[: len(up)], up, even[1:]), (even[: len(odd)], down, odd)
    return [before, *_sweep(odd, ladder[1:], reverse), after]


class _Chunked(torch.autograd.Function):
    """Scan of time, drive [L, B, G, E] with A [G, N, E] and B, C [L, B, G, N]: y [L, B, G, E], state [B, G, N, E]."""

    @staticmethod
    def forward(ctx: Any, time: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        state = A.new_zeros(drive.shape[1], *A.shape)
        y, binary = torch.empty_like(drive), A * math.log2(math.e)
        keep = any(ctx.needs_input_grad)
        entering = []
        for space, t, x, b, c, out in _chunks(state, time, drive, B, C, y):
            if keep:
                entering.append(state)
            space.solve(state, binary, t, x, b)
            torch.matmul(c.unsqueeze(-2), space.rows[1:], out=out.unsqueeze(-2))
            state = space.rows[-1].clone()
        ctx.save_for_backward(time, drive, A, B, C, *entering)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        time, drive, A, B, C, *entering = ctx.saved_tensors
        grads = [torch.empty_like(v) for v in (time, drive, B, C)]
        d_A, binary = torch.zeros_like(A), A * math.log2(math.e)
        chunks = list(_chunks(entering[0], time, drive, B, C, grad_y.contiguous(), *grads, grad=True))
        for state, (space, t, x, b, c, dy, dt, dx, db, dc) in zip(reversed(entering), reversed(chunks), strict=True):
            space.solve(state, binary, t, x, b)
            states, grad = space.rows[1:], space.grads[1:]
            torch.mul(dy.unsqueeze(-2), c.unsqueeze(-1), out=grad)
            grad[-1] += grad_state
            space.grads[0] = 0
            for target, link, source in space.backward:
                target.addcmul_(link, source)
            grad_state = space.grads[0].clone()
            torch.matmul(b.unsqueeze(-2), grad, out=dx.unsqueeze(-2))
            # a row by a transpose takes a tenth of the time of a matrix by a column
            torch.matmul(x.unsqueeze(-2), grad.mT, out=db.unsqueeze(-2))
            torch.matmul(dy.unsqueeze(-2), states.mT, out=dc.unsqueeze(-2))
            exponent = grad.mul_(space.links).mul_(space.rows[:-1])  # gradient by t A
            torch.sum(torch.mul(exponent, A, out=states), -2, out=dt)
            d_A += exponent.mul_(t.unsqueeze(-2)).sum((0, 1))
        return grads[0], grads[1], d_A, grads[2], grads[3]


def _chunks(state: Tensor, *values: Tensor, grad: bool = False) -> Iterator[tuple[Any, ...]]:
    """The values [L, ...] in chunks of nearly equal length, each with a workspace of its length."""
    length = len(values[0])
    steps = max(CHUNK // state.numel(), 4)
    spaces: dict[int, _Workspace] = {}
    for parts in zip(*(v.tensor_split(-(-length // steps)) for v in values), strict=True):
        taken = len(parts[0])
        if taken not in spaces:
            spaces[taken] = _Workspace(taken, state, grad)
        yield spaces[taken], *parts
