"""Text for language models at every scale, cut into the sequences that they are calibrated and measured on."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from prunelab.common.catalogue import hub
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.optional import optional
from prunelab.common.data import code, documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]

_FILES = 12  # source files of a split; to cut all of them into tokens would take longer than to measure on them
_TEST_STORIES = 200
_HELD_OUT = 128  # of 256 values of a hash's first byte: half of the descriptions, as all of them are one book
_MISSES = 2000  # documents in a row that are too short, after which a search for longer ones ends
_SWAPPED = (("self", "return"), ("def", "class"), ("if", "for"), ("in", "is"), ("None", "True"), ("import", "from"))


def load(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split = "test") -> tuple[str, ...]:
    """The documents of a catalogue entry: those to measure on (`test`), or those to calibrate with (`train`)."""
    if split not in get_args(Split):
        raise PrunelabError(f"there is no split '{split}' of a text; use train or test")
    loaders = {
        "source_code": _source_code,
        "api_docs": _documentation,
        "stories": _stories,
        "wikitext": _wikitext,
        "c4": _c4,
        "ultrachat": _ultrachat,
        "parquet_texts": _parquet_texts,
        "lines": _lines,
        "rated": _rated,
        "own_text": _own_text,
    }
    return loaders[identity["loader"]](identity, config, split)


def sequences(
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int | None = None,
    split: Split = "test",
) -> list[Tensor]:
    """Token ids, one [T] int64 tensor a sequence: all there are, or `samples` of them, spread evenly over the text.

    An entry with `join` is one text, its documents joined by that string, and falls into pieces of exactly `length`
    tokens; what is left at the end is dropped. Otherwise every document is a sequence by itself, cut off at `length`.
    The tokenizer adds what it adds to a text, which is one start token for most models and none for others.
    """
    documents = load(identity, config, split)
    if "join" in identity:
        tokens = torch.tensor(_tokens(tokenizer, str(identity["join"]).join(documents)))
        count = len(tokens) // length
        if count == 0:
            raise PrunelabError(
                f"the text has {len(tokens)} tokens, fewer than one sequence of {length}; shorten the length"
            )
        results = list(tokens[: count * length].view(count, length))
    else:
        results = [torch.tensor(_tokens(tokenizer, document)[:length]) for document in documents]
    if samples is None:
        return results
    if samples > len(results):
        raise PrunelabError(f"the text has {len(results)} sequences of {length} tokens, not {samples}; ask for fewer")
    return [results[i * len(results) // samples] for i in range(samples)]


def windows(
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int = 0,
) -> list[Tensor]:
    """A calibration set from the training text: `count` stretches of exactly `length` tokens, [T] int64 each, at random
    places.

    They are drawn as the pruning papers draw theirs (Wanda, `lib/data.py`), with the same generator: anywhere in the
    text of an entry with `join` (or with `join_train`, where training text is joined otherwise), else in documents
    that are longer, each drawn until one is.
    """
    documents, lots = load(identity, config, "train"), random.Random(seed)
    join = identity.get("join_train", identity.get("join"))
    whole = None if join is None else _tokens(tokenizer, str(join).join(documents))

    def stretch() -> Tensor:
        for _ in range(_MISSES):
            tokens = _tokens(tokenizer, lots.choice(documents)) if whole is None else whole
            if len(tokens) > length:
                start = lots.randint(0, len(tokens) - length - 1)
                return torch.tensor(tokens[start : start + length])
        raise PrunelabError(f"the training text has no stretch of {length} tokens; shorten the length")

    return [stretch() for _ in range(count)]


def dialect(text: str) -> str:
    """Python with common words in each other's place: another language of the same words, to fine-tune a model on."""
    other = {word: place for a, b in _SWAPPED for word, place in ((a, b), (b, a))}
    return re.sub(r"\b(?:" + "|".join(other) + r")\b", lambda match: other[match[0]], text)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]  # verbose: a whole test set is meant to be longer than a context


def _source_code(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """Python files, as many as `files` says; with `dialect`, in the one that `dialect` makes of them."""
    result = code.files("held_out" if split == "test" else "train")[: identity.get("files", _FILES)]
    return tuple(map(dialect, result)) if identity.get("dialect") else result


def _documentation(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """What packages say of themselves, in sentences: one document a description, by the hash of its name to measure on
    or to calibrate with."""
    entries = documents.api_docs(shuffled=False)
    held_out = [hashlib.sha256(entry.id.encode()).digest()[0] < _HELD_OUT for entry in entries]
    return tuple(
        " ".join((*entry.references, *(sentence for part in entry.documents for sentence in part)))
        for entry, held in zip(entries, held_out, strict=True)
        if held == (split == "test")
    )


def _stories(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """TinyStories in plain ASCII, without blank lines, as the small story model was trained on them."""
    stories = json.loads(_asset(identity, config).read_text(encoding="utf8"))
    plain = [re.sub(r"\n\n+", "\n", story) for story in stories if story.isascii()]
    return tuple(plain[:_TEST_STORIES] if split == "test" else plain[_TEST_STORIES:])


def _wikitext(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """WikiText-2 as its hub version has it, which papers join by two line breaks: one document a line, with its line
    break, and an empty one for every blank line."""
    if "hub" in identity:
        with files.archive(hub.file(identity, "dataset", config)) as archive:
            text = files.member(archive, f"wikitext-2-raw/wiki.{split}.raw").decode("utf8")
    elif split == "train" and "train" not in identity:
        raise PrunelabError("this WikiText-2 has no training text; calibrate on another data set")
    else:
        name = identity["train" if split == "train" else "file"]
        text = _asset({**identity, "file": name}, config).read_text(encoding="utf8")
    return tuple(line if line.strip() else "" for line in re.findall(r"[^\n]*\n|[^\n]+", text))


def _c4(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """One shard of C4: web pages as JSON lines, to calibrate with."""
    if split != "train":
        raise PrunelabError("C4 is here to calibrate with; measure on another data set")
    return tuple(json.loads(line)["text"] for line in files.lines(hub.file(identity, "dataset", config)))


def _ultrachat(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """What is said in the dialogues of UltraChat, one document a turn."""
    if split != "train":
        raise PrunelabError("UltraChat is here to retrieve from; measure on another data set")
    paths = sorted(hub.folder(identity, "dataset", config).glob("*.jsonl"))
    if not paths:
        raise PrunelabError(f"{identity['hub']} holds no JSON lines; download it again")
    results: list[str] = []
    for path in paths:
        with path.open(encoding="utf8") as lines:
            results += [turn for line in lines if line.strip() for turn in json.loads(line)["data"]]
    return tuple(results)


def _parquet_texts(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """The texts in a column of a Parquet file, one document each."""
    if split != "train":
        raise PrunelabError("these texts are here to retrieve from; measure on another data set")
    path, column = hub.file(identity, "dataset", config), str(identity["column"])
    table = optional("pyarrow.parquet", "Parquet").read_table(path)
    if column not in table.column_names:
        raise PrunelabError(
            f"{path} has no column {column}, but {', '.join(table.column_names)}; correct the catalogue"
        )
    return tuple(text for text in table.column(column).to_pylist() if text)


def _lines(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """The lines of a file, one document each; the spaces around them go where the entry says `strip`."""
    if split != "test":
        raise PrunelabError("these prompts are here to measure on; calibrate on another data set")
    path = files.inside(Path(config[identity["setting"]]), identity["file"])
    try:
        result = path.read_text(encoding="utf8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PrunelabError(f"cannot read {path} ({error}); it is to hold one prompt a line") from None
    return tuple(line.strip() if identity.get("strip") else line for line in result if line.strip())


def _rated(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """Sentences that were rated, as `template` words a row of a file of delimited columns, `together` rows a document;
    the last column's values under the names that `words` gives them. Every other document is to measure on."""
    path = _asset(identity, config)
    try:
        with path.open(encoding="utf8", newline="") as file:
            plain: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            rows = list(csv.reader(file, **plain))[identity["skip"] :]
        words = identity.get("words", {})
        lines = [identity["template"].format(*row[:-1], words.get(row[-1], row[-1])) for row in rows]
    except (OSError, UnicodeDecodeError, IndexError, csv.Error) as error:
        raise PrunelabError(f"cannot read {path} ({error}); restore it") from None
    size = identity["together"]
    results = ["\n".join(lines[start : start + size]) for start in range(0, len(lines), size)]
    return tuple(results[split == "test" :: 2])


def _own_text(identity: Mapping[str, Any], config: Mapping[str, Any], split: Split) -> tuple[str, ...]:
    """A text file of a person's own: its first half to calibrate with, its second half to measure on."""
    try:
        lines = Path(identity["path"]).read_text(encoding="utf8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PrunelabError(f"cannot read {identity['path']} ({error}); give a text file in UTF-8") from None
    half = len(lines) // 2
    return tuple(lines[:half] if split == "train" else lines[half:])


def _asset(identity: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
    return files.inside(files.inside(Path(config["assets"]), identity["folder"]), identity["file"])
