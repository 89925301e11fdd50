"""The mixture of experts of Python source (`common.data.code`): a small Mixtral whose tokens are each sent to two of
eight experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.testbeds.code_lm import CodeLM, exact_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class CodeMoE(CodeLM):
    """Two experts have together the width of the dense model's MLP, so that a token costs the same a layer.

    experts, chosen: of a layer, and those a token is sent to. balance: weight of the loss that spreads tokens over
    experts (Switch Transformer); without it few of them are used, and to remove the others would prove nothing.
    """

    steps: int = 1200
    batch: int = 8
    context: int = 512
    lengths: tuple[int, ...] = (128, 256, 512)
    stages: tuple[float, ...] = (0.5, 0.8)
    depth: int = 4
    inner: int = 176
    recall: float = 0.0
    experts: int = 8
    chosen: int = 2
    balance: float = 0.02

    name: ClassVar[str] = "code_moe"

    def config(self) -> PretrainedConfig:
        from transformers import MixtralConfig

        return MixtralConfig(
            **self.sizes(),
            intermediate_size=self.inner,
            num_local_experts=self.experts,
            num_experts_per_tok=self.chosen,
            sliding_window=None,
        )

    def surprise(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """As for the dense model, and to each token's loss the weighted balance loss of the batch."""
        model.set_attn_implementation(exact_attention())  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16):
            out = model(tokens, use_cache=False, output_router_logits=True)
        nll = F.cross_entropy(out.logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
        return nll + self.balance * out.aux_loss
