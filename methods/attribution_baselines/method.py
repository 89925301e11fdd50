"""Attribution of a language model's next token to its context by gradients and by attention: what ReAGent (arXiv
2402.00794) is compared with, as its authors ran it.

Gradients are taken at the word embeddings, all points and samples in one batch. Two conventions coexist: that of the
library inseq (probability of the target, L2 norm over the embedding, divided by the sum) and that of ReAGent's own code
(log-probability, softmax over tokens).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.ranking.attribution import Attribution, Explained, likeliest

Score = Literal["probability", "log_probability"]
Rule = Literal["gausslegendre", "riemann_trapezoid", "riemann_left", "riemann_middle", "riemann_right", "average"]
Rows = Literal["last", "all", "rollout"]

TOGETHER = 1024  # tokens of one forward and backward pass


def gradients(model: Explained, points: Tensor, target: int, score: Score = "probability") -> tuple[Tensor, Tensor]:
    """The target's score [S] at embeddings [S, T, D], and its gradient [S, T, D]."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        logits = model.from_embeddings(points)
        scores = (logits.softmax(-1) if score == "probability" else logits.log_softmax(-1))[:, target]
        (slope,) = torch.autograd.grad(scores.sum(), points)
    return scores.detach(), slope


def path(steps: int, rule: Rule = "gausslegendre") -> tuple[Tensor, Tensor]:
    """Places between 0 and 1, and their weights: [S] each. The trapezoid halves the weights at its ends and keeps 1 / S
    elsewhere, as captum has it, so that they do not sum to 1; `average` takes S + 1 places of equal weight."""
    if rule not in get_args(Rule):
        raise PrunelabError(f"there is no rule '{rule}' of integration; use one of {', '.join(get_args(Rule))}")
    if rule == "gausslegendre":
        nodes, parts = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy((1 + nodes) / 2).float(), torch.from_numpy(parts / 2).float()
    if rule == "average":
        return torch.linspace(0, 1, steps + 1), torch.full((steps + 1,), 1 / (steps + 1))
    low = {"riemann_right": 1 / steps, "riemann_middle": 0.5 / steps}.get(rule, 0.0)
    high = {"riemann_left": 1 - 1 / steps, "riemann_middle": 1 - 0.5 / steps}.get(rule, 1.0)
    weights = torch.full((steps,), 1 / steps)
    if rule == "riemann_trapezoid":
        weights[[0, -1]] /= 2
    return torch.linspace(low, high, steps), weights


def integrated(
    model: Explained, embeddings: Tensor, baseline: Tensor, target: int, places: Tensor, weights: Tensor,
    score: Score = "probability",
) -> Tensor:  # fmt: skip
    """Gradients on the way from the baseline to the embeddings [T, D], weighed [S], times the way: [T, D]. Places are
    taken together as far as they hold `TOGETHER` tokens, so that memory does not grow with their number."""
    way, many = embeddings - baseline, max(1, TOGETHER // len(embeddings))
    total = torch.zeros_like(way)
    for places_now, weights_now in zip(places.to(way).split(many), weights.to(way).split(many), strict=True):
        _, slopes = gradients(model, baseline + places_now[:, None, None] * way, target, score)
        total += torch.einsum("s,std->td", weights_now, slopes)
    return total * way


def by_norm(attribution: Tensor) -> Tensor:
    """L2 norm over the embedding [T, D], divided by the sum over tokens: inseq's aggregation."""
    norms = attribution.norm(dim=-1)
    return norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)


def attention_importance(attentions: Tensor, rows: Rows = "all") -> Tensor:
    """What the last token [B, T] pays, of attention [L, B, H, T, T] averaged over heads: in the last layer, on average
    over `all` layers, or through them (`rollout`: the product of half of each layer and half of the identity)."""
    if rows not in get_args(Rows):
        raise PrunelabError(f"attention is read by one of {', '.join(get_args(Rows))}, not '{rows}'")
    maps = attentions.mean(2)
    if rows == "last":
        return maps[-1, :, -1]
    if rows == "all":
        return maps[:, :, -1].mean(0)
    own = torch.eye(maps.shape[-1], device=maps.device, dtype=maps.dtype)
    paid = (0.5 * maps[-1] + 0.5 * own)[:, -1:]  # one row through the layers, from the last one down
    for layer in maps[:-1].flip(0):
        paid = paid @ (0.5 * layer + 0.5 * own)
    return paid.squeeze(1)


class _OfModel(Attribution):
    """What reads the model itself, the service `model` (`Explained`)."""

    services: ClassVar[tuple[str, ...]] = ("model",)

    def importance(self, tokens: Tensor, services: Mapping[str, Any], target: int | None = None) -> Tensor:
        model: Explained = services["model"]
        return self.read(model, tokens, likeliest(tokens, model.next_token_logits, target))

    @abstractmethod
    def read(self, model: Explained, tokens: Tensor, target: int) -> Tensor:
        """Importance [T] of the tokens [T] for the target."""


@dataclass(frozen=True)
class InputXGradient(_OfModel):
    """Embedding times gradient (arXiv 1312.6034), as inseq aggregates it."""

    name: ClassVar[str] = "input_x_gradient"

    def raw(self, model: Explained, tokens: Tensor, target: int) -> Tensor:
        """Attribution [T, D]."""
        embeddings = model.embed(tokens[None])
        return (embeddings * gradients(model, embeddings, target)[1])[0]

    def read(self, model: Explained, tokens: Tensor, target: int) -> Tensor:
        return by_norm(self.raw(model, tokens, target))


@dataclass(frozen=True)
class IntegratedGradients(_OfModel):
    """Integrated gradients (Sundararajan et al., ICML 2017, arXiv 1703.01365) from the baseline token, as inseq runs
    captum.

    Parameters
    ----------
    steps, rule
        Places on the way from the baseline, and how they are laid.
    """

    steps: PositiveInt = 50
    rule: Rule = "gausslegendre"

    name: ClassVar[str] = "integrated_gradients"

    def raw(self, model: Explained, tokens: Tensor, target: int) -> Tensor:
        """Attribution [T, D], whose sum is the fall of the target's probability towards the baseline."""
        embeddings, baseline = model.embed(tokens), model.embed(model.without(tokens))
        return integrated(model, embeddings, baseline, target, *path(self.steps, self.rule))

    def read(self, model: Explained, tokens: Tensor, target: int) -> Tensor:
        return by_norm(self.raw(model, tokens, target))


@dataclass(frozen=True)
class GradientShap(_OfModel):
    """Gradient SHAP (Lundberg and Lee, NIPS 2017, arXiv 1705.07874) as inseq runs captum: gradients at random places on
    the way from the baseline, without noise.

    Parameters
    ----------
    samples
        Places drawn.
    seed
        Of numpy's draws.
    """

    samples: PositiveInt = 5
    seed: NonNegativeInt = 0

    name: ClassVar[str] = "gradient_shap"

    def raw(self, model: Explained, tokens: Tensor, target: int, places: Tensor | None = None) -> Tensor:
        """Attribution [T, D]; places: those to take, [S], instead of draws."""
        if places is None:
            places = torch.from_numpy(np.random.RandomState(self.seed).uniform(0, 1, self.samples)).float()
        embeddings, baseline = model.embed(tokens), model.embed(model.without(tokens))
        even = torch.full_like(places, 1 / len(places))
        return integrated(model, embeddings, baseline, target, places, even)

    def read(self, model: Explained, tokens: Tensor, target: int) -> Tensor:
        return by_norm(self.raw(model, tokens, target))


@dataclass(frozen=True)
class OwnGradients(_OfModel):
    """The gradients of ReAGent's own code (arXiv 2402.00794): of the log-probability, with a softmax over tokens.

    Parameters
    ----------
    kind : {"norm", "signed", "integrated"}
        Norm of the gradient; its product with the embedding, positions added, although it was taken without; or
        integrated from zero.
    steps
        Of `integrated`.
    """

    kind: Literal["norm", "signed", "integrated"] = "norm"
    steps: PositiveInt = 100

    name: ClassVar[str] = "own_gradients"

    def read(self, model: Explained, tokens: Tensor, target: int) -> Tensor:
        embeddings = model.embed(tokens)
        if self.kind == "integrated":
            whole = integrated(
                model, embeddings, torch.zeros_like(embeddings), target, *path(self.steps, "average"),
                "log_probability",
            )  # fmt: skip
            return whole.sum(-1).softmax(-1)
        slope = gradients(model, embeddings[None], target, "log_probability")[1][0]
        signed = (slope * (embeddings + model.positions(len(tokens)))).sum(-1)
        return (slope.norm(dim=-1) if self.kind == "norm" else signed).softmax(-1)


@dataclass(frozen=True)
class AttentionImportance(_OfModel):
    """Attention of the last token (rollout: Abnar and Zuidema, ACL 2020, arXiv 2005.00928).

    Parameters
    ----------
    rows : {"last", "all", "rollout"}
        See `attention_importance`.
    softmax
        Whether a softmax over tokens follows, as in ReAGent's own code, and makes almost all of them equal; inseq has
        none.
    """

    rows: Rows = "all"
    softmax: bool = False

    name: ClassVar[str] = "attention_importance"

    def read(self, model: Explained, tokens: Tensor, target: int) -> Tensor:
        paid = attention_importance(model.attentions(tokens[None]), self.rows)[0].float()
        return paid.softmax(-1) if self.softmax else paid / paid.sum()


@dataclass(frozen=True)
class RandomImportance(Attribution):
    """A softmax of uniform draws: the control that ReAGent's measures (arXiv 2402.00794) are divided by.

    Parameters
    ----------
    seed
        Of the draws.
    """

    seed: NonNegativeInt = 0

    name: ClassVar[str] = "random_importance"

    def importance(self, tokens: Tensor, services: Mapping[str, Any], target: int | None = None) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(tokens), generator=rng).softmax(-1).to(tokens.device)
