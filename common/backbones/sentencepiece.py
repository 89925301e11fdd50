"""Byte-pair models of SentencePiece as tokenizers of transformers, for checkpoints whose own tokenizer is code that
comes with them. Reads the file's few fields that matter by itself."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunelab.common.core.errors import PrunelabError

BLANK = "\u2581"  # stands for a blank in pieces
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of pieces
PAIRS = 2  # the kind of model that merges pairs


@dataclass(frozen=True)
class Pieces:
    """A byte-pair model: its pieces in the order of their ids with scores and types, whether unknown characters become
    bytes, and whether a blank is put before a text."""

    names: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    bytes: bool
    prefix: bool


def read(path: Path) -> Pieces:
    """The byte-pair model of a file. Raises PrunelabError where it is none, or changes texts in ways that are not
    built here."""
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        trainer = dict(_fields(next(value for number, value in fields if number == 2)))
        normal = dict(_fields(next((value for number, value in fields if number == 3), b"")))
        names = tuple(piece[1].decode("utf8") for piece in pieces)
    except (OSError, IndexError, KeyError, StopIteration, struct.error, UnicodeDecodeError, TypeError) as error:
        raise PrunelabError(
            f"{path} is no model of SentencePiece ({type(error).__name__}); download it again"
        ) from None
    if trainer.get(3, 1) != PAIRS:
        raise PrunelabError(f"{path} merges no pairs; only byte-pair models of SentencePiece are read")
    if normal.get(2) or normal.get(4, 1):
        raise PrunelabError(f"{path} normalises texts before it cuts them, which is not built here")
    scores = tuple(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0 for piece in pieces)
    types = tuple(int(piece.get(3, 1)) for piece in pieces)
    return Pieces(names, scores, types, bool(trainer.get(35, 0)), bool(normal.get(3, 1)))


def merges(pieces: Pieces) -> list[tuple[str, str]]:
    """The pairs that are merged, first the one whose outcome has the highest score."""
    ids = {name: i for i, name in enumerate(pieces.names)}
    results = []
    for name, score, kind in zip(pieces.names, pieces.scores, pieces.types, strict=True):
        if kind == 1:
            parts = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
            results += [(-score, ids[a], ids[b], a, b) for a, b in parts if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(results)]


def tokenizer(path: Path, **marks: Any) -> Any:
    """A tokenizer of transformers for a byte-pair model; marks: its `bos_token` and others, as transformers takes
    them, and `add_bos_token`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces, first = read(path), marks.pop("add_bos_token", False)
    unknown = next((name for name, kind in zip(pieces.names, pieces.types, strict=True) if kind == UNKNOWN), None)
    vocabulary = {name: i for i, name in enumerate(pieces.names)}
    own = Tokenizer(
        models.BPE(vocabulary, merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=pieces.bytes)
    )
    blanks = [normalizers.Replace(" ", BLANK)]
    own.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), *blanks] if pieces.prefix else blanks)
    end = [decoders.Strip(" ", 1, 0)] if pieces.prefix else []
    own.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    for name, kind in zip(pieces.names, pieces.types, strict=True):
        if kind in (UNKNOWN, CONTROL):
            own.add_special_tokens([AddedToken(name, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            own.add_tokens([AddedToken(name, normalized=False)])
    if first:
        mark = str(marks["bos_token"])
        own.post_processor = processors.TemplateProcessing(
            single=f"{mark} $A", pair=f"{mark} $A {mark} $B", special_tokens=[(mark, vocabulary[mark])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=own, **marks)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of the fields of a message in the wire format of protocol buffers."""
    place = 0

    def whole() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        number, kind = divmod(whole(), 8)
        if kind == 0:
            yield number, whole()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else whole()
        if place + size > len(message):
            raise IndexError("cut short")
        yield number, message[place : place + size]
        place += size
