"""ShortGPT (Men et al., Findings of ACL 2025): delete the layers that hardly turn the hidden state.

A layer's block influence is one minus the cosine between what goes into it and what comes out, a token. The layers of
least influence leave in one shot; nothing makes up for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.options import PositiveInt
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Probe, Statistics, Target, Unit, WeightSignals

Metric = Literal["cosine", "angular", "magnitude"]


def block_influence(before: Tensor, after: Tensor, metric: Metric = "cosine") -> Tensor:
    """Influence [...] of a layer on every token, from hidden states [..., D] in front of it and behind: one minus
    their cosine (Eq. 1), the angle between them as a share of a half turn, or the magnitude of what the layer adds as a
    share of what comes out. As released, a cosine with a zero vector is 0.5."""
    before, after = before.float(), after.float()  # products of norms overflow half precision
    if metric == "magnitude":
        return (after - before).norm(dim=-1) / after.norm(dim=-1).clamp_min(torch.finfo(after.dtype).tiny)
    norms = before.norm(dim=-1) * after.norm(dim=-1)
    cosine = torch.where(norms == 0, 0.5, (before * after).sum(-1) / norms)
    return 1 - cosine if metric == "cosine" else cosine.clamp(-1, 1).arccos() / math.pi


@dataclass(frozen=True)
class ShortGPT(WeightPruner):
    """Removal of whole layers by block influence, without training (arXiv 2403.03853).

    Parameters
    ----------
    stride
        Tokens of a piece: calibration documents are cut into pieces that are read from position 0.
    metric
        `cosine`, the paper's, `angular`, which the authors' metric offers as well, or `magnitude`: relative magnitude,
        a baseline of the paper (arXiv 2312.09299).
    final_norm
        As released, the last layer's output is taken behind the final norm, as libraries report it. False takes what
        the layer itself puts out.
    """

    stride: PositiveInt = 256
    metric: Metric = "cosine"
    final_norm: bool = True

    name: ClassVar[str] = "shortgpt"

    @property
    def sequential(self) -> bool:
        return False  # every layer is measured in the whole model

    @property
    def units(self) -> Sequence[Unit]:
        return ("layers",)

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """The influence of every layer, summed over all tokens as released: the order is that of the paper's mean."""
        influence = [torch.zeros((), dtype=torch.float64) for _ in probe.targets]
        for sample in probe.samples:
            for piece in sample.split(self.stride):
                states = probe.hidden_states(piece, self.final_norm)
                for i, target in enumerate(probe.targets):
                    before, after = states[target.block], states[target.block + 1]
                    influence[i] += block_influence(before, after, self.metric).sum().cpu()
        return {t.name: {"influence": value} for t, value in zip(probe.targets, influence, strict=True)}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals["influence"].view(1)
