"""CATP (Li et al., AAAI 2026): a prompt with examples, pictures among text, is pruned by what its last question asks.

Unit: an image token of the decoder's sequence. Before the decoder every picture keeps tokens that fit its own text and
are diverse; within it, first the pictures of the examples lose tokens, then that of the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveInt
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def rescaled_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines [..., M, N] of the rows of two matrices, rescaled to [0, 1] (assumption: linearly), which keeps the
    objective below monotone."""
    unit = (nn.functional.normalize(x.float(), dim=-1) for x in (a, b))
    left, right = unit
    return (1 + left @ right.mT) / 2


def facility_location(similarity: Tensor, alignment: Tensor, keep: int) -> Tensor:
    """The subset [keep] that greedy search finds for eq. 4: every token [S, S] is as well covered by its most similar
    kept one as can be, and kept ones are aligned [S] with the text. In the order of their choice; ties go to the
    earlier."""
    covered = torch.zeros_like(alignment)  # of nothing kept, 0 (assumption)
    free, picks = torch.zeros_like(alignment), []
    for _ in range(keep):
        gain = (similarity - covered).clamp_min(0).sum(1) + alignment + free
        pick = gain.argmax()
        picks.append(pick)
        covered = torch.maximum(covered, similarity[pick])
        free = free.index_fill(0, pick, float("-inf"))
    return torch.stack(picks) if picks else torch.zeros(0, dtype=torch.long, device=similarity.device)


def attention_growth(now: Tensor, before: Tensor) -> Tensor:
    """By how much the attention of the question's last token to each token grew from one layer to the next [B, N], for
    its rows [B, H, N]; 0 where it fell (eq. 8)."""
    return (now.float().mean(1) - before.float().mean(1)).clamp_min(0)


def likeness(hidden: Tensor, of: Tensor) -> Tensor:
    """Cosine [B, N] of every token [B, N, D] with the mean of those in a mask [B, N]."""
    share = of.float() / of.sum(1, keepdim=True).clamp_min(1)
    mean = (share.unsqueeze(1) @ hidden.float()).squeeze(1)
    return torch.cosine_similarity(hidden.float(), mean.unsqueeze(1), dim=-1)


@dataclass(frozen=True)
class CATP(TokenPruner):
    """CATP (arXiv 2508.07871): contextually adaptive token pruning of interleaved prompts, in two stages.

    The budget is the share of the image tokens that is left in the end, 1 - R: half of what leaves goes before the
    decoder. A prompt's last picture is the question's, others are of examples; a picture's text is what follows it.

    Parameters
    ----------
    layer : int, optional
        K, counted from 0 (assumption): behind it tokens of examples leave, and behind the next the question's. None: a
        fifth of the depth, 6 of 28 and 32 as in the paper; it has 10 for 40 layers.
    alignment, relevance : float
        lambda 1 and 2, the weights of the fit to the text, and to the question.
    context : {"all", "image"}
        What the question's image tokens are compared with: all that is left of the examples, or their image tokens
        (the text leaves it open).
    positions : str
        Tokens keep their position numbers (assumption), or are numbered anew.
    """

    layer: PositiveInt | None = None
    alignment: NonNegativeFloat = 0.7
    relevance: NonNegativeFloat = 0.6
    context: Literal["all", "image"] = "all"
    positions: Positions = "original"

    name: ClassVar[str] = "catp"
    exempt = {"budget": "the first stage removes half of what is to leave"}

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        layer = max(1, round(info.depth / 5)) if self.layer is None else self.layer
        return [Site(0, "packed"), Site(layer + 1, "input"), Site(layer + 2, "input")]

    def requires(self, site: Site) -> frozenset[Signal]:
        if site.index == 1:
            return frozenset({"hidden", "last_row", Reading("last_row", site.layer - 2)})
        return frozenset({"hidden"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        if signals.state.setdefault("budget", budget) != budget:
            raise PrunelabError(f"{self.name} takes one budget, the share of the image tokens that is left in the end")
        if site.where == "packed":
            return self.first_stage(signals, budget)
        assert signals.indices is not None
        # of each token the number of its picture's pair, -1 before the first; the question's comes last
        pair = signals.state["pair"].gather(1, signals.indices)
        last, share = pair.amax(1, keepdim=True), self.share(budget, signals)
        question, image = pair == last, signals.prunable
        mine = image & question
        sizes = signals.state["sizes"]  # image tokens of examples and of the question, at first
        if site.index == 1:
            growth = attention_growth(signals.last_row, signals.at(Reading("last_row", site.layer - 2)))
            of = question if signals.valid is None else question & signals.valid
            scores = (growth + self.relevance * likeness(signals.hidden, of)).masked_fill(mine, float("inf"))
            counts = self.counts(sizes[0], share, mine, signals)
        else:
            others = ~mine if signals.valid is None else ~mine & signals.valid
            context = others & ~question & (image if self.context == "image" else others)
            context = torch.where(context.any(1, keepdim=True), context, others)  # a question without examples
            scores = likeness(signals.hidden, context).masked_fill(image & ~mine, float("inf"))
            counts = self.counts(sizes[1], share, image & ~mine, signals)
        return Plan(signals.keep(counts, scores=scores), positions=self.positions)

    def share(self, budget: Budget, signals: TokenSignals) -> float:
        """The share of the image tokens that is left in the end."""
        if budget.unit == "ratio":
            return budget.amounts[0]
        total = signals.state.setdefault("total", max(signals.available()))
        return budget.count(total) / max(total, 1)

    def counts(self, sizes: Sequence[int], share: float, whole: Tensor, signals: TokenSignals) -> list[int]:
        """How many image tokens stay: a share of so many, and all of a mask [B, N]."""
        if whole.device.type == "meta":  # one picture is the question's, of whose tokens all or a share stay
            stay = [0 if size else n for size, n in zip(sizes, signals.available(), strict=True)]
        else:
            stay = whole.sum(1).tolist()
        return [int(round(share * n, 6)) + more for n, more in zip(sizes, stay, strict=True)]

    def first_stage(self, signals: TokenSignals, budget: Budget) -> Plan:
        """Half of what is to leave, from every picture, by its own text."""
        share, image, hidden = self.share(budget, signals), signals.prunable, signals.hidden
        if image.device.type == "meta":  # where pictures stand is in the values
            signals.state["pair"] = image.long() - 1
            signals.state["sizes"] = [0] * len(image), signals.available()
            stay = [int(round((1 + share) / 2 * n, 6)) for n in signals.available()]
            return Plan(signals.keep(stay, scores=hidden[..., 0]), positions=self.positions)
        places = image.cpu()  # one look: where pictures stand is the prompt's
        known = ~places if signals.valid is None else ~places & signals.valid.cpu()
        keep, pair = torch.zeros_like(image), torch.full(image.shape, -1)
        pictures = None if signals.pictures is None else signals.pictures()
        sizes: tuple[list[int], list[int]] = ([], [])
        for sample in range(len(image)):
            indices = places[sample].nonzero().squeeze(1)
            own = [indices] if pictures is None else list(indices.split([self.length(p) for p in pictures[sample]]))
            for number, part in enumerate(own):
                pair[sample, int(part[0]) :] = number
            sizes[0].append(sum(map(len, own[:-1])))
            sizes[1].append(len(own[-1]))
            words = known[sample]
            for number, part in enumerate(own):
                text = words & (pair[sample] == number)
                text = text if bool(text.any()) else words  # nothing follows: all words are a picture's text
                read = hidden[sample, text.nonzero().squeeze(1).to(hidden.device)].float()
                mean = read.mean(0) if len(read) else hidden.new_zeros(hidden.shape[2])
                part = part.to(image.device)
                tokens, left = hidden[sample, part], int(round((1 + share) / 2 * len(part), 6))
                if left == len(part):
                    keep[sample, part] = True
                    continue
                fit = self.alignment * rescaled_cosine(tokens, mean.unsqueeze(0)).squeeze(1)
                keep[sample, part[facility_location(rescaled_cosine(tokens, tokens), fit, left)]] = True
        signals.state["pair"], signals.state["sizes"] = pair.to(image.device), sizes
        return Plan(signals.keep(mask=keep), positions=self.positions)

    def length(self, picture: TokenSignals) -> int:
        """Tokens that a decoder reads of a picture, newlines included."""
        assert picture.pack is not None
        return picture.pack(torch.ones(1, picture.units)).shape[1]
