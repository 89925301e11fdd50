"""The report: a small site of static pages that open from the file system, every number linked to its run.

`index.html` lists the papers, `<slug>/index.html` shows one, `boards.html` sets methods of all papers side by side.
Each page has style and script inside and loads nothing. Everything that comes from data is escaped, by the templates or
by `drawing.svg`; what is marked safe was made here, and no script but our own may run: its hash is the page's policy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from prunelab.common.core import files
from prunelab.common.drawing import svg
from prunelab.common.drawing.figures import Figure
from prunelab.common.experiments import forecast, papers, schema, workspace
from prunelab.paper_tables import claims, contrasts, cross, join, literature, tables

HERE = Path(__file__).parent
OUTCOMES = tuple(tables.SHAPES)
HOURS = (1, 10, 100)  # limits that readers choose among, of GPU hours


# -- one paper as the template sees it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hours:
    """What runs that wait take of a GPU, foretold. unknown: runs whose hours nothing tells."""

    hours: float
    runs: int
    unknown: int

    @property
    def limits(self) -> list[str]:
        """Which of the limits that readers choose among they keep to."""
        if not self.runs:
            return ["nothing"]
        if self.unknown:
            return ["unknown"]
        return [str(limit) for limit in HOURS if self.hours <= limit] or ["more"]

    @property
    def shown(self) -> str:
        """In a cell."""
        if not self.runs or self.unknown == self.runs:
            return "unknown" if self.runs else "–"
        return forecast.shown(self.hours) + (" or more" if self.unknown else "")


@dataclass(frozen=True)
class Section:
    """A paper with everything that is shown of it."""

    paper: schema.Paper
    tables: Sequence[join.PaperTable]
    boards: Sequence[join.BoardTable]
    files: Sequence[str]  # names without suffix: tables first, then boards
    figures: Sequence[Figure]
    made: Sequence[str]  # addresses of runs made for figures alone
    verdicts: Sequence[claims.Verdict] = ()
    contrasts: Sequence[contrasts.Row] = ()
    models: Sequence[str] = ()  # that its tables run on, as they are known
    hours: Hours = Hours(0, 0, 0)  # of what waits

    @property
    def tags(self) -> list[str]:
        """The taxonomy, one word an axis and term."""
        return [f"{axis}:{tag}" for axis, tags in self.paper.taxonomy.items() for tag in tags]

    @cached_property
    def lines(self) -> list[join.Line]:
        """Every reported number."""
        return [line for table in self.tables for line in table.lines]

    @cached_property
    def outcomes(self) -> Counter[str]:
        """How many lines came out how."""
        return Counter(line.outcome for line in self.lines)

    @cached_property
    def lacking(self) -> list[tuple[str, int]]:
        """What numbers that were not reproduced would take, with how many, the most frequent first. A number may take
        several things."""
        needs = (v.reproduced.needs or v.reproduced.status for v in self.lines if v.reproduced.value is None)
        return Counter(part for text in needs for part in dict.fromkeys(text.split("; "))).most_common()

    @property
    def named_tables(self) -> list[tuple[str, join.PaperTable]]:
        """Tables with their file names."""
        return list(zip(self.files, self.tables))

    @property
    def named_boards(self) -> list[tuple[str, join.BoardTable]]:
        """Boards with their file names."""
        return list(zip(self.files[len(self.tables) :], self.boards))


@dataclass
class Notes:
    """Numbered notes of one table, each once."""

    place: str
    numbers: dict[str, int] = field(default_factory=dict)

    def __call__(self, text: str) -> Markup:
        """A mark that shows the note on hovering and leads to it."""
        number = self.numbers.setdefault(text, len(self.numbers) + 1)
        return Markup('<sup><a href="#{}-n{}" title="{}">{}</a></sup>').format(self.place, number, text, number)


@dataclass
class Runs:
    """Runs that the page leads to, in order of first mention."""

    records: join.Records
    folder: Path  # where the page will lie
    addresses: dict[str, None] = field(default_factory=dict)

    def link(self, text: str, address: str | None) -> Markup:
        """A value that leads to how it was obtained."""
        if address is None:
            return Markup.escape(text)
        self.addresses.setdefault(address)
        return Markup('<a href="#r-{}">{}</a>').format(address, text)

    def blocks(self) -> list[dict[str, Any]]:
        """How each run was made."""
        return [self._block(address) for address in self.addresses]

    def _block(self, address: str) -> dict[str, Any]:
        record = self.records.at(address)
        run, made = record["run"], record["environment"]
        options = ", ".join(f"{k}={v!r}" for k, v in run["options"].items())
        short = (f"{run['method']}({options})" if options else run["method"]) or "unpruned"
        settings = {k: v for k, v in run["settings"].items() if k not in ("samples", "seed", "seeds")}
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
            "seeds": run["settings"].get("seeds"),
            "device": f"{made['device']}, {made['threads']} thread{'s' * (made['threads'] != 1)}, {made['dtype']}",
            "libraries": f"Python {made.get('python')}, {_flat(made.get('libraries'))} on {made.get('machine')}",
            "code": f"commit {commit or 'unknown'}{dirty}; sources {record['sources']}",
            "results": _results(record["metrics"]),
        }
        return {
            "address": address,
            "task": run["task"],
            "summary": " · ".join(str(part) for part in (short, run["budget"], run["scale"]) if part),
            "rows": [(k, v) for k, v in rows.items() if v not in (None, "")],
            "file": Path(os.path.relpath(self.records.place(address), self.folder)).as_posix(),
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
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        kept, dead = [], False
        for child in token.children or []:
            if child.type == "link_open":
                dead = not str(child.attrs["href"]).startswith(("https://", "http://"))
            if not (dead and child.type in ("link_open", "link_close")):
                kept.append(child)
        token.children = kept
    return Markup(reader.renderer.render(tokens, reader.options, {}))


# -- small pictures --------------------------------------------------------------------------------------------------

BAR, INTERVAL = 120.0, 150.0  # widths


def bar(outcomes: Mapping[str, int]) -> Markup:
    """How a paper's numbers came out, as one bar; the counts beside it say the same in words."""
    total, left, parts = sum(outcomes.values()), 0.0, []
    for outcome in OUTCOMES:
        if outcomes.get(outcome):
            width = BAR * outcomes[outcome] / total
            parts.append(svg.element("rect", class_=f"b-{_css(outcome)}", x=left, y=0.0, width=width, height=10.0))
            left += width
    label = ", ".join(f"{outcomes[o]} {tables.WORDS[o]}" for o in OUTCOMES if outcomes.get(o))
    return Markup(svg.document(BAR, 10.0, label or "no numbers", "".join(parts), "bar")) if parts else Markup("–")


def interval(value: join.Value, reach: tuple[float, float], level: float | None) -> Markup:
    """A value with its 95 % interval on the axis that all rows of a board share, the unpruned model's value dashed."""
    assert value.value is not None
    low, span = reach[0], (reach[1] - reach[0]) or 1.0

    def across(v: float) -> float:
        return 6 + (v - low) / span * (INTERVAL - 12)

    parts = [svg.element("line", class_="rule", x1=0.0, x2=INTERVAL, y1=7.0, y2=7.0)]
    if level is not None:
        parts.append(svg.element("line", class_="level", x1=across(level), x2=across(level), y1=0.0, y2=14.0))
    x, margin = across(value.value), value.margin
    if margin:
        ends = across(value.value - margin), across(value.value + margin)
        parts.append(svg.element("line", class_="error s0", x1=ends[0], x2=ends[1], y1=7.0, y2=7.0))
    parts.append(svg.element("circle", class_="mark s0", cx=x, cy=7.0, r=3.6))
    return Markup(svg.document(INTERVAL, 14.0, tables.shown(value, 2), "".join(parts), "interval"))


def _css(outcome: str) -> str:
    return outcome.replace(" ", "-")


# -- the pages -------------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """What all pages share."""

    sections: Sequence[Section]
    leaderboards: Sequence[cross.Leaderboard]
    joined: literature.Literature
    config: Mapping[str, Any]
    records: join.Records
    folder: Path  # where index.html will lie
    made: Mapping[str, Any]  # of this build: commit, dirty

    @cached_property
    def _templates(self) -> jinja2.Environment:
        script = (HERE / "page.js").read_text(encoding="utf-8")
        result = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        result.globals |= {
            "css": Markup((HERE / "page.css").read_text(encoding="utf-8")),
            "js": Markup(script),
            "js_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            "sections": self.sections,
            "leaderboards": self.leaderboards,
            "literature": self.joined,
            "scale": self.config["scale"],
            "assets": bool(self.config["assets"]),
            "commit": self.made["commit"],
            "dirty": self.made["dirty"],
            "outcomes": OUTCOMES,
            "shapes": tables.SHAPES,
            "words": tables.WORDS,
            "css_of": _css,
            "bar": bar,
            "interval": interval,
            "t": tables,
            "verdict": contrasts.verdict,
            "html": Markup,
            "web": lambda link: link.startswith(("https://", "http://")),
            "plain": lambda tag: tag.replace("_", " "),
            "counted": lambda number, word: f"{number} {word}" + ("" if number == 1 else "s"),
        }
        return result

    def index(self) -> str:
        """Papers with their status at a glance."""
        total = sum((s.outcomes for s in self.sections), Counter[str]())
        lacking: Counter[str] = Counter()
        for section in self.sections:
            lacking.update(dict(section.lacking))
        return self._render(
            "index.html",
            up="",
            total=total,
            lacking=lacking.most_common(12),
            more=max(len(lacking) - 12, 0),
            reasons=[(schema.REASONS[r], n) for r, n in self.reasons().most_common()],
            rehearsed=self.rehearsed(),
            verdicts=[verdict for section in self.sections for verdict in section.verdicts],
            families=sorted({s.paper.family for s in self.sections}),
            axes={
                axis: tags
                for axis in schema.AXES
                if (tags := sorted({tag for s in self.sections for tag in s.paper.taxonomy.get(axis, [])}))
            },
            models=sorted({model for s in self.sections for model in s.models}, key=str.lower),
            hours=HOURS,
            gpu=forecast.gpu(join.GPU).name,
        )

    def reasons(self) -> Counter[str]:
        """How many numbers nothing here can run, by the reason."""
        return Counter(line.reason for section in self.sections for line in section.lines if line.reason)

    def rehearsed(self) -> tuple[int, int]:
        """How many combinations of the paper scale passed on look-alikes, of how many that were tried."""
        try:
            noted = json.loads((Path(self.config["results"]) / workspace.REHEARSALS).read_text(encoding="utf-8"))
        except OSError:
            return 0, 0
        return sum(not each["fault"] for each in noted), len(noted)

    def boards(self) -> str:
        """Methods of all papers side by side."""
        return self._render("boards.html", up="")

    def literature(self) -> str:
        """What several papers report of the same."""
        return self._render("literature.html", up="")

    def model(self, name: str) -> str:
        """What papers report of one model."""
        return self._render("model.html", up="../", model=name, shelves=self.joined.shelves[name])

    def paper(self, section: Section) -> str:
        """One paper."""
        folder = self.folder / section.paper.slug
        return self._render(
            "paper.html",
            up="../",
            s=section,
            paper=section.paper,
            gpu=forecast.gpu(join.GPU).name,
            readme=_readme(section.paper.slug),
            code=_code(section.paper.slug, folder),
            Notes=Notes,
            runs=Runs(self.records, folder),
        )

    def _render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(**values)


def _code(slug: str, folder: Path) -> list[tuple[str, str | None]]:
    """The method's files with links from the page, where the page lies in the same tree."""
    root, here = files.ROOT.resolve(), folder.resolve()
    results = []
    for name in ("method.py", "paper.yaml", "reported.csv"):
        path = papers.METHODS / slug / name
        link = Path(os.path.relpath(path, here)).as_posix() if here.is_relative_to(root) else None
        results.append((f"methods/{slug}/{name}", link))
    return results


def _readme(slug: str) -> Markup | None:
    path = papers.METHODS / slug / "README.md"
    return markdown(path.read_text(encoding="utf-8")) if path.exists() else None
