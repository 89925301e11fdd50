"""The head by which SigLIP pools a picture's patches, which checkpoints of language models leave out: the service
`pooling_head`, with weights of the encoder's own repository."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError


class PoolingHead:
    """Pools features that an encoder of the same kind gave.

    Parameters
    ----------
    encoder : Module
        SigLIP's encoder of images with its head. Its last norm and the head alone are used.
    """

    def __init__(self, encoder: Any) -> None:
        if getattr(encoder, "head", None) is None:
            raise PrunelabError("this SigLIP has no pooling head; name a repository of the whole of it")
        self.norm, self.head = encoder.post_layernorm, encoder.head

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """A descriptor [T, D] of each picture, and its probe's attention [T, N], mean over heads, for features [T, N,
        D] before the encoder's last norm."""
        if features.shape[-1] != self.head.probe.shape[-1]:
            raise PrunelabError(
                f"the pooling head reads {self.head.probe.shape[-1]} channels, and the model's encoder has"
                f" {features.shape[-1]}; name the repository of that encoder"
            )
        normed = self.norm(features.to(self.head.probe.dtype))
        pooled, attention = self.head.attention(self.head.probe.expand(len(normed), -1, -1), normed, normed)
        described = pooled + self.head.mlp(self.head.layernorm(pooled))
        return described[:, 0], attention[:, 0]
