"""Rotations of a decoder's spaces that leave what it computes as it is (SliceGPT, arXiv 2401.15024; QuaRot,
arXiv 2404.00456), and channels that leave its residual stream.

An RMS norm without a gain commutes with every rotation. Its gain therefore moves into the linears behind it, and then
the residual stream h becomes h Q: what writes into it gets Q on its outputs, what reads it gets Q on its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.projections import IN, OUT, cut, taken

READS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"}
READS |= {"gate_proj", "up_proj", "gate_up_proj", "shared_expert_gate"}
WRITES = {"o_proj", "down_proj"}
NORMS = ("input_layernorm", "post_attention_layernorm")  # of attention and of the MLP


def commutes(blocks: list[nn.Module], final: nn.Module) -> bool:
    """Whether every norm on the stream is an RMS norm in front of attention or MLP."""
    for block in blocks:
        norms = {name for name, module in block.named_children() if "norm" in name and _rms(module)}
        if norms != set(NORMS) or any("norm" in name and name not in norms for name, _ in block.named_children()):
            return False
    return _rms(final)


def rotate_stream(model: Any, blocks: list[nn.Module], final: nn.Module, rotation: Tensor) -> None:
    """Rotate the residual stream of a decoder by [D, D]; the head gets a weight of its own where it was tied."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False
    _read(embedding.weight, rotation)
    for block in blocks:
        gains = [gain_of(block.get_submodule(norm)) for norm in NORMS]
        for weight, behind in _reading(block):
            _read(weight, rotation, gains[behind])
        for weight, bias in _writing(block):
            _write(weight, rotation)
            if bias is not None:
                _write(bias, rotation)
    _read(head.weight, rotation, gain_of(final))


def stream_size(model: Any, blocks: list[nn.Module], final: Any) -> int:
    """Parameters of each channel of the residual stream; those of a tied head count once."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    size = len(embedding.weight) + (0 if head.weight is embedding.weight else len(head.weight)) + final.weight.dim()
    for block in blocks:
        size += sum(weight.numel() // weight.shape[-1] for weight, _ in _reading(block)) + len(NORMS)
        size += sum(weight.numel() // len(weight) + (bias is not None) for weight, bias in _writing(block))
    return size


def stream_holders(
    model: Any, blocks: list[nn.Module], final: Any
) -> dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    """By name the parameters that hold the channels of the residual stream, and how each is seen as [D, n]."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    reading = [embedding.weight, *(weight for block in blocks for weight, _ in _reading(block)), head.weight]
    norms: list[Any] = [*(block.get_submodule(name).weight for block in blocks for name in NORMS), final.weight]
    writing = [weight for block in blocks for weight, _ in _writing(block)]
    views = [(weight, _turned) for weight in reading] + [(weight, _column) for weight in norms]
    return {known[id(weight)]: (weight, view) for weight, view in [*views, *((weight, _same) for weight in writing)]}


def _turned(weight: Tensor) -> Tensor:
    return weight.mT


def _column(weight: Tensor) -> Tensor:
    return weight.unsqueeze(1)


def _same(weight: Tensor) -> Tensor:
    return weight


def narrow_stream(model: Any, blocks: list[nn.Module], final: nn.Module, kept: Tensor) -> None:
    """Keep these channels [K] of the residual stream. The gains of norms, which divide by a mean over channels, grow by
    the root of how many there were to one that stays: where the others were zero, the model computes what it did."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied, whole = head.weight is embedding.weight, embedding.weight.shape[1]
    embedding.weight = taken(embedding.weight, kept, 1)
    embedding.embedding_dim = len(kept)
    if tied:
        head.weight, head.in_features = embedding.weight, len(kept)
    else:
        cut(head, IN, kept)
    norms: list[Any] = [*(block.get_submodule(name) for block in blocks for name in NORMS), final]
    for norm in norms:
        offset = float(type(norm).__name__.startswith("Gemma"))
        norm.weight = taken(norm.weight, kept, 0)
        with torch.no_grad():
            norm.weight.add_(offset).mul_((whole / len(kept)) ** 0.5).sub_(offset)
    for block in blocks:
        for path, module in block.named_modules():
            name = path.rpartition(".")[2]
            if isinstance(module, nn.Linear) and name in READS | WRITES:
                cut(module, IN if name in READS else OUT, kept)


def _reading(block: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Weights [..., D] that read the stream, with the place of the norm in front of them."""
    for path, module in block.named_modules():
        name, behind = path.rpartition(".")[2], int(not path.startswith("self_attn"))
        fused = name == "experts" and hasattr(module, "gate_up_proj")
        router = name == "gate" and not isinstance(module, nn.Linear) and hasattr(module, "weight")
        if fused:
            yield module.gate_up_proj, behind
        elif router or (name in READS and isinstance(module, nn.Linear)):
            yield module.weight, behind


def _writing(block: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weights [..., D, n] that write into the stream, and their biases [D]."""
    for path, module in block.named_modules():
        name = path.rpartition(".")[2]
        if name == "experts" and hasattr(module, "down_proj"):
            yield module.down_proj, None
        elif name in WRITES and isinstance(module, nn.Linear):
            yield module.weight, module.bias


def _rms(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and getattr(module, "bias", None) is None


def gain_of(norm: Any) -> Tensor:
    """The gain [D] of an RMS norm, which then has none."""
    offset = float(type(norm).__name__.startswith("Gemma"))  # these store what is added to one
    gain: Tensor = norm.weight.detach().double() + offset
    with torch.no_grad():
        norm.weight.fill_(1 - offset)
    return gain


@torch.no_grad()
def _read(weight: Tensor, rotation: Tensor, gain: Tensor | None = None) -> None:
    if weight.device.type != "meta":
        wide = weight.double() if gain is None else weight.double() * gain
        weight.copy_(wide @ rotation.to(weight.device, torch.float64))


@torch.no_grad()
def _write(tensor: Tensor, rotation: Tensor) -> None:
    if tensor.device.type != "meta":
        back = rotation.to(tensor.device, torch.float64).T
        tensor.copy_(back @ tensor.double())


def check_rotation(rotation: Tensor, width: int, name: str) -> None:
    """Refuse a matrix that is no rotation of a space of this width."""
    if rotation.shape != (width, width):
        raise PrunelabError(f"'{name}' is rotated by a matrix of {width} x {width}, not {tuple(rotation.shape)}")
    square = rotation.double().T @ rotation.double()
    if not torch.allclose(square, torch.eye(width, dtype=torch.float64, device=square.device), atol=1e-4):
        raise PrunelabError(f"the rotation of '{name}' is not orthogonal")
