"""Mixtures of experts as transformers keeps them: the experts of a block are fused parameters, `gate_up_proj`
[E, 2I, D] and `down_proj` [E, D, I], and their linears and units are views of these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import Tap
from prunelab.common.weights.adapters.pretrained import Pretrained
from prunelab.common.weights.adapters.projections import taken
from prunelab.common.weights.targets import Decision, Observation, Routing, Target

_COUNTS = ("num_local_experts", "num_experts")
SERVED = "served_by"  # buffer of experts some of which are used in the places of others


class Mixtures(Pretrained):
    """Blocks of which some, or all, have experts in place of an MLP."""

    experts: ClassVar[str] = "mlp.experts"
    router: ClassVar[str] = "mlp.gate"
    experts_norm: ClassVar[str] = "post_attention_layernorm"

    # -- targets -----------------------------------------------------------------------------------------------------

    def _linear(self, block: int) -> list[Target]:
        results = super()._linear(block)
        experts = self._part(block, self.experts)
        if experts is None:
            return results
        count, width, inner = experts.down_proj.shape
        for index in range(count):
            name = f"{self.prefix(block)}.{self.experts}.{index}"
            for role, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                source = f"{name}.down" if role == "down" else f"{name}.gate"
                path = f"{self.experts}.{role}"
                part = self._part_of(path)
                results.append(
                    Target("linear", f"{name}.{role}", block, path, shape, source=source, expert=index, part=part)
                )
        return results

    def _experts(self, block: int) -> list[Target]:
        experts = self._part(block, self.experts)
        if experts is None or hasattr(experts, SERVED):
            return []
        count, width, inner = experts.down_proj.shape
        name, least = f"{self.prefix(block)}.{self.experts}", self._part(block, self.router).top_k
        return [Target("experts", name, block, "experts", (count,), 3 * inner * width + width, least=least)]

    # -- what a target reads -----------------------------------------------------------------------------------------

    def taps(self, target: Target) -> tuple[str, ...]:
        if target.expert >= 0:
            return (self.experts,)
        return (self.experts, self.router, self.experts_norm) if target.unit == "experts" else super().taps(target)

    def observe(
        self, target: Target, seen: Mapping[str, Tap], before: Tensor, after: Tensor, tokens: Tensor
    ) -> Observation:
        if target.expert < 0 and target.unit != "experts":
            return super().observe(target, seen, before, after, tokens)
        before, after = before.flatten(0, -2), after.flatten(0, -2)
        if target.expert >= 0:
            hidden, chosen, _ = seen[self.experts][0]
            rows = (chosen == target.expert).any(-1)  # the tokens sent to it
            inputs = hidden.flatten(0, -2)[rows]
            if target.role.endswith(".down"):
                inputs = _inner(self._part(target.block, self.experts), target.expert, inputs)
            return Observation(inputs, self.weights(target), before, after, tokens, rows=rows)
        inputs = seen[self.experts][0][0].flatten(0, -2)
        logits, gates, chosen = seen[self.router][1]
        residual = seen[self.experts_norm][0][0].flatten(0, -2)
        routed = seen[self.experts][1].flatten(0, -2)
        expert = self._part(target.block, self.experts)
        routing = Routing(
            residual,
            logits,
            chosen,
            gates,
            routed,
            lambda e, x: _expert(expert, e, x),
            partial(_computed, expert.act_fn),
            partial(among, self._part(target.block, self.router), inputs),
        )
        return Observation(inputs, self.weights(target), before, after, tokens, routing)

    def parameter(self, target: Target) -> nn.Parameter:
        if target.expert < 0:
            return super().parameter(target)
        part = "down_proj" if target.role.endswith(".down") else "gate_up_proj"
        result: nn.Parameter = self.model.get_parameter(f"{self.prefix(target.block)}.{self.experts}.{part}")
        return result

    def view(self, target: Target, tensor: Tensor) -> Tensor:
        if target.expert < 0:
            return super().view(target, tensor)
        if target.role.endswith(".down"):
            return tensor[target.expert]
        return tensor[target.expert].chunk(2)[target.role.endswith(".up")]

    def structure(self, target: Target) -> dict[str, Tensor]:
        if target.unit != "experts":
            return super().structure(target)
        experts, router = self._part(target.block, self.experts), self._part(target.block, self.router)
        return {"gate_up": experts.gate_up_proj, "down": experts.down_proj, "router": router.weight}

    # -- removal -----------------------------------------------------------------------------------------------------

    def check(self, target: Target, decision: Decision) -> None:
        super().check(target, decision)
        if decision.kept < target.least and target.unit == "experts" and decision.share is None:
            raise PrunelabError(
                f"{target.name} would keep {decision.kept} experts, fewer than the {target.least} of a token"
            )

    def share(self, target: Target, kept: Tensor, share: Tensor) -> None:
        if target.unit != "experts":
            super().share(target, kept, share)
            return
        self.reshaped = True
        experts = self._part(target.block, self.experts)
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, taken(getattr(experts, name), kept, 0))
        experts.num_experts = len(kept)
        place = torch.full((target.units,), -1)
        place[kept.cpu()] = torch.arange(len(kept))
        router = self._part(target.block, self.router).weight.device
        device = torch.device("cpu") if router.type == "meta" else router
        share = share.cpu()
        served = place[share.clamp_min(0)].masked_fill(share < 0, -1)
        experts.register_buffer(SERVED, served.to(device), persistent=False)
        experts.register_forward_pre_hook(_redirected)

    def lost(self, target: Target, decision: Decision) -> int:
        if target.unit != "experts" or decision.share is None:
            return super().lost(target, decision)
        return target.size - self._part(target.block, self.router).weight.shape[1]  # whose rows stay

    def remove(self, target: Target, kept: Tensor) -> None:
        if target.unit != "experts":
            super().remove(target, kept)
            return
        self.reshaped = True
        experts, router = self._part(target.block, self.experts), self._part(target.block, self.router)
        for module, name in ((experts, "gate_up_proj"), (experts, "down_proj"), (router, "weight")):
            setattr(module, name, taken(getattr(module, name), kept, 0))
        if (correction := getattr(router, "e_score_correction_bias", None)) is not None:
            router.e_score_correction_bias = taken(correction, kept, 0)
        if (groups := getattr(router, "num_group", None) or 1) > 1:
            counts = torch.bincount(kept.cpu() // (target.units // groups), minlength=groups)
            if int(counts.min()) != int(counts.max()) or int(counts.min()) < 2:
                # assumption: groups place experts on devices; where a plan leaves them unlike, tokens choose among all
                # experts that stay.
                router.num_group = router.topk_group = 1
        experts.num_experts = router.num_experts = len(kept)

    def sizes(self, target: Target) -> dict[str, int]:
        if target.unit != "experts":
            return super().sizes(target)
        config, router = self.model.config, self._part(target.block, self.router)
        results = {next(name for name in _COUNTS if hasattr(config, name)): target.units}
        groups = getattr(router, "num_group", None)
        return results if groups is None else {**results, "n_group": groups, "topk_group": router.topk_group}

    def finish(self) -> bool:
        routers = [r for i in range(len(self.blocks)) if (r := self._part(i, self.router)) is not None]
        alike = len({(getattr(r, "num_group", None), getattr(r, "topk_group", None)) for r in routers}) < 2
        return super().finish() and alike

    def count_layers(self, config: Any, stay: list[int]) -> None:
        super().count_layers(config, stay)
        if hasattr(config, "mlp_only_layers"):  # counts places, so that these are counted anew
            dense = [i for i in range(len(stay)) if self._part(i, self.experts) is None]
            config.mlp_only_layers, config.decoder_sparse_step = dense, 1


def _redirected(experts: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tokens go to the experts that stand in for those that the router chose, or without them where none does."""
    hidden, chosen, weights = args
    served = getattr(experts, SERVED)[chosen]
    return hidden, served.clamp_min(0), weights.masked_fill(served < 0, 0)


def among(router: Any, inputs: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """What a router chooses for inputs [T, D] of the experts [K] that are kept, and their gates."""
    kept = kept.to(inputs.device)
    small = copy.copy(router)
    small._parameters = {name: nn.Parameter(part[kept], False) for name, part in router._parameters.items()}
    small._buffers = {name: part[kept] for name, part in router._buffers.items()}
    small.num_experts = len(kept)
    if (getattr(small, "num_group", None) or 1) > 1:
        small.num_group = small.topk_group = 1  # as `remove` has it where groups become unlike
    _, gates, chosen = type(small).forward(small, inputs)  # without what hooks of the other wrap around its own
    return kept[chosen], gates


def _inner(experts: Any, index: int, x: Tensor) -> Tensor:
    gate, up = nn.functional.linear(x, experts.gate_up_proj[index]).chunk(2, dim=-1)
    inner: Tensor = experts.act_fn(gate) * up
    return inner


def _expert(experts: Any, index: int, x: Tensor) -> Tensor:
    return _computed(experts.act_fn, experts.gate_up_proj[index], experts.down_proj[index], x)


def _computed(act: Callable[[Tensor], Tensor], gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = nn.functional.linear(x, gate_up).chunk(2, dim=-1)
    return nn.functional.linear(act(gate) * up, down)
