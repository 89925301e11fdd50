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

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from common.errors import PrunelabError

Implementation = Literal["reference", "chunked", "kernel"]
CHUNK = 1 << 17  # states [steps, B, E, N] worked on at a time: with its decays 1 MiB in float32, the size of an L2 cache


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


@torch.library.custom_op("prunelab::selective_scan", mutates_args=(), device_types="meta")
def _meta_scan(u: Tensor, A: Tensor, gated: bool, skip: bool) -> tuple[Tensor, Tensor]:
    """Shapes alone, for the meta device: output like u [B, E, L] and state [B, E, N]."""
    return torch.empty_like(u), A.new_empty(u.shape[0], *A.shape)


@register_flop_formula(torch.ops.prunelab.selective_scan)  # type: ignore[untyped-decorator]
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
            installed, else chunked.

    Raises:
        PrunelabError: for shapes that do not fit, negative gaps, an unknown or unavailable implementation.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, gap)
    chosen = _choose(implementation, u)
    if u.device.type == "meta":
        y, state = torch.ops.prunelab.selective_scan(u, A, z is not None, D is not None)
        return (y, state) if return_state else y
    dtype = torch.promote_types(u.dtype, torch.float32)
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if softplus:
        dt = F.softplus(dt)
    drive, time = dt * u, dt
    if gap is not None:  # exp(dt_t A) exp(gap_t dt_{t-1} A): only the decay lasts longer, the input does not
        before = F.pad(dt[..., :-1], (1, 0))
        time = torch.addcmul(dt, gap.to(dtype).reshape(-1, 1, gap.shape[-1]), before)
    scan = {"reference": _reference, "chunked": _chunked, "kernel": _kernel}[chosen]
    y, state = scan(time, drive, A.to(dtype), B.to(dtype), C.to(dtype))
    if D is not None:
        y = torch.addcmul(y, u.to(dtype), D.to(dtype)[:, None])
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state) if return_state else y


def _choose(implementation: str | None, u: Tensor) -> Implementation:
    """The implementation that will run."""
    usable = u.device.type == "cuda" and importlib.util.find_spec("mamba_ssm") is not None
    match implementation:
        case None:
            return "kernel" if usable else "chunked"
        case "kernel" if not usable and u.device.type != "meta":
            raise PrunelabError("the scan kernel needs CUDA tensors and mamba-ssm; install prunelab[gpu] or use chunked")
        case "reference" | "chunked" | "kernel":
            return implementation
    raise PrunelabError(f"no scan implementation {implementation!r}; use reference, chunked or kernel")


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    gap: Tensor | None,
) -> None:
    """Refuse shapes that do not belong together; see `selective_scan`."""
    if u.ndim != 3 or 0 in u.shape:
        raise PrunelabError(f"a scan takes u [batch, channels, length], none of them 0, not {tuple(u.shape)}")
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.is_complex():
        raise PrunelabError(f"A must be real [channels={channels}, states], not {A.dtype} {tuple(A.shape)}")
    states = A.shape[1]
    for name, value in (("B", B), ("C", C)):
        groups = value.shape[1] if value.ndim == 4 else 1
        fits = {(channels, states), (batch, states, length), (batch, groups, states, length)}
        if tuple(value.shape) not in fits:
            raise PrunelabError(
                f"{name} must be [{batch}, {states}, {length}], [{batch}, groups, {states}, {length}] or "
                f"[{channels}, {states}], not {tuple(value.shape)}"
            )
        if channels % groups:
            raise PrunelabError(f"{channels} channels do not divide into the {groups} groups of {name}")
    for name, extra, shapes in (
        ("delta", delta, [(batch, channels, length)]),
        ("z", z, [(batch, channels, length)]),
        ("D", D, [(channels,)]),
        ("delta_bias", delta_bias, [(channels,)]),
        ("gap", gap, [(batch, length), (length,)]),
    ):
        if extra is not None and tuple(extra.shape) not in shapes:
            raise PrunelabError(f"{name} must be {' or '.join(map(str, shapes))}, not {tuple(extra.shape)}")
    if gap is not None and gap.device.type != "meta" and bool((gap < 0).any()):
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
    for t in range(length):
        state = torch.exp(time[:, :, t, None] * A) * state + drive[:, :, t, None] * B[..., t]
        outputs.append((state * C[..., t]).sum(-1))
    return torch.stack(outputs, -1), state


# -- kernel ----------------------------------------------------------------------------------------------------------


def _kernel(time: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The same by mamba_ssm. It decays and drives with one width, so the input is scaled by what it gets too much."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y, state = selective_scan_fn(drive / time.clamp_min(torch.finfo(time.dtype).tiny), time, A, B, C, return_last_state=True)
    return y, state


# -- chunked ---------------------------------------------------------------------------------------------------------


def _chunked(time: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The same by chunks; splits the channels into the groups that share B and C."""
    batch, channels, length = drive.shape
    B, C = _grouped(B, batch, length), _grouped(C, batch, length)
    groups = math.lcm(B.shape[1], C.shape[1])
    B, C = (w if w.shape[1] == groups else w.repeat_interleave(groups // w.shape[1], 1) for w in (B, C))
    split = (groups, channels // groups)
    y, state = _Chunked.apply(time.unflatten(1, split), drive.unflatten(1, split), A.unflatten(0, split), B, C)
    return y.flatten(1, 2), state.flatten(1, 2)


def _ladder(links: Tensor) -> list[Tensor]:
    """Links [M - 1, ...] between M rows, between every second row (the odd ones), every fourth, and so on."""
    rungs = [links]
    while len(links) > 1:
        links = links[1:-1:2] * links[2::2]
        rungs.append(links)
    return rungs


def _recur(rows: Tensor, ladder: Sequence[Tensor], reverse: bool = False) -> None:
    """In place rows[i + 1] += links[i] rows[i] in sequence (reverse: rows[i] += links[i] rows[i + 1], last first).

    Solves every second row from its neighbour, those by themselves, and the others from them: 2 log2(M) operations on
    tensors instead of M.
    """
    if len(rows) < 2:
        return
    even, odd, links = rows[0::2], rows[1::2], ladder[0]
    down, up = links[0::2], links[1::2]  # down[i] joins even[i] and odd[i], up[i] joins odd[i] and even[i + 1]
    if reverse:
        odd[: len(up)].addcmul_(up, even[1:])
        _recur(odd, ladder[1:], reverse)
        even[: len(odd)].addcmul_(down, odd)
    else:
        odd.addcmul_(down, even[: len(odd)])
        _recur(odd, ladder[1:])
        even[1:].addcmul_(up, odd[: len(up)])


class _Chunked(torch.autograd.Function):
    """Scan of time and drive [B, G, E, L] with A [G, E, N] and B, C [B, G, N, L]; returns y [B, G, E, L] and the last
    state [B, G, E, N].

    Inside, a chunk of T steps is a tensor [T + 1, B, G, N, E] whose first row is the state that enters: channels are
    innermost so that every operation runs over contiguous memory.
    """

    @staticmethod
    def forward(ctx: Any, time: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        batch, groups, channels, length = drive.shape
        states = A.shape[2]
        steps = _steps(drive.shape, states)
        exponent = _exponent(A)
        y = drive.new_empty(batch, length, groups, channels)
        state = drive.new_zeros(batch, groups, states, channels)
        entering = []
        for start in range(0, length, steps):
            chunk = slice(start, start + steps)
            entering.append(state)
            _, rows = _states(state, exponent, *(_rows(x, chunk) for x in (time, drive, B)))
            y[:, chunk] = torch.matmul(_rows(C, chunk).unsqueeze(-2), rows[1:]).squeeze(-2).transpose(0, 1)
            state = rows[-1].clone()
        ctx.save_for_backward(time, drive, A, B, C, torch.stack(entering))
        return y.permute(0, 2, 3, 1), state.transpose(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        time, drive, A, B, C, entering = ctx.saved_tensors
        length = drive.shape[-1]
        steps = _steps(drive.shape, A.shape[2])
        exponent, rate = _exponent(A), A.transpose(1, 2).contiguous()
        batch, groups, channels, _ = drive.shape
        d_time, d_drive = (drive.new_empty(batch, length, groups, channels) for _ in range(2))
        d_B, d_C = (drive.new_empty(batch, length, groups, A.shape[2]) for _ in range(2))
        d_A = torch.zeros_like(rate)
        carry = grad_state.transpose(2, 3)
        for k in reversed(range(len(entering))):
            chunk = slice(k * steps, (k + 1) * steps)
            t, x, b, c, dy = (_rows(v, chunk) for v in (time, drive, B, C, grad_y))
            ladder, rows = _states(entering[k], exponent, t, x, b)
            grad = torch.empty_like(rows)  # of the loss by each state
            grad[0] = 0
            torch.mul(dy.unsqueeze(-2), c.unsqueeze(-1), out=grad[1:])
            grad[-1] += carry
            _recur(grad, ladder, reverse=True)
            carry = grad[0].clone()
            g = grad[1:]
            d_drive[:, chunk] = torch.matmul(b.unsqueeze(-2), g).squeeze(-2).transpose(0, 1)
            d_B[:, chunk] = torch.matmul(g, x.unsqueeze(-1)).squeeze(-1).transpose(0, 1)
            d_C[:, chunk] = torch.matmul(rows[1:], dy.unsqueeze(-1)).squeeze(-1).transpose(0, 1)
            g.mul_(ladder[0]).mul_(rows[:-1])  # by the exponent t A
            d_time[:, chunk] = (g * rate).sum(-2).transpose(0, 1)
            d_A += g.mul_(t.unsqueeze(-2)).sum((0, 1))
        return (
            d_time.permute(0, 2, 3, 1),
            d_drive.permute(0, 2, 3, 1),
            d_A.transpose(1, 2),
            d_B.permute(0, 2, 3, 1),
            d_C.permute(0, 2, 3, 1),
        )


def _steps(shape: Sequence[int], states: int) -> int:
    """Steps of a chunk: with the row that enters a power of two, as many as fit `CHUNK`, and at least 15."""
    batch, groups, channels, length = shape
    fit = max(CHUNK // (batch * groups * channels * states), 16)
    return min((1 << (fit.bit_length() - 1)) - 1, length)


def _exponent(A: Tensor) -> Tensor:
    """A [G, E, N] as [G, N, E], for powers of two: exp2 is several times faster than exp on the CPU."""
    return A.transpose(1, 2).contiguous() * math.log2(math.e)


def _rows(value: Tensor, chunk: slice) -> Tensor:
    """A chunk of [B, G, E, L], time first: [T, B, G, E]."""
    return value[..., chunk].permute(3, 0, 1, 2).contiguous()


def _states(state: Tensor, exponent: Tensor, time: Tensor, drive: Tensor, b: Tensor) -> tuple[list[Tensor], Tensor]:
    """The ladder of decays of a chunk and its states [T + 1, B, G, N, E], from the one that enters to the last."""
    decay = (time.unsqueeze(-2) * exponent).exp2_()
    rows = torch.empty((len(time) + 1, *state.shape), dtype=state.dtype, device=state.device)
    rows[0] = state
    torch.mul(drive.unsqueeze(-2), b.unsqueeze(-1), out=rows[1:])
    ladder = _ladder(decay)
    _recur(rows, ladder)
    return ladder, rows
