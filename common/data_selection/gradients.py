"""Gradients of single samples at checkpoints of a training, a few at a time, and their random projections.

Shape letters: k samples, P parameters that learn, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.examples import collate
from prunelab.common.data_selection.losses import counted, token_loss
from prunelab.common.data_selection.signals import Forward, logits_of

HELD = 1 << 27  # numbers of gradients, and of a projection, that are in memory at once: half a gigabyte


@dataclass(frozen=True)
class Checkpoint:
    """A training with Adam as it once was.

    parameters: those that learn, by name. mean, square: Adam's moments [P] of them, one parameter behind the other.
    rate: the mean learning rate of the steps that this checkpoint stands for. step: how many steps there were.
    """

    parameters: Mapping[str, Tensor]
    mean: Tensor
    square: Tensor
    rate: float
    step: int

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any, rate: float) -> Checkpoint:
        """A model and its optimiser as they are now; `rate` is what the rates since the last checkpoint were in the
        mean."""
        learned = _learned(model)
        states = [optimizer.state.get(parameter, {}) for parameter in learned.values()]
        if not all("exp_avg_sq" in state for state in states):
            raise PrunelabError(
                "a checkpoint needs Adam's moments of every parameter that learns; take it after a step of"
                " torch.optim.AdamW on them"
            )
        mean, square = (torch.cat([state[name].flatten() for state in states]) for name in ("exp_avg", "exp_avg_sq"))
        kept = {name: parameter.detach().clone() for name, parameter in learned.items()}
        return cls(kept, mean, square, float(rate), int(states[0]["step"]))


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not learned:
        raise PrunelabError("no parameter of the model learns; give it low-rank adapters, or requires_grad_()")
    return learned


@dataclass(frozen=True)
class Gradients:
    """The gradients of the loss of every sample, by itself, at any checkpoint of the model's training."""

    model: nn.Module
    samples: Sequence[Any]
    forward: Forward = logits_of

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, checkpoint: Checkpoint) -> Iterator[Tensor]:
        """Gradients [k, P] in the samples' order, as many at a time as memory is meant to hold."""
        held = max(1, HELD // len(checkpoint.mean))
        with _at(self.model, checkpoint) as learned:
            for start in range(0, len(self.samples), held):
                part = range(start, min(start + held, len(self.samples)))
                yield torch.stack([self._gradient(learned, place) for place in part])

    def _gradient(self, learned: Sequence[nn.Parameter], place: int) -> Tensor:
        batch = {name: value.to(learned[0].device) for name, value in collate([self.samples[place]]).items()}
        with torch.enable_grad():
            loss = _loss(self.forward(self.model, batch), batch["labels"])
            each = torch.autograd.grad(loss, learned, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(each, learned, strict=True)]
        return torch.cat([part.flatten() for part in flat]).float()


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of one sample."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return token_loss(logits, labels).sum() / counted(labels).sum().clamp_min(1)


@contextmanager
def _at(model: nn.Module, checkpoint: Checkpoint) -> Iterator[Sequence[nn.Parameter]]:
    """The model in eval mode with the checkpoint's parameters; its own, and its mode, come back."""
    learned = _learned(model)
    if learned.keys() != checkpoint.parameters.keys():
        raise PrunelabError("the checkpoint is of another model: other parameters learn; take it from this one")
    own = {name: parameter.detach().clone() for name, parameter in learned.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        _set(learned, checkpoint.parameters)
        yield list(learned.values())
    finally:
        _set(learned, own)
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def _set(learned: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in learned.items():
        parameter.copy_(values[name])


def projected(gradients: Tensor, dimensions: int, seed: int = 0) -> Tensor:
    """Products [k, D] of gradients [k, P] with random signs, the same for the same seed, of which a block is drawn at a
    time (Rademacher projection: cosines stay what they were but for an error that falls with 1 / sqrt(D))."""
    rng = torch.Generator(gradients.device).manual_seed(seed)
    result = gradients.new_zeros(len(gradients), dimensions)
    for part in gradients.split(max(1, HELD // dimensions), 1):
        signs = part.new_empty(part.shape[1], dimensions).bernoulli_(0.5, generator=rng)
        result += part @ signs.mul_(2).sub_(1)
    return result
