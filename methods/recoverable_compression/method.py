"""Recoverable Compression (Chen et al., AAAI 2025): the question brings back patches that the picture alone gives up.

Unit: a patch of the image encoder, before the projector. Budgets are dynamic: as many patches stay as scores are
outliers. Patches stay by the class token's interest, then by likeness to the question's text; of the rest a few centres
gather their neighbours, and one token all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeFloat, PositiveInt
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

SIMILARITY = "text_similarity"  # the service: last hidden states [B, N, C] of patches -> likeness to the text [B, N]


def outlier_share(scores: Tensor, neighbours: int, contamination: float | Literal["auto"] = "auto") -> float:
    """The share of scores [N] that are outliers by their local density (LOF, scikit-learn's automatic threshold, or as
    many as a share), among so many neighbours. Of fewer than three scores none is."""
    from sklearn.neighbors import LocalOutlierFactor

    if len(scores) < 3:
        return 0.0
    points = scores.detach().float().cpu().numpy().reshape(-1, 1)
    with warnings.catch_warnings():  # equal scores are meant: those of patches that are kept already
        warnings.simplefilter("ignore", UserWarning)
        factor = LocalOutlierFactor(n_neighbors=min(neighbours, len(scores) - 1), contamination=contamination)
        result = factor.fit_predict(points)
    return int((result == -1).sum()) / len(scores)


def class_interest(query: Tensor, keys: Tensor) -> Tensor:
    """Attention [..., N] of a class token, whose heads are taken as one: its query [..., 1, C] and the keys [..., N +
    1, C] of itself, first, and its patches. It does not sum up to 1, since its own share is left out."""
    logits = (query @ keys.transpose(-2, -1)).squeeze(-2) * query.shape[-1] ** -0.5
    return logits.softmax(-1)[..., 1:]


@dataclass(frozen=True)
class Parts:
    """What becomes of one picture's N patches: those kept by the picture and by the text (best first), the rest
    (ascending), the rest's centres (places in it, best first), and of each centre its neighbours [centres, K]
    (places)."""

    vision: Tensor
    text: Tensor
    rest: Tensor
    centres: Tensor
    neighbours: Tensor
    shares: tuple[float, float, float]


def parted(
    interest: Tensor,
    likeness: Tensor,
    keys: Tensor,
    neighbours: tuple[int, int, int] = (20, 20, 10),
    gathered: int = 32,
    weight: float = 50.0,
    centres_of: Literal["width", "rest"] = "width",
    keys_of: Literal["all", "rest"] = "all",
    most: int | None = None,
    least: int = 1,
) -> Parts:
    """Parts of one picture, for its patches' interest [N], likeness to the text [N] and keys [N, C].

    centres_of: what the third share is multiplied by, the features' width, as released, or how many patches rest.
    keys_of: whether a resting patch's place is looked up among all keys, as released, or among those of the rest. most:
    patches that may be kept. least: patches kept by the picture, though none is an outlier (0 in the released code,
    which then may keep none at all).
    """
    total = len(interest)
    vision_share = outlier_share(interest, neighbours[0])
    most = total if most is None else most
    vision = selection.descending(interest)[: min(max(least, int(total * vision_share)), max(most, 1))]
    likeness = likeness.index_fill(0, vision, float(likeness.min()))
    text_share = outlier_share(likeness, neighbours[1])
    left = total - len(vision)
    text = selection.descending(likeness)[: min(int(left * text_share), max(most - len(vision), 0))]
    stays = torch.zeros(total, dtype=torch.bool, device=interest.device)
    stays[vision] = True
    stays[text] = True
    rest = (~stays).nonzero().squeeze(1)
    own, alike = interest[rest], likeness[rest]
    share = outlier_share(own, neighbours[2])
    count = min(int((keys.shape[1] if centres_of == "width" else len(rest)) * share), len(rest))
    centres = selection.descending(own)[:count]
    unit = nn.functional.normalize((keys if keys_of == "all" else keys[rest]).float(), dim=-1)[: len(rest)]
    near = unit[centres] @ unit.T + weight * alike
    near.scatter_(1, centres.unsqueeze(1), float("-inf"))
    near = near.topk(min(gathered, max(len(rest) - 1, 0)), dim=1).indices
    return Parts(vision, text, rest, centres, near, (vision_share, text_share, share))


def mixture(parts: Parts, interest: Tensor, alone: bool = False) -> Mix:
    """The tokens that go on, of the patches' interest [N]: kept patches in raster order, centres with what they gather
    (weighed by interest, not normalised), and one token of all that is neither. Without a centre the last is left out,
    as released, unless `alone`."""
    kept = torch.cat([parts.vision, parts.text]).unique()
    first, count = len(kept), len(parts.centres)
    number = torch.arange(first + count, device=kept.device)
    target, source, weight = [number], [kept, parts.rest[parts.centres]], [torch.ones_like(number, dtype=torch.float32)]
    if count:
        near = parts.rest[parts.neighbours].flatten()
        target.append(number[first:].repeat_interleave(parts.neighbours.shape[1]))
        source.append(near)
        weight.append(interest[near].float())
    outputs = first + count
    if count or alone:
        others = torch.ones(len(parts.rest), dtype=torch.bool, device=kept.device).index_fill(0, parts.centres, False)
        others = parts.rest[others]
        target.append(torch.full_like(others, outputs))
        source.append(others)
        weight.append(interest[others].float())
        outputs += 1
    entries = [torch.cat(x).unsqueeze(0) for x in (target, source, weight)]
    return Mix(entries[0], entries[1], entries[2], outputs)


def together(mixes: Sequence[Mix]) -> Mix:
    """Mixtures of one sample each as one of a batch, padded to the most outputs."""
    outputs = max(mix.outputs for mix in mixes)
    entries = max(mix.target.shape[1] for mix in mixes)

    def padded(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([nn.functional.pad(x, (0, entries - x.shape[1])) for x in values])

    target, source, weight = (padded([getattr(mix, name) for mix in mixes]) for name in ("target", "source", "weight"))
    counts = torch.tensor([mix.outputs for mix in mixes], device=mixes[0].target.device)
    valid = torch.arange(outputs, device=counts.device) < counts.unsqueeze(1)
    return Mix(target, source, weight, outputs, None if bool(valid.all()) else valid)


@dataclass(frozen=True)
class RecoverableCompression(TokenPruner):
    """Recoverable Compression (arXiv 2409.01179): keeps outliers by the class token's interest and by likeness to the
    question, and merges the rest into a few tokens.

    How many stay follows from the picture and the text; the budget is an upper bound on the patches kept. `Budget(1.0)`
    is the paper's method. The likeness of patches to the text is a service, `text_similarity`: from the encoder's last
    hidden states [B, N, C] to [B, N].

    Parameters
    ----------
    vision_neighbours, text_neighbours, rest_neighbours : int
        Of the outlier factors that give the three shares.
    gathered : int
        How many patches a centre gathers.
    weight : float
        Of likeness to the text beside the keys' cosine, when a centre chooses them.
    centres_of : {"width", "rest"}
        What the share of centres is of: the features' width, a slip of the released code, or the patches that rest.
    keys_of : {"all", "rest"}
        Whether the key of a resting patch is looked up by its place in the rest among all keys, another slip, or
        rightly.
    alone : bool
        Whether the token of all others stays where there is no centre; released without.
    """

    vision_neighbours: PositiveInt = 20
    text_neighbours: PositiveInt = 20
    rest_neighbours: PositiveInt = 10
    gathered: PositiveInt = 32
    weight: NonNegativeFloat = 50.0
    centres_of: Literal["width", "rest"] = "width"
    keys_of: Literal["all", "rest"] = "all"
    alone: bool = False

    name: ClassVar[str] = "recoverable_compression"
    services: ClassVar[tuple[str, ...]] = (SIMILARITY,)
    adaptive = True
    positions = "renumber"
    exempt = {
        "keep_all": "outliers decide, not the budget: the rest is merged under any budget",
        "budget": "the budget is an upper bound on patches kept, and merged ones come on top",
        "padding": "a picture has no padding; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "encoded")]

    def readings(self) -> tuple[Reading, Reading, Reading, Reading]:
        """The class token's query and key, the patches' keys and last hidden states, of the encoder's last layer."""
        query, key = (Reading(name, -1, "encoder", "class") for name in ("queries", "keys"))
        return query, key, Reading("keys", -1, "encoder"), Reading("hidden", -1, "encoder")

    def requires(self, site: Site) -> frozenset[Reading]:
        return frozenset(self.readings())

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        crops, first = max(1, len(signals.grids)), signals.prunable.shape[1] - signals.units
        query, key, keys, hidden = (signals.at(reading) for reading in self.readings())
        query, key, keys = (x.transpose(1, 2).flatten(2).float() for x in (query, key, keys))  # heads taken as one
        likeness = signals.services[SIMILARITY](hidden[:, first:])
        keys = keys[:, first:].unflatten(1, (crops, -1))
        interest = class_interest(
            query[:, :crops].unsqueeze(2), torch.cat([key[:, :crops].unsqueeze(2), keys], 2)
        ).flatten(1)
        keys = keys.flatten(1, 2)
        if keys.device.type == "meta":  # how many are outliers is in the values
            return Plan(Gather(torch.arange(first + signals.units, device=keys.device).expand(len(keys), -1)))
        most = budget.count(signals.units)
        mixes = []
        for own, like, key_of in zip(interest, likeness.to(interest), keys, strict=True):
            parts = parted(
                own, like, key_of,
                (self.vision_neighbours, self.text_neighbours, self.rest_neighbours),
                self.gathered, self.weight, self.centres_of, self.keys_of, most,
            )  # fmt: skip
            mixes.append(mixture(parts, own, self.alone))
        return Plan(selection.behind(together(mixes), first), positions="renumber")
