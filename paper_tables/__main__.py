"""The report: everything the papers report beside what we obtained, as a site of HTML pages, with CSV,
Markdown, LaTeX and BibTeX.

Reads reported.csv, paper.yaml and run records; runs nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import write_text
from prunelab.common.experiments import forecast, papers, plans, provenance, replay
from prunelab.common.experiments.derived import behind
from prunelab.common.experiments.run import Run
from prunelab.paper_tables import cite, claims, contrasts, cross, figures, grids, join, literature, page, tables


def build(config: Mapping[str, Any]) -> tuple[Path, list[join.Line]]:
    """Write every file and return the index's path with all reported numbers. The index comes last: where it exists,
    so does all it links to."""
    results = Path(config["results"])
    folder, records = results / "paper_tables", join.Records(results)
    plan = plans.of(config)
    outlook = forecast.Outlook(plan, forecast.gpu(join.GPU))
    sections = [_section(slug, plan, records, outlook) for slug in plan.slugs]
    leaderboards = cross.leaderboards(((s.paper.slug, board) for s in sections for board in s.boards), records)
    made = provenance.environment()
    joined = literature.of(plan, ((s.paper.slug, s.named_tables) for s in sections))
    site = page.Site(sections, leaderboards, joined, config, records, folder, made)
    files: dict[str, str] = {}
    for section in sections:
        slug = section.paper.slug
        for name, table in section.named_tables:
            files |= _downloads(slug, name, tables.table_csv(table), tables.table_grid(slug, table))
            printed = tables.printed_grid(slug, table)
            files[f"{slug}/{name}-as-printed.tex"] = grids.latex(printed, f"{slug}-{name}-as-printed")
        for name, board in section.named_boards:
            files |= _downloads(slug, name, tables.board_csv(board), tables.board_grid(slug, board))
        if section.contrasts:
            values, grid = contrasts.csv(section.contrasts), contrasts.grid(slug, section.contrasts)
            files |= _downloads(slug, contrasts.NAME, values, grid)
        files[f"{slug}/cite.bib"] = cite.entries(section.paper, made["commit"], config["scale"])
        files[f"{slug}/index.html"] = site.paper(section)
    for leaderboard in leaderboards:
        files |= _downloads("boards", leaderboard.name, cross.csv(leaderboard), cross.grid(leaderboard))
    files["numbers.csv"] = tables.numbers_csv((s.paper.slug, line) for s in sections for line in s.lines)
    files["cite.bib"] = cite.prunelab(made["commit"])
    for model in joined.shelves:
        files[f"literature/{tables.identifier(model)}.html"] = site.model(model)
    files["literature/literature.csv"] = literature.csv(joined.quantities)
    apart = literature.csv(joined.disagreements)
    files |= _downloads("literature", "disagreements", apart, literature.grid(joined))
    files["literature.html"] = site.literature()
    files["boards.html"] = site.boards()
    files["index.html"] = site.index()
    for path, text in files.items():
        write_text(folder / path, text)
    return folder / "index.html", [line for section in sections for line in section.lines]


def keep(folder: Path, place: Path) -> None:
    """Copy what people read of a report into a folder under version control: a Markdown file a paper, with all its
    tables and boards, the boards across papers, what papers disagree on, and every number in one CSV file. The site is
    built where it is wanted."""
    texts: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.md")):
        texts.setdefault(path.parent.name, []).append(path.read_text(encoding="utf-8"))
    strange = [path.name for path in place.glob("*") if path.is_dir() or path.suffix not in (".md", ".csv")]
    if strange:
        raise PrunelabError(f"{place} holds {strange[0]}, which no report keeps; empty it, or name another folder")
    for path in place.glob("*"):
        path.unlink()
    for slug, parts in texts.items():
        write_text(place / f"{slug}.md", "\n".join(parts))
    write_text(place / "numbers.csv", (folder / "numbers.csv").read_text(encoding="utf-8"))


def keep_records(config: Mapping[str, Any]) -> int:
    """Put the records of boards that ran with the samples that decide them under version control, in place of older
    ones of the same runs; how many. Raises PrunelabError where the configuration does not ask for all samples, or
    where a record was made by code that no revision in the history has."""
    if config["samples"] != "full":
        raise PrunelabError("records are kept of runs with all samples; add --config samples=full")
    plan, results = plans.of(config), Path(config["results"])
    full = [p.run for slug in plan.slugs for p in plan.points(slug) if p.scale in p.board.full]
    runs = {run.likeness: run for run in full if isinstance(run, Run) and run.path(results).exists()}
    for run in runs.values():
        record = provenance.read(run.path(results))  # raises where it is damaged
        if reason := provenance.repeatable(record):
            raise PrunelabError(f"the record {run.address} {reason}; make it anew in a clean tree of one that is")
    for path in join.KEPT.glob("*.json"):
        newer = runs.get(replay.run_of(provenance.read(path)).likeness)
        if newer and newer.path(results).name != path.name:
            path.unlink()
    for run in runs.values():
        write_text(join.KEPT / run.path(results).name, run.path(results).read_text(encoding="utf-8"))
    return len(runs)


def _downloads(place: str, name: str, values: str, grid: grids.Grid) -> dict[str, str]:
    """A table's files by path: all that a reader may want to take along."""
    return {
        f"{place}/{name}.csv": values,
        f"{place}/{name}.md": grids.markdown(grid),
        f"{place}/{name}.tex": grids.latex(grid, f"{place}-{name}"),
    }


def _section(slug: str, plan: plans.Plan, records: join.Records, outlook: forecast.Outlook) -> page.Section:
    result, boards = join.tables(slug, plan, records, outlook), join.boards(slug, plan, records)
    lines = [line for table in result for line in table.lines]
    drawn, made = figures.of(slug, plan, lines, boards, records)
    results = list(claims.verdicts(papers.load(slug), boards, records))
    runs = [run for cell in plan.cells(slug) for run in behind(cell.runs.get("paper"))]
    named = [name for run in runs for kind, name in run.names if kind == "model"]
    models = tuple(dict.fromkeys(literature.published(name) for name in named))
    waiting = outlook.total([lacks for paper, lacks, _ in outlook.waiting if paper == slug])
    hours = page.Hours(waiting["gpu_hours"], waiting["runs"], waiting["hours_unknown"])
    names = tables.file_names(result, boards)
    sides = contrasts.rows(papers.load(slug), boards, plan, records)
    return page.Section(papers.load(slug), result, boards, names, drawn, made, results, sides, models, hours)


def counts(lines: list[join.Line]) -> str:
    """The lines by how they were obtained."""
    waits = {"ready": "ready", "stand-in": "stand-in only"}
    how = Counter(v.outcome if v.outcome in waits else v.reproduced.status.partition(":")[0] for v in lines)
    named = {"analytic": "analytic", "measured": "measured", **waits, "not run": "not run"}
    off = sum(line.outcome == "off" for line in lines)
    if how["stale"]:
        named["stale"] = "stale"
    assumed = sum(line.outcome == "assumed" for line in lines)
    summary = ", ".join([f"{len(lines)} reported", *(f"{how[k]} {v}" for k, v in named.items())]) + f"; {off} off"
    return summary + (f", {assumed} under an assumption" if assumed else "")


def main(arguments: list[str] | None = None) -> int:
    """Entry point: a mistake in the input is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m prunelab.paper_tables", description=__doc__)
    parser.add_argument(
        "--config", action="append", nargs="+", default=[], metavar="KEY=VALUE", help="setting of configs/default.yaml"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="also write what is kept under version control there")
    parser.add_argument("--keep-records", action="store_true", help="keep the boards' records (--config samples=full)")
    given = parser.parse_args(arguments)
    try:
        config = lookup.settings(lookup.pairs([pair for group in given.config for pair in group]))
        if given.keep_records:
            print(f"{keep_records(config)} records kept")
        path, lines = build(config)
        if given.keep:
            keep(path.parent, given.keep)
    except PrunelabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}  (CSV, Markdown, LaTeX and BibTeX beside it)\n{counts(lines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
