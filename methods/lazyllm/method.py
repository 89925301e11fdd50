"""LazyLLM (Fu et al., 2024): a prompt is computed only as far as the next word needs it.

Unit: a token of the prompt. Before a few layers of the decoder the tokens that the newest one attends to least stop;
their hidden states wait there. Every word that is generated chooses anew, and what it wants back goes on from where it
waited, so that no token is computed twice in any layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, Share
from prunelab.common.core.plan import ModelInfo, Rest, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def confidence(last_row: Tensor) -> Tensor:
    """Eq. 1, s_i [B, N]: the attention [B, H, N] that the newest token pays to each token, averaged over heads.

    Eq. 1 writes the indices the other way round; the text around it, and sense, say that the newest token asks.
    """
    return last_row.mean(1)


def boundaries(depth: int, shares: Sequence[float]) -> tuple[int, ...]:
    """The layers, from 0, before which tokens stop: behind these shares of a decoder of that depth."""
    return tuple(sorted({max(1, int(round(share * depth, 6))) for share in shares}))


@dataclass(frozen=True)
class LazyLLM(TokenPruner):
    """LazyLLM (arXiv 2407.14057): progressive pruning of the prompt, at its reading and at every word.

    The budget is the share of the active tokens that goes on at each pruning layer: one minus the paper's k-th
    percentile. The paper does not print its own; `schedule` is that of its sketch.

    Parameters
    ----------
    layers : tuple of int, optional
        The pruning layers, from 0, each the first that sees fewer tokens; None: behind `shares` of the depth.
    shares : tuple of float
        For 32 layers the groups 1-9, 10-19, 20-28 and 29-32 of figure 7, in other words the 30, 30, 30 and 10 % of
        figure 4.
    rest : {"defer", "drop"}
        `defer` lets tokens come back; with `drop` the reading of the prompt decides for good, which with one early
        layer is the static pruning that the paper compares with.
    """

    layers: tuple[NonNegativeInt, ...] | None = None
    shares: tuple[Share, ...] = (0.3, 0.6, 0.9)
    rest: Rest = "defer"

    name: ClassVar[str] = "lazyllm"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if info.depth < 2:
            raise PrunelabError("lazyllm prunes between layers; use a model of two layers or more")
        layers = boundaries(info.depth, self.shares) if self.layers is None else self.layers
        return [Site(layer, "input") for layer in layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"last_row"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        # assumption: of the active tokens the best share stays, equal ones in their order; the paper drops what lies
        # below a percentile, which leaves ties and the rounding open. The newest token always stays.
        return confidence(signals.last_row)


def schedule(sites: int = 3, dropped: float = 0.3) -> Budget:
    """The budget of figure 4: at each boundary that share of the prompt's tokens leaves, 0.7, 0.4 and 0.1 are left."""
    left = [1 - dropped * (i + 1) for i in range(sites)]
    return Budget(tuple(round(now / before, 6) for now, before in zip(left, [1.0, *left[:-1]])))
