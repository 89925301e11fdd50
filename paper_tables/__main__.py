"""`python -m paper_tables`: everything the papers report beside what we obtained, as CSV, Markdown and one HTML page.

Reads reported.csv, paper.yaml and run records; runs nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import catalogue, papers
from common.errors import PrunelabError
from common.provenance import write_text
from paper_tables import figures, join, page, tables


def build(config: Mapping[str, Any]) -> tuple[Path, list[join.Line]]:
    """Write every file and return the page's path with all reported numbers. The page comes last: where it exists,
    so does all it links to."""
    results = Path(config["results"])
    folder, records = results / "paper_tables", join.Records(results)
    sections = [_section(slug, config, records) for slug in papers.selected(config)]
    index = page.build(sections, config, records, folder)
    for section in sections:
        slug, split = section.paper.slug, len(section.tables)
        for name, table in zip(section.files[:split], section.tables, strict=True):
            write_text(folder / slug / f"{name}.csv", tables.table_csv(table))
            write_text(folder / slug / f"{name}.md", tables.table_markdown(slug, table))
        for name, board in zip(section.files[split:], section.boards, strict=True):
            write_text(folder / slug / f"{name}.csv", tables.board_csv(board))
            write_text(folder / slug / f"{name}.md", tables.board_markdown(slug, board))
    write_text(folder / "index.html", index)
    return folder / "index.html", [line for section in sections for line in section.lines]


def _section(slug: str, config: Mapping[str, Any], records: join.Records) -> page.Section:
    found, boards = join.tables(slug, config, records), join.boards(slug, config, records)
    lines = [line for table in found for line in table.lines]
    drawn, made = figures.of(slug, config, lines, boards, records)
    return page.Section(papers.load(slug), found, boards, tables.file_names(found, boards), drawn, made)


def counts(lines: list[join.Line]) -> str:
    """The lines by how they were obtained."""
    how = Counter("stand-in" if v.outcome == "stand-in" else v.reproduced.status.partition(":")[0] for v in lines)
    off = sum(line.outcome == "off" for line in lines)
    named = {"analytic": "analytic", "measured": "measured", "stand-in": "stand-in only", "not run": "not run"}
    if how["stale"]:
        named["stale"] = "stale"
    return ", ".join([f"{len(lines)} reported", *(f"{how[k]} {v}" for k, v in named.items())]) + f"; {off} off"


def main(arguments: list[str] | None = None) -> int:
    """Entry point: a mistake in the input is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m paper_tables", description=__doc__)
    parser.add_argument(
        "--config", action="append", nargs="+", default=[], metavar="KEY=VALUE", help="setting of configs/default.yaml"
    )
    given = parser.parse_args(arguments)
    try:
        path, lines = build(catalogue.settings(catalogue.pairs([pair for group in given.config for pair in group])))
    except PrunelabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}  (CSV and Markdown beside it)\n{counts(lines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
