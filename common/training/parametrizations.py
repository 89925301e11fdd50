"""What training puts on weights: low-rank factors, masks, gates and fake quantisers.

Each is a module on a weight, held there by `torch.nn.utils.parametrize`: the model's code is left alone, and what was
put on comes off again. A module on a weight maps it, [out, in] whatever its layout, to the weight that is used; a gate
gives `factors`, one for each unit of a structure, by which the weights that read the unit are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training import peft
from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.targets import Quantised, Target

# -- what can be put on ----------------------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.to(soft.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard` with the gradient of `soft`, exactly (Bengio et al., arXiv 1308.3432)."""
    result: Tensor = _StraightThrough.apply(hard, soft)
    return result


class Mask(nn.Module):
    """A fixed mask of weights or units: `Training.prune` sets it."""

    mask: Tensor

    def __init__(self, shape: tuple[int, ...], device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=device))

    def factors(self) -> Tensor:
        return self.mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class LowRank(nn.Module):
    """W + scale * up @ down, for up [out, rank] and down [rank, in] (LoRA, arXiv 2106.09685).

    As there, `down` starts at random and `up` at zero, so that the weight starts as it is. gain: a further factor,
    which is not trained, for methods that damp a layer's change for a while.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float = 1.0) -> None:
        super().__init__()
        if not 1 <= rank <= min(shape):
            raise PrunelabError(
                f"factors of rank {rank} do not fit a weight of {shape[0]} x {shape[1]}; lower the rank"
            )
        self.up = nn.Parameter(torch.zeros(shape[0], rank))
        self.down = nn.Parameter(torch.empty(rank, shape[1]))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale, self.gain = scale, 1.0

    def delta(self) -> Tensor:
        """What is added to the weight."""
        return (self.scale * self.gain) * (self.up @ self.down)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta().to(weight.dtype)


class Gate(nn.Module):
    """The sigmoid of a learned logit for each unit, as steep as `temperature` says."""

    def __init__(self, units: int, start: float = 0.0) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((units,), start))
        self.temperature = 1.0

    def factors(self) -> Tensor:
        return torch.sigmoid(self.temperature * self.logit)


class NoiseGate(nn.Module):
    """A Gaussian factor for each unit, drawn while training, its mean otherwise: variational information bottleneck
    (Dai et al., arXiv 1802.10399)."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(1 + 0.01 * torch.randn(units))
        self.log_variance = nn.Parameter(-9 + 0.01 * torch.randn(units))

    def factors(self) -> Tensor:
        if not self.training:
            return self.mean
        return self.mean + torch.randn_like(self.mean) * (self.log_variance / 2).exp()

    def log_alpha(self) -> Tensor:
        """ln(variance / mean^2) [units]: a unit with more noise than signal, above 0, can go."""
        return self.log_variance - (self.mean.square() + 1e-8).log()

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence from the prior whose variance fits each unit best."""
        return 0.5 * torch.log1p(self.mean.square() / (self.log_variance.exp() + 1e-8)).sum()


class FakeQuantised(nn.Module):
    """The tensor rounded to `bits` signed bits at a learned step size (LSQ, arXiv 1902.08153). On a weight or, at
    `input` or `output`, on activations; the step starts from the first tensor that comes."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise PrunelabError(f"cannot quantise to {bits} bits; give 2 to 16")
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.step = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        start = 2 * x.detach().abs().mean() / math.sqrt(self.high)
        with torch.no_grad():
            self.step.copy_(torch.where(self.step == 0, start, self.step))
        step = straight_through(self.step, self.step / math.sqrt(x.numel() * self.high))  # a share of the gradient
        scaled = (x / step).clamp(self.low, self.high)
        return straight_through(scaled.round(), scaled) * step

    def code(self, weight: Tensor) -> Quantised:
        """The weight [out, in] as the whole numbers that it was used as."""
        numbers = (weight / self.step).clamp(self.low, self.high).round() - self.low
        scale = self.step.detach().float().expand(len(weight), 1)
        zero = torch.full_like(scale, -self.low)
        return Quantised(numbers.to(torch.uint8), scale, zero, self.high.bit_length() + 1, weight.shape[1])


class EightBit(nn.Module):
    """Under all else on a weight [out, in]: codes of eight bits for it, each row by its largest magnitude over 127
    (LLM.int8, arXiv 2208.07339, without what that does to activations)."""

    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        largest = weight.detach().flatten(1).abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("scale", (largest / 127).view(-1, *[1] * (weight.dim() - 1)))
        self.dtype = weight.dtype

    def codes(self, weight: Tensor) -> Tensor:
        """The codes of the weight, in int8."""
        return (weight.float() / self.scale).round().to(torch.int8)

    def forward(self, codes: Tensor) -> Tensor:
        return (codes.float() * self.scale).to(self.dtype)


# -- putting on and taking off ---------------------------------------------------------------------------------------

Where = Literal["weight", "units", "input", "output", "held"]


@dataclass(frozen=True)
class Attachment:
    """A module at a target.

    at: `weight` of a linear or tensor target, whose parameter it maps; `units` of a structure, whose factors it gives;
    `input` or `output` of a layer with a weight, whose activations it maps; `held` by the module of that name, with
    which it is trained and kept, for a method that calls it itself (`TrainingMethod.around`).
    """

    target: Target
    module: nn.Module
    at: Where = "weight"


class _Weight(nn.Module):
    """A module at a weight [out, in], for a parameter in whatever layout, which keeps its data type."""

    def __init__(self, inner: nn.Module, turned: bool) -> None:
        super().__init__()
        self.inner, self.turned = inner, turned

    def forward(self, weight: Tensor) -> Tensor:
        if self.turned:
            return self.inner(weight.t()).t().to(weight.dtype)
        return self.inner(weight.flatten(1)).view_as(weight).to(weight.dtype)


class _Readers(nn.Module):
    """A gate at a parameter that reads the units: its entries along `axis` times their units' factors."""

    unit: Tensor

    def __init__(self, gate: Any, unit: Tensor, axis: int) -> None:
        super().__init__()
        self.gate, self.axis = gate, axis
        self.register_buffer("unit", unit, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        factors = self.gate.factors()[self.unit].to(weight.dtype)
        return weight * factors.view(-1, *[1] * (weight.dim() - 1 - self.axis))

    def inputs(self, x: Tensor) -> Tensor:
        """What the parameter is multiplied with [..., C], which comes to the same."""
        return x * self.gate.factors()[self.unit].to(x.dtype)


class _Bypass(nn.Module):
    """A gate of one unit at a whole block: the share of what the block changes that goes on."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, before: Tensor, after: Any) -> Any:
        if isinstance(after, tuple):
            return (self(before, after[0]), *after[1:])
        return torch.lerp(before, after, self.gate.factors()[0].to(after.dtype))  # exact at 0 and 1


def put_on(adapter: WeightAdapter, attachments: Sequence[Attachment], eight: bool = False) -> Callable[[bool], None]:
    """Put modules on the model. Gives the function that takes them off again: with True the weights stay as they were
    used last, with False they are what lay underneath. eight: weights that get low-rank factors are held in codes of
    eight bits below them, so that what lay underneath comes back rounded."""
    removers: list[Callable[[bool], None]] = []

    def take_off(keep: bool) -> None:
        while removers:
            removers.pop()(keep)

    try:
        for attachment in attachments:
            attachment.module.to(next(adapter.model.parameters()).device)
            _put_on(adapter, attachment, removers, eight and isinstance(attachment.module, LowRank))
    except BaseException:
        take_off(False)
        raise
    return take_off


def parametrized(adapter: WeightAdapter, attachment: Attachment) -> list[tuple[nn.Module, str, nn.Module]]:
    """Owner, name and map of every parameter that an attachment at `weight` or `units` changes."""
    target, module = attachment.target, attachment.module
    if attachment.at == "weight":
        if not target.loose or target.expert >= 0:
            raise PrunelabError(f"nothing can be put on the weight of {target.name}, which is no parameter by itself")
        path, _, name = (target.name if target.unit == "tensor" else f"{target.name}.weight").rpartition(".")
        owner = adapter.model.get_submodule(path)
        return [(owner, name, _Weight(module, target.unit == "linear" and hasattr(owner, "nf")))]
    if target.unit == "experts":
        experts = adapter.model.get_submodule(target.name)
        return [(experts, "down_proj", _Readers(module, torch.arange(target.units), 0))]
    owners: list[tuple[nn.Module, str, nn.Module]] = []
    for reader in adapter.readers(target):
        owner, axis = reader.module, int(not hasattr(reader.module, "nf"))
        unit = torch.zeros(owner.weight.shape[axis], dtype=torch.long)
        unit[reader.entries.flatten()] = torch.arange(target.units).repeat_interleave(reader.entries.shape[1])
        owners.append((owner, "weight", _Readers(module, unit, axis)))
    if not owners:
        raise PrunelabError(f"gates on {target.unit} cannot be trained in a {type(adapter.model).__name__}")
    return owners


def _put_on(
    adapter: WeightAdapter, attachment: Attachment, removers: list[Callable[[bool], None]], eight: bool = False
) -> None:
    target, module = attachment.target, attachment.module
    if isinstance(module, peft.Factors):
        return  # they are there already
    if attachment.at in ("input", "output"):
        owner = adapter.model.get_submodule(target.name.removesuffix(".weight"))
        if not target.loose or not hasattr(owner, "weight"):
            raise PrunelabError(f"activations are mapped at layers with a weight, and {target.name} is none")
        removers.append(_beside(owner, module, attachment.at))
    elif attachment.at == "held":
        removers.append(_beside(adapter.model.get_submodule(target.name), module, "held"))
    elif target.unit == "layers":
        removers.append(_beside(adapter.model.get_submodule(target.name), _Bypass(module), "past"))
    else:
        for owner, name, mapping in parametrized(adapter, attachment):
            mapping = mapping.to(getattr(owner, name).device)
            if peft.has_factors(owner):
                if attachment.at == "weight":
                    raise PrunelabError(f"{target.name} has factors of peft; merge them first, or leave the layer out")
                removers.append(_at_inputs(owner, mapping))  # type: ignore[arg-type]
                continue
            if eight or not parametrize.is_parametrized(owner, name):  # the first to go on takes all off
                removers.append(_in_codes(owner, name) if eight else _off(owner, name))
            parametrize.register_parametrization(owner, name, mapping)


@dataclass(frozen=True)
class _Hooks:
    """Hooks of a module that is registered with its owner by that name: a copy of the owner goes by its own."""

    name: str

    def input(self, owner: Any, args: Any) -> Any:
        return owner._modules[self.name](args[0]).to(args[0].dtype), *args[1:]

    def output(self, owner: Any, args: Any, output: Any) -> Any:
        return owner._modules[self.name](output).to(output.dtype)

    def gate(self, owner: Any, args: Any) -> Any:
        return owner._modules[self.name].inputs(args[0]), *args[1:]

    def past(self, owner: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return owner._modules[self.name](args[0] if args else kwargs["hidden_states"], output)


def _beside(owner: nn.Module, module: nn.Module, at: str) -> Callable[[bool], None]:
    """Register a module with its owner, so that it is trained and kept with it, and let it work at the owner's input or
    output, as a gate of the input, or past the owner; what takes it off again."""
    name = f"_prunelab_{sum(key.startswith('_prunelab_') for key in owner._modules)}"
    owner.add_module(name, module)
    hook: Any = None
    if at in ("input", "gate"):
        hook = owner.register_forward_pre_hook(getattr(_Hooks(name), at))
    elif at != "held":
        hook = owner.register_forward_hook(getattr(_Hooks(name), at), with_kwargs=at == "past")

    def remove(keep: bool) -> None:
        if hook is not None:
            hook.remove()
        del owner._modules[name]

    return remove


def _at_inputs(owner: Any, gate: _Readers) -> Callable[[bool], None]:
    """A gate at a layer that `peft` gave factors, which read the units as well: at what it reads, and in the end on
    all that reads it."""
    beside = _beside(owner, gate, "gate")

    def remove(keep: bool) -> None:
        beside(keep)
        if keep:
            with torch.no_grad():
                for layer in (owner.base_layer, owner.lora_A[peft.adapter(owner)]):
                    layer.weight.copy_(gate(layer.weight))

    return remove


def _in_codes(owner: nn.Module, name: str) -> Callable[[bool], None]:
    """Hold a parameter in codes of eight bits; what takes them off again. It stays the same object throughout."""
    parameter = owner._parameters[name]
    if parameter is None or parametrize.is_parametrized(owner, name):
        raise PrunelabError("only plain weights can be held in eight bits; merge what was put on them first")
    eight, learns, off = EightBit(parameter), parameter.requires_grad, _off(owner, name)
    parameter.requires_grad_(False)
    parameter.data = eight.codes(parameter)
    parametrize.register_parametrization(owner, name, eight, unsafe=True)  # unsafe: of another data type

    def remove(keep: bool) -> None:
        with torch.no_grad():
            value = getattr(owner, name) if keep else eight(parameter)
        off(False)
        parameter.data = value.detach()
        parameter.requires_grad_(learns)

    return remove


def _off(owner: nn.Module, name: str) -> Callable[[bool], None]:
    order = list(owner._parameters)

    def remove(keep: bool) -> None:
        if parametrize.is_parametrized(owner, name):
            cls = type(owner)  # which copies of the model share, and torch takes the parametrization off the class
            own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
            owner.__class__ = type(cls.__name__, cls.__bases__, own)
            parametrize.remove_parametrizations(owner, name, leave_parametrized=keep)
            for key in order:  # the parameter comes back as the last one
                if key in owner._parameters:
                    owner._parameters[key] = owner._parameters.pop(key)

    return remove
