"""PAT (Liu et al., AAAI 2025): prune the hidden width of a language model while it is tuned to instructions.

What enters the residual stream, from the embedding, every attention and every MLP, passes a module that mixes channels
at low rank and closes some of them. One mask for the whole model learns which; its gates sharpen while they learn and
are frozen before they are steps. In the end the modules are multiplied into the weights, and the closed channels leave.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveInt, PositiveShare, Within
from prunelab.common.training.method import Batch, Training, TrainingMethod, low_rank
from prunelab.common.training.parametrizations import Attachment
from prunelab.common.training.schedule import Schedule, Temperature
from prunelab.common.weights.targets import Decision, Target, Unit
from prunelab.methods.pat.sparsification import HiddenMask, Sparsified, identity_loss, mask_loss, modules

WRITERS = ("o_proj", "down_proj")  # linears that write into the residual stream


@dataclass(frozen=True)
class PAT(TrainingMethod):
    """Pruning-aware tuning (arXiv 2408.14721). The budget is the share of the hidden channels: 0.75 are a quarter less.

    Parameters
    ----------
    rank, scale
        Of LoRA on all linears (alpha 4 over 20 is 0.2).
    inner
        Rank of the modules, as a share of the hidden width (200 of 4096 in the paper).
    milestone
        Share of the training at whose end gates would be steps; at the share `freeze` of it the mask stops learning.
    mask
        `learned`, or `fixed`: the last channels close, at `rate`, in the paper's ablation.
    count, orthogonal
        Weights of the loss on the number of open channels, and of the modules' identity loss.
    """

    rank: PositiveInt = 20
    scale: NonNegativeFloat = 0.2
    inner: PositiveShare = 0.05
    milestone: PositiveShare = 1 / 3
    freeze: Within = 0.8
    mask: Literal["learned", "fixed"] = "learned"
    rate: NonNegativeFloat = 2.77
    count: NonNegativeFloat = 10.0
    orthogonal: NonNegativeFloat = 1.0

    name: ClassVar[str] = "pat"
    exempt = {"budget": "of the hidden channels; weights stay, with fewer entries"}

    @property
    def units(self) -> Sequence[Unit]:
        return ("hidden", "linear", "tensor")

    def covers(self, target: Target) -> bool:
        return target.unit != "tensor" or "embed_tokens" in target.name

    def steps(self, whole: int) -> int:
        """The milestone, in steps of a training."""
        return max(2, int(self.milestone * whole))

    def schedule(self, steps: int) -> Schedule:
        return Temperature(self.steps(steps), self.freeze)

    def hidden(self, training: Training) -> Target:
        """The hidden channels."""
        return next(target for target in training.targets if target.unit == "hidden")

    def attach(self, training: Training) -> Sequence[Attachment]:
        hidden = self.hidden(training)
        stays = hidden.units - training.target_budget.pruned(hidden.units)
        mask = HiddenMask(
            hidden.units, stays, self.steps(training.steps), self.freeze, self.mask == "learned", self.rate
        )
        results: list[Attachment] = []
        for target in training.targets:
            if target.unit == "linear":
                results.append(low_rank(training, target, min(self.rank, *target.shape), self.scale))
            if target.unit == "tensor" or target.role.rpartition(".")[2] in WRITERS:
                path = target.name.removesuffix(".weight")
                if getattr(training.model.get_submodule(path), "bias", None) is not None:
                    raise PrunelabError(f"pat: {path} has a bias, which no weight can take in; use a model without")
                rank = max(1, round(self.inner * hidden.units))
                results.append(Attachment(target, Sparsified(mask, rank), "output"))
        return results

    def trainable(self, names: Sequence[str], training: Training) -> Collection[str]:
        own = {name for target in training.targets for name in training.learned(target)}
        return [name for name in names if name in own]

    def before_step(self, batch: object, training: Training) -> None:
        self.hidden_mask(training).step = training.step

    def hidden_mask(self, training: Training) -> HiddenMask:
        """The mask that all modules share."""
        return next(iter(modules(training.attachments).values())).mask

    def loss(self, batch: Batch, outputs: Any, teacher: Any, training: Training) -> Tensor:
        loss: Tensor = outputs.loss
        mask = self.hidden_mask(training)
        if mask.learned:
            loss = loss + mask_loss(mask.proxy, mask.stays, self.count)
        if self.orthogonal:
            results: list[Sparsified] = list(modules(training.attachments).values())
            loss = loss + self.orthogonal * torch.stack([identity_loss(module.down) for module in results]).sum()
        return loss

    def finish(self, training: Training) -> Mapping[str, Decision]:
        results = {}
        merged = modules(training.attachments)
        for target in training.targets:
            everything = torch.ones(target.shape, dtype=torch.bool)
            if target.unit == "hidden":
                results[target.name] = Decision(self.hidden_mask(training).kept().cpu())
            elif target.name in merged:
                weight = training.weight(target)
                module = merged[target.name]
                new = module.merged(weight.T).T if target.unit == "tensor" else module.merged(weight)
                results[target.name] = Decision(everything, {"weight": new.contiguous()})
            else:
                results[target.name] = Decision(everything)
        return results
