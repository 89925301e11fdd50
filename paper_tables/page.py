"""The report: one HTML page that opens offline, with style and script inside and every number linked to its run.

Everything that comes from data is escaped, by the template or by `common.svg`; what is marked safe was made here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from common import papers, provenance
from common.figures import Figure
from paper_tables import join, tables

HERE = Path(__file__).parent
OUTCOMES = tuple(tables.SHAPES)


# -- one paper as the template sees it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A paper with everything that is shown of it."""

    paper: papers.Paper
    tables: Sequence[join.PaperTable]
    boards: Sequence[join.BoardTable]
    files: Sequence[str]  # names without suffix: tables first, then boards
    figures: Sequence[Figure]
    made: Sequence[str]  # addresses of runs made for figures alone

    @property
    def lines(self) -> list[join.Line]:
        """Every reported number."""
        return [line for table in self.tables for line in table.lines]

    @property
    def outcomes(self) -> Counter[str]:
        """How many lines came out how."""
        return Counter(line.outcome for line in self.lines)


@dataclass
class Notes:
    """Numbered notes of one table, each once."""

    place: str
    texts: list[str] = field(default_factory=list)

    def __call__(self, text: str) -> Markup:
        """A mark that shows the note on hovering and leads to it."""
        if text not in self.texts:
            self.texts.append(text)
        number = self.texts.index(text) + 1
        return Markup('<sup><a href="#{}-n{}" title="{}">{}</a></sup>').format(self.place, number, text, number)


@dataclass
class Runs:
    """Runs that the page leads to, in order of first mention."""

    records: join.Records
    folder: Path
    addresses: list[str] = field(default_factory=list)

    def link(self, text: str, address: str | None) -> Markup:
        """A value that leads to how it was obtained."""
        if address is None:
            return Markup.escape(text)
        if address not in self.addresses:
            self.addresses.append(address)
        return Markup('<a href="#r-{}">{}</a>').format(address, text)

    def blocks(self) -> list[dict[str, Any]]:
        """How each run was made."""
        return [self._block(address) for address in self.addresses]

    def _block(self, address: str) -> dict[str, Any]:
        record = join.record(self.records, address)
        run, made = record["run"], record["environment"]
        options = ", ".join(f"{k}={v!r}" for k, v in run["options"].items())
        short = (f"{run['method']}({options})" if options else run["method"]) or "unpruned"
        settings = {k: v for k, v in run["settings"].items() if k not in ("samples", "seed")}
        commit, dirty = made.get("commit"), ", with changes not committed" if made.get("dirty") else ""
        rows = {
            "method": f"{run['method']}({options})" if run["method"] else "none: the unpruned model",
            "budget": run["budget"] or "none",
            "budget, resolved": record["metrics"].get("budget", {}).get("text"),
            "scale": run["scale"] or "none: the outcome has no scale",
            "model": _flat(run["ids"].get("model")),
            "data": _flat(run["ids"].get("data") or run["ids"].get("files")) or "none",
            "settings": _flat(settings),
            "samples": run["settings"].get("samples"),
            "seed": run["settings"].get("seed", 0),
            "device": f"{made['device']}, {made['threads']} thread{'s' * (made['threads'] != 1)}, {made['dtype']}",
            "libraries": f"Python {made.get('python')}, {_flat(made.get('libraries'))} on {made.get('machine')}",
            "code": f"commit {commit or 'unknown'}{dirty}; sources {record['sources']}",
            "results": _results(record["metrics"]),
        }
        return {
            "address": address,
            "kind": run["kind"],
            "summary": " · ".join(str(part) for part in (short, run["budget"], run["scale"]) if part),
            "rows": [(k, v) for k, v in rows.items() if v not in (None, "")],
            "file": Path(os.path.relpath(self.records.results / "records" / f"{address}.json", self.folder)).as_posix(),
        }


def _flat(value: Any) -> str:
    """A mapping in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {f'({_flat(v)})' if isinstance(v, Mapping) else v}" for k, v in value.items())
    return "" if value is None else str(value)


def _results(metrics: Mapping[str, Any], most: int = 8) -> str:
    named = [f"{k} {v['value']:.10g}" for k, v in metrics.items() if isinstance(v.get("value"), (int, float))]
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return ", ".join(named[:most]) + more


# -- the method's own page -------------------------------------------------------------------------------------------


def markdown(source: str) -> Markup:
    """A README as HTML: no raw HTML, no images, no links but to the web, headings below the page's own."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image"])
    tokens = reader.parse(source)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 3, 6)}"
        kept, dead = [], False
        for child in token.children or []:
            if child.type == "link_open":
                dead = not str(child.attrs["href"]).startswith(("https://", "http://"))
            if not (dead and child.type in ("link_open", "link_close")):
                kept.append(child)
        token.children = kept
    return Markup(reader.renderer.render(tokens, reader.options, {}))


# -- the page --------------------------------------------------------------------------------------------------------


def build(sections: Sequence[Section], config: Mapping[str, Any], records: join.Records, folder: Path) -> str:
    """The page's HTML; `folder` is where it will lie."""
    made = provenance.environment()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    runs = Runs(records, folder)
    return environment.get_template("page.html").render(
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        js=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        sections=sections,
        scale=config["scale"],
        assets=bool(config["assets"]),
        commit=made["commit"],
        dirty=made["dirty"],
        total=sum((s.outcomes for s in sections), Counter()),
        outcomes=OUTCOMES,
        shapes=tables.SHAPES,
        words=tables.WORDS,
        readme=_readme,
        html=Markup,
        zip=zip,
        Notes=Notes,
        runs=runs,
        t=tables,
        web=lambda link: link.startswith(("https://", "http://")),
        plain=lambda tag: tag.replace("_", " "),
    )


def _readme(slug: str) -> Markup | None:
    path = papers.METHODS / slug / "README.md"
    return markdown(path.read_text(encoding="utf-8")) if path.exists() else None
