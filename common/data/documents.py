"""Documents with reference summaries, for the extractive methods.

Each data set is its own background corpus: N counts the single documents of all its entries (`background`).
"""

from __future__ import annotations

import ast
import hashlib
import html
import importlib.util
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.ranking import text
from prunelab.common.ranking.text import Background


@dataclass(frozen=True)
class Document:
    """What is to be summarised: a cluster of documents (often one), each a tuple of sentences, and references."""

    id: str
    documents: tuple[tuple[str, ...], ...]
    references: tuple[str, ...]


def load(entry: Mapping[str, Any], config: Mapping[str, Any], limit: int | None = None) -> tuple[Document, ...]:
    """The documents of a catalogue entry, or the first `limit` of them."""
    loader = entry["loader"]
    if loader == "api_docs":
        return api_docs(limit, shuffled=bool(entry["shuffled"]))
    if loader == "duc":
        return duc(Path(config["duc"]))[:limit]
    return {"opinosis": opinosis, "bbc": bbc, "cnndm": cnndm}[loader](Path(config["assets"]))[:limit]


def background(documents: Sequence[Document]) -> Background:
    """The data set's own background corpus: every document of every cluster counts once."""
    return Background.of([w for s in d for w in text.words(s)] for entry in documents for d in entry.documents)


# -- testbed: API documentation --------------------------------------------------------------------------------------

API_PACKAGES = ("networkx", "numpy", "scipy", "sklearn")
_SKIPPED = re.compile(r"tests?|testing|_?vendored|externals|extern|_?generate\w*|benchmarks?")
_MIN_SENTENCES, _MIN_SUMMARY = 8, 6
_HEADING = re.compile(r"^(?P<title>\S[^\n]*)\n(?P<rule>([-=~^*])\3{2,})[ ]*$", re.MULTILINE)
_ENTRIES = re.compile(r"(other )?(parameters?|returns?|yields?|raises?|warns?|attributes?)", re.IGNORECASE)
_NO_PROSE = re.compile(r"(see also|references?|bibliography|examples?|methods?|functions?|classes)", re.IGNORECASE)
_LONG_STRING = re.compile(r'"""((?:(?!""").){900,})"""', re.DOTALL)
_MARKUP = (
    (re.compile(r"\s*<https?:[^>]*>`?_*"), ""),  # targets of links
    (re.compile(r":[\w:.+-]+:`~?([^`<]*)(?:<[^`]*>)?`"), r"\1"),  # roles
    (re.compile(r"`+~?"), ""),  # literals and references
    (re.compile(r"\s*\[[\w#*,. -]{1,12}\]_"), ""),  # citations
    (re.compile(r"(?<!\w)(\*\*?|\|)([^*|\s](?:[^*|]*[^*|\s])?)\1(?!\w)"), r"\2"),  # emphasis and substitutions
)
_PROSE_WORD = re.compile(r"[A-Za-z][a-z]*(?:['’-][A-Za-z]+)*[,;:.!?)]*|\([A-Za-z]+|[aAI]")


@cache
def api_docs(limit: int | None = None, shuffled: bool = True) -> tuple[Document, ...]:
    """The testbed: long docstrings of the packages this project depends on. The first paragraph, which their
    authors wrote as a summary, is the reference; the running text of the rest is the document.

    shuffled: sentences come in a fixed random order. In their own order the first ones restate the summary, and
    a task that reading order alone solves says nothing about ranking by content.

    Sources are read and parsed, never imported. Entries are in order of package, module and qualified name; a
    summary or a text that occurred before is left out. The entries depend on the installed versions.
    """
    results: list[Document] = []
    seen: set[object] = set()
    for package in API_PACKAGES:
        for name, docstring in _docstrings(package):
            summary, prose = describe(docstring)
            long_enough = len(prose) >= _MIN_SENTENCES and len(text.words(summary)) >= _MIN_SUMMARY
            if not long_enough or summary[-1] not in ".!?" or seen & {summary, prose}:
                continue
            seen |= {summary, prose}
            if shuffled:
                prose = tuple(sorted(prose, key=lambda s: hashlib.sha256(s.encode("utf8", "replace")).digest()))
            results.append(Document(name, (prose,), (summary,)))
            if len(results) == limit:
                return tuple(results)
    if not results:
        raise PrunelabError(f"none of {', '.join(API_PACKAGES)} is installed; install this project's requirements")
    return tuple(results)


def describe(docstring: str) -> tuple[str, tuple[str, ...]]:
    """The summary of a docstring, and the sentences of running text behind it.

    Of sections that list parameters, results or attributes the descriptions stay and the `name : type` lines go.
    Left out: examples, references and pointers, code, formulas, lists, tables, directives, field lists, headings,
    and sentences that are hardly words.
    """
    head, *rest = _HEADING.split(docstring)  # text, then (title, rule, mark, text) for each underlined heading
    if not head.strip() and rest:
        head = f"{rest[0]}.\n\n{rest[3]}"  # a title that opens the docstring
        rest = rest[4:]
    paragraphs = list(_paragraphs(head))
    for title, body in zip(rest[::4], rest[3::4], strict=True):
        if _ENTRIES.fullmatch(title.strip()):
            for entry in re.split(r"^\S.*\n", body, flags=re.MULTILINE):
                paragraphs += _paragraphs(textwrap.dedent(entry))
        elif not _NO_PROSE.fullmatch(title.strip()):
            paragraphs += _paragraphs(body)
    summary, prose = "".join(paragraphs[:1]), paragraphs[1:]
    return summary, tuple(s for p in prose for s in text.sentences(p) if _is_prose(s))


def _paragraphs(body: str) -> Iterator[str]:
    """Paragraphs of running text, free of markup: no list, table or directive, and nothing indented."""
    for block in re.split(r"\n\s*\n", body.expandtabs().strip("\n")):
        lines = block.strip("\n").split("\n")
        if re.match(r"$|[-*+:|.=#@]|\(?\w{1,2}[.)] ", lines[0]):
            continue
        if any(re.match(r" |>>>|[-*:|] |\.\. |===|---", line) for line in lines):
            continue
        plain = " ".join(line.strip() for line in lines)
        for pattern, replacement in _MARKUP:
            plain = pattern.sub(replacement, plain)
        yield re.sub(r"\s+([,.;:)])", r"\1", " ".join(plain.split()))


def _is_prose(sentence: str) -> bool:
    """A sentence of at least five pieces, four in five of them plain words, with a capital and a final mark."""
    pieces = sentence.split()
    plain = sum(_PROSE_WORD.fullmatch(p) is not None for p in pieces)
    return len(pieces) >= 5 and plain >= 0.8 * len(pieces) and sentence[0].isupper() and sentence[-1] in ".!?"


def _docstrings(package: str) -> Iterator[tuple[str, str]]:
    """(package.module.name, docstring) of everything in the package's sources, sorted by module, then by name."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(spec.submodule_search_locations[0])
    modules = []
    for path in root.rglob("*.py"):
        parts = (package, *path.relative_to(root).with_suffix("").parts)
        if not any(_SKIPPED.fullmatch(p) for p in parts):
            modules.append((".".join(p for p in parts if p != "__init__"), path))
    for module, path in sorted(modules):
        source = path.read_text(encoding="utf8", errors="replace")
        if _LONG_STRING.search(source):
            yield from sorted(_nodes(ast.parse(source), module))


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _nodes(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring and len(docstring) > 900:
        yield name, docstring
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, _Documented):
                yield from _nodes(child, f"{name}.{child.name}")


# -- assets: small samples of public data sets -----------------------------------------------------------------------


def opinosis(assets: Path) -> tuple[Document, ...]:
    """Opinosis: 51 topics, each a list of sentences from reviews, with three to five short human summaries."""
    with files.archive(_asset(assets, "opinosis/OpinosisDataset1.0_0.zip")) as archive:
        names = sorted(files.names(archive))
        results = []
        for name in names:
            if match := re.fullmatch(r"topics/(.*)\.txt\.data", name):
                lines = files.member(archive, name).decode("latin-1").splitlines()
                gold = [n for n in names if n.startswith(f"summaries-gold/{match[1]}/") and n.endswith(".gold")]
                references = tuple(_one_line(files.member(archive, n).decode("latin-1")) for n in gold)
                results.append(Document(match[1], (tuple(_one_line(s) for s in lines if text.words(s)),), references))
    return tuple(results)


def bbc(assets: Path, every: int = 20) -> tuple[Document, ...]:
    """BBC News Summary: every `every`-th of 2225 articles without its headline, with its extractive summary."""
    with files.archive(_asset(assets, "bbc_summary/bbc_news_summary.tar.gz")) as archive:
        members = {name.removeprefix("./"): name for name in files.names(archive)}

        def read(name: str) -> str:
            return files.member(archive, members[name]).decode("latin-1")

        results = []
        for name in sorted(n for n in members if n.startswith("News Articles/"))[::every]:
            _, _, body = read(name).partition("\n")
            key = name.removeprefix("News Articles/").removesuffix(".txt")
            references = (_one_line(read(f"Summaries/{key}.txt")),)
            results.append(Document(key, (tuple(text.sentences(body)),), references))
    return tuple(results)


def cnndm(assets: Path) -> tuple[Document, ...]:
    """Six documents of CNN/DailyMail, tokenised, with their highlights."""
    entries = json.loads(_asset(assets, "cnndm_sample/cnndm_sample.train.0.json").read_text(encoding="utf8"))
    return tuple(
        Document(
            f"cnndm-{i}",
            (tuple(" ".join(tokens) for tokens in entry["src"]),),
            (" ".join(token for tokens in entry["tgt"] for token in tokens),),
        )
        for i, entry in enumerate(entries)
    )


def _asset(assets: Path, name: str) -> Path:
    path = assets / name
    if not path.is_file():
        raise PrunelabError(f"the assets folder {assets} lacks {name}; point to a folder that has it")
    return path


def _one_line(raw: str) -> str:
    return " ".join(raw.split())


# -- paper: licensed DUC data ----------------------------------------------------------------------------------------


def duc(folder: Path) -> tuple[Document, ...]:
    """Clusters of DUC 2003 or 2004 (task 2 or 4) with their human summaries, as NIST hands them out.

    folder/docs/<cluster>/<file>: SGML of one news story each, the story between <TEXT> and </TEXT>, the cluster
    named like d30001t. folder/models/ or folder/eval/models/, also in sub-folders: one plain text a summary, named
    like D30001.M.100.T.A: cluster, M, number of words, who chose the cluster, who wrote the summary.
    """
    models = next((m for m in (folder / "models", folder / "eval" / "models") if m.is_dir()), None)
    if not (folder / "docs").is_dir() or models is None:
        raise PrunelabError(f"{folder} is no DUC folder; it must hold docs/<cluster>/ and models/ (or eval/models/)")
    summaries: dict[str, list[Path]] = {}
    for path in sorted(models.rglob("*.M.*"), key=lambda p: p.name):
        summaries.setdefault(path.name.split(".")[0].lower(), []).append(path)
    results = []
    for cluster in sorted(p for p in (folder / "docs").iterdir() if p.is_dir()):
        stories = tuple(_story(path) for path in sorted(cluster.iterdir()) if path.is_file())
        human = summaries.get(cluster.name.lower().rstrip("abcdefghijklmnopqrstuvwxyz"), [])
        if not human:
            expected = f"{cluster.name[:-1].upper()}.M.100.{cluster.name[-1:].upper()}.A"
            raise PrunelabError(f"{models} has no summary of cluster {cluster.name}; expected files such as {expected}")
        if not any(stories):
            raise PrunelabError(f"{cluster} holds no story; expected SGML files with text between <TEXT> and </TEXT>")
        results.append(Document(cluster.name, stories, tuple(_plain(p.read_text("latin-1")) for p in human)))
    if not results:
        raise PrunelabError(f"{folder / 'docs'} holds no cluster; expected folders such as d30001t")
    return tuple(results)


def _story(path: Path) -> tuple[str, ...]:
    bodies = re.findall(r"<TEXT>(.*?)</TEXT>", path.read_text("latin-1"), re.DOTALL | re.IGNORECASE)
    paragraphs = re.split(r"</?P>", "\n\n".join(bodies), flags=re.IGNORECASE)
    return tuple(s for p in paragraphs for s in text.sentences(_plain(p, keep_blank_lines=True)) if text.words(s))


def _plain(raw: str, keep_blank_lines: bool = False) -> str:
    raw = html.unescape(re.sub(r"<[^>]*>", " ", raw))
    return raw if keep_blank_lines else _one_line(raw)
