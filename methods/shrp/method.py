"""SHRP (Su et al., 2025): attention heads are experts; which of them serve is found by routing, and the others leave.

While the model is fine-tuned, a router in every layer sends each input to one head, and what the head gives goes on
through the layer's MLP, which all heads share and of which little is left. The heads that were chosen most often stay
in the end; the router leaves.

A reconstruction: there is no code, and only the abstract could be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt, PositiveShare, Share
from prunelab.common.training.method import Training, TrainingMethod, masked
from prunelab.common.training.parametrizations import Attachment, straight_through
from prunelab.common.weights import masks
from prunelab.common.weights.targets import Decision, Target, Unit


def top1(logits: Tensor) -> Tensor:
    """The head of each input [B, H] as zeros and a one, with the gradient of the routing probabilities; of equal ones
    the first."""
    chosen = nn.functional.one_hot(logits.detach().argmax(-1), logits.shape[-1])
    return straight_through(chosen, logits.softmax(-1))


def most_used(counts: Tensor, keep: int) -> Tensor:
    """Mask [H] of the heads that were chosen most often; of equal counts the first."""
    kept = torch.zeros(len(counts), dtype=torch.bool)
    kept[counts.cpu().argsort(descending=True, stable=True)[:keep]] = True
    return kept


def neuron_size(weights: Mapping[str, Tensor]) -> Tensor:
    """How large each neuron of an MLP is [C]: the product of the norms of what makes and what reads it."""
    rows = [weights[role].float().norm(dim=1) for role in ("gate", "up") if role in weights]
    return torch.stack(rows).prod(0) * weights["down"].float().norm(dim=0)


class Router(nn.Module):
    """A linear map from a layer's input to its heads. counts: how often each was chosen; kept: those that serve once
    this is settled; gates: of the inputs at hand [B, H]."""

    counts: Tensor
    kept: Tensor

    def __init__(self, width: int, heads: int, pool: str) -> None:
        super().__init__()
        self.linear, self.pool = nn.Linear(width, heads), pool
        self.register_buffer("counts", torch.zeros(heads, dtype=torch.long))
        self.register_buffer("kept", torch.ones(heads, dtype=torch.bool))
        self.counting, self.settled = False, False
        self.gates: Tensor | None = None

    def route(self, hidden: Tensor) -> None:
        """Choose for inputs [B, T, D]."""
        if self.settled:
            self.gates = self.kept.expand(len(hidden), -1)
            return
        pooled = hidden[:, 0] if self.pool == "first" else hidden.mean(1)
        self.gates = top1(self.linear(pooled.to(self.linear.weight.dtype)))
        if self.counting and self.training:
            self.counts += self.gates.detach().sum(0).long()


@dataclass(frozen=True)
class SHRP(TrainingMethod):
    """Heads by their use under Top-1 routing, with a small MLP that they share (arXiv 2512.20635). A reconstruction.

    The budget is the share, or the number, of the heads that stay in each layer; with `expander` of heads alone,
    otherwise of the MLP's neurons, too.

    Parameters
    ----------
    expander
        Neurons that stay of an MLP; None for the budget's share of them. Half a head's width gives the paper's FLOPs.
    dense
        Layers that stay as they are.
    pool
        The router reads the `mean` of a layer's input over tokens, or the `first` token.
    counted
        Share of the routing's steps, the last, in which use is counted.
    settles
        Share of the training, at its end, in which the heads that stay serve every input, as they will.
    """

    expander: PositiveInt | None = None
    dense: tuple[NonNegativeInt, ...] = ()
    pool: Literal["mean", "first"] = "mean"
    counted: PositiveShare = 0.5
    settles: Share = 0.3

    name: ClassVar[str] = "shrp"

    @property
    def units(self) -> Sequence[Unit]:
        return ("heads", "channels")

    def covers(self, target: Target) -> bool:
        return target.block not in self.dense

    # -- what is put on ----------------------------------------------------------------------------------------------

    def attach(self, training: Training) -> Sequence[Attachment]:
        results = []
        for target in training.targets:
            if target.unit == "heads":
                width = training.adapter.weights(target)["q"].shape[1]
                results.append(Attachment(target, Router(width, target.units, self.pool), "held"))
            else:
                results.append(masked(target))
        return results

    def routers(self, training: Training) -> Iterator[tuple[Target, Router]]:
        """Every attention with its router."""
        for attachment in training.attachments:
            if isinstance(attachment.module, Router):
                yield attachment.target, attachment.module

    @contextmanager
    def around(self, training: Training) -> Iterator[None]:
        """Each attention tells its router what it reads, and what reads the heads is given those of the input's
        choice."""
        removers = []
        for target, router in self.routers(training):
            (reader,) = training.adapter.readers(target)
            unit = torch.zeros(reader.entries.numel(), dtype=torch.long)
            unit[reader.entries.flatten()] = torch.arange(target.units).repeat_interleave(reader.entries.shape[1])

            def route(module: nn.Module, args: Any, kwargs: Any, router: Router = router) -> None:
                router.route(args[0] if args else kwargs["hidden_states"])

            def gate(module: nn.Module, args: Any, router: Router = router, unit: Tensor = unit) -> Any:
                assert router.gates is not None
                return args[0] * router.gates[:, unit.to(args[0].device)].unsqueeze(1).to(args[0].dtype), *args[1:]

            attention = training.model.get_submodule(target.name)
            removers.append(attention.register_forward_pre_hook(route, with_kwargs=True))
            removers.append(reader.module.register_forward_pre_hook(gate))
        try:
            yield
        finally:
            for handle in removers:
                handle.remove()

    # -- a training --------------------------------------------------------------------------------------------------

    def start(self, training: Training) -> None:
        for target in training.targets:
            if target.unit == "channels":
                kept = target.units if self.expander is None else min(self.expander, target.units)
                budget = training.target_budget if self.expander is None else Budget(kept, "count")
                scores = neuron_size(training.adapter.weights(target))
                training.prune(target, masks.per_row(scores, self.amount(budget, target)))
            elif self.heads(target, training) < 1:
                raise PrunelabError(f"{training.target_budget} leaves {target.name} no head; keep more")

    def before_step(self, batch: Callable[[], Any], training: Training) -> None:
        routed = training.steps - round(self.settles * training.steps)
        for target, router in self.routers(training):
            if training.step >= routed and not router.settled:
                router.kept.copy_(most_used(router.counts, self.heads(target, training)))
            router.settled = training.step >= routed
            router.counting = training.step >= routed - max(1, round(self.counted * routed))

    def finish(self, training: Training) -> Mapping[str, Decision]:
        results = {
            target.name: Decision(most_used(router.counts, self.heads(target, training)))
            for target, router in self.routers(training)
        }
        return results | {t.name: Decision(training.mask(t).clone()) for t in training.targets if t.unit == "channels"}

    def heads(self, target: Target, training: Training) -> int:
        """Heads that stay."""
        return target.units - self.amount(training.target_budget, target).pruned(target.units)

    @staticmethod
    def amount(budget: Budget, target: Target) -> Budget:
        """The budget of a target."""
        return budget.at(target.block)
