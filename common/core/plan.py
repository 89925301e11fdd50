"""Plans: what a method decided at a site, and what it may know of the model."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Where = Literal["input", "after_attention", "block_output", "tower", "encoded", "projected", "packed"]


Rest = Literal["drop", "bypass", "halt", "defer"]


Positions = Literal["original", "renumber", "hold", "decay"]


@dataclass(frozen=True)
class Site:
    """A place in a network where a plan acts. `index` counts the method's own sites in order.

    where: `input` sees what enters the layer, `after_attention` the residual stream between attention and MLP,
    `block_output` the finished block with that block's attention at hand, `tower` what enters a layer of the image
    encoder before a language model, `encoded` the features of its patches before the projector, `projected` visual
    tokens behind it, before pooling and packing, `packed` the sequence a language model is about to read. class_token:
    at `encoded`, whether the encoder's class token stands before the patches of every crop and, where it stays, is read
    by the language model; like all special tokens it is protected.
    """

    layer: int
    where: Where = "block_output"
    index: int = 0
    class_token: bool = False


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know of a model: sizes only.

    `tokens` includes the `special` tokens, which come first; only a class token may sit elsewhere, at `class_index`
    (vision Mamba puts it in the middle). `levels` counts the feature maps of a pyramid, `vocabulary` the tokens that a
    language model gives logits for. `tower` are the sizes of the image encoder before a language model, as deep as its
    features come from, with the tokens of one crop.
    """

    family: str
    depth: int
    heads: int
    width: int
    tokens: int
    special: int = 0
    class_token: bool = False
    class_index: int = 0
    grid: tuple[int, ...] | None = None
    levels: int = 1
    tower: ModelInfo | None = None
    vocabulary: int = 0

    def patches(self, indices: Tensor) -> Tensor:
        """Patch numbers of those token indices [K] that are patches, neither special nor padding (-1)."""
        if self.class_index:
            indices = indices[(indices >= 0) & (indices != self.class_index)]
            return indices - (indices > self.class_index).long()
        return indices[indices >= self.special] - self.special


def unscaled(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, which would lower what is compared and added up."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


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
        dense = torch.zeros(*self.index.shape, units, device=self.index.device)
        dense = dense.scatter(-1, self.index.unsqueeze(-1), 1.0)
        return dense if self.valid is None else dense * self.valid.unsqueeze(-1)

    def narrow(self, outputs: int) -> Gather:
        """The first `outputs` entries alone (used to cost measured counts on the meta device)."""
        return Gather(self.index[..., :outputs], None if self.valid is None else self.valid[..., :outputs])


@cache
def _warm() -> None:
    """Torch says once a process that its compressed rows are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = torch.zeros(0, dtype=torch.long)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.long), none, none.float(), (1, 1))


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
        """[B, N, D] -> [B, K, D]; a matrix that names every unit for every output is multiplied as a dense one."""
        with unscaled(x):  # outputs have the dtype of units
            return self._apply(x)

    def _apply(self, x: Tensor) -> Tensor:
        if self.target.shape[1] >= max(4, self.outputs) * x.shape[1]:
            return self.matrix(x.shape[1]).to(x.dtype) @ x
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not self._learning(x):
            return self._product(x)
        entries = x.gather(1, self.source.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        entries = entries * self.weight.unsqueeze(-1).to(x.dtype)
        out = x.new_zeros(x.shape[0], self.outputs, x.shape[-1])
        return out.scatter_add(1, self.target.unsqueeze(-1).expand_as(entries), entries)

    def _learning(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)

    def _product(self, x: Tensor) -> Tensor:
        """The same as one sparse product over the whole batch. It adds up in the same order, to the same bits where the
        processor does not fuse products and sums, without moving every entry twice; there is none for half precision,
        and other devices move memory fast enough."""
        _warm()
        batch, units, width = x.shape
        number = torch.arange(batch).unsqueeze(1)
        target, source = (self.target + number * self.outputs).flatten(), (self.source + number * units).flatten()
        weight = self.weight.to(x.dtype).expand(batch, -1).flatten()
        order = target.argsort(stable=True)
        rows = batch * self.outputs
        starts = torch.zeros(rows + 1, dtype=torch.long)
        starts[1:] = torch.bincount(target, minlength=rows).cumsum(0)
        sparse = torch.sparse_csr_tensor(
            starts, source[order], weight[order], (rows, batch * units), check_invariants=False
        )
        return (sparse @ x.flatten(0, 1)).view(batch, self.outputs, width)

    def matrix(self, units: int) -> Tensor:
        """The same reduction as a dense [B, K, N] matrix."""
        batch = self.target.shape[0]
        flat = torch.zeros(batch, self.outputs * units, dtype=self.weight.dtype, device=self.weight.device)
        return flat.scatter_add(1, self.target * units + self.source, self.weight).view(batch, self.outputs, units)

    def narrow(self, outputs: int) -> Mix:
        """See `Gather.narrow`."""
        return Mix(self.target.clamp(max=outputs - 1), self.source, self.weight, outputs, self.valid)

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Mix:
        """Any dense [B, K, N] matrix, such as a learned many-to-many transform, as a Mix."""
        batch, outputs, units = matrix.shape
        target = torch.arange(outputs, device=matrix.device).repeat_interleave(units)
        source = torch.arange(units, device=matrix.device).repeat(outputs)
        return cls(target.expand(batch, -1), source.expand(batch, -1), matrix.reshape(batch, -1), outputs)


@dataclass(frozen=True)
class Squares(Mix):
    """Means of squares of `side` units of maps (rows, columns) of equal size that lie one after the other behind
    `first` units that stay as they are: a `Mix` that pools in place of looking entries up.

    grid: of one map. made: the entries that this holds of; with others in their place it is any mixture.
    """

    grid: tuple[int, int] = (0, 0)
    side: int = 1
    first: int = 0
    made: tuple[Tensor, ...] = ()

    def of_batch(self, batch: int, device: torch.device) -> Squares:
        """The same for so many samples, on a device."""
        if batch == 1 and device == self.weight.device:
            return self
        made = tuple(part.expand(batch, -1).to(device) for part in self.made)
        return replace(self, target=made[0], source=made[1], weight=made[2], made=made)

    def _apply(self, x: Tensor) -> Tensor:
        own = (self.target, self.source, self.weight)
        if any(now is not before for now, before in zip(own, self.made, strict=True)):
            return super()._apply(x)
        batch, width = len(x), x.shape[-1]
        maps = x[:, self.first :].reshape(-1, *self.grid, width).permute(0, 3, 1, 2)
        pooled = torch.nn.functional.avg_pool2d(maps, self.side).permute(0, 2, 3, 1).reshape(batch, -1, width)
        return torch.cat([x[:, : self.first], pooled], 1) if self.first else pooled


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
               the bias the units already carry;
    groups:    [B, K] where plans are for single images and videos: numbers from 0 by which the method knows outputs
               together at later sites, as `signals.groups`; -1 in none;
    gate:      [B, N] from 0 to 1 for every unit, with gradients, in place of a hard choice while the model trains: all
               units go on, and attention to each is weighed by its gate from here on; with `bypass` in that layer
               alone, of whose changes each unit takes that share. Otherwise it has no say.
    """

    reduce: Reduction
    layout: Tensor | None = None
    rest: Rest = "drop"
    positions: Positions = "original"
    key_bias: Tensor | None = None
    groups: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class Effort:
    """How much of its work a decoder's layer does for visual tokens, all of which stay.

    window:  visual tokens of one picture attend to those of it that are at most (window - 1) / 2 rows and columns away,
             earlier or later ones, and to no other visual token; 0: as the model has it;
    heads:   for each head, whether attention to visual tokens, and of them, has a say; None: all have;
    read:    whether any token's attention to visual ones has a say;
    neurons: share of the MLP's neurons, from the first on, that visual tokens go through.
    """

    window: int = 0
    heads: tuple[bool, ...] | None = None
    read: bool = True
    neurons: float = 1.0

    @property
    def attends_as_ever(self) -> bool:
        """Whether attention is the model's own."""
        return not self.window and self.read and (self.heads is None or all(self.heads))


@dataclass(frozen=True)
class Report:
    """What one application cost. Counts are means over the samples seen; MACs are per sample.

    tokens[l] = (tokens the attention of layer l saw, tokens its MLP saw). `macs` includes `scoring_macs`. standard:
    whether MACs are of the model's standard input, though others passed, whose images could not be told apart.
    """

    tokens: tuple[tuple[float, float], ...]
    macs: float
    scoring_macs: float
    dense_macs: float
    samples: int
    cache_bytes: int | None = None
    standard: bool = False

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
        if not self.samples:
            lines.append("seen      nothing yet: this is what an input would cost")
        if self.standard:
            lines.append("MACs are of a standard input: the samples seen had unlike numbers of images in one batch")
        if self.cache_bytes is not None:
            lines.append(f"cache     {self.cache_bytes / 2**20:.2f} MiB")
        return "\n".join(lines)
