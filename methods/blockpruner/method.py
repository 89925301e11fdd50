"""BlockPruner (Zhong et al., Findings of ACL 2025): remove attention and MLP blocks one by one, each time the one
without which the calibration text is least surprising.

A layer is two blocks, each with its norm, that add to the residual stream; either can leave without the other. After
every removal all that are left are tried anew, since what a block is worth depends on which others are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Decision, Probe, Statistics, Target, Unit, WeightSignals

BlockType = Literal["mix", "mha", "mlp"]

ROLES: Mapping[BlockType, tuple[str, ...]] = {"mix": ("attention", "mlp"), "mha": ("attention",), "mlp": ("mlp",)}


def window_loss(logits: Tensor, tokens: Tensor, padding: int | None = None) -> Tensor:
    """Mean loss of a window of tokens [T] under logits [T, V], a scalar. Targets that are `padding` do not count."""
    return F.cross_entropy(logits[:-1].float(), tokens[1:], ignore_index=-100 if padding is None else padding)


def greedy(
    candidates: Sequence[Target], perplexity: Callable[[Sequence[Target]], float]
) -> Iterator[tuple[Target, list[float]]]:
    """The candidates in the order of their removal, each with the perplexities of all that were tried in its step, NaN
    for those that are gone. The lowest wins, of equal ones the first."""
    gone: list[Target] = []
    while len(gone) < len(candidates):
        tried = [math.nan if c in gone else perplexity([*gone, c]) for c in candidates]
        best = min((i for i, c in enumerate(candidates) if c not in gone), key=tried.__getitem__)
        gone.append(candidates[best])
        yield candidates[best], tried


@dataclass(frozen=True)
class BlockPruner(WeightPruner):
    """Greedy removal of attention and MLP blocks by perplexity, without training (arXiv 2406.10594).

    The budget counts blocks of the whole model: `17removed` are the first 17 of the search.

    Parameters
    ----------
    block_type
        `mix` removes both, `mha` attention alone, `mlp` MLPs alone.
    padding
        Token id whose predictions do not count.
    samples
        Sequences of the calibration set, the first ones, that judge every removal; None takes all.
    """

    block_type: BlockType = "mix"
    padding: NonNegativeInt | None = None
    samples: PositiveInt | None = None

    name: ClassVar[str] = "blockpruner"

    @property
    def sequential(self) -> bool:
        return False  # every block is tried in the whole model

    @property
    def units(self) -> Sequence[Unit]:
        return ("sublayers",)

    def covers(self, target: Target) -> bool:
        return target.role in ROLES[self.block_type]

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """The step at which each block leaves, infinite for those that stay."""
        candidates = [t for role in ROLES[self.block_type] for t in probe.targets if t.role == role]
        gone = probe.budget.pruned(len(candidates))
        if gone >= len(candidates):
            raise PrunelabError(f"blockpruner would remove all blocks under {probe.budget}; keep more")
        search = greedy(candidates, lambda removed: self.perplexity(probe, removed))
        steps = dict.fromkeys((target.name for target in candidates), math.inf)
        steps |= {target.name: float(step) for step, (target, _) in zip(range(gone), search, strict=False)}
        return {name: {"step": torch.tensor(step)} for name, step in steps.items()}

    def perplexity(self, probe: Probe, gone: Sequence[Target]) -> float:
        """Perplexity of the calibration set without some blocks: that of the mean of the windows' mean losses."""
        with probe.trial([(target, Decision(torch.zeros(1, dtype=torch.bool))) for target in gone]):
            losses = [
                window_loss(probe.logits(sample), sample, self.padding) for sample in probe.samples[: self.samples]
            ]
        result = float(torch.stack(losses).mean().exp())
        if math.isnan(result):
            raise PrunelabError(
                f"without {gone[-1].name} the model's loss is NaN; check the weights, use a wider dtype"
            )
        return result

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals["step"].view(1)
