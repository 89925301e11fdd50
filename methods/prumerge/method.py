"""LLaVA-PruMerge and PruMerge+ (Shang et al., ICCV 2025): the patches that the class token finds outstanding, each with
what its neighbours say.

Unit: a feature of the image encoder, before the projector. How many stay is how many attention weights are outliers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeFloat, PositiveInt
from prunelab.common.core.plan import Mix, ModelInfo, Plan, Positions, Site, take
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.common.tokens.video import Outputs, Pooling, joined, pooled_video


def class_attention(query: Tensor, keys: Tensor) -> Tensor:
    """The score of every patch [B, N]: attention of the class token's query [B, C] to keys [B, 1 + N, C], its own
    first, as if there were one head of the whole width."""
    logits = (keys @ query.unsqueeze(2)).squeeze(2) / query.shape[1] ** 0.5
    return logits.softmax(-1)[:, 1:]


def outlier_share(scores: Tensor, whisker: float = 1.5) -> float:
    """Share of the scores, all together, above the third quartile by more than `whisker` interquartile ranges."""
    flat = scores.flatten().double()
    low, high = torch.quantile(flat, flat.new_tensor([0.25, 0.75]))
    return int((flat > high + whisker * (high - low)).sum()) / flat.numel()


def best(scores: Tensor, share: float) -> Tensor:
    """The patches [B, n] of that share of all N, the best first."""
    return selection.descending(scores)[:, : int(scores.shape[1] * share)]


def spatial(patches: int, share: float, density: int = 3) -> Tensor:
    """PruMerge+: patches at even steps, `density` times as many as the share; the last patch is never one."""
    step = int(1 / share) if share else patches
    return torch.arange(0, max(patches - 1, 1), max(1, int(step / density)))


def spatial_fixed(patches: int, share: float) -> Tensor:
    """The same where the share is given, as many as that: from half a step on."""
    step = int(1 / share) if share else patches
    return torch.arange(int(step / 2), max(patches - 1, int(step / 2) + 1), step)[: max(1, int(patches * share))]


def others(kept: Tensor, patches: int) -> Tensor:
    """The patches [B, N - n] that are not kept [B, n], ascending. As released: a patch that is kept twice takes another
    one along, the first of the rest."""
    numbers = torch.arange(patches, device=kept.device).expand(len(kept), -1)
    return numbers.scatter(1, kept, 0).sort(-1).values[:, kept.shape[1] :]


def merged(scores: Tensor, keys: Tensor, kept: Tensor, neighbours: int = 32) -> Mix:
    """Each kept patch [B, n] with the sum of the features of its nearest `neighbours` by cosine of keys [B, N, C], kept
    ones or others, weighted by their scores [B, N]; then one more output, the same sum over all that are not kept."""
    batch, count = kept.shape
    rest = others(kept, scores.shape[1])
    pool = torch.cat([kept, rest], 1)  # [B, n + M]
    unit = torch.nn.functional.normalize(keys, dim=-1)
    likeness = take(unit, kept) @ take(unit, pool).transpose(1, 2)
    likeness.diagonal(dim1=1, dim2=2).fill_(float("-inf"))  # nobody is its own neighbour
    near = selection.descending(likeness)[..., : min(neighbours, pool.shape[1] - 1)].flatten(1)
    near = pool.gather(1, near)
    own = torch.arange(count, device=kept.device)
    target = torch.cat(
        [own, own.repeat_interleave(near.shape[1] // max(count, 1)), own.new_full(rest.shape[1:], count)]
    )
    source = torch.cat([kept, near, rest], 1)
    weight = torch.cat([torch.ones_like(kept, dtype=scores.dtype), scores.gather(1, near), scores.gather(1, rest)], 1)
    return Mix(target.expand(batch, -1), source, weight, count + 1)


KEYS = Reading("keys", -1, "tower")


@dataclass(frozen=True)
class PruMerge(TokenPruner):
    """LLaVA-PruMerge (arXiv 2403.15388): keeps the patches whose class attention is an outlier, adds to each what its
    nearest neighbours say, and puts all others into one more token.

    The budget counts a crop's kept patches without that token. While the number is adaptive it is an upper bound.

    Parameters
    ----------
    plus : bool
        PruMerge+: patches at even steps are kept besides, so that no part of the picture is left out.
    adaptive : bool
        Whether outliers say how many patches stay; otherwise the budget does, half of it evenly spaced with `plus`.
    neighbours : int
        How many nearest patches are added to each.
    whisker : float
        Interquartile ranges above the third quartile from which on a weight is an outlier.
    density : int
        How many times as many patches as outliers PruMerge+ spaces evenly.
    where : {"encoded", "projected"}
        Before the projector as released; or behind it, where frames of a video have been pooled or are about to be, and
        keys and attention are pooled alike.
    attention : {"class", "received"}
        There, whether a patch counts by the class token's attention or, where the encoder has none, by what it
        receives of all patches.
    pooling : {"bilinear", "average", "none"}
        How frames are pooled behind a projector that has not pooled them.
    positions : str
        Merged tokens have no place in the picture, so all are numbered anew.
    """

    plus: bool = False
    adaptive: bool = True
    neighbours: PositiveInt = 32
    whisker: NonNegativeFloat = 1.5
    density: PositiveInt = 3
    where: Literal["encoded", "projected"] = "encoded"
    attention: Literal["class", "received"] = "class"
    pooling: Pooling = "bilinear"
    positions: Positions = "renumber"

    name: ClassVar[str] = "prumerge"
    ascending: ClassVar[bool] = False
    exempt = {
        "budget": "outliers say how many stay, and one more token holds the rest",
        "keep_all": "features of neighbours are added, whatever the budget",
        "padding": "an encoder's crops have no padding",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if self.where == "projected":
            return [Site(0, "projected")]
        return [Site(0, "encoded")]

    def readings(self) -> tuple[Reading, Reading, Reading]:
        """The class token's query and key, and the patches' keys, in the encoder's last layer."""
        names = (("queries", "class"), ("keys", "class"), ("keys", None))
        first, second, third = (Reading(name, -1, "encoder", rows=rows) for name, rows in names)  # type: ignore[arg-type]
        return first, second, third

    def requires(self, site: Site) -> frozenset[Signal]:
        if site.where == "projected":
            return frozenset({"cls_row" if self.attention == "class" else "received", KEYS})
        return frozenset(self.readings())

    def kept(self, scores: Tensor, most: int) -> Tensor:
        """The patches [B, n] that stay, in the order in which they are read, for scores [B, N] of which the outliers
        are counted together."""
        patches = scores.shape[1]
        if not self.adaptive:
            share = (most // 2 if self.plus else most) / patches
            ranked = selection.descending(scores)[:, : most // 2 if self.plus else most]
            even = spatial_fixed(patches, share).to(ranked.device) if self.plus and most > 1 else ranked.new_zeros(0)
            return torch.cat([ranked, even.expand(len(ranked), -1)], 1)
        share = outlier_share(scores, self.whisker)
        ranked = best(scores, share)[:, :most]
        if not self.plus:
            return ranked
        even = spatial(patches, share, self.density).to(ranked.device)
        taken = torch.zeros(patches, dtype=torch.bool, device=ranked.device).index_fill(0, ranked[0], True)
        return torch.cat([ranked, even[~taken[even]].unsqueeze(0)], 1)[:, : max(most, ranked.shape[1])]

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        if site.where == "projected":
            return self.behind_projector(signals, budget)
        signals.one_length(self.name)
        crops, patches = len(signals.grids), signals.units // len(signals.grids)
        query, own, keys = (signals.at(reading).transpose(1, 2).flatten(2) for reading in self.readings())
        special = keys.shape[1] // crops - patches
        keys = keys.unflatten(1, (crops, -1)).flatten(0, 1)[:, special:]  # a crop a row
        query, own = (x[:, :crops].reshape(len(keys), 1, -1) for x in (query, own))
        scores, most = class_attention(query.squeeze(1), torch.cat([own, keys], 1)), budget.count(patches)
        if self.adaptive and scores.device.type != "meta":
            rows = [(scores[i : i + 1], keys[i : i + 1]) for i in range(len(scores))]
            mix = selection.side_by_side([merged(s, k, self.kept(s, most), self.neighbours) for s, k in rows])
        else:
            kept = selection.descending(scores)[:, :most] if self.adaptive else self.kept(scores, most)
            mix = merged(scores, keys, kept, self.neighbours)
        whole = selection.of_crops(mix, crops, patches)
        if special:
            whole = selection.behind(whole, special)
        # crops are neither unpadded nor parted by newlines, as their order is lost
        nowhere = torch.full((len(whole.target), whole.outputs, 3), -1, device="cpu") if crops > 1 else None
        return Plan(whole, layout=nowhere, positions=self.positions)

    def behind_projector(self, signals: TokenSignals, budget: Budget) -> Plan:
        """Of every frame by itself what stays of its pooled tokens."""

        def read() -> list[Tensor]:
            rows = signals.cls_row if self.attention == "class" else signals.received
            return [rows.float().mean(1).unsqueeze(-1), signals.at(KEYS).float().transpose(1, 2).flatten(2)]

        video = pooled_video(signals, self.name, self.pooling, read)
        most = budget.count(video.maps[0].shape[2])
        return video.plan(
            [joined([self.frame(s, k, t, most) for t, (s, k) in enumerate(zip(*each, strict=True))])
             for each in zip(*video.maps, strict=True)]
        )  # fmt: skip

    def frame(self, scores: Tensor, keys: Tensor, number: int, most: int) -> Outputs:
        """What stays of the tokens of a video's frame of that number, for scores [N, 1] and keys [N, C]."""
        row, cells = scores.T, len(scores)
        if self.adaptive and row.device.type == "meta":
            kept = selection.descending(row)[:, :most]
        else:
            kept = self.kept(row, most)
        mix = merged(row, keys.unsqueeze(0), kept, self.neighbours)
        place = torch.cat([kept[0], kept.new_full((1,), cells - 1)])  # all others stand at the frame's end
        return Outputs(mix.target[0], number * cells + mix.source[0], mix.weight[0], number * cells + place)
