"""Transformers as chains of blocks, each with attention heads, an MLP, and itself as a layer.

A family names the modules; what its projections are fused from follows from their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import Shelf, Tap, View, WeightAdapter
from prunelab.common.weights.adapters.projections import IN, OUT, Projection, length, remove
from prunelab.common.weights.targets import Decision, Observation, Target

READS = {"heads": "o", "channels": "down"}  # the projection that reads the units of a structure
SILENT = {"attention_output": "o"}  # the same of units that are silenced alone


class Blocks(WeightAdapter):
    """A chain of transformer blocks.

    layers: path of the chain; attention: of a block's attention, whose attribute `head_size` is the size of a head;
    heads: paths of `q` `k` `v` `o`, mlp: of `gate` `up` `down` (no `gate` in a plain MLP). Roles of equal path are one
    fused projection, whose outputs are all q, then all k, then all v; where `interleaved`, q k v of the first head,
    then of the next. sublayers: of `attention` and `mlp` the module whose output is added to the residual stream, and
    the norms that serve it alone.
    """

    layers: ClassVar[str]
    attention: ClassVar[str]
    head_size: ClassVar[str] = "head_dim"
    heads: ClassVar[Mapping[str, str]] = {}
    mlp: ClassVar[Mapping[str, str]] = {}
    sublayers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    interleaved: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.gone: set[int] = set()  # blocks to leave in finish()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.get_submodule(self.layers))

    def prefix(self, block: int) -> str:
        return f"{self.layers}.{block}"

    def _part(self, block: int, path: str) -> Any:
        """A submodule of a block, or None."""
        module: Any = self.body(block)
        for name in path.split("."):
            module = getattr(module, name, None)
        return module

    def _modules(self, block: int, paths: Mapping[str, str]) -> dict[str, Any]:
        """The modules at these paths by role; none where one is missing."""
        results = {role: self._part(block, path) for role, path in paths.items()}
        return {} if any(module is None for module in results.values()) else results

    # -- targets -----------------------------------------------------------------------------------------------------

    def _heads(self, block: int) -> list[Target]:
        return self._structure("heads", block, self.path(block, self.attention))

    def _channels(self, block: int) -> list[Target]:
        down = self.mlp.get("down", "")
        return self._structure("channels", block, self.path(block, down.rpartition(".")[0]))

    def _attention_output(self, block: int) -> list[Target]:
        return self._structure("attention_output", block, self.path(block, self.heads.get("o", "")))

    def _structure(self, unit: str, block: int, name: str) -> list[Target]:
        projections = self._projections(unit, block)
        if not projections:
            return []
        reader = projections[(READS | SILENT)[unit]]
        units, span = reader.entries.shape
        size = sum(part.size for part in projections.values()) // units
        read = reader.size // units
        return [Target(unit, name, block, unit, (units,), size, span, read=read)]  # type: ignore[arg-type]

    def _layers(self, block: int) -> list[Target]:
        size = sum(parameter.numel() for parameter in self.body(block).parameters())
        return [Target("layers", self.prefix(block), block, "layers", (1,), size)]

    def _sublayers(self, block: int) -> list[Target]:
        results = []
        for role, (path, *norms) in self.sublayers.items():
            modules = [self._part(block, name) for name in (path, *norms)]
            if not isinstance(modules[0], Absent):
                size = sum(p.numel() for module in modules for p in module.parameters())
                results.append(Target("sublayers", self.path(block, path), block, role, (1,), size))
        return results

    def _span(self, block: int, path: str) -> int:
        if path != self.heads.get("o"):
            return 1
        attention = self._part(block, self.attention)
        return int(getattr(attention, "v_head_dim", None) or getattr(attention, self.head_size))

    # -- where the units of structures lie ---------------------------------------------------------------------------

    def projections(self, target: Target) -> dict[str, Projection]:
        """The projections of heads or channels by role."""
        return self._projections(target.unit, target.block)

    def _projections(self, unit: str, block: int) -> dict[str, Projection]:
        if unit in SILENT:
            return self._query_heads(block)
        if unit not in READS:
            return {}
        modules = self._modules(block, self.heads if unit == "heads" else self.mlp)
        if not modules:
            return {}
        entries = self.head_entries(block, modules) if unit == "heads" else self.channel_entries(modules)
        last = READS[unit]
        return {role: Projection(modules[role], IN if role == last else OUT, entries[role]) for role in entries}

    def _query_heads(self, block: int) -> dict[str, Projection]:
        """The output projection with the places of query heads among its inputs."""
        o = self._modules(block, {"o": self.heads["o"]}).get("o") if "o" in self.heads else None
        if o is None:
            return {}
        attention = self._part(block, self.attention)
        size = getattr(attention, "v_head_dim", None) or getattr(attention, self.head_size)
        return {"o": Projection(o, IN, torch.arange(length(o, IN)).view(-1, size))}

    def head_entries(self, block: int, modules: Mapping[str, Any]) -> dict[str, Tensor]:
        """Places [units, span] of key-value groups in `q` `k` `v` `o`; none where heads cannot leave alone."""
        size = getattr(self._part(block, self.attention), self.head_size)
        queries = length(modules["o"], IN)
        if self.interleaved:
            q, k, v = torch.arange(3 * queries).view(-1, 3, size).unbind(1)
            return {"q": q, "k": k, "v": v, "o": torch.arange(queries).view(len(q), -1)}
        keys = length(modules["k"], OUT)
        fused = modules["q"] is modules["k"]
        keys = (keys - queries) // 2 if fused else keys
        starts = {"q": 0, "k": queries, "v": queries + keys} if fused else dict.fromkeys("qkv", 0)
        groups = keys // size
        spans = {role: (queries if role == "q" else keys) // groups for role in "qkv"}
        entries = {role: starts[role] + torch.arange(groups * spans[role]).view(groups, -1) for role in "qkv"}
        return {**entries, "o": torch.arange(queries).view(groups, -1)}

    def channel_entries(self, modules: Mapping[str, Any]) -> dict[str, Tensor]:
        """Places [units, 1] of channels in `gate` `up` `down`; none where the MLP is built otherwise."""
        inner = length(modules["down"], IN)
        fused = modules.get("gate") is modules["up"]
        if length(modules["up"], OUT) != inner * (1 + fused):
            return {}
        channels = torch.arange(inner).unsqueeze(1)
        return {role: channels + inner * (fused and role == "up") for role in modules}

    def holders(self, target: Target) -> dict[str, tuple[nn.Parameter, View]]:
        result = self.projections(target).items()
        return {role: (part.module.weight, part.view) for role, part in result} or super().holders(target)

    def structure(self, target: Target) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}
        if target.whole:
            body = self.body(target.block)
            for path in self.sublayers.get(target.role, ("",)):
                results |= body.get_submodule(path).named_parameters(prefix=path)
            return results
        for role, part in self.projections(target).items():
            results[role] = part.module.weight
            if part.module.bias is not None:
                results[f"{role}.bias"] = part.module.bias
        return results

    def weights(self, target: Target) -> dict[str, Tensor]:
        projections = self.projections(target)
        if not projections:
            return super().weights(target)
        results = {role: part.weight() for role, part in projections.items()}
        biases = {f"{role}.bias": part.bias() for role, part in projections.items()}
        return {**results, **{name: bias for name, bias in biases.items() if bias is not None}}

    # -- what a target reads -----------------------------------------------------------------------------------------

    def taps(self, target: Target) -> tuple[str, ...]:
        if target.unit == "linear":
            return (target.role,)
        o = self.heads.get("o")
        reads = {"heads": o, "attention_output": o, "channels": self.mlp.get("down")}.get(target.unit)
        return () if reads is None else (reads,)

    def observe(
        self, target: Target, seen: Mapping[str, Tap], before: Tensor, after: Tensor, tokens: Tensor
    ) -> Observation:
        before, after = before.flatten(0, -2), after.flatten(0, -2)
        inputs = before if target.whole else seen[self.taps(target)[0]][0][0].flatten(0, -2)
        role = READS.get(target.unit)
        read = None if role is None else lambda: {role: inputs}
        return Observation(inputs, self.weights(target), before, after, tokens, read=read)

    # -- decisions ---------------------------------------------------------------------------------------------------

    def assign(self, target: Target, role: str, value: Tensor) -> None:
        name, _, bias = role.partition(".")
        projections = self.projections(target)
        if name in projections:
            projections[name].write(bias or "weight", value)
        else:
            super().assign(target, role, value)

    def add_bias(self, target: Target, role: str, value: Tensor) -> None:
        name, _, end = role.partition(".")
        part = self.projections(target).get(name)
        if part is None or end != "bias" or part.axis == OUT:
            return super().add_bias(target, role, value)
        weight = part.module.weight
        value = value.to(weight.device, weight.dtype)
        part.module.bias = nn.Parameter(value, requires_grad=weight.requires_grad)

    def drop_bias(self, target: Target, role: str) -> None:
        self.projections(target)[role.partition(".")[0]].module.bias = None

    def readers(self, target: Target) -> list[Projection]:
        projections = self.projections(target)
        return [projections[(READS | SILENT)[target.unit]]] if projections else []

    def attempt(self, target: Target, decision: Decision, dense: Shelf | None = None) -> Callable[[], None]:
        if not target.whole:
            return super().attempt(target, decision, dense)
        own = self.weights(target)
        before = {role: own[role].clone() for role in decision.values}
        for role, value in decision.values.items():
            self.assign(target, role, value)
        layer = target.unit == "layers"
        module = self.blocks[target.block] if layer else self._part(target.block, self.sublayers[target.role][0])
        forward = vars(module).get("forward")  # what wraps it: accelerate's hooks, say
        if not decision.kept:
            module.forward = _pass_by if layer else Absent(module, target.role).forward

        def undo() -> None:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
            for role, value in before.items():
                self.assign(target, role, value)

        return undo

    def remove(self, target: Target, kept: Tensor) -> None:
        if target.unit == "layers":
            self.gone.add(target.block)  # blocks leave together, in finish()
            return
        if target.unit == "sublayers":
            self._leave(target)
            return
        remove(list(self.projections(target).values()), kept)
        if target.unit == "heads":
            self.resize(target.block)

    def resize(self, block: int) -> None:
        """Bring what a block's attention notes of its size up to date; most read it off their weights."""

    def _leave(self, target: Target) -> None:
        """Take attention or MLP out of a block with its norms; a block of which nothing is left goes itself."""
        body, (path, *norms) = self.body(target.block), self.sublayers[target.role]
        body.set_submodule(path, Absent(body.get_submodule(path), target.role))
        for norm in norms:
            body.set_submodule(norm, nn.Identity())
        if next(body.parameters(), None) is None:
            self.gone.add(target.block)

    def drop_layers(self) -> list[int] | None:
        """Take the blocks away that decisions left out; the places of those that stay, None where none leaves."""
        if not self.gone:
            return None
        stay = [i for i in range(len(self.blocks)) if i not in self.gone]
        if not stay:
            raise PrunelabError("no layer would be left; keep more")
        parent, _, name = self.layers.rpartition(".")
        chain, blocks = self.model.get_submodule(self.layers), self.blocks
        left = [blocks[i] for i in stay]
        setattr(self.model.get_submodule(parent), name, type(chain)(*([left] if _is_list(chain) else left)))
        for place, block in enumerate(self.blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):  # names its place in the cache
                    module.layer_idx = place  # type: ignore[assignment]
        self.gone.clear()
        return stay


class Absent(nn.Module):
    """In place of attention or an MLP that left: adds nothing to the residual stream.

    Attention notes in the cache that tokens went by, by one number each, since models count tokens by what one of
    their layers has cached.
    """

    def __init__(self, module: nn.Module, role: str) -> None:
        super().__init__()
        self.role = role
        if hasattr(module, "layer_idx"):
            self.layer_idx: Any = module.layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        if self.role != "attention":
            return nothing
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            passed = nothing[:, None, :, :1]
            cache.update(passed, passed, self.layer_idx)
        return nothing, None


def _pass_by(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a block that is not there would give."""
    return hidden


def _is_list(chain: nn.Module) -> bool:
    return isinstance(chain, nn.ModuleList)
