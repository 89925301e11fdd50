"""EdgeQAT (Shen et al., 2024): small language models trained at four bits, so that attention stays informative.

Weights and activations are rounded at learned step sizes while the model trains. Two losses join cross entropy and
distillation: queries and keys shall keep their entropy, and attention maps the likeness to those of an unquantised
teacher. Tokens that attend little to the first one get activations of fewer bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from prunelab.common.core import attention_interface as seam
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveFloat, Share
from prunelab.common.training.method import Batch, Training, TrainingMethod
from prunelab.common.training.parametrizations import Attachment, FakeQuantised
from prunelab.common.weights.targets import Decision, Target
from prunelab.methods.edgeqat.quantisers import (
    QuantisedAttention,
    TokenQuantised,
    Tokens,
    distribution_loss,
    entropy,
    entropy_loss,
    likeness,
    logits_loss,
)

Bits = Annotated[int, Interval(ge=2, le=8)]


@dataclass(frozen=True)
class EdgeQAT(TrainingMethod):
    """Quantisation-aware training guided by entropy and distribution (arXiv 2402.10787).

    The budget takes nothing away: all weights stay, as codes of `weights` bits. Needs the service `teacher`, the
    unquantised model.

    Parameters
    ----------
    weights
        Bits of the linears' weights, one step size each.
    activations, few
        Bits of activations, and of those of tokens that matter less.
    share
        Of the tokens that matter less; 0 for none. The release never has it together with the losses.
    entropy, distribution
        Weights of the two losses.
    likeness
        Whether training moves attention maps away from the teacher's, as `released`, or `towards` them.
    hard, temperature
        Share of cross entropy beside distillation, and the temperature of that.
    """

    weights: Bits = 4
    activations: Bits = 8
    few: Bits = 4
    share: Share = 0.5
    entropy: NonNegativeFloat = 0.5
    distribution: NonNegativeFloat = 1.0
    likeness: Literal["released", "towards"] = "released"
    hard: Share = 0.5
    temperature: PositiveFloat = 2.0

    name: ClassVar[str] = "edgeqat"
    services: ClassVar[tuple[str, ...]] = ("teacher",)

    def attach(self, training: Training) -> Sequence[Attachment]:
        """Quantisers on every linear's weight, on what attention and MLP read, on what the MLP's last linear reads, and
        in attention."""
        tokens, results = Tokens(), []
        attentions = training.adapter.targets("heads")
        if not attentions:
            raise PrunelabError(f"edgeqat: a {type(training.model).__name__} has no attention that it knows")
        inputs: dict[str, TokenQuantised] = {}
        for target in training.targets:
            results.append(Attachment(target, FakeQuantised(self.weights)))
            if target.span > 1:
                continue  # what reads heads reads them as they are
            source = target.source or target.name
            if source not in inputs:
                inputs[source] = TokenQuantised(tokens, self.activations, self.few, first=not inputs)
            results.append(Attachment(target, inputs[source], "input"))
        for target in attentions:
            held = QuantisedAttention(tokens, self.activations, self.few, self.share)
            results.append(Attachment(target, held, "held"))
        return results

    @contextmanager
    def around(self, training: Training) -> Iterator[None]:
        """Attention is computed by what was attached, and that of the teacher is watched."""
        held = {id(training.model.get_submodule(t.name)): m for t, m in self.attentions(training)}
        layers = [training.model.get_submodule(target.name) for target, _ in self.attentions(training)]

        def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
            result: Tensor = held[id(layer)](q, k, v, mask, scale).to(v.dtype)
            return result

        with ExitStack() as stack:
            stack.enter_context(seam.replaced(layers, attend))
            watched = seam.attention_layers(training.services["teacher"])
            if len(watched) != len(layers):
                raise PrunelabError(
                    f"edgeqat: the teacher has {len(watched)} attention layers and the model {len(layers)}; give the"
                    " model itself, unquantised"
                )
            for layer, module in zip(watched, held.values(), strict=True):
                module.teacher, stop = seam.record(layer)
                stack.callback(stop)
            yield

    def attentions(self, training: Training) -> list[tuple[Target, QuantisedAttention]]:
        """The attention modules by target."""
        return [(a.target, a.module) for a in training.attachments if isinstance(a.module, QuantisedAttention)]

    def loss(self, batch: Batch, outputs: Any, teacher: Any, training: Training) -> Tensor:
        loss: Tensor = self.hard * outputs.loss
        loss = loss + (1 - self.hard) * logits_loss(outputs.logits, teacher.logits, self.temperature)
        informed, alike = [], []
        for _, module in self.attentions(training):
            assert module.seen is not None and module.teacher is not None
            queries, keys, logits = module.seen
            other = module.teacher
            informed.append(entropy(queries, keys))
            alike.append(likeness(logits, other.shown() @ other.keys.transpose(-1, -2) * other.scale))
            module.forget()
            other.clear()
        if self.entropy:
            loss = loss + entropy_loss(informed, self.entropy)
        if self.distribution:
            sign = 1.0 if self.likeness == "released" else -1.0
            loss = loss + distribution_loss(alike, self.distribution, sign)
        return loss

    def finish(self, training: Training) -> Mapping[str, Decision]:
        results = {}
        for target in training.targets:
            quantiser = next(m for m in training.modules(target) if isinstance(m, FakeQuantised))
            code = quantiser.code(training.parameter(target))
            results[target.name] = Decision(torch.ones(target.shape, dtype=torch.bool), code=code)
        return results
