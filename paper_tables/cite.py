"""BibTeX of a paper and of its reproduction here, the latter from CITATION.cff."""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from prunelab.common.core import files
from prunelab.common.experiments import schema

FILE = files.ROOT / "CITATION.cff"


@dataclass(frozen=True)
class Software:
    """What CITATION.cff says of this software."""

    title: str
    authors: tuple[str, ...]
    version: str
    year: int
    licence: str


@cache
def software() -> Software:
    """CITATION.cff."""
    given: Mapping[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    people = [a.get("name") or f"{a.get('family-names', '')}, {a.get('given-names', '')}" for a in given["authors"]]
    released = datetime.date.fromisoformat(str(given["date-released"]))
    return Software(given["title"], tuple(people), str(given["version"]), released.year, given["license"])


def _plain(text: str) -> str:
    """Text inside a BibTeX field: no braces or commands of its own."""
    signs = {"\\": r"\textbackslash ", "{": "(", "}": ")"} | {sign: f"\\{sign}" for sign in "$&#%_"}
    return "".join(signs.get(sign, sign) for sign in " ".join(text.split()))


def prunelab(commit: str | None, *, key: str = "prunelab", of: str = "", scale: str = "") -> str:
    """The entry of this software, or of its reproduction `of` a paper's tables, with the commit that made them."""
    made = software()
    title = _plain(f"Reproduction of the tables of: {of}" if of else made.title)
    notes = [f"Prunelab {made.version}", f"commit {commit}" if commit else "", f"{scale} scale" if scale else ""]
    fields = {
        "author": " and ".join("{" + _plain(name) + "}" for name in made.authors),
        "title": "{" + title + "}",
        "year": str(made.year),
        "version": made.version,
        "note": _plain(", ".join(note for note in notes if note)),
    }
    lines = [f"  {name:<7} = {{{value}}}" for name, value in fields.items()]
    return f"@software{{{key},\n" + ",\n".join(lines) + "\n}\n"


def entries(paper: schema.Paper, commit: str | None, scale: str) -> str:
    """A paper's own entry, then that of its reproduction."""
    own = prunelab(commit, key=f"prunelab_{paper.slug}", of=paper.title, scale=scale)
    return f"{bibtex(paper)}\n\n{own}"


def bibtex(paper: schema.Paper) -> str:
    """A paper's own entry, from its title, authors, venue, year and links."""
    last = paper.authors[0].split()[-1] if paper.authors else paper.slug
    key = re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", last).lower()) + f"{paper.year}{paper.slug}"
    preprint = paper.venue.lower().startswith("arxiv")
    fields = {
        "title": "{" + _plain(paper.title) + "}",
        "author": " and ".join(_plain(name) for name in paper.authors),
        "howpublished" if preprint else "booktitle": _plain(paper.venue),
        "year": str(paper.year),
        "url": paper.links.get("paper", ""),
    }
    lines = [f"  {name:<9} = {{{value}}}" for name, value in fields.items() if value]
    return f"@{'misc' if preprint else 'inproceedings'}{{{key},\n" + ",\n".join(lines) + "\n}"
