"""What a weight-pruning run decided: saved, shown, compared, and carried out again on the dense model.

On disk a plan is a folder: `plan.json`, and one safetensors file a block with, for each target, the mask as packed bits
and the new values. The work folder of an interrupted run holds the same files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.targets import Decision, Quantised, Target

EARLIER, HELD = "earlier_", "_prunelab_plans"  # in a plan's folder, and on a model that was pruned
PLAN, ROTATIONS, LEARNED = "plan.json", "rotations.safetensors", "learned.safetensors"


@dataclass(frozen=True)
class WeightReport:
    """Sizes before and after.

    Zeros are counted apart, as they stand in the weights: they take as much room and time as any other number unless a
    sparse kernel uses them. `reset` parameters hold what they held before fine-tuning. `bytes` takes quantised weights
    as packed, and `bits` is what a prunable parameter that is left takes on average, scales and zeros included; 0 where
    nothing was quantised. average_parameters: those not at zero, the mean over the steps of a training that pruned.
    """

    dense_parameters: int
    parameters: int
    dense_bytes: int
    bytes: int
    prunable: int
    removed: int
    zeroed: int
    reset: int = 0
    average_parameters: float | None = None
    bits: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of the prunable parameters that is gone, zero, or again what it was before fine-tuning."""
        return (self.removed + self.zeroed + self.reset) / max(self.prunable, 1)

    def __str__(self) -> str:
        lines = [
            f"parameters {self.parameters:,} of {self.dense_parameters:,}",
            f"bytes      {self.bytes:,} of {self.dense_bytes:,}",
            f"sparsity   {100 * self.sparsity:.2f} % of the {self.prunable:,} prunable parameters",
        ]
        if self.bits:
            lines.append(f"bits       {self.bits:.2f} a prunable parameter, packed with its scales and zeros")
        if self.zeroed:
            lines.append(f"zeros      {self.zeroed:,} stored as zeros, which alone make a model no smaller or faster")
        if self.reset:
            lines.append(f"deltas     {self.reset:,} of what fine-tuning changed taken back; the model stays dense")
        if self.average_parameters is not None:
            lines.append(f"training   {self.average_parameters:,.0f} parameters on average over its steps")
        return "\n".join(lines)


@dataclass
class Tally:
    """What decisions did, target by target, counted in the weights as they were left."""

    removed: int = 0
    emptied: int = 0  # parameters of structures that stay, which only read zeros
    zeros: dict[str, tuple[Target, int]] = field(default_factory=dict)  # of every matrix that was decided on
    reset: int = 0
    quantised: int = 0  # parameters that became codes, and the bytes of these
    code_bytes: int = 0

    @property
    def zeroed(self) -> int:
        return self.emptied + sum(count for _, count in self.zeros.values())

    def write(self, adapter: WeightAdapter, target: Target, decision: Decision) -> None:
        """Carry a decision out, and count it."""
        shrinking = self._within(adapter, target) if decision.remove and not target.loose else []
        adapter.write(target, decision)
        gone = target.units - decision.kept
        if not target.loose:
            self.removed += gone * adapter.lost(target, decision) if decision.remove else 0
            self.emptied += 0 if decision.remove else gone * target.read
        elif decision.whole:
            self.reset += gone
        else:
            weight = adapter.weights(target)["weight"]
            plain = decision.code is None and weight.device.type != "meta"  # codes may stand for zero by chance
            self.zeros[target.name] = target, _zeros(adapter, target) if plain else gone
        for matrix in shrinking:  # zeros that left with the structure are zeros no more
            self.zeros[matrix.name] = matrix, _zeros(adapter, matrix)
        if decision.code is not None:
            self.quantised += target.units
            self.code_bytes += decision.code.bytes

    def _within(self, adapter: WeightAdapter, structure: Target) -> list[Target]:
        """Matrices with zeros that lie in a structure."""
        held = {id(parameter) for parameter in adapter.structure(structure).values()}
        near = [m for m, count in self.zeros.values() if count and m.block == structure.block and m.expert < 0]
        return [matrix for matrix in near if id(adapter.parameter(matrix)) in held]


def _zeros(adapter: WeightAdapter, matrix: Target) -> int:
    return int((adapter.weights(matrix)["weight"] == 0).sum())


CODE = ("codes", "scale", "zero", "form", "index")  # a quantised weight's tensors
SHARE = "share"  # by whom each expert is served
SILENT = "silent"  # marks structures that stay, with zeros where they are read


def bits(mask: Tensor) -> Tensor:
    """A mask as bits [ceil(n / 8)], uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unbits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that `bits` made."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=math.prod(shape))).bool().view(*shape)


def packed(decision: Decision) -> dict[str, Tensor]:
    """A decision as small tensors: packed mask bits, of a masked weight (unless whole) the values that stay, and packed
    codes."""
    mask = decision.mask.cpu()
    results = {"mask": bits(mask)}
    for role, value in decision.values.items():
        value = value.detach().cpu()
        results[role] = value[mask] if role == "weight" and not decision.whole else value.contiguous()
    if (code := decision.code) is not None:
        form = torch.tensor([code.bits, code.group, int(code.symmetric), code.turned])
        codes = packed_codes(code.codes.cpu(), code.bits)
        stored = {"codes": codes, "scale": code.scale, "zero": code.zero, "form": form, "index": code.index}
        results |= {role: tensor.cpu() for role, tensor in stored.items() if tensor is not None}
    if decision.share is not None:
        results[SHARE] = decision.share.cpu()
    return results if decision.remove else {**results, SILENT: torch.ones(1, dtype=torch.bool)}


def unpacked(target: Target, tensors: Mapping[str, Tensor]) -> Decision:
    """The decision that `packed` stored."""
    mask = unbits(tensors["mask"], target.shape)
    values = {role: value for role, value in tensors.items() if role not in ("mask", SILENT, SHARE, *CODE)}
    whole = "weight" in values and values["weight"].numel() == target.units > int(mask.sum())
    if "weight" in values and not whole:
        values["weight"] = values["weight"].new_zeros(target.shape).masked_scatter_(mask, values["weight"])
    code = None
    if "codes" in tensors:
        width, group, symmetric, turned = tensors["form"].tolist()
        codes = unpacked_codes(tensors["codes"], width, target.shape)
        index = tensors.get("index")
        code = Quantised(codes, tensors["scale"], tensors["zero"], width, group, bool(symmetric), index, turned)
    return Decision(mask, values, whole, SILENT not in tensors, code, tensors.get(SHARE))


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape as a string of bits, most significant first."""
    expanded = np.unpackbits(codes.numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(expanded))


def unpacked_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes that `packed_codes` stored, in this shape."""
    count = math.prod(shape)
    each = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(np.packbits(np.pad(each, ((0, 0), (8 - bits, 0))), axis=1)).view(*shape)


class WeightPlan:
    """The decisions of one run by target, and what was run.

    header: method, budget, seed, model class and report, and what layers and sublayers that were scored are `worth`;
    `tensors` of a block are read where they lie, in memory or in
    a folder, when they are asked for. rotations: of the model's spaces, before anything was decided. learned:
    what the method learned, for `prune(..., learned=...)` on another model. earlier: plans by which the model was
    pruned before, in order; they are saved and carried out with this one.
    """

    def __init__(
        self,
        header: Mapping[str, Any],
        targets: list[Target],
        blocks: Mapping[int, Any],
        rotations: Mapping[str, Tensor] = MappingProxyType({}),
        learned: Mapping[str, Tensor] = MappingProxyType({}),
        earlier: Sequence[WeightPlan] = (),
    ) -> None:
        self.header = dict(header)
        self.earlier = tuple(earlier)
        self.rotations = dict(rotations)
        self.learned = dict(learned)
        self.targets = targets
        self._blocks = blocks  # block -> {name|role: tensor}, or the path of a file that holds it

    def __len__(self) -> int:
        return len(self.targets)

    def decision(self, target: Target | str) -> Decision:
        """What was decided on a target, given by itself or by name."""
        if isinstance(target, str):
            by_name = {t.name: t for t in self.targets}
            if target not in by_name:
                raise PrunelabError(f"the plan holds no target '{target}'; it has {', '.join(list(by_name)[:4])} ...")
            target = by_name[target]
        result = _of(target, self._blocks[target.block])
        if "mask" not in result:
            raise PrunelabError(f"the plan is damaged: it says nothing of {target.name}; make it anew")
        return unpacked(target, result)

    def decisions(self) -> Iterator[tuple[Target, Decision]]:
        """Every target with its decision."""
        for target in self.targets:
            yield target, self.decision(target)

    @property
    def report(self) -> WeightReport:
        """Sizes before and after."""
        return WeightReport(**self.header["report"])

    @property
    def removes(self) -> bool:
        """Whether units leave the model, rather than being set to zero."""
        return any(not target.loose and decision.remove for target, decision in self.decisions())

    def apply(self, model: nn.Module) -> bool:
        """Carry the plan out on a dense model of the same architecture, in place, and before it the earlier ones that
        were not. False where the pruned model's shape is one that no config of its family describes."""
        stock = [plan.apply(model) for plan in self.earlier[len(plans_of(model)) :]]
        adapter = weight_adapter(model)
        results = {t.name: t for unit in {t.unit for t in self.targets} for t in adapter.targets(unit)}
        wrong = [t.name for t in self.targets if t.name not in results or results[t.name].shape != t.shape]
        if wrong:
            raise PrunelabError(
                f"the plan does not fit this model: {', '.join(wrong[:4])} differ; give the dense model"
            )
        if self.rotations:
            adapter.rotate(self.rotations)
        for target, decision in self.decisions():
            adapter.write(target, decision)
        note(model, self)
        return adapter.finish() and all(stock)

    def save(self, folder: Path | str) -> None:
        """Write the plan to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for block in self._blocks:
            write_tensors(block_file(folder, block), _read(self._blocks[block]))
        self.save_header(folder)
        for number, plan in enumerate(self.earlier):
            plan.save(folder / f"{EARLIER}{number}")

    def save_header(self, folder: Path) -> None:
        """Write what was run and on what, which makes a folder of decisions a plan."""
        for name, tensors in ((ROTATIONS, self.rotations), (LEARNED, self.learned)):
            if tensors:
                write_tensors(folder / name, tensors)
        write_json(folder / PLAN, {**self.header, "targets": [asdict(target) for target in self.targets]})

    @classmethod
    def load(cls, folder: Path | str) -> WeightPlan:
        """Read a plan from its folder. Tensors are read when they are asked for."""
        folder = Path(folder)
        try:
            header = json.loads((folder / PLAN).read_text())
            targets = [Target(**{**entry, "shape": tuple(entry["shape"])}) for entry in header.pop("targets")]
        except FileNotFoundError:
            raise PrunelabError(f"{folder} holds no finished plan; run the pruning to its end first") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PrunelabError(f"{folder / PLAN} is not a plan: {error}") from None
        rotations, learned = (_read(folder / n) if (folder / n).exists() else {} for n in (ROTATIONS, LEARNED))
        blocks = {block: block_file(folder, block) for block in {t.block for t in targets}}
        earlier = [cls.load(part) for part in sorted(folder.glob(f"{EARLIER}*"))]
        return cls(header, targets, blocks, rotations, learned, earlier)

    def __str__(self) -> str:
        header = self.header
        lines = [f"{header['method']} under {header['budget']} on {header['model']}", str(self.report)]
        for block, targets in groupby(self.targets, key=lambda target: target.block):
            kept: dict[str, list[int]] = {}
            for target in targets:
                counts = kept.setdefault(target.role, [0, 0])
                counts[0] += self.decision(target).kept
                counts[1] += target.units
            shares = ", ".join(f"{role} {count}/{units}" for role, (count, units) in kept.items())
            lines.append(f"{'outside' if block < 0 else f'block {block}'}: {shares}")
        return "\n".join(lines)

    def diff(self, other: WeightPlan) -> str:
        """Targets on which two plans differ, with the units that only one of them keeps."""
        names, theirs = {t.name for t in self.targets}, {t.name for t in other.targets}
        lines = [f"{name}: only in the first plan" for name in sorted(names - theirs)]
        lines += [f"{name}: only in the second plan" for name in sorted(theirs - names)]
        for target in (t for t in self.targets if t.name in theirs):
            a, b = self.decision(target), other.decision(target.name)
            if a.mask.shape != b.mask.shape:
                lines.append(f"{target.name}: of another shape")
                continue
            first, second = int((a.mask & ~b.mask).sum()), int((b.mask & ~a.mask).sum())
            values = a.values.keys() != b.values.keys() or any(
                not torch.equal(v, b.values[role]) for role, v in a.values.items()
            )
            values |= (a.code is None) != (b.code is None)
            if a.code is not None and b.code is not None:
                values |= a.code.bits != b.code.bits or not torch.equal(a.code.dense(), b.code.dense())
            if first or second or values:
                lines.append(
                    f"{target.name}: {first} units only in the first, {second} only in the second"
                    + (", other values" if values else "")
                )
        return "\n".join(lines) or "the plans are equal"


def plans_of(model: Any) -> tuple[WeightPlan, ...]:
    """The plans by which a model was pruned, in order."""
    results: tuple[WeightPlan, ...] = vars(model).get(HELD, ()) if hasattr(model, "__dict__") else ()
    return results


def note(model: Any, plan: WeightPlan) -> None:
    """Let a model know by what it was pruned."""
    if hasattr(model, "__dict__"):
        vars(model)[HELD] = (*plans_of(model), plan)


def block_file(folder: Path, block: int) -> Path:
    """Where the tensors of a block lie."""
    return folder / ("outside.safetensors" if block < 0 else f"block_{block:04d}.safetensors")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def _read(where: Any) -> Mapping[str, Tensor]:
    if not isinstance(where, Path):
        results: Mapping[str, Tensor] = where
        return results
    with safe_open(where, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _of(target: Target, where: Any) -> dict[str, Tensor]:
    """The tensors of one target by role."""
    start = f"{target.name}|"
    if not isinstance(where, Path):
        return {name.removeprefix(start): tensor for name, tensor in where.items() if name.startswith(start)}
    try:
        with safe_open(where, "pt") as file:
            names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
            return {name.removeprefix(start): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise PrunelabError(f"{where} cannot be read ({error}); the plan is damaged, make it anew") from None
