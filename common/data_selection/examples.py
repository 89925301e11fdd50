"""Training data as methods see it: a corpus that may be larger than memory, or one batch, with signals that are
computed when they are first read.

Shape letters: n samples, N tokens of the longest, V words of the vocabulary.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.optional import optional
from prunelab.common.data_selection.losses import IGNORED, counted

SIGNALS = (
    "text", "loss", "entropy", "logits", "reference_loss", "history_loss", "prompt_attention", "last_attention",
    "rater_attention", "embedding", "grades", "gradients",
)  # fmt: skip


class Examples:
    """Training data: its size, its tokens and labels, and the signals that a method named in `requires`.

    Always at hand: `ids` of the n samples, `rng` for methods that draw, `services`, and `targets`, the corpora that the
    data should come to resemble, where some were given; `target` is the first. Of tokenised data also `tokens` and
    `labels` [n, N] (labels [n] of a classification), `counted` [n, N], the tokens that enter the loss, and `prompt`
    [n, N], those that do not, padding apart.

    Signals by name, aligned with the tokens, 0 where a token enters no loss: `loss` and `entropy` [n, N] under the
    model that is trained and its `logits` [n, N, V] (or [n, V]); `reference_loss` and `history_loss` [n, N] under the
    services `reference` and `history`. In one layer, the mean over heads: `prompt_attention` [n, N], what each token
    pays to the prompt; `rater_attention` [n, N], what it pays to those words of the prompt that the answer is most
    like; `last_attention` [n, N], what the last token pays to each. `embedding` [n, D]: the mean over a sample's tokens
    of what the model's output layer is given; `grades` [n, G], a column of the data. `gradients`: a function of a
    checkpoint that gives those of every sample, a few samples at a time. `text`: the texts, an iterable that can be
    read again and holds one of them at a time.
    """

    def __init__(
        self,
        size: int,
        sources: Mapping[str, Callable[[], Any]],
        required: frozenset[str],
        *,
        ids: Sequence[Any] | None = None,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        valid: Tensor | None = None,
        targets: Sequence[Examples] = (),
        services: Mapping[str, Any] | None = None,
        rng: torch.Generator | None = None,
    ) -> None:
        missing = required - sources.keys()
        if missing:
            name = min(missing)
            raise PrunelabError(f"the signal '{name}' {_REMEDY.get(name, f'is unknown; there are {SIGNALS}')}")
        self._sources, self._required = sources, required
        self.size = size
        self.ids = range(size) if ids is None else ids
        self.tokens, self.labels, self.valid = tokens, labels, valid
        self.targets = tuple(targets)
        self.services = services or {}
        self.rng = rng or torch.Generator().manual_seed(0)
        self.broken: Tensor | None = None  # whether a signal held NaN, on the device

    def __len__(self) -> int:
        return self.size

    @property
    def target(self) -> Examples | None:
        """The one corpus that the data should come to resemble, or the first of several."""
        return self.targets[0] if self.targets else None

    @property
    def counted(self) -> Tensor:
        """Tokens that enter the loss."""
        assert self.labels is not None and self.labels.dim() == 2, "these data have no tokens"
        return counted(self.labels)

    @property
    def prompt(self) -> Tensor:
        """Tokens that are read and enter no loss."""
        assert self.labels is not None and self.tokens is not None
        valid = torch.ones_like(self.tokens, dtype=torch.bool) if self.valid is None else self.valid.bool()
        return (self.labels == IGNORED) & valid

    @property
    def lengths(self) -> Tensor:
        """Tokens [n] of each sample that enter the loss."""
        return self.counted.sum(1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._required:
            raise AttributeError(f"the signal '{name}' was not required; name it in requires()")
        value = self._sources[name]()
        if isinstance(value, Tensor):
            bad = ~torch.isfinite(value).all()
            self.broken = bad if self.broken is None else self.broken | bad
        setattr(self, name, value)
        return value

    def refuse_broken(self) -> None:
        """Stop where a signal held NaN or infinite values."""
        if self.broken is not None and bool(self.broken):
            raise PrunelabError(
                "a signal of the training data holds NaN or infinite values; check the samples and the model's dtype"
            )


_REMEDY = {
    "text": "needs texts; give texts or a JSON-lines file",
    "reference_loss": "needs a reference model; give services={'reference': ...}",
    "history_loss": "needs the model of an earlier time; give services={'history': ...}",
    **dict.fromkeys(
        ("loss", "entropy", "logits", "prompt_attention", "last_attention", "rater_attention", "embedding"),
        "needs a model; give model=",
    ),
    "grades": "is what graders gave every sample; give samples with a column `grades`",
}


@dataclass(frozen=True)
class JsonLines:
    """Documents of a JSON-lines file (plain, or compressed as .gz, .bz2, .xz or .zst), read anew each time and one at a
    time.

    Parameters
    ----------
    path
        The file.
    field
        The field of a line that holds the text.
    """

    path: Path | str
    field: str = "text"

    def rows(self, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The lines behind the first `skip`, each checked: valid UTF-8 and JSON, with a text that is not empty."""
        return (self.row(line, number) for number, line in enumerate(self.lines(skip), skip + 1))

    def lines(self, skip: int = 0) -> Iterator[bytes]:
        """The lines as they are, behind the first `skip`."""
        path = Path(self.path)
        try:
            with _opened(path) as file:
                yield from islice(file, skip, None)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise PrunelabError(f"cannot read {path} ({error}); check the path") from None

    def row(self, line: bytes, number: int) -> dict[str, Any]:
        """What the line of a number holds, checked."""
        return self._row(line, f"{self.path}, line {number}")

    def _row(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise PrunelabError(f"{where} is not UTF-8; convert the file first") from None
        except ValueError:
            raise PrunelabError(f"{where} is not JSON; write one object a line") from None
        return self._checked(row, where)

    def _checked(self, row: Any, where: str) -> dict[str, Any]:
        if not isinstance(row, dict) or not isinstance(row.get(self.field), str):
            raise PrunelabError(f"{where} has no text in its field '{self.field}'; name the field that has")
        if not row[self.field].strip():
            raise PrunelabError(f"{where} holds an empty document; leave it out")
        if not _encodable(row[self.field]):
            raise PrunelabError(f"{where} holds characters that are no valid UTF-8; repair it")
        return row

    def __iter__(self) -> Iterator[str]:
        return (row[self.field] for row in self.rows())


@dataclass(frozen=True)
class Parquet(JsonLines):
    """Documents of a Parquet file, as those of JSON lines; reads with pyarrow, which is not among the requirements."""

    def lines(self, skip: int = 0) -> Iterator[bytes]:
        library = optional("pyarrow.parquet", "Parquet")
        try:
            batches = library.ParquetFile(self.path).iter_batches()
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from (json.dumps(row, default=str).encode() + b"\n" for row in islice(rows, skip, None))
        except (OSError, ValueError) as error:
            raise PrunelabError(f"cannot read {self.path} ({error}); check the path") from None


@dataclass(frozen=True)
class Rows:
    """Documents of rows at hand, as a `datasets.Dataset` holds them, read one at a time.

    Parameters
    ----------
    data
        The rows, mappings that can be read again.
    field
        The field of a row that holds the text.
    """

    data: Any
    field: str = "text"

    def rows(self) -> Iterator[Any]:
        """The rows, each checked: a text of valid characters that is not empty."""
        for place, row in enumerate(self.data):
            if not isinstance(row, Mapping) or not isinstance(row.get(self.field), str):
                raise PrunelabError(f"row {place} has no text in its field '{self.field}'; name the field that has")
            _check(row[self.field], place)
            yield row

    def __iter__(self) -> Iterator[str]:
        return (row[self.field] for row in self.rows())

    def __getitem__(self, place: int) -> Any:
        return self.data[place]


def corpus(path: Path | str, field: str = "text") -> JsonLines:
    """The documents of a file, by its ending."""
    return (Parquet if Path(path).suffix == ".parquet" else JsonLines)(path, field)


def _opened(path: Path) -> Any:
    if path.suffix == ".zst":
        return io.BufferedReader(optional("zstandard", "Zstandard").open(path, "rb"))  # it gives no lines by itself
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(path.suffix, Path.open)(path, "rb")


def checked_texts(texts: Iterable[str]) -> Iterable[str]:
    """Texts at hand, none of them empty or of broken characters; files check their own."""
    if isinstance(texts, JsonLines | Rows):
        return texts
    if isinstance(texts, str):
        raise PrunelabError("training data are a list of texts, and this is one; put it into a list")
    documents = list(texts)
    for place, text in enumerate(documents):
        _check(text, place)
    return documents


def _check(text: Any, place: int) -> None:
    if not isinstance(text, str) or not text.strip():
        raise PrunelabError(f"document {place} is empty or no text; leave it out")
    if not _encodable(text):
        raise PrunelabError(f"document {place} holds characters that are no valid UTF-8; repair it")


def _encodable(text: str) -> bool:
    """Whether a text has no half of a surrogate pair in it, as JSON may."""
    try:
        return text.isascii() or bool(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def collate(samples: Sequence[Any]) -> dict[str, Tensor]:
    """One batch of samples: token ids, or mappings of tensors (`input_ids`, `labels`, `pixel_values` ...).

    Token ids are padded on the right, and padding enters no loss; where samples bring no labels, a language model's are
    their tokens.
    """
    rows = [dict(sample) if isinstance(sample, Mapping) else {"input_ids": sample} for sample in samples]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise PrunelabError("samples of one batch have different fields; give every sample the same")
    if "input_ids" not in rows[0]:
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    for row in rows:
        ids = row["input_ids"] = torch.as_tensor(row["input_ids"]).long()
        if not ids.numel():
            raise PrunelabError("a sample holds no token; leave it out")
        row.setdefault("attention_mask", torch.ones_like(ids))
        row.setdefault("labels", ids)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED, "reference_loss": 0, "history_loss": 0}
    length = max(len(row["input_ids"]) for row in rows)

    def joined(key: str) -> Tensor:
        tensors = [torch.as_tensor(row[key]) for row in rows]
        if key not in fill:
            return torch.stack(tensors)
        return torch.stack([torch.nn.functional.pad(t, (0, length - len(t)), value=fill[key]) for t in tensors])

    return {key: joined(key) for key in rows[0]}
