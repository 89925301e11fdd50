"""What every weight adapter offers: targets, what they read, and the removal of their units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.projections import Projection, is_linear, oriented
from prunelab.common.weights.targets import Decision, Observation, Target, Unit

Tap = tuple[tuple[Any, ...], Any]  # what a module got and what it gave
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chain:
    """Blocks `start` to `stop` of a model, through which one calibration set passes: that of a `component`, whose
    `adapter` runs it."""

    component: str
    start: int
    stop: int
    adapter: WeightAdapter


class WeightAdapter(ABC):
    """Targets of one model family. A block is what the calibration set passes through one at a time."""

    family: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[tuple[str, ...], ...]] = ()  # linears (ends of their paths) that read one input
    skip: ClassVar[tuple[str, ...]] = ()  # names of linears that are not weights to prune, such as gates
    part_depth: ClassVar[int] = 1  # names from a block down to its attention and MLP
    norm: ClassVar[str] = ""  # path of the norm behind the last block, empty where there is none
    by_call: ClassVar[bool] = False  # whether a calibration sample is a call, its arguments by name

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Whether the adapter fits a model of none of the classes that any adapter names."""
        return False

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in forward order."""

    @abstractmethod
    def prefix(self, block: int) -> str:
        """Name of a block in the model; empty where the block is the model."""

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The chains of blocks that calibration sets pass through: one, but in models of several components."""
        return (Chain("", 0, len(self.blocks), self),)

    @abstractmethod
    def run(self, sample: Any) -> Any:
        """The model's forward on one sample, as calibration needs it."""

    def call(self, sample: Any) -> Any:
        """What tells the calls of the blocks on one sample from those on others: their length."""
        return len(sample)

    def embed(self, sample: Tensor) -> Tensor:
        """The model's embedding [D] of one sequence."""
        raise PrunelabError(f"a {type(self.model).__name__} gives no embeddings; use a text encoder or decoder")

    def loss(self, sample: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss the model was trained with, on one sample. labels: by default the sample itself."""
        raise PrunelabError(
            f"the loss of a {type(self.model).__name__} needs labels, which a calibration set does not hold;"
            " use a method that needs no losses or gradients"
        )

    @abstractmethod
    def check_sample(self, sample: Tensor) -> None:
        """Refuse a calibration sample the model cannot read."""

    def config(self) -> dict[str, Any]:
        """The dense model's config, as plain values, from which its architecture can be built again."""
        return {}

    @abstractmethod
    def finish(self) -> bool:
        """Bring the model's config up to date; False where no config of the family can describe the model as it is
        now, so that only the plan can."""

    def body(self, block: int) -> nn.Module:
        """The module whose projections the names of a block's targets begin at."""
        return self.blocks[block]

    # -- targets -----------------------------------------------------------------------------------------------------

    def targets(self, unit: Unit) -> list[Target]:
        """The model's targets of a unit, in forward order; an empty list where it has none."""
        if unit == "tensor":
            return self._tensors()
        results = getattr(self, f"_{unit}", None)
        return [] if results is None else [target for block in range(len(self.blocks)) for target in results(block)]

    @abstractmethod
    def taps(self, target: Target) -> tuple[str, ...]:
        """Modules of the target's block whose inputs and outputs are needed to observe it."""

    def received(self, block: int, run: Callable[[], Any]) -> Tensor:
        """Attention [T] that the tokens of one sequence receive in a block, which `run` sends it through once more."""
        raise PrunelabError(f"{self.family}: these blocks show no attention; use a method that weighs no tokens by it")

    @abstractmethod
    def observe(
        self, target: Target, seen: Mapping[str, Tap], before: Tensor, after: Tensor, tokens: Tensor
    ) -> Observation:
        """One sequence at a target, from what the tapped modules got and gave."""

    def parameter(self, target: Target) -> nn.Parameter:
        """The parameter that holds the weight of a linear or tensor target."""
        name = target.name if target.unit == "tensor" else f"{target.name}.weight"
        result: nn.Parameter = self.model.get_parameter(name)
        return result

    def view(self, target: Target, tensor: Tensor) -> Tensor:
        """The target's share of a tensor shaped like its parameter."""
        return oriented(self.model.get_submodule(target.name), tensor) if target.unit == "linear" else tensor

    def holders(self, target: Target) -> dict[str, tuple[nn.Parameter, View]]:
        """By role the parameters that hold the target's weights, and what of a tensor shaped like one is the target's,
        as [out, in]."""
        return {"weight": (self.parameter(target), partial(self.view, target))} if target.loose else {}

    def structure(self, target: Target) -> dict[str, Tensor]:
        """The parameters that hold a structure."""
        return {}

    def weights(self, target: Target) -> dict[str, Tensor]:
        """The target's tensors by role, as views of the model's own wherever its layout allows one."""
        if target.loose:
            return {"weight": self.view(target, self.parameter(target).detach())}
        return {role: tensor.detach() for role, tensor in self.structure(target).items()}

    # -- what is done before any target is measured ------------------------------------------------------------------

    def graph(self) -> fx.Graph | None:
        """The model's forward, layer by layer, for methods that follow what flows back through it; None where it cannot
        be traced."""
        return None

    def makers(self, target: Target) -> list[str]:
        """Paths of the layers whose outputs are the units of a structure."""
        return []

    def widths(self) -> dict[str, int]:
        """Sizes of the spaces that can be rotated without changing what the model computes, by name."""
        return {}

    def rotate(self, rotations: Mapping[str, Tensor]) -> None:
        """Rotate these spaces by orthogonal matrices, each as wide as its space."""
        raise PrunelabError(f"{self.family}: no rotation leaves what the model computes as it is")

    # -- decisions ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def remove(self, target: Target, kept: Tensor) -> None:
        """Take the units of a structure away but those at `kept` [K]."""

    def share(self, target: Target, kept: Tensor, share: Tensor) -> None:
        """Take the units of a structure away but those at `kept` [K], and use these in the others' places, as `share`
        [units] says."""
        raise PrunelabError(f"{target.name} has {target.unit}; only experts are used in each other's places")

    def lost(self, target: Target, decision: Decision) -> int:
        """Parameters that leave the model with each unit of a structure."""
        return target.size

    def readers(self, target: Target) -> list[Projection]:
        """Where the units of a structure are read: with these entries at zero they are as good as gone. None where
        that takes more."""
        return []

    def check(self, target: Target, decision: Decision) -> None:
        """Refuse a decision the model cannot carry."""
        if decision.code is not None and target.unit != "linear":
            raise PrunelabError(f"{target.name} holds {target.unit}; only linears become codes")
        if decision.remove and target.unit == "attention_output" and decision.kept < target.units:
            raise PrunelabError(f"query heads are silenced, and {target.name} cannot lose them; leave them in place")
        if not decision.remove and not target.loose and not self.readers(target):
            raise PrunelabError(f"{target.unit} are removed or kept; {target.name} cannot be set to zero instead")

    def write(self, target: Target, decision: Decision) -> None:
        """Carry a decision out on the model."""
        with torch.no_grad():
            known = self.weights(target)
            if decision.code is not None:
                self.assign(target, "weight", decision.code.dense())
            for role, value in decision.values.items():
                if role in known:
                    self.assign(target, role, value)
                else:
                    self.add_bias(target, role, value)
            if target.loose:
                if known["weight"].device.type != "meta" and not decision.whole:
                    known["weight"].masked_fill_(~decision.mask.to(known["weight"].device), 0)
            elif decision.kept < target.units:
                if decision.share is not None:
                    self.share(target, decision.mask.nonzero().flatten(), decision.share)
                elif decision.remove:
                    self.remove(target, decision.mask.nonzero().flatten())
                else:
                    for reader in self.readers(target):
                        reader.silence(~decision.mask)

    def staying(self, pruned: Sequence[tuple[Target, Tensor]]) -> dict[int, tuple[nn.Parameter, Tensor]]:
        """By identity the parameters that hold pruned weights, or that read pruned units which are still there, and of
        each, as a mask, what stays; `pruned` are targets with their masks."""
        results: dict[int, tuple[nn.Parameter, Tensor]] = {}

        def of(parameter: nn.Parameter) -> Tensor:
            stays = torch.ones_like(parameter, dtype=torch.bool)
            return results.setdefault(id(parameter), (parameter, stays))[1]

        for target, mask in pruned:
            if target.loose:
                parameter, view = self.holders(target)["weight"]
                view(of(parameter)).masked_fill_(~mask.to(parameter.device), False)
            for reader in () if target.loose else self.readers(target):
                reader.blank(of(reader.module.weight), ~mask)
        return results

    def attempt(self, target: Target, decision: Decision, dense: Shelf | None = None) -> Callable[[], None]:
        """Carry a decision out in a way that the returned function takes back to the bit: structures are silenced
        rather than removed. What was there is kept in memory, or on a shelf of the dense model's tensors."""
        decision = replace(decision, remove=False)
        self.check(target, decision)
        own, touched = self.weights(target), {*decision.values, *(["weight"] if target.loose else [])}
        readers = {f"reader {i}": r.module.weight.detach() for i, r in enumerate(self.readers(target))}
        touching = {**{role: own[role] for role in touched & own.keys()}, **readers}
        kept = _kept(dense, target.name, touching)
        biases = decision.values.keys() - own.keys()  # by name, so that `undo` does not hold what the decision holds
        self.write(target, decision)

        def undo() -> None:
            with torch.no_grad():
                for role, value in kept().items():
                    if role in readers:
                        readers[role].copy_(value)
                    else:
                        self.assign(target, role, value)
            for role in biases:
                self.drop_bias(target, role)

        return undo

    def assign(self, target: Target, role: str, value: Tensor) -> None:
        """New values for one of the target's tensors."""
        own = self.weights(target)[role]
        if own.device.type != "meta":
            own.copy_(value)

    def add_bias(self, target: Target, role: str, value: Tensor) -> None:
        """Create the bias that a decision names."""
        raise PrunelabError(f"{self.family} has no place for the value '{role}' of {target.name}")

    def drop_bias(self, target: Target, role: str) -> None:
        """Take away a bias that `add_bias` made."""
        raise NotImplementedError

    # -- linears and other tensors are found alike everywhere --------------------------------------------------------

    def path(self, block: int, path: str) -> str:
        """Name in the model of a module of a block."""
        return f"{self.prefix(block)}.{path}".removeprefix(".")

    def is_linear(self, module: nn.Module) -> bool:
        """Whether a module's weight is one to prune."""
        return is_linear(module)

    def _linear(self, block: int) -> list[Target]:
        results = []
        for path, module in self.body(block).named_modules():
            if self.is_linear(module) and path.rpartition(".")[2] not in self.skip:
                shape = tuple(oriented(module, module.weight).shape)
                source = self.path(block, self._source(path))
                name, part, span = self.path(block, path), self._part_of(path), self._span(block, path)
                results.append(Target("linear", name, block, path, shape, span=span, source=source, part=part))
        return results

    def _part_of(self, path: str) -> str:
        """The part of a block in which a path lies."""
        return ".".join(path.split(".")[: self.part_depth])

    def _span(self, block: int, path: str) -> int:
        """Input channels of a linear that are one head's, 1 where it reads none."""
        return 1

    def _source(self, path: str) -> str:
        """The first of the linears that read one input with the linear at `path`."""
        for group in self.shared:
            for end in group:
                if f".{path}".endswith(f".{end}"):
                    return path.removesuffix(end) + group[0]
        return path

    def _tensors(self) -> list[Target]:
        linear = self.targets("linear")
        held, parts = {id(self.parameter(target)) for target in linear}, {(t.block, t.part) for t in linear}
        starts = {f"{self.prefix(block)}.".lstrip("."): block for block in range(len(self.blocks))}

        def part(name: str) -> str:
            for start, block in starts.items():
                if name.startswith(start) and (block, own := self._part_of(name[len(start) :])) in parts:
                    return own
            return ""

        return [
            Target("tensor", name, -1, name, tuple(parameter.shape), part=part(name))
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in held
        ]

    def refuse_tied(self, targets: Sequence[Target]) -> None:
        """Stop where a target's weight is also used under another name, since pruning one would prune both."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for target in targets:
            if target.loose:
                shared = names[id(self.parameter(target))]
                if len(shared) > 1:
                    raise PrunelabError(
                        f"{' and '.join(shared)} are one tied parameter; untie them or leave {target.name} out"
                    )


class Shelf(Protocol):
    """A place for groups of tensors by key; see `prunelab.common.weights.checkpoints.Shelf`."""

    def __contains__(self, key: str) -> bool: ...
    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None: ...
    def get(self, key: str) -> dict[str, Tensor]: ...


def _kept(shelf: Shelf | None, name: str, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Copies of tensors, of a shelf made once."""
    if shelf is None:
        copies = {role: tensor.clone() for role, tensor in tensors.items()}
        return lambda: copies
    key = f"{name}|{','.join(sorted(tensors))}"
    if key not in shelf:
        shelf.put(key, tensors)
    return lambda: shelf.get(key)
