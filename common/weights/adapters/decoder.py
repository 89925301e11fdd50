"""Decoder-only language models of transformers: Llama and the many classes built alike, dense or with experts.

Experts are fused parameters there, [E, 2I, D] and [E, D, I]; their linears and units are views of these.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import PrunelabError
from common.targets import Decision, Observation, Routing, Target
from common.weights.adapters.base import Tap, WeightAdapter

_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


class Decoder(WeightAdapter):
    family = "decoder"
    model_classes = tuple(f"transformers.models.{m}.modeling_{m}.{c}ForCausalLM" for m, c in _CLASSES.items())
    shared = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    skip = ("shared_expert_gate",)

    layers: ClassVar[str] = "model.layers"
    attention: ClassVar[str] = "self_attn"
    heads: ClassVar[Mapping[str, str]] = {r: f"self_attn.{r}_proj" for r in "qkvo"}
    mlp: ClassVar[Mapping[str, str]] = {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
    experts: ClassVar[str] = "mlp.experts"
    router: ClassVar[str] = "mlp.gate"
    experts_norm: ClassVar[str] = "post_attention_layernorm"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.get_submodule(self.layers))

    def prefix(self, block: int) -> str:
        return f"{self.layers}.{block}"

    def run(self, sample: Tensor) -> Any:
        return self.model(input_ids=sample.unsqueeze(0), use_cache=False)

    def loss(self, sample: Tensor) -> Tensor:
        ids = sample.unsqueeze(0)
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def check_sample(self, sample: Tensor) -> None:
        config = self.model.config
        if sample.dim() != 1 or sample.dtype not in (torch.int64, torch.int32) or len(sample) < 2:
            raise PrunelabError("a calibration sample is a vector of at least two token ids; see weights.windows")
        if len(sample) > config.max_position_embeddings:
            raise PrunelabError(
                f"calibration sequences of {len(sample)} tokens exceed the model's {config.max_position_embeddings}"
            )
        if int(sample.min()) < 0 or int(sample.max()) >= config.vocab_size:
            raise PrunelabError(f"calibration tokens lie outside the vocabulary of {config.vocab_size}")

    def config(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=False))
        return values

    # -- targets -----------------------------------------------------------------------------------------------------

    def _part(self, block: int, path: str) -> Any:
        """A submodule of a block, or None."""
        module: Any = self.blocks[block]
        for name in path.split("."):
            module = getattr(module, name, None)
        return module

    def _linear(self, block: int) -> list[Target]:
        found = super()._linear(block)
        experts = self._part(block, self.experts)
        if experts is None:
            return found
        count, width, inner = experts.down_proj.shape
        for index in range(count):
            name = f"{self.prefix(block)}.{self.experts}.{index}"
            for role, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                source = f"{name}.down" if role == "down" else f"{name}.gate"
                path = f"{self.experts}.{role}"
                found.append(Target("linear", f"{name}.{role}", block, path, shape, source=source, expert=index))
        return found

    def _heads(self, block: int) -> list[Target]:
        attention = self._part(block, self.attention)
        parts = {role: self._part(block, path) for role, path in self.heads.items()}
        norm = self._part(block, f"{self.attention}.q_norm")
        if any(part is None for part in parts.values()):
            return []
        if norm is not None and norm.weight.numel() != attention.head_dim:
            return []  # a norm over all heads changes with every head that leaves (OLMoE)
        groups = parts["k"].out_features // attention.head_dim
        size = sum(part.weight.numel() for part in parts.values())
        size += sum(parts[r].bias.numel() for r in "qkv" if parts[r].bias is not None)
        name = f"{self.prefix(block)}.{self.attention}"
        span = parts["o"].in_features // groups
        return [Target("heads", name, block, "heads", (groups,), size // groups, span)]

    def _channels(self, block: int) -> list[Target]:
        parts = [part for path in self.mlp.values() if (part := self._part(block, path)) is not None]
        if len(parts) < len(self.mlp):
            return []
        inner = parts[-1].in_features
        size = sum(part.weight.numel() for part in parts)
        size += sum(part.bias.numel() for part in parts[:-1] if part.bias is not None)
        name = f"{self.prefix(block)}.{self.mlp['down'].rpartition('.')[0]}"
        return [Target("channels", name, block, "channels", (inner,), size // inner)]

    def _experts(self, block: int) -> list[Target]:
        experts = self._part(block, self.experts)
        if experts is None:
            return []
        count, width, inner = experts.down_proj.shape
        name, least = f"{self.prefix(block)}.{self.experts}", self._part(block, self.router).top_k
        return [Target("experts", name, block, "experts", (count,), 3 * inner * width + width, least=least)]

    def _layers(self, block: int) -> list[Target]:
        size = sum(parameter.numel() for parameter in self.blocks[block].parameters())
        return [Target("layers", self.prefix(block), block, "layers", (1,), size)]

    # -- what a target reads -----------------------------------------------------------------------------------------

    def taps(self, target: Target) -> tuple[str, ...]:
        if target.kind == "linear":
            return (target.role,) if target.expert < 0 else (self.experts,)
        reads = {
            "heads": (self.heads["o"],),
            "channels": (self.mlp["down"],),
            "experts": (self.experts, self.router, self.experts_norm),
        }
        return reads.get(target.kind, ())

    def observe(
        self, target: Target, seen: Mapping[str, Tap], before: Tensor, after: Tensor, tokens: Tensor
    ) -> Observation:
        before, after = before.flatten(0, -2), after.flatten(0, -2)
        routing = None
        if target.kind == "layers":
            inputs = before
        elif target.expert >= 0:
            inputs = self._expert_inputs(target, seen[self.experts][0])
        else:
            inputs = seen[self.taps(target)[0]][0][0].flatten(0, -2)
        if target.kind == "experts":
            logits, gates, chosen = seen[self.router][1]
            residual = seen[self.experts_norm][0][0].flatten(0, -2)
            routed = seen[self.experts][1].flatten(0, -2)
            expert = self._part(target.block, self.experts)
            routing = Routing(residual, logits, chosen, gates, routed, lambda e, x: _expert(expert, e, x))
        return Observation(inputs, self.weights(target), before, after, tokens, routing)

    def _expert_inputs(self, target: Target, given: tuple[Any, ...]) -> Tensor:
        """The tokens sent to an expert, or for its down projection what lies between."""
        hidden, chosen, _ = given
        x = hidden.flatten(0, -2)[(chosen == target.expert).any(-1)]
        if target.role.endswith(".down"):
            x = _inner(self._part(target.block, self.experts), target.expert, x)
        return x

    def parameter(self, target: Target) -> nn.Parameter:
        name = target.name if target.kind == "tensor" else f"{target.name}.weight"
        if target.expert >= 0:
            part = "down_proj" if target.role.endswith(".down") else "gate_up_proj"
            name = f"{self.prefix(target.block)}.{self.experts}.{part}"
        found: nn.Parameter = self.model.get_parameter(name)
        return found

    def view(self, target: Target, tensor: Tensor) -> Tensor:
        if target.expert < 0:
            return tensor
        if target.role.endswith(".down"):
            return tensor[target.expert]
        return tensor[target.expert].chunk(2)[target.role.endswith(".up")]

    def structure(self, target: Target) -> dict[str, Tensor]:
        if target.kind == "experts":
            experts, router = self._part(target.block, self.experts), self._part(target.block, self.router)
            return {"gate_up": experts.gate_up_proj, "down": experts.down_proj, "router": router.weight}
        found: dict[str, Tensor] = {}
        for role, part in self._linears(target).items():
            found[role] = part.weight
            if part.bias is not None:
                found[f"{role}.bias"] = part.bias
        return found

    def _linears(self, target: Target) -> dict[str, Any]:
        """The linears of heads or channels by role."""
        paths = {"heads": self.heads, "channels": self.mlp}.get(target.kind, {})
        return {role: self._part(target.block, path) for role, path in paths.items()}

    # -- removal -----------------------------------------------------------------------------------------------------

    def add_bias(self, target: Target, role: str, value: Tensor) -> None:
        name, _, kind = role.partition(".")
        linear = self._linears(target).get(name)
        if linear is None or kind != "bias":
            return super().add_bias(target, role, value)
        value = value.to(linear.weight.device, linear.weight.dtype)
        linear.bias = nn.Parameter(value, requires_grad=linear.weight.requires_grad)

    def remove(self, target: Target, kept: Tensor) -> None:
        if target.kind == "layers":
            self.gone.add(target.block)  # blocks leave together, in finish()
            return
        if target.kind == "experts":
            self._remove_experts(target, kept)
            return
        parts = self._linears(target)
        last = "o" if target.kind == "heads" else "down"
        columns = spread(kept, target.span)
        for role, part in parts.items():
            if role == last:
                narrow(part, columns, 1)
            else:
                narrow(part, spread(kept, part.out_features // target.units), 0)

    def check(self, target: Target, decision: Decision) -> None:
        if decision.kept < target.least and target.kind == "experts":
            raise PrunelabError(
                f"{target.name} would keep {decision.kept} experts, fewer than the {target.least} of a token"
            )

    def _remove_experts(self, target: Target, kept: Tensor) -> None:
        experts, router = self._part(target.block, self.experts), self._part(target.block, self.router)
        for module, name in ((experts, "gate_up_proj"), (experts, "down_proj"), (router, "weight")):
            setattr(module, name, _taken(getattr(module, name), kept, 0))
        experts.num_experts = router.num_experts = len(kept)

    def finish(self) -> bool:
        self._own_config()
        self._drop_layers()
        config, blocks = self.model.config, range(len(self.blocks))
        changes: dict[str, int] = {}
        for kind in (self._heads, self._channels, self._experts):
            targets = [target for block in blocks for target in kind(block)]
            if len({target.shape for target in targets}) > 1:
                return False
            if targets:
                changes |= self._sizes(targets[0])
        biases = {
            "attention_bias": self._missing_biases(self.heads, "attention_bias"),
            "mlp_bias": self._missing_biases(self.mlp, "mlp_bias"),
        }
        if any(linears is None for linears in biases.values()) or not _describes(config, changes):
            return False
        for option, linears in biases.items():
            for linear in linears or ():  # the config knows all of a part's biases or none: zeros are the others
                setattr(config, option, True)
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), linear.weight.requires_grad)
        for name, size in changes.items():
            setattr(config, name, size)
        return True

    def _sizes(self, target: Target) -> dict[str, int]:
        """What the config says of a structure's size."""
        if target.kind == "channels":
            return {"intermediate_size": target.units}
        if target.kind == "experts":
            return {next(name for name in _EXPERT_COUNTS if hasattr(self.model.config, name)): target.units}
        head = self._part(target.block, self.attention).head_dim
        queries = self._part(target.block, self.heads["q"]).out_features // head
        return {"head_dim": head, "num_attention_heads": queries, "num_key_value_heads": target.units}

    def _missing_biases(self, paths: Mapping[str, str], option: str) -> list[Any] | None:
        """The linears that still need a bias for the config to describe biases that a plan gave to others; None where
        the family's config knows no such biases."""
        parts = [part for i in range(len(self.blocks)) for p in paths.values() if (part := self._part(i, p))]
        given = any(part.bias is not None for part in self._last(paths))
        if not given or getattr(self.model.config, option, False):
            return []
        return [part for part in parts if part.bias is None] if hasattr(self.model.config, option) else None

    def _last(self, paths: Mapping[str, str]) -> list[Any]:
        """The output projections of a part."""
        path = list(paths.values())[-1]
        return [part for i in range(len(self.blocks)) if (part := self._part(i, path))]

    def _own_config(self) -> None:
        """A copy of the config, since other models may have been built from the same object."""
        shared, own = self.model.config, copy.deepcopy(self.model.config)
        for module in self.model.modules():
            if getattr(module, "config", None) is shared:
                module.config = own

    def _drop_layers(self) -> None:
        if not self.gone:
            return
        stay = [i for i in range(len(self.blocks)) if i not in self.gone]
        if not stay:
            raise PrunelabError("no layer would be left; keep more")
        parent, _, name = self.layers.rpartition(".")
        blocks, config = self.blocks, self.model.config
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(blocks[i] for i in stay))
        for place, block in enumerate(self.blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):  # names its place in the cache
                    module.layer_idx = place  # type: ignore[assignment]
        config.num_hidden_layers = len(stay)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in stay]
        if hasattr(config, "mlp_only_layers"):  # counts places, so that these are counted anew
            dense = [i for i in range(len(stay)) if self._part(i, self.experts) is None]
            config.mlp_only_layers, config.decoder_sparse_step = dense, 1
        self.gone.clear()


def _describes(config: Any, changes: Mapping[str, int]) -> bool:
    """Whether the config's class accepts these sizes (Llama's wants its width to divide by its heads)."""
    from huggingface_hub.errors import StrictDataclassError

    changed = copy.deepcopy(config)
    for name, size in changes.items():
        setattr(changed, name, size)
    try:
        changed.validate()
    except (StrictDataclassError, ValueError):
        return False
    return True


def spread(units: Tensor, span: int) -> Tensor:
    """Channels [K * span] that belong to units [K] of `span` consecutive channels each."""
    return (units.unsqueeze(-1) * span + torch.arange(span, device=units.device)).flatten()


def _taken(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    kept = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def narrow(linear: nn.Linear, index: Tensor, dim: int) -> None:
    """Keep these outputs (dim 0) or inputs (dim 1) of a linear."""
    linear.weight = _taken(linear.weight, index, dim)
    if dim == 0 and linear.bias is not None:
        linear.bias = _taken(linear.bias, index, 0)
    linear.out_features, linear.in_features = linear.weight.shape


def _inner(experts: Any, index: int, x: Tensor) -> Tensor:
    gate, up = nn.functional.linear(x, experts.gate_up_proj[index]).chunk(2, dim=-1)
    inner: Tensor = experts.act_fn(gate) * up
    return inner


def _expert(experts: Any, index: int, x: Tensor) -> Tensor:
    return nn.functional.linear(_inner(experts, index, x), experts.down_proj[index])
