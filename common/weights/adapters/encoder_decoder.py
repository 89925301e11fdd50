"""T5: an encoder and a decoder that reads it, as one chain of blocks.

A calibration sample is a vector of token ids. The encoder reads its first half and the decoder continues with the
second, as in prefix language modelling (# assumption: plain text has no other pairs of source and target). What passes
through the chain is [source | target] along the token axis: blocks of the encoder move the source on, blocks of the
decoder the target, and what the pruned encoder gave is what the decoder then reads.

Heads are no targets: all layers of a stack add one table of position biases, with a column a head, which the first
layer holds; no layer can lose heads that the others keep. Nor are layers: the first holds that table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import Tap
from prunelab.common.weights.adapters.pretrained import Pretrained
from prunelab.common.weights.targets import Observation, Target


class Stage(nn.Module):
    """One block of either stack, on the joint states [1, S + T, D] of source and target."""

    def __init__(self, model: Any, stack: str, index: int) -> None:
        super().__init__()
        self.stack = stack
        self.block = getattr(model, stack).block[index]
        self._model = [model]  # in a list, so that it is no part of this module

    def own(self, states: Tensor) -> Tensor:
        """The states that the block moves on."""
        source, target = halves(states)
        return source if self.stack == "encoder" else target

    def forward(self, states: Tensor) -> Tensor:
        source, target = halves(states)
        model = self._model[0]
        moved = self.own(states)
        bias = getattr(model, self.stack).block[0].layer[0].SelfAttention.compute_bias(moved.shape[1], moved.shape[1])
        if self.stack == "encoder":
            return torch.cat([self.block(source, None, bias)[0], target], 1)
        causal = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
        bias = bias.masked_fill(~causal, torch.finfo(bias.dtype).min)
        read = model.encoder.final_layer_norm(source)
        return torch.cat([source, self.block(target, None, bias, read)[0]], 1)


class T5(Pretrained):
    """T5 and Flan-T5."""

    family = "t5"
    model_classes = ("transformers.models.t5.modeling_t5.T5ForConditionalGeneration",)
    shared = (
        ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"),
        ("EncDecAttention.k", "EncDecAttention.v"),
        ("wi_0", "wi_1"),
    )
    layers = "encoder.block"
    part_depth = 3
    inner = "d_ff"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.stages = [Stage(model, stack, i) for stack, i in self._places()]

    def _places(self) -> list[tuple[str, int]]:
        stacks = ("encoder", "decoder")
        return [(stack, i) for stack in stacks for i in range(len(getattr(self.model, stack).block))]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.stages

    def body(self, block: int) -> nn.Module:
        result: nn.Module = self.stages[block].block
        return result

    def prefix(self, block: int) -> str:
        stack, index = self._places()[block]
        return f"{stack}.block.{index}"

    # -- calibration -------------------------------------------------------------------------------------------------

    def check_sample(self, sample: Tensor) -> None:
        super().check_sample(sample)
        if len(sample) < 4:
            raise PrunelabError("T5 calibrates on at least four token ids: half for the encoder, half for the decoder")

    def _pair(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Source and target [1, S] and [1, T], S = T or T - 1."""
        half = len(sample) // 2
        return sample[None, :half], sample[None, half:]

    def run(self, sample: Tensor) -> Any:
        source, target = self._pair(sample)
        shifted = self.model._shift_right(target)
        states = torch.cat([self.model.encoder.embed_tokens(source), self.model.decoder.embed_tokens(shifted)], 1)
        for stage in self.stages:
            states = stage(states)
        out = self.model.decoder.final_layer_norm(halves(states)[1])
        if self.model.config.scale_decoder_outputs:
            out = out * self.model.model_dim**-0.5
        return SimpleNamespace(logits=self.model.lm_head(out))

    def loss(self, sample: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            raise PrunelabError(
                "T5 calibrates on plain sequences, of which it predicts the second half; leave labels out"
            )
        source, target = self._pair(sample)
        loss: Tensor = self.model(input_ids=source, labels=target).loss
        return loss

    # -- targets -----------------------------------------------------------------------------------------------------

    def _modules(self, block: int, paths: Mapping[str, str]) -> dict[str, Any]:
        mlp = self.body(block).layer[-1].DenseReluDense  # type: ignore[index,union-attr]
        inner = {"gate": mlp.wi_0, "up": mlp.wi_1} if hasattr(mlp, "wi_0") else {"up": mlp.wi}
        return {**inner, "down": mlp.wo}

    def _heads(self, block: int) -> list[Target]:
        return []

    def _layers(self, block: int) -> list[Target]:
        return []

    def _channels(self, block: int) -> list[Target]:
        place = len(self.body(block).layer) - 1  # type: ignore[arg-type]
        return self._structure("channels", block, self.path(block, f"layer.{place}.DenseReluDense"))

    def taps(self, target: Target) -> tuple[str, ...]:
        path = (
            target.role if target.unit == "linear" else f"{target.name.removeprefix(self.prefix(target.block))[1:]}.wo"
        )
        return (f"block.{path}",)

    def observe(
        self, target: Target, seen: Mapping[str, Tap], before: Tensor, after: Tensor, tokens: Tensor
    ) -> Observation:
        own = self.stages[target.block].own
        return super().observe(target, seen, own(before), own(after), tokens)


def halves(states: Tensor) -> tuple[Tensor, Tensor]:
    """Source and target of joint states [1, S + T, D]."""
    source = states.shape[1] // 2
    return states[:, :source], states[:, source:]
