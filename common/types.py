"""The values that travel between methods, adapters and reports: small, frozen, model-free.

Shape letters used throughout the project: B batch, N units before pruning, K units after it, H heads,
D channels, E entries of a sparse matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from common.errors import PrunelabError

Unit = Literal["ratio", "count", "removed", "pattern", "words", "bytes", "macs", "cost"]
Where = Literal["input", "after_attention", "block_output", "projected", "packed"]
Rest = Literal["drop", "bypass", "halt", "defer"]
Positions = Literal["original", "renumber", "hold", "decay"]


@dataclass(frozen=True)
class Budget:
    """How much may stay: one amount for every site, or one amount a site.

    unit: `ratio` keeps that share of the units, `count` keeps that many, `removed` takes that many away,
    `pattern` keeps that many of each `every` consecutive ones (2:4), `words` and `bytes` limit text, `macs` names
    multiply-accumulates and `cost` a share of the dense ones (both are turned into one of the first three by
    `common.cost.match`).
    """

    amount: float | tuple[float, ...]
    unit: Unit = "ratio"
    every: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.amount, Sequence) and not isinstance(self.amount, (str, tuple)):
            object.__setattr__(self, "amount", tuple(self.amount))
        if self.unit not in get_args(Unit):
            raise PrunelabError(f"budget unit '{self.unit}' is unknown; use one of {', '.join(get_args(Unit))}")
        for value in self.amounts:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise PrunelabError(f"budget amount {value!r} is not a finite number")
            if value < 0 or (self.unit in ("ratio", "cost") and value > 1):
                allowed = "between 0 and 1" if self.unit in ("ratio", "cost") else "at least 0"
                raise PrunelabError(f"budget {value:g} {self.unit} is out of range: it must be {allowed}")
        if not self.amounts:
            raise PrunelabError("a budget needs at least one amount")
        if (self.unit == "pattern") != (self.every > 0):
            raise PrunelabError("a pattern names how many stay of how many, and nothing else does; write it as 2:4")
        if self.unit == "pattern" and any(a != int(a) or a > self.every for a in self.amounts):
            raise PrunelabError(f"the pattern {self} is out of range: whole numbers up to {self.every} can stay")

    @property
    def amounts(self) -> tuple[float, ...]:
        """The amounts as a tuple, also where there is only one."""
        return self.amount if isinstance(self.amount, tuple) else (self.amount,)

    def at(self, index: int) -> Budget:
        """The budget of the index-th site. A single amount serves every site."""
        if len(self.amounts) == 1:
            return replace(self, amount=self.amounts[0])
        if index >= len(self.amounts):
            raise PrunelabError(f"the budget names {len(self.amounts)} amounts but the method prunes at more sites")
        return replace(self, amount=self.amounts[index])

    def count(self, available: int) -> int:
        """Units kept out of `available`, rounded down as the token-pruning papers do.

        Ratios pass through six decimals first, so that 0.7 stored in single precision still means 0.7.
        """
        if len(self.amounts) != 1:
            raise PrunelabError("this budget has one amount a site; take `budget.at(index)` first")
        amount = self.amounts[0]
        if self.unit == "ratio":
            return int(round(amount * available, 6)) if amount < 1 else available
        if self.unit == "count":
            return min(int(amount), available)
        if self.unit == "removed":
            return max(available - int(amount), 0)
        if self.unit == "pattern":
            if available % self.every:
                raise PrunelabError(f"{available} units do not divide into groups of {self.every}, as {self} needs")
            return available // self.every * int(amount)
        raise PrunelabError(f"a budget in {self.unit} does not count units; use ratio, count or removed")

    def pruned(self, available: int) -> int:
        """Units taken away out of `available`. Of a ratio this number is rounded down, as the weight-pruning papers
        do, where `count` rounds down the number that stays."""
        if self.unit == "ratio" and len(self.amounts) == 1:
            return int(round((1 - self.amounts[0]) * available, 6))
        return available - self.count(available)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `0.7`, `0.9,0.8,0.7`, `13removed`, `64count`, `2:4`, `665bytes`, `100words`, `0.75cost` or
        `2.97e9macs`."""
        if pattern := re.fullmatch(r"\s*(\d+(?:,\d+)*):(\d+)\s*", text):
            kept = tuple(int(part) for part in pattern[1].split(","))
            return cls(kept if len(kept) > 1 else kept[0], "pattern", int(pattern[2]))
        match = re.fullmatch(r"\s*([-+.,\d\s]+(?:e\+?\d+)?)\s*([a-z]*)\s*", text)
        try:
            if match is None:
                raise ValueError
            amounts = [float(part) for part in match[1].split(",")]
        except ValueError:
            raise PrunelabError(
                f"cannot read the budget '{text}';"
                " write 0.7, 0.9,0.8,0.7, 13removed, 64count, 2:4, 665bytes or 100words"
            ) from None
        plain = tuple(int(a) if a.is_integer() and match[2] not in ("", "ratio", "cost") else a for a in amounts)
        return cls(plain if len(plain) > 1 else plain[0], match[2] or "ratio")  # type: ignore[arg-type]

    def __str__(self) -> str:
        unit = "" if self.unit == "ratio" else f":{self.every}" if self.unit == "pattern" else self.unit
        return ",".join(f"{a:.10g}" for a in self.amounts) + unit


@dataclass(frozen=True)
class Site:
    """A place in a network where a plan acts. `index` counts the method's own sites in order.

    where: `input` sees what enters the layer, `after_attention` the residual stream between attention and MLP,
    `block_output` the finished block with that block's attention at hand, `projected` visual tokens before
    pooling and packing, `packed` the sequence a language model is about to read.
    """

    layer: int
    where: Where = "block_output"
    index: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know of a model: sizes only.

    `tokens` includes the `special` tokens, which come first; only a class token may sit elsewhere, at `class_place`
    (vision Mamba puts it in the middle). `levels` counts the feature maps of a pyramid.
    """

    family: str
    depth: int
    heads: int
    width: int
    tokens: int
    special: int = 0
    class_token: bool = False
    class_place: int = 0
    grid: tuple[int, ...] | None = None
    levels: int = 1

    def patches(self, places: Tensor) -> Tensor:
        """Patch numbers of those token places [K] that are patches, neither special nor padding (-1)."""
        if self.class_place:
            places = places[(places >= 0) & (places != self.class_place)]
            return places - (places > self.class_place).long()
        return places[places >= self.special] - self.special


def take(x: Tensor, index: Tensor) -> Tensor:
    """Whole units [B, K, ...] (or [B, H, K, ...]) of x [B, N, ...] at positions index [B, K] (or [B, H, K]).

    The batch axes are folded into one, so that rows are copied whole: several times as fast as an expanded gather.
    """
    lead, units = index.shape[:-1], x.shape[index.dim() - 1]
    rows = torch.arange(lead.numel(), device=index.device).view(*lead, 1) * units + index
    return x.flatten(0, index.dim() - 1).index_select(0, rows.flatten()).view(*index.shape, *x.shape[index.dim() :])


@dataclass(frozen=True)
class Gather:
    """Keep units as they are. index [B, K] (or [B, H, K]) int64 positions; valid, of the same shape, marks the
    entries that count where samples keep different numbers of units."""

    index: Tensor
    valid: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.index.shape[-1]

    def apply(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [B, K, ...]."""
        return take(x, self.index)

    def matrix(self, units: int) -> Tensor:
        """The same reduction as a dense [B, K, N] matrix; rows of invalid entries are zero."""
        dense = torch.nn.functional.one_hot(self.index, units).float()
        return dense if self.valid is None else dense * self.valid.unsqueeze(-1)

    def narrow(self, outputs: int) -> Gather:
        """The first `outputs` entries alone (used to cost measured counts on the meta device)."""
        return Gather(self.index[..., :outputs], None if self.valid is None else self.valid[..., :outputs])


@dataclass(frozen=True)
class Mix:
    """Outputs that are weighted sums of units (merging, resizing, soft assignment), also for K > N.

    A sparse [B, K, N] matrix in coordinate form: entry e of sample b adds `weight[b, e]` times unit
    `source[b, e]` to output `target[b, e]`; all three are [B, E].
    """

    target: Tensor
    source: Tensor
    weight: Tensor
    outputs: int
    valid: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, K, D]; a matrix with many entries a unit is multiplied as a dense one."""
        if self.target.shape[1] > 4 * x.shape[1]:
            return self.matrix(x.shape[1]).to(x.dtype) @ x
        entries = x.gather(1, self.source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        entries = entries * self.weight.unsqueeze(-1).to(x.dtype)
        out = x.new_zeros(x.shape[0], self.outputs, x.shape[-1])
        return out.scatter_add(1, self.target.unsqueeze(-1).expand_as(entries), entries)

    def matrix(self, units: int) -> Tensor:
        """The same reduction as a dense [B, K, N] matrix."""
        batch = self.target.shape[0]
        flat = torch.zeros(batch, self.outputs * units, dtype=self.weight.dtype, device=self.weight.device)
        return flat.scatter_add(1, self.target * units + self.source, self.weight).view(batch, self.outputs, units)

    def narrow(self, outputs: int) -> Mix:
        """See `Gather.narrow`."""
        return replace(self, target=self.target.clamp(max=outputs - 1), outputs=outputs)

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Mix:
        """Any dense [B, K, N] matrix, such as a learned many-to-many transform, as a Mix."""
        batch, outputs, units = matrix.shape
        target = torch.arange(outputs, device=matrix.device).repeat_interleave(units)
        source = torch.arange(units, device=matrix.device).repeat(outputs)
        return cls(target.expand(batch, -1), source.expand(batch, -1), matrix.reshape(batch, -1), outputs)


Reduction = Gather | Mix


@dataclass(frozen=True)
class Plan:
    """What a method decided at one site.

    reduce:    which units, or which mixtures of them, go on;
    layout:    [B, K, 3] grid place (t, y, x) of each output, -1 where it has none; None if nothing was rearranged;
    rest:      what becomes of the others: `drop`, `bypass` (scattered back unchanged behind the layer), `halt` (their
               result is taken here), `defer` (kept aside, may return while decoding);
    positions: how the outputs are numbered: `original` (they keep their places; convolutions see zeros in the gaps),
               `renumber` (closed up, as if the others had never been), or for scans `hold` / `decay` (closed up, the
               state is kept or decays over the gap);
    key_bias:  [B, K] added to the logits of attention to each output from here on (ToMe's log size); None leaves
               the bias the units already carry.
    """

    reduce: Reduction
    layout: Tensor | None = None
    rest: Rest = "drop"
    positions: Positions = "original"
    key_bias: Tensor | None = None


@dataclass(frozen=True)
class Report:
    """What one application cost. Counts are means over the samples seen; MACs are per sample.

    tokens[l] = (tokens the attention of layer l saw, tokens its MLP saw). `macs` includes `scoring_macs`.
    """

    tokens: tuple[tuple[float, float], ...]
    macs: float
    scoring_macs: float
    dense_macs: float
    samples: int
    cache_bytes: int | None = None

    @property
    def saving(self) -> float:
        """Share of the dense MACs that is saved, scoring included."""
        return 1 - self.macs / self.dense_macs

    def __str__(self) -> str:
        lines = [
            f"MACs      {self.macs / 1e9:.3f} G of {self.dense_macs / 1e9:.3f} G a sample"
            f" ({100 * self.saving:.1f} % saved; {self.scoring_macs / 1e9:.4f} G of it is scoring)",
            "tokens    " + " ".join(f"{mlp:g}" if mlp == attn else f"{attn:g}>{mlp:g}" for attn, mlp in self.tokens),
        ]
        if self.cache_bytes is not None:
            lines.append(f"cache     {self.cache_bytes / 2**20:.2f} MiB")
        return "\n".join(lines)
