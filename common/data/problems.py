"""Problems with short answers: of competitions, whose answer is a number or a formula, and of examinations, whose
answer is one of several choices.

Repositories, or folders of the user's own (`setting`), hold them in files of every kind and under names of their own,
which a catalogue entry tells: `files`, one pattern of names or several; `ask` and `answer`, columns, of `ask` also
several that follow each other; `behind` and `before`, what the answer stands between in its column; `boxed: true` where
it is the last boxed part of it; `without`, what the answers of those that count do not hold; `choices`, columns of
choices or one column that holds them by letter; `first: right` where the first choice is the right one; `tests`, the
form of tests that programs pass; `where`, what rows must say; `drawn`, how many of them are drawn.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from prunelab.common.catalogue import hub
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.optional import optional
from prunelab.common.data import programs

LETTERS = "ABCDEFGHIJ"
DRAW = 42  # seed of what an entry draws, and of the order of choices
BOXED = "\\boxed{"


@dataclass(frozen=True)
class Problem:
    """text: what is asked, choices included. answer: as it is given, a letter where there are choices; empty where the
    data have none. tests, function: of a program, see `common.data.programs`."""

    text: str
    answer: str
    choice: bool
    tests: tuple[programs.Test, ...] = ()
    function: str = ""

    @property
    def graded(self) -> bool:
        """Whether there is something to grade by."""
        return bool(self.answer or self.tests)


def load(identity: Mapping[str, Any], config: Mapping[str, Any]) -> list[Problem]:
    """The problems of a catalogue entry, in the order of files and rows."""
    own = "setting" in identity
    folder = Path(config[identity["setting"]]) if own else hub.folder(identity, "dataset", config)
    named = identity["files"]
    patterns = [named] if isinstance(named, str) else list(named)
    pattern = ", ".join(patterns)
    paths = sorted(
        p for p in folder.rglob("*") if any(fnmatchcase(p.relative_to(folder).as_posix(), each) for each in patterns)
    )
    rng = random.Random(DRAW)
    try:
        rows = [row for path in paths for row in _rows(path)]
        conditions = {str(key): str(value) for key, value in identity.get("where", {}).items()}
        rows = [row for row in rows if all(str(row[key]) == value for key, value in conditions.items())]
        if "without" in identity:
            rows = [row for row in rows if identity["without"] not in str(row[identity["answer"]])]
        results = [_problem(row, identity, rng) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise PrunelabError(
            f"{folder}: {pattern} holds no problems as configs/datasets.yaml tells of them ({type(error).__name__}:"
            f" {error}); download it again"
        ) from None
    if not results:
        raise PrunelabError(f"{folder} holds no problem in {pattern}; download it again")
    count = int(identity.get("drawn", 0))
    return [results[i] for i in sorted(rng.sample(range(len(results)), count))] if 0 < count < len(results) else results


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        library = optional("pyarrow.parquet", "Parquet")
        yield from library.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)
    elif path.suffix == ".json":
        held = json.loads(path.read_text(encoding="utf-8"))
        yield from held.values() if isinstance(held, dict) else held
    else:
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())


def _problem(row: Mapping[str, Any], identity: Mapping[str, Any], rng: random.Random) -> Problem:
    columns = identity["ask"]
    text = " ".join(str(row[name]).strip() for name in ([columns] if isinstance(columns, str) else columns))
    answer = _answer(str(row[identity["answer"]]), identity) if "answer" in identity else ""
    named = identity.get("choices")
    if identity.get("tests") == "livecodebench":
        tests, function = programs.tests_of(row)
        begins = f"\n\n```python\n{row['starter_code']}\n```" if row.get("starter_code") else ""
        return Problem(text + begins, "", choice=False, tests=tests, function=function)
    if named is None:
        return Problem(text, answer, choice=False)
    if isinstance(named, str):
        held = row[named]
        choices = [str(held[letter]) for letter in sorted(held)]
    else:
        choices = [str(row[name]).strip() for name in named]
    if identity.get("first") == "right":
        order = rng.sample(range(len(choices)), len(choices))
        answer, choices = LETTERS[order.index(0)], [choices[i] for i in order]
    if answer not in LETTERS[: len(choices)] or len(answer) != 1:
        raise ValueError(f"'{answer}' is none of {len(choices)} choices")
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return Problem(f"{text}\n\n{listed}", answer, choice=True)


def _answer(held: str, identity: Mapping[str, Any]) -> str:
    """The answer itself of what its column holds."""
    if identity.get("boxed"):
        result = boxed(held)
        if result is None:
            raise ValueError(f"no boxed part closes in '{held[-40:]}'")
        return result
    if "behind" in identity:
        held = held.rpartition(identity["behind"])[2]
    return held.partition(identity["before"])[0].strip() if "before" in identity else held.strip()


# -- grading by rule -------------------------------------------------------------------------------------------------


def solved(problem: Problem, written: str) -> bool:
    """Whether the last boxed part of what was written is the answer: the letter of the choice, or an equal number or
    formula once what only sets it is left out. Of problems with tests, whether the last program passes all of them."""
    if problem.tests:
        program = programs.written(written)
        return program is not None and programs.passes(program, problem.tests, problem.function)
    result = boxed(written)
    if result is None or not problem.answer:
        return False
    if problem.choice:
        letters = re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", re.sub(r"\\text\{([^{}]*)\}", r"\1", result))
        return letters[:1] == [problem.answer]
    return equal(plain(result), plain(problem.answer))


def equal(one: str, other: str) -> bool:
    """Whether two plain formulas are the same text, or numbers of which one is a decimal fraction and which lie within
    a ten-thousandth of each other."""
    if one == other:
        return True
    try:
        return "." in one + other and math.isclose(float(one), float(other), rel_tol=1e-4)
    except ValueError:
        return False


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, with braces matched; None where there is none that closes."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(BOXED)
    for place, letter in enumerate(text[begin:], begin):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[begin:place].strip()
    return None


def plain(formula: str) -> str:
    """A number or formula without what only sets it: spaces, dollars, sizes of brackets, units in words, commas between
    thousands, zeros in front and behind; fractions as a/b."""
    text = formula.strip().strip("$").rstrip(".")
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])", "", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\{[^{}]*\}", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("^\\circ", "").replace("^{\\circ}", "").replace("\\%", "")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", re.sub(r"\s+", "", text))
    if re.fullmatch(r"-?\d+(?:\.\d+)?", text):
        text = f"{float(text):.10g}" if "." in text else str(int(text))
    return text
