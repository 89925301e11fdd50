"""Calibration data of the shapes people hold it in, under names where there are several corpora, and the objectives
that turn it into a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import WeightAdapter

INPUTS = ("input_ids", "pixel_values")
LABELS = ("labels", "label")
SCALE = 20.0  # of the cosine similarities in the contrastive loss
Objective = Literal["lm", "labels", "contrastive"] | Callable[[Any, Sequence[Any]], Tensor] | None


class Labelled(NamedTuple):
    """A sequence or image, and what a model should make of it."""

    inputs: Tensor
    label: Tensor


@dataclass(frozen=True)
class Corpus:
    """One part of the calibration set.

    items: what an objective reads: sequences [T] or images [C, H, W], these `Labelled`, or several of them by name
    (`query`, `positive`, `negative`); sequences: those among them, which pass through the blocks. Where they are
    `calls`, the arguments of one by name, each passes as a whole.
    """

    items: tuple[Any, ...]
    calls: bool = False

    @property
    def sequences(self) -> list[Any]:
        return list(self.items) if self.calls else [sequence for item in self.items for sequence in _within(item)]

    def to(self, device: torch.device) -> Corpus:
        """The same on a device."""
        moved = [tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, item) for item in self.items]
        return Corpus(tuple(moved), self.calls)


def _within(item: Any) -> Iterator[Any]:
    if isinstance(item, Labelled):
        yield item.inputs
    elif isinstance(item, Mapping):
        yield from item.values()
    else:
        yield item


def named(calibration: Any) -> dict[str, Any]:
    """The parts of a calibration set by name; a set without names is the part ''."""
    if calibration is None:
        return {}
    if isinstance(calibration, Mapping) and not any(name in calibration for name in INPUTS):
        return dict(calibration)
    return {"": calibration}


def corpus(data: Any) -> Corpus:
    """What lies in data of any shape that people hold: token ids [N, T] or images [N, C, H, W] as a tensor or array,
    one of them, lists of them or of lists of ids, a batch of a tokeniser or processor (of which padding is left out),
    a data loader or set of such batches, pairs of inputs and labels, and lists of named sequences.

    Raises PrunelabError at anything else.
    """
    return Corpus(tuple(_items(data)))


def calls(data: Any) -> Corpus:
    """The same for a component of a pipeline of which nothing is known: what it is called with, by name or as is."""
    if isinstance(data, Mapping):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, str):
        raise PrunelabError("a component's calibration set is a list of the arguments of its calls, by name")
    return Corpus(tuple(data), calls=True)


def _items(data: Any, nested: bool = False) -> Iterator[Any]:
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    if isinstance(data, Tensor):
        yield from _rows(data)
    elif isinstance(data, Mapping):
        yield from _batch(data)
    elif isinstance(data, str | bytes) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        what = "a text" if isinstance(data, str | bytes) else f"a {type(data).__name__}"
        raise PrunelabError(
            f"{what} is no calibration data: give token ids or images, as the model's own tokeniser or transform makes"
            " them; see prunelab.common.weights.windows"
        )
    elif isinstance(data, tuple | list) and _is_pair(data, nested):
        yield from _labelled(*data)
    else:
        yield from _each(data)


def _each(data: Any) -> Iterator[Any]:
    """What lies in the elements of a list, set or loader."""
    parts = list(data) if isinstance(data, Iterable) else [data[i] for i in range(len(data))]
    if parts and all(isinstance(part, int) and not isinstance(part, bool) for part in parts):
        yield torch.tensor(parts)
        return
    for part in parts:
        if isinstance(data, DataLoader) and isinstance(part, list):  # what was a tuple before it was collated
            part = tuple(part) if len(part) > 1 else part[0]
        if isinstance(part, tuple) and len(part) > 2:
            raise PrunelabError(f"a calibration sample of {len(part)} parts is unclear; give them by name")
        yield from _items(part, nested=True)


def _is_pair(data: Sequence[Any], nested: bool) -> bool:
    """Whether these are inputs and labels: two parts that are unlike, or in an element of a set a tuple of two."""
    if len(data) != 2 or not isinstance(data[0], Tensor | np.ndarray):
        return False
    inputs, label = torch.as_tensor(data[0]), data[1]
    unlike = inputs.is_floating_point() and not (
        isinstance(label, Tensor | np.ndarray) and torch.as_tensor(label).is_floating_point()
    )
    return unlike or (nested and isinstance(data, tuple))


def _rows(data: Tensor) -> Iterator[Tensor]:
    """The sequences or images of a tensor, or the single point that it is."""
    single = 3 if data.is_floating_point() and data.dim() > 1 else 1
    if data.dtype == torch.bool or data.is_complex() or data.dim() not in (single, single + 1):
        given = f"{str(data.dtype).removeprefix('torch.')} {list(data.shape)}"
        raise PrunelabError(
            "calibration data are whole numbers [T] or [N, T], token ids, or floating-point numbers [C, H, W] or"
            f" [N, C, H, W], images, or [C], a point; these are {given}"
        )
    yield from (data.unbind() if data.dim() > single else (data,))


def _labelled(inputs: Any, labels: Any) -> Iterator[Labelled]:
    rows = list(_items(inputs))
    label = torch.as_tensor(labels)
    if len(rows) == 1 and (label.dim() == 0 or (label.dim() == 1 and len(label) > 1)):
        label = label.unsqueeze(0)
    if len(label) != len(rows):
        raise PrunelabError(f"{len(rows)} calibration samples have {len(label)} labels; give one each")
    yield from (Labelled(row, one) for row, one in zip(rows, label, strict=True))


def _batch(data: Mapping[str, Any]) -> Iterator[Any]:
    """The samples of a batch by name."""
    inputs = [name for name in INPUTS if name in data]
    if not inputs:
        yield from _grouped(data)
        return
    known = {inputs[0], "attention_mask", "token_type_ids", *LABELS}
    if unknown := sorted(data.keys() - known):
        raise PrunelabError(f"a calibration batch has {', '.join(unknown)}, which is not read; leave it out")
    rows = list(_items(data[inputs[0]]))
    if "token_type_ids" in data and any(bool(torch.as_tensor(t).any()) for t in data["token_type_ids"]):
        raise PrunelabError("calibration sequences are single texts; leave pairs (token_type_ids) out")
    if "attention_mask" in data:
        seen = list(_items(data["attention_mask"]))
        rows = [row[mask.bool()] for row, mask in zip(rows, seen, strict=True)]
    labels = next((data[name] for name in LABELS if name in data), None)
    if labels is None:
        yield from rows
        return
    own = [torch.as_tensor(one) for one in labels]
    if len(rows) == 1 and len(own) > 1:  # of a single sample, one a token
        own = [torch.stack(own)]
    if len(own) != len(rows):
        raise PrunelabError(f"{len(rows)} calibration samples have {len(own)} labels; give one each")
    if "attention_mask" in data and own and own[0].dim() > 0:
        own = [one[mask.bool()] for one, mask in zip(own, seen, strict=True)]
    yield from (Labelled(row, one) for row, one in zip(rows, own, strict=True))


def _grouped(data: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Sequences that belong together, by name."""
    parts = {name: list(_items(value)) for name, value in data.items()}
    if len({len(rows) for rows in parts.values()}) != 1:
        raise PrunelabError(f"unlike numbers of {', '.join(map(str, parts))} in a calibration batch; give one each")
    yield from (dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True))


# -- objectives ------------------------------------------------------------------------------------------------------


def loss_of(adapter: WeightAdapter, objective: Objective, model: Any) -> Callable[[Sequence[Any]], Tensor]:
    """The loss of a batch of items. None is the loss the model was trained with, `lm` likewise; `labels` cross entropy
    of the model's logits, `contrastive` InfoNCE over the positives and negatives of the batch; a function gets the
    model as it was given and the batch."""
    if callable(objective):
        return lambda batch: objective(model, batch)
    known = {None: _own, "lm": _own, "labels": _labels, "contrastive": _contrastive}
    if objective not in known:
        raise PrunelabError(f"the objective is one of lm, labels and contrastive, or a function, not {objective!r}")
    return lambda batch: known[objective](adapter, batch)


def _own(adapter: WeightAdapter, batch: Sequence[Any]) -> Tensor:
    losses = []
    for item in batch:
        for sample in _within(item):
            label = item.label if isinstance(item, Labelled) and item.label.shape == sample.shape else None
            losses.append(adapter.loss(sample, label))
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _labels(adapter: WeightAdapter, batch: Sequence[Any]) -> Tensor:
    if not all(isinstance(item, Labelled) for item in batch):
        raise PrunelabError("the objective 'labels' needs pairs of inputs and labels as its calibration set")
    losses = []
    for item in batch:
        out = adapter.run(item.inputs)
        logits = out if isinstance(out, Tensor) else out.logits
        losses.append(F.cross_entropy(logits.flatten(0, -2), item.label.reshape(-1).to(logits.device)))
    return torch.stack(losses).mean()


def _contrastive(adapter: WeightAdapter, batch: Sequence[Any]) -> Tensor:
    """InfoNCE of scaled cosines: each query's own positive against all positives and negatives of the batch."""
    if not all(isinstance(item, Mapping) and {"query", "positive"} <= item.keys() for item in batch):
        raise PrunelabError("the objective 'contrastive' needs items of query, positive and maybe negative sequences")
    queries = torch.stack([adapter.embed(item["query"]) for item in batch])
    others = [item[name] for name in ("positive", "negative") for item in batch if name in item]
    against = torch.stack([adapter.embed(sequence) for sequence in others])
    cosines = F.normalize(queries.float(), dim=-1) @ F.normalize(against.float(), dim=-1).T
    return F.cross_entropy(SCALE * cosines, torch.arange(len(batch), device=cosines.device))
