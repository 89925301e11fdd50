"""Instructions with their answers, as published sets for instruction tuning hold them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prunelab.common.catalogue import hub
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.optional import optional
from prunelab.common.data.tuning import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


def load(
    identity: Mapping[str, Any], config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[Piece]:
    """Every instruction with its answer, cut off at `length` tokens, of which the answer alone enters the loss: of a
    JSON file, or of the Parquet files of a repository where none is named. The last turn of a conversation is the
    answer to what stands before it."""
    where = hub.file if "file" in identity else hub.folder
    path = where(identity, "dataset", config)
    try:
        results = [_pair(row) for row in _rows(path)]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise PrunelabError(
            f"{path} is no list of instructions with answers ({type(error).__name__}: {error}); download it again"
        ) from None
    pieces = [piece for turns, answer in results if (piece := _piece(turns, answer, tokenizer, length)) is not None]
    if not pieces:
        raise PrunelabError(f"no answer of {path} lies within {length} tokens; allow more")
    return pieces


def _rows(path: Path) -> list[Any]:
    if path.is_file():
        rows: list[Any] = json.loads(path.read_text(encoding="utf8"))
        return rows
    paths = sorted(path.rglob("*.parquet"))
    if not paths:
        raise OSError("no Parquet file in it")
    library = optional("pyarrow.parquet", "Parquet")
    return [row for file in paths for row in library.read_table(file).to_pylist()]


def _pair(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
    """What is asked, turn by turn, and the answer."""
    keys = ("conversations", "from", "value") if "conversations" in row else ("messages", "role", "content")
    if keys[0] in row:
        name, who, what = keys
        roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
        turns = [{"role": roles[turn[who]], "content": str(turn[what])} for turn in row[name]]
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        return turns[:last], turns[last]["content"]
    question = "\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
    return [{"role": "user", "content": question}], str(row["output"] if "output" in row else row["response"])


def _piece(
    turns: Sequence[Mapping[str, str]], answer: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> Piece | None:
    prompt = tokenizer(_prompt(turns, tokenizer), verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = prompt + tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"] + end
    if len(prompt) >= length:
        return None
    tokens = torch.tensor(ids[:length])
    labels = tokens.clone()
    labels[: len(prompt)] = IGNORED
    return Piece(answer, tokens, labels, "\n".join(str(turn["content"]) for turn in turns))


def _prompt(turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The turns as the model's own template has them; base models, which have none, read them under plain headings."""
    if getattr(tokenizer, "chat_template", None):
        text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        return text
    return "".join(_headed(turns)) + "### assistant\n"  # assumption: papers name no template for base models


def _headed(turns: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for turn in turns:
        yield f"### {turn['role']}\n{turn['content']}\n\n"
