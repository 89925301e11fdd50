"""LogiQA's questions as its authors' files hold them (lgw863/LogiQA-dataset), in the columns that lm-evaluation-harness
reads: the program that made them of the files on the hub is one that `datasets` runs no more."""

from __future__ import annotations

from pathlib import Path

from prunelab.common.core.errors import PrunelabError

FILES = {"train": "Train.txt", "validation": "Eval.txt", "test": "Test.txt"}
LETTERS = "abcd"


def rows(path: Path) -> list[dict[str, str | list[str]]]:
    """The questions of a file, each of which is seven lines behind an empty one: the right letter, a text, what
    is asked, and four choices. Raises PrunelabError where it holds something else."""
    try:
        blocks = [block.split("\n") for block in path.read_text(encoding="utf-8").strip().split("\n\n")]
    except (OSError, ValueError):
        raise PrunelabError(f"{path} cannot be read; fetch it from lgw863/LogiQA-dataset") from None
    odd = [n for n, block in enumerate(blocks, 1) if len(block) != 7 or block[0].strip() not in set(LETTERS)]
    if odd:
        raise PrunelabError(f"{path}: question {odd[0]} is no letter, text, question and four choices; fetch it again")
    return [
        {
            "label": label.strip(),
            "context": _spaced(text),
            "question": _spaced(question),
            "options": [_spaced(choice[2:]) for choice in choices],  # behind "A."
        }
        for label, text, question, *choices in blocks
    ]


def _spaced(text: str) -> str:
    """As the harness's questions have it: the files lack the space behind a full stop."""
    return text.replace(".", ". ").strip()
