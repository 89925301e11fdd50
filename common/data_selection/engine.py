"""One engine for every data selector: before training on a corpus, or inside the training on each batch."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import unwritable
from prunelab.common.core.hooks import after, before, claimed, run_all
from prunelab.common.core.method import Method
from prunelab.common.data_selection import reading, signals
from prunelab.common.data_selection.examples import Examples, JsonLines, Rows, checked_texts, collate
from prunelab.common.data_selection.gradients import Gradients
from prunelab.common.data_selection.losses import IGNORED, counted, weighted_loss
from prunelab.common.data_selection.reading import Look, Lost
from prunelab.common.data_selection.role import DataPlan, DataSelector
from prunelab.common.data_selection.signals import WEIGHT, Batch, Forward

# -- before training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selected:
    """What a method chose of a corpus: an iterable of the samples that stay, in their order.

    Texts and lines of a file come as they are; tokenised samples as mappings whose `labels` leave out the tokens that
    go, with their `loss_weight` where the method weighs.
    """

    source: Iterable[Any]
    plan: DataPlan
    size: int
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        kept = set(self.indices)
        return (self._sample(place, row) for place, row in enumerate(_rows(self.source)) if place in kept)

    def __getitem__(self, index: int) -> Any:
        if not hasattr(self.source, "__getitem__"):
            raise PrunelabError("samples of a file are read one after the other; make a list of them first")
        place = self.indices[index]
        return self._sample(place, self.source[place])

    def _sample(self, place: int, row: Any) -> Any:
        if self.plan.tokens is None and self.plan.weight is None:
            return row
        sample = {name: value[0] for name, value in collate([row]).items()}
        if self.plan.tokens is not None:
            mask = self.plan.tokens[place, : len(sample["labels"])].cpu()
            sample["labels"] = sample["labels"].masked_fill(~mask, IGNORED)
        if self.plan.weight is not None:
            weight = self.plan.weight[place].cpu()
            sample[WEIGHT] = weight if weight.dim() == 0 else weight[: len(sample["labels"])]
        return sample

    def write(self, path: Path | str) -> None:
        """Write the texts that stay to a JSON-lines file."""
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("w", encoding="utf-8") as file:
                for row in self:
                    row = row if isinstance(row, dict) else {"text": row}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            part.replace(path)
        except TypeError:
            raise PrunelabError(
                f"{path} would hold tensors; only texts are written, train on the rest at once"
            ) from None
        except OSError as error:
            raise unwritable(path, error) from None
        finally:
            part.unlink(missing_ok=True)

    def __str__(self) -> str:
        lines = [f"samples    {len(self.indices):,} of {self.size:,}"]
        if self.plan.tokens is not None:
            lines.append(f"tokens     {int(self.plan.tokens[self.indices].sum()):,} enter the loss")
        return "\n".join(lines)

    def report(self, tokenizer: Any = None) -> str:
        """What stays in numbers, and the first samples that go or lose tokens, to read; `tokenizer` turns tokens into
        text."""
        return "\n".join((str(self), *reading.lines(list(self._lost()), tokenizer)))

    def _lost(self) -> Iterator[Lost]:
        kept, missing = set(self.indices), {False: reading.SHOWN, True: reading.SHOWN}
        for place, row in enumerate(_rows(self.source)):
            stays = place in kept
            if not missing[stays] or (stays and self.plan.tokens is None):
                continue
            missing[stays] -= 1
            where = f"sample {place}"
            if isinstance(row, str) or (isinstance(row, Mapping) and "input_ids" not in row):
                yield Lost(where, reading.words(row))
                continue
            sample = collate([row])
            trained = counted(sample["labels"])[0]
            tokens = self.plan.tokens[place, : len(trained)].cpu() if stays and self.plan.tokens is not None else None
            yield Lost(where, sample["input_ids"][0], trained, tokens)


def _rows(source: Any) -> Iterable[Any]:
    rows: Iterable[Any] = source.rows() if isinstance(source, JsonLines | Rows) else source
    return rows


def select(
    method: Method,
    data: Iterable[Any],
    budget: Budget | float | str | Sequence[float],
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    target: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    services: Mapping[str, Any] | None = None,
    forward: Forward = signals.logits_of,
    seed: int = 0,
    batch: int = 16,
) -> Selected:
    """What `method` keeps of a corpus before training.

    Parameters
    ----------
    data
        Texts, a file (`corpus`: JSON lines or Parquet), rows with a field `text` (a list, a `datasets.Dataset`, or
        `Rows` for another field), or tokenised samples (token ids, or mappings as the model takes them).
    budget
        One amount, or two, for samples and for tokens.
    model, tokenizer
        The model whose signals the method reads, and what turns texts into its tokens.
    target
        Texts that the data should come to resemble, or samples for a method that reads gradients; several corpora by
        name.
    services
        Second models: `reference`, `history`; `checkpoints` of a warm-up (`gradients.Checkpoint`).
    forward
        The logits of a model and a batch, where the model is none of transformers.

    Raises
    ------
    PrunelabError
        At empty or broken documents, a signal that cannot be had or holds NaN, and where nothing would be kept.
    """
    selector, budget = _checked(method, budget, "before")
    required = selector.requires()
    services = dict(services or {})
    for name in selector.services:
        if name not in services:
            raise PrunelabError(f"{selector.name} needs the service '{name}'; give services={{'{name}': ...}}")
    texts, samples = _texts(data)
    read: dict[str, Any] = {"text": lambda: texts} if texts is not None else {}
    columns: dict[str, Tensor] = {}
    differentiated = "gradients" in required
    if differentiated and model is None:
        raise PrunelabError(f"{selector.name} reads gradients; give model=")
    if texts is None or required - {"text"} or "tokens" in selector.chooses:
        samples = _tokenised(texts, tokenizer, required) if samples is None else samples
        if differentiated:
            assert model is not None
            gradients = Gradients(model, list(samples), forward)
            samples, read["gradients"] = gradients.samples, lambda: gradients
        columns = _measured(selector, samples, model, services, forward, batch)
        read |= {name: lambda value=columns[name]: value for name in required & columns.keys()}
    size = len(columns["labels" if "labels" in columns else next(iter(columns))]) if columns else _count(texts)
    if not size:
        raise PrunelabError("there is no document to choose from; give at least one")
    corpora = target.values() if isinstance(target, Mapping) else () if target is None else (target,)
    aims = [_aim(each, model, tokenizer, forward) if differentiated else _corpus(each) for each in corpora]
    examples = Examples(
        size, read, required, tokens=columns.get("input_ids"), labels=columns.get("labels"),
        valid=columns.get("attention_mask"), targets=aims, services=services,
        rng=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    plan = selector.plan(examples, budget)
    examples.refuse_broken()
    indices = list(range(size)) if plan.samples is None else plan.samples.index[0].tolist()
    nothing = not indices or (plan.tokens is not None and not bool(plan.tokens[indices].any()))
    if nothing:
        raise PrunelabError(f"{selector.name} would keep nothing of {size} samples under {budget}; keep more")
    source = data if texts is None else texts
    if texts is not None and (plan.tokens is not None or plan.weight is not None):
        pairs = zip(columns["input_ids"], columns["attention_mask"])
        source = [ids[mask.bool()] for ids, mask in pairs]  # what was decided on tokens holds for these tokens
    return Selected(source, plan, size, indices)


def _checked(method: Method, budget: Budget | float | str | Sequence[float], when: str) -> tuple[DataSelector, Budget]:
    if not isinstance(method, DataSelector):
        raise PrunelabError(f"{method.name} is a {method.role}, which chooses no training data")
    if method.when != when:
        elsewhere = {
            "before": "before training, with prunelab.common.data_selection.engine.select",
            "each_batch": "in each batch of a training, inside of `with prunelab.apply(method, model, budget)`",
        }
        raise PrunelabError(f"{method.name} chooses {elsewhere[method.when]}")
    budget = Budget.of(budget)
    method.budgets(budget)
    return method, budget


def _texts(data: Iterable[Any]) -> tuple[Iterable[str] | None, Iterable[Any] | None]:
    """The data as texts, or as tokenised samples."""
    if isinstance(data, JsonLines | Rows | str):
        return checked_texts(data), None
    if not (isinstance(data, Sized) and len(data) and hasattr(data, "__getitem__")):
        raise PrunelabError(
            "training data are texts or samples in a list or a datasets.Dataset that is not empty, or a file (corpus)"
        )
    first = data[0]
    if isinstance(first, Mapping) and "input_ids" not in first and isinstance(first.get("text"), str):
        return Rows(data), None
    return (checked_texts(data), None) if isinstance(first, str) else (None, data)


def _corpus(texts: Iterable[str]) -> Examples:
    checked = checked_texts(texts)
    size = _count(checked)
    if not size:
        raise PrunelabError("a target corpus holds no document; give at least one")
    return Examples(size, {"text": lambda: checked}, frozenset(("text",)))


def _aim(target: Iterable[Any], model: Any, tokenizer: Any, forward: Forward) -> Examples:
    """Target samples, of which gradients are read."""
    texts, samples = _texts(target)
    samples = list(_tokenised(texts, tokenizer, frozenset({"gradients"})) if samples is None else samples)
    gradients = Gradients(model, samples, forward)
    return Examples(len(samples), {"gradients": lambda: gradients}, frozenset({"gradients"}))


def _count(texts: Iterable[str] | None) -> int:
    assert texts is not None
    return sum(1 for _ in texts)


def _tokenised(texts: Iterable[str] | None, tokenizer: Any, required: frozenset[str]) -> Iterator[Tensor]:
    if tokenizer is None:
        read = ", ".join(sorted(required - {"text"})) or "what the method chooses"
        raise PrunelabError(f"tokens are needed for {read}; give tokenizer=")
    assert texts is not None
    return (torch.as_tensor(tokenizer(text)["input_ids"]) for text in texts)


def _measured(
    selector: DataSelector,
    samples: Iterable[Any],
    model: nn.Module | None,
    services: Mapping[str, Any],
    forward: Forward,
    size: int,
) -> dict[str, Tensor]:
    """Tokens, labels and signals of all samples, [n, ...], a batch at a time; what is kept lies on the CPU."""
    device = None if model is None else next(model.parameters()).device
    parts: dict[str, list[Tensor]] = {}
    stream = iter(samples)
    while chunk := list(islice(stream, size)):
        batch = {name: value.to(device) for name, value in collate(chunk).items()}
        sources = signals.sources(selector.requires(), batch, model, services, selector.attention_layer, forward)
        values = {name: sources[name]() for name in selector.requires() & sources.keys()}
        for name, value in (values | {n: batch[n] for n in _KEPT if n in batch}).items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: _joined(tensors, _KEPT.get(name, 0)) for name, tensors in parts.items()}


_KEPT = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}  # with what fills them up


def _joined(parts: Sequence[Tensor], fill: int) -> Tensor:
    """[n, N, ...] of parts with fewer tokens."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    whole = parts[0].new_full((sum(len(part) for part in parts), width, *parts[0].shape[2:]), fill)
    start = 0
    for part in parts:
        whole[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return whole


# -- inside the training ---------------------------------------------------------------------------------------------


def narrowed(batch: Batch, plan: DataPlan) -> dict[str, Any]:
    """The batch as the plan leaves it: samples that stay, labels of tokens that stay, and `loss_weight`."""
    left = dict(batch)
    labels: Tensor = batch["labels"]
    size = len(labels)
    if plan.tokens is not None:
        left["labels"] = labels.masked_fill(~plan.tokens, IGNORED)
    if plan.weight is not None:
        left[WEIGHT] = plan.weight
    if plan.samples is not None:
        index = plan.samples.index[0].to(labels.device)
        for name, value in left.items():
            if isinstance(value, Tensor) and value.dim() and len(value) == size:
                left[name] = value.index_select(0, index)
    return left


@dataclass
class Handle:
    """What is chosen while a model trains: counts over the batches so far."""

    method: DataSelector
    budget: Budget
    batches: int = 0
    samples: int = 0
    kept_samples: int = 0
    unseen: int = 0  # training passes that showed no labels
    tokens: Tensor | int = 0
    kept_tokens: Tensor | int = 0
    broken: list[Tensor] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)  # the first batches, and the last

    def report(self, tokenizer: Any = None) -> str:
        """Shares of samples and tokens that entered the loss, and of the first batches and the last a sample that went
        and one that lost tokens, to read; `tokenizer` turns tokens into text."""
        if not self.batches:
            raise PrunelabError(
                f"{self.method.name} has seen no batch; train the model with `labels` among its inputs inside the block"
            )
        self.refuse_broken()
        return "\n".join((
            f"batches    {self.batches:,}",
            f"samples    {self.kept_samples:,} of {self.samples:,}",
            f"tokens     {int(self.kept_tokens):,} of {int(self.tokens):,} entered the loss",
            *reading.lines([one for look in self.looks for one in look.examples()], tokenizer),
        ))  # fmt: skip

    def refuse_broken(self) -> None:
        """Stop where a signal held NaN, or a batch was left without a token."""
        if self.broken and bool(torch.stack(self.broken).any()):
            raise PrunelabError(
                f"{self.method.name} met signals that are NaN or infinite, or left a batch without any token; check the"
                " data, or keep more"
            )


@dataclass(frozen=True)
class _Weight:
    """What the tokens of a pass count: a weight of the method's own, None for 1, and by how much the tokens of the
    batch outnumber those that stay."""

    own: Tensor | None
    labels: Tensor
    share: Tensor

    def weigh(self, output: Any) -> None:
        """Let an output's loss have the weights. TRL's trainer asks for logarithms of probabilities, which it sums
        itself and divides by the tokens of the whole batch."""
        own = self.own if self.own is None or self.own.dim() == 2 else self.own[:, None]
        if getattr(output, "log_probs", None) is not None:
            factor = self.share if own is None else self.share * (own[:, 1:] if own.shape[1] > 1 else own)
            output.log_probs = output.log_probs * factor.to(output.log_probs.dtype)
        elif own is not None:
            output.loss = weighted_loss(output.logits, self.labels, own)


class _Now(threading.local):
    """The pass at hand of a thread: whether it is one for signals alone, and what its loss is to be weighed with."""

    busy = False
    weight: _Weight | None = None


@contextmanager
def applied(
    method: Method,
    model: nn.Module,
    budget: Budget | float | str | Sequence[float],
    *,
    services: Mapping[str, Any] | None = None,
    forward: Forward = signals.logits_of,
    seed: int = 0,
) -> Iterator[Handle]:
    """Let a method choose from each batch that the model is trained on inside a `with` block.

    Whatever trains the model, each of its passes in training mode with `labels` first goes through the model without
    gradients for the signals, if the method reads any of the model's own; then samples and labels that the method drops
    are left out of the pass. Methods that weigh data need `logits` or `log_probs` among the model's outputs. Draws
    start from torch's global generator, so that a training that puts it back where it stood goes on with the same
    choices.
    """
    selector, budget = _checked(method, budget, "each_batch")
    seconds = dict(services or {})
    handle = Handle(selector, budget)
    names = list(inspect.signature(model.forward).parameters)
    removers: list[Any] = []
    now = _Now()

    def choose(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if now.busy or not (model.training and torch.is_grad_enabled()):
            return None
        batch = dict(zip(names, args)) | kwargs
        if batch.get("labels") is None:
            handle.unseen += 1
            return None
        now.busy = True
        try:
            rng = torch.Generator().manual_seed(seed + int(torch.randint(2**31, ())))
            left, share = _chosen(handle, batch, model, seconds, forward, rng)
        finally:
            now.busy = False
        now.weight = _Weight(left.pop(WEIGHT, None), left["labels"], share)
        return (), left

    def weigh(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if now.weight is not None and not now.busy:
            now.weight.weigh(output)
            now.weight = None

    with claimed(selector, model, seconds):
        removers += [before(model, choose, kwargs=True), after(model, weigh)]
        try:
            yield handle
        finally:
            run_all(removers)
    if handle.unseen and not handle.batches:
        raise PrunelabError(
            f"{selector.name} saw no labels in {handle.unseen} training passes and chose nothing; give the model its"
            " `labels`, and no loss function of the trainer's own"
        )
    handle.refuse_broken()


def _chosen(
    handle: Handle, batch: Batch, model: nn.Module, services: Mapping[str, Any], forward: Forward, rng: torch.Generator
) -> tuple[dict[str, Any], Tensor]:
    """The batch as the method leaves it, and how often its tokens hold those that stay; counts are taken on the
    device."""
    selector, labels = handle.method, batch["labels"]
    required = selector.requires()
    sources = signals.sources(required, batch, model, services, selector.attention_layer, forward)
    examples = Examples(
        len(labels), sources, required, tokens=batch.get("input_ids"), labels=labels,
        valid=batch.get("attention_mask"), services=services, rng=rng,
    )  # fmt: skip
    with torch.no_grad():
        plan = selector.plan(examples, handle.budget)
        left = {name: value for name, value in narrowed(batch, plan).items() if name not in signals.SERVICES}
        before, after = counted(labels).sum(), counted(left["labels"]).sum()
    if not len(left["labels"]):
        raise PrunelabError(
            f"{selector.name} keeps none of {len(labels)} samples under {handle.budget}; keep more, or take larger"
            " batches"
        )
    if left.get("num_items_in_batch") is not None:  # what the trainer divides by
        left["num_items_in_batch"] = left["num_items_in_batch"] * after / before.clamp_min(1)
    handle.batches += 1
    handle.samples += len(labels)
    handle.kept_samples += len(left["labels"])
    handle.tokens, handle.kept_tokens = handle.tokens + before, handle.kept_tokens + after
    bad = after == 0 if examples.broken is None else examples.broken | (after == 0)
    handle.broken = [bad if not handle.broken else handle.broken[0] | bad]
    if batch.get("input_ids") is not None:
        samples = None if plan.samples is None else plan.samples.index[0]
        look = Look(handle.batches, batch["input_ids"], labels, batch.get("attention_mask"), plan.tokens, samples)
        handle.looks = [*handle.looks[: reading.SHOWN - 1], look]
    return left, before / after.clamp_min(1)
