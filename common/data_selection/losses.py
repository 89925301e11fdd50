"""What a language model's logits say of every token of a text. All of it is aligned with the tokens: entry j belongs to
token j, and the first token, which nothing predicts, has 0.

Shape letters: B samples, N tokens, V words of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # the label of a token that enters no loss


def counted(labels: Tensor) -> Tensor:
    """Tokens [B, N] that enter the loss."""
    mask = labels != IGNORED
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], 1)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood [B, N] of the labels; 0 where a token enters no loss."""
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
    return F.pad(each, (1, 0))


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy [B, N], in nats, of the distribution that predicted each token."""
    logs = F.log_softmax(logits[:, :-1].float(), -1)
    return F.pad(-(logs.exp() * logs).sum(-1), (1, 0))


def weighted_loss(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The tokens' losses times weight [B] or [B, N], summed, over the number of tokens that enter the loss."""
    weight = weight[:, None] if weight.dim() == 1 else weight
    return (token_loss(logits, labels) * weight).sum() / counted(labels).sum().clamp_min(1)
