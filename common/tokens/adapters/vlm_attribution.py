"""Which patches of an image or video the tokens of a language model stand for, whatever was dropped or merged on the
way: what a picture of the kept tokens is drawn from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunelab.common.core.plan import Gather, Mix, Site
from prunelab.common.tokens.adapters.vlm_prompt import Encoded

Masses = dict[str, list[Tensor]]  # by modality, of each image or video [crops, patches]


@dataclass
class Attribution:
    """Which patches the tokens of a prompt stand for, to be followed back from behind any site.

    Every token has the mass 1, which is handed back to what it was made of: to the one it was, or to those that were
    merged by their weights. The masses of a frame's patches add up to the tokens that the frame has left.

    encoded, visual: what the encoder gave, and where it stood in the prompt, by modality. steps: for each site which
    tokens [B, K] behind it are visual, and how masses over them become masses over those before it. root: how masses
    over the tokens that the first step started from become masses over patches; None where that is the whole prompt.
    """

    encoded: Mapping[str, Encoded]
    visual: Mapping[str, Tensor]
    steps: list[tuple[Site, Tensor, Callable[[Tensor], Tensor]]]
    root: Callable[[Tensor], Masses] | None = None

    def dense(self, sample: int) -> Masses:
        """The masses of a sample's patches where nothing is pruned."""
        whole = functools.reduce(torch.logical_or, self.visual.values())
        return self._unpacked(self._only(whole, sample))

    def behind(self, sample: int) -> list[tuple[Site, Masses]]:
        """What is left of a sample behind each site."""
        results = []
        for number, (site, visual, _) in enumerate(self.steps):
            mass = self._only(visual, sample)
            for _, _, back in reversed(self.steps[: number + 1]):
                mass = back(mass)
            results.append((site, (self.root or self._unpacked)(mass)))
        return results

    @staticmethod
    def _only(visual: Tensor, sample: int) -> Tensor:
        mass = torch.zeros(visual.shape)
        mass[sample] = visual[sample].cpu().float()
        return mass

    def _unpacked(self, mass: Tensor) -> Masses:
        """Masses over patches for masses [B, N] over the prompt."""
        results: Masses = {}
        for modality, encoded in self.encoded.items():
            visual = self.visual[modality].cpu()
            owners = encoded.owners(visual.sum(1).tolist())
            parts = [torch.zeros(length) for length in encoded.lengths]
            for row, own, places in zip(mass, owners, visual, strict=True):
                for i, part in zip(own, row[places].split([encoded.lengths[i] for i in own]), strict=True):
                    parts[i] = parts[i] + part
            results[modality] = [patches.squeeze(2) for patches in encoded.patches(parts)]
        return results


def spread(reduce: Gather | Mix, mass: Tensor, units: int) -> Tensor:
    """Masses [B, K] of a reduction's outputs handed back to its `units` units [B, N], by their weights."""
    out = torch.zeros(len(mass), units)
    if isinstance(reduce, Gather):
        return out.scatter_add(1, reduce.index.cpu(), mass)
    weight = reduce.weight.detach().float().cpu()
    return out.scatter_add(1, reduce.source.cpu(), weight * mass.gather(1, reduce.target.cpu()))


def handed_back(
    mass: Tensor, turn: Tensor, reduce: Gather | Mix, row: int, shape: Sequence[int], special: int = 0
) -> Tensor:
    """Masses of the tokens of one image, row `row` of a reduction, handed back to its patches. Its units are of `shape`
    (crops, units), the `special` first of each crop no patches. Token i is the `turn[i]`-th of the outputs that count,
    or where that is -1 a newline."""
    real = torch.ones(reduce.outputs, dtype=torch.bool) if reduce.valid is None else reduce.valid[row].cpu()
    outputs = torch.zeros(int(real.sum()) + 1).scatter_add(0, turn.cpu() % (int(real.sum()) + 1), mass)[:-1]
    whole = torch.zeros(1, reduce.outputs).index_put((torch.tensor(0), real.nonzero().squeeze(1)), outputs)
    if isinstance(reduce, Gather):
        reduce = Gather(reduce.index[row : row + 1])
    else:
        reduce = replace(
            reduce, **{n: getattr(reduce, n)[row : row + 1] for n in ("target", "source", "weight")}, valid=None
        )
    return spread(reduce, whole, shape[0] * shape[1]).view(*shape)[:, special:]
