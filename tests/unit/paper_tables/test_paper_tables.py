"""What `python -m prunelab.paper_tables` writes, from records made by hand."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
import tomllib
import types
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markupsafe import Markup
from pydantic import ValidationError

from prunelab.common import tasks
from prunelab.common.catalogue import lookup
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.drawing import sheets
from prunelab.common.experiments import papers, planning, plans, provenance, schema, workspace
from prunelab.common.experiments.run import Run
from prunelab.common.metrics import uncertainty
from prunelab.methods.pruning_by_explaining import figures as explained
from prunelab.methods.pruning_by_explaining import tables as by_explaining
from prunelab.methods.pruning_survey import figures as arms
from prunelab.methods.random_pruning import figures as densities
from prunelab.methods.sparse_pretraining import figures as averages
from prunelab.paper_tables import __main__ as command
from prunelab.paper_tables import cite, cross, figures, grids, join, page, tables, tolerance

SLUG = "zero_tprune"
SETTINGS = lookup.settings({})
EVIL = '<script>alert("1")</script>'
ENVIRONMENT = {
    "python": "3.11", "machine": "abacus", "libraries": {"torch": "2"}, "commit": "c0ffee", "dirty": True,
    "device": "cpu", "threads": 1, "dtype": "float32",
}  # fmt: skip
DENSE, PRUNED = [True] * 90 + [False] * 10, [True] * 80 + [False] * 20  # every pruned success is a dense one too


def share(correct: list[bool]) -> dict[str, Any]:
    bits = "".join("01"[c] for c in correct)
    n, p = len(correct), sum(correct) / len(correct)
    return {"value": 100 * p, "n": n, "stderr": 100 * (p * (1 - p) / n) ** 0.5, "bits": f"{int('1' + bits, 2):x}"}


def classified(correct: list[bool], gmacs: float) -> dict[str, Any]:
    saving = {"value": 100 * (1 - gmacs / 2)}
    return {"top1": share(correct), "gmacs": {"value": gmacs}, "saving": saving, "budget": {"text": "Budget(0.5)"}}


def write(run: Run, values: dict[str, Any], config: dict[str, Any], **changes: Any) -> Path:
    record = {"identity": run.identity, "sources": run.sources, "run": asdict(run), "metrics": values}
    record |= {"environment": ENVIRONMENT, "timing": {"seconds": 1.0}} | changes
    path = Path(config["results"]) / "records" / f"{record['identity']}-{record['sources']}.json"
    provenance.write(path, record)
    return path


def run_of(table: str, row: str, column: str, scale: str, config: dict[str, Any]) -> Run:
    for cell in planning.cells(SLUG, config):
        r = cell.reported
        if (r.table, r.row, r.column) == (table, row, column):
            run = cell.runs[scale]
            assert isinstance(run, Run)
            return run
    raise AssertionError


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings for one paper and an empty results folder."""
    monkeypatch.setattr(lookup, "_testbed_hash", lambda name: "0" * 64)
    for key in ("assets", "scale", "papers", "results", "gpu", "imagenet", "duc"):
        monkeypatch.delenv(f"PRUNELAB_{key.upper()}", raising=False)
    return lookup.settings({"papers": SLUG, "results": str(tmp_path / "results")})


@pytest.fixture
def config(bare: dict[str, Any]) -> dict[str, Any]:
    """The same with a few records."""
    fill(bare)
    return bare


def fill(config: dict[str, Any]) -> None:
    """A few records: an exact cost within tolerance and one off, stand-ins, a board and a gallery."""
    write(run_of("DeiT-S main", "+Zero-TP-a", "GFLOPs", "paper", config), {"fvcore": {"value": 2.9712}}, config)
    write(run_of("DeiT-S main", "DeiT-S", "GFLOPs", "paper", config), {"fvcore": {"value": 4.608}}, config)
    for point in planning.points(SLUG, config):
        assert isinstance(point.run, Run)
        write(point.run, classified(PRUNED, 1.0) if point.budget else classified(DENSE, 2.0), config)
    sites = [{"layer": 2, "where": "block_output", "kept": [0, 1, 3]}, {"layer": 5, "where": "input", "kept": [3]}]
    items = [{"label": EVIL, "dense": 1, "pruned": 1, "image": ["00ff", "ff00"], "sites": sites}]
    for job in planning.figures(SLUG, config):
        assert isinstance(job.run, Run)
        write(job.run, {"scenes": {"value": 1, "grid": [2, 2], "items": items}}, config)


def rows(config: dict[str, Any], name: str) -> list[dict[str, str]]:
    with (Path(config["results"]) / "paper_tables" / SLUG / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines(config: dict[str, Any]) -> list[join.Line]:
    found = join.tables(SLUG, plans.made(config), join.Records(Path(config["results"])))
    return [line for table in found for line in table.lines]


# -- the join --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["bare", "config"])
def test_every_reported_number_has_a_line_and_every_blank_a_reason(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(fixture)
    command.build(config)
    written = [row for table in papers.load(SLUG).tables for row in rows(config, tables.identifier(table.name))]
    asked = [(r.table, r.row, r.column, r.text) for r in papers.reported(SLUG)]
    assert sorted((r["table"], r["row"], r["column"], r["reported"]) for r in written) == sorted(asked)
    for row in written:
        assert row["status"]
        if row["reproduced"]:
            assert row["difference"] and row["tolerance"] and row["within_tolerance"] in ("yes", "no") and row["record"]
            assert row["tolerance_from"]
        else:
            assert row["status"] in ("not run", "ready", "stand-in") and row["needs"]
            assert not row["difference"] and not row["within_tolerance"]
        if row.get("testbed_status"):  # a table without a stand-in has no such column
            assert row["testbed_status"] == "stand-in" if row["testbed"] else ": " in row["testbed_status"]
        assert all(row[key] for key in row if key.endswith("_status"))


def test_a_stand_in_is_never_taken_for_the_papers_number(config: dict[str, Any]) -> None:
    command.build(config)
    dense = next(r for r in rows(config, "deit-s-main") if r["row"] == "DeiT-S" and r["column"] == "top-1")
    assert dense["testbed"] == "90" and dense["testbed_samples"] == "100" and dense["testbed_record"]
    assert dense["reproduced"] == "" and dense["status"] == "ready" and dense["needs"].startswith("the ImageNet-1k")
    for line in lines(config):
        assert line.reproduced.value is None or line.reproduced.status in ("analytic", "measured")
        if line.outcome == "stand-in":
            assert line.reproduced.value is None and line.within is None


def test_tolerance_decides_between_within_and_off(config: dict[str, Any]) -> None:
    found = {(v.reported.row, v.reported.column): v for v in lines(config) if v.reported.table == "DeiT-S main"}
    near, far = found["+Zero-TP-a", "GFLOPs"], found["DeiT-S", "GFLOPs"]
    assert (near.outcome, far.outcome) == ("within", "off")
    assert near.difference == pytest.approx(0.0012) and far.difference == pytest.approx(0.058)
    assert near.reproduced.status == "analytic"


def test_what_runs_under_an_assumption_is_shown_and_not_judged(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = papers.load(SLUG)
    changed = [t.model_copy(update={"assumes": "a <drawn> half"}) for t in paper.tables if t.name == "DeiT-S main"]
    others = [t for t in paper.tables if t.name != "DeiT-S main"]
    monkeypatch.setattr(papers, "load", lambda slug: paper.model_copy(update={"tables": [*changed, *others]}))
    _, found = command.build(config)
    near = next(v for v in found if (v.reported.row, v.reported.column) == ("+Zero-TP-a", "GFLOPs"))
    assert near.outcome == "assumed" and near.within is None
    assert near.difference == pytest.approx(0.0012)
    assert Counter(v.outcome for v in found)["within"] == Counter(v.outcome for v in found)["off"] == 0
    written = {(r["row"], r["column"]): r for r in rows(config, "deit-s-main")}
    assert written["+Zero-TP-a", "GFLOPs"]["assumes"] == "a <drawn> half"
    assert written["+Zero-TP-a", "GFLOPs"]["within_tolerance"] == "" and written["DeiT-S", "GFLOPs"]["difference"]
    text = page_of(config).read_text(encoding="utf-8")
    assert "analytic, under an assumption" in text and "under an assumption: a &lt;drawn&gt; half" in text
    assert "2 under an assumption" in command.counts(found)
    assert all(row["assumes"] == "" for t in others for row in rows(config, tables.identifier(t.name)))


def test_a_record_of_other_sources_is_stale_at_paper_scale(bare: dict[str, Any], tmp_path: Path) -> None:
    config = bare | {"scale": "paper", "imagenet": str(tmp_path)}
    run = run_of("DeiT-S main", "DeiT-S", "top-1", "paper", config)
    write(run, classified(DENSE, 4.6), config, sources="0123456789ab")
    line = next(v for v in lines(config) if v.reported.row == "DeiT-S" and v.reported.column == "top-1")
    assert line.outcome == line.reproduced.status == "stale"
    assert line.reproduced.record == f"{run.identity}-0123456789ab"


def test_a_formulas_figure_stands_beside_our_own_count(bare: dict[str, Any]) -> None:
    config = bare | {"papers": "fastv"}
    cells = [c for c in planning.cells("fastv", config) if c.count and c.reported.table == "T1"]
    assert len({c.count.address for c in cells if c.count}) == 4  # the unpruned model and three shares
    counted = next(c.count for c in cells if c.count and c.count.budget == "0.25")
    figures = {"decoder_macs": {"value": 1348.18, "protocol": "35 text tokens"}, "scoring_macs": {"value": 0.0025}}
    write(counted, figures | {"cache_mib": {"value": 103.0}}, config)
    found = next(
        t for t in join.tables("fastv", plans.made(config), join.Records(Path(config["results"]))) if t.name == "T1"
    )
    own = {v.reported.row: v.reproduced.ours for v in found.lines if v.reported.column == "relative FLOPs"}
    assert own["LLaVA-1.5-7B K=2 R=75%"] == join.Count(1348.18, 0.0025, counted.address, 103.0, "35 text tokens")
    assert own["LLaVA-1.5-7B baseline"] is None
    command.build(config)
    text = (Path(config["results"]) / "paper_tables" / "fastv" / "t1.md").read_text()
    assert "1348.2 G (0.0025 scoring), cache 103 MiB" in text and "35 text tokens" in text


def test_what_ran_on_a_folder_of_ones_own_is_no_reproduction(bare: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "timm" / "deit_small_patch16_224.fb_in1k"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights of one's own")
    config = bare | {"scale": "paper", "imagenet": str(tmp_path), "hub": str(tmp_path / "hub")}
    run = run_of("DeiT-S main", "DeiT-S", "top-1", "paper", config)
    assert run.stand_in and not run.needs
    write(run, classified(DENSE, 4.6), config)
    line = next(v for v in lines(config) if v.reported.row == "DeiT-S" and v.reported.column == "top-1")
    assert line.outcome == "stand-in" and line.reproduced.value is None and line.difference is None
    assert line.others[join.FOLDER].value == 90
    command.build(config)
    written = next(r for r in rows(config, "deit-s-main") if (r["row"], r["column"]) == ("DeiT-S", "top-1"))
    assert written["own folder"] == "90" and written["own folder_status"] == "stand-in" and not written["reproduced"]
    assert {b.scale for b in join.boards(SLUG, plans.made(config), join.Records(Path(config["results"])))} >= {
        join.FOLDER
    }


def test_differences_on_boards_are_paired(config: dict[str, Any]) -> None:
    (board,) = join.boards(SLUG, plans.made(config), join.Records(Path(config["results"])))
    base, point = board.points[0], board.points[1]
    assert base.budget is None and base.difference is None
    expected = uncertainty.mean([100.0 * (a - b) for a, b in zip(PRUNED, DENSE, strict=True)])
    assert point.difference == pytest.approx(-10) and point.interval == pytest.approx(1.96 * expected["stderr"])
    unpaired = 1.96 * (share(DENSE)["stderr"] ** 2 + share(PRUNED)["stderr"] ** 2) ** 0.5
    assert point.interval is not None and point.interval < 0.8 * unpaired
    command.build(config)
    written = rows(config, "trade-off-testbed")
    assert written[0]["budget"] == "none" and written[0]["saving"] == "0" and written[0]["difference"] == ""
    assert written[1]["status"] == "stand-in" and written[1]["difference"] == "-10"


# -- the command -----------------------------------------------------------------------------------------------------


def test_same_records_give_same_bytes_and_the_page_comes_last(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[Path] = []
    write = files.write_text
    monkeypatch.setattr(command, "write_text", lambda path, text: (order.append(path), write(path, text)))
    index, _ = command.build(config)
    first = {path: path.read_bytes() for path in order}
    grids_ = len(papers.load(SLUG).tables) + 3  # with the board, the board across papers, and what papers disagree on
    models = list((index.parent / "literature").glob("*.html"))
    printed = len(papers.load(SLUG).tables)  # in the paper's own layout
    # four pages, two files to cite with, all numbers, and what enters the literature
    assert order[-1] == index and len(first) == len(order) == 3 * grids_ + printed + 8 + len(models)
    command.build(config)
    assert {path: path.read_bytes() for path in first} == first
    assert not list(index.parent.rglob(".*"))


def test_command_prints_where_and_how_many(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", f"papers={SLUG}", "--config", f"results={config['results']}"]
    assert command.main(given) == 0
    said = capsys.readouterr().out
    assert str(Path(config["results"]) / "paper_tables" / "index.html") in said
    assert f"{len(papers.reported(SLUG))} reported, 2 analytic, 0 measured" in said


@pytest.mark.parametrize("given", ["nonsense", "colour=blue", "papers=no_such_paper", "scale=huge", "papers=[}"])
def test_mistakes_are_one_line(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--config", given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_tampered_record_is_refused(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = run_of("DeiT-S main", "DeiT-S", "GFLOPs", "paper", config).path(Path(config["results"]))
    path.write_text(path.read_text().replace("4.608", "4.55"))
    assert command.main(["--config", f"papers={SLUG}", f"results={config['results']}"]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err
    assert not (Path(config["results"]) / "paper_tables").exists()


def test_building_imports_no_torch() -> None:
    code = "import sys, paper_tables.__main__, prunelab.methods.zero_tprune.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, check=False).returncode == 0


def test_tables_of_one_file_name_are_refused() -> None:
    twins = [join.PaperTable("Table 1", "", "", ()), join.PaperTable("table-1", "", "", ())]
    with pytest.raises(PrunelabError, match=r"table-1\.csv"):
        tables.file_names(twins, [])


# -- the page --------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Every id, every link, and everything that a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action"):
                self.loads.append(value or "")


def page_of(config: dict[str, Any]) -> Path:
    """The paper's page, built."""
    return command.build(config)[0].parent / SLUG / "index.html"


def test_pages_stand_alone_and_their_links_lead_somewhere(config: dict[str, Any]) -> None:
    folder = command.build(config)[0].parent
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    own = {str(p.relative_to(folder)) for p in pages if p.parent.name != "literature"}
    assert own == {"index.html", "boards.html", "literature.html", f"{SLUG}/index.html"}
    for path, found in pages.items():
        text = path.read_text(encoding="utf-8")
        assert all(load.startswith("data:image/png;base64,") for load in found.loads)
        assert found.scripts == 1 and "url(" not in text and "@import" not in text
        assert len(found.ids) == len(set(found.ids))
        for link in found.links:
            file, _, fragment = link.partition("#")
            if not link.startswith("https://"):
                there = (path.parent / file).resolve() if file else path.resolve()
                assert there.exists(), link
                assert not fragment or fragment in Links(there.read_text(encoding="utf-8")).ids, link
    assert pages[folder / SLUG / "index.html"].loads, "the gallery's pictures are inside"


def test_every_table_has_its_four_files(config: dict[str, Any]) -> None:
    folder = page_of(config).parent
    for name in tables.file_names(*join_of(config)):
        for suffix in ("csv", "md", "tex"):
            assert (folder / f"{name}.{suffix}").stat().st_size
            assert f'href="{name}.{suffix}"' in (folder / "index.html").read_text(encoding="utf-8")
    assert (folder / "cite.bib").read_text(encoding="utf-8").count("@") == 2


def join_of(config: dict[str, Any]) -> tuple[list[join.PaperTable], list[join.BoardTable]]:
    records = join.Records(Path(config["results"]))
    return join.tables(SLUG, plans.made(config), records), join.boards(SLUG, plans.made(config), records)


def test_page_shows_how_each_number_was_obtained(config: dict[str, Any]) -> None:
    text = page_of(config).read_text(encoding="utf-8")
    run = run_of("DeiT-S main", "+Zero-TP-a", "GFLOPs", "paper", config)
    assert f'href="#r-{run.address}"' in text and f'id="r-{run.address}"' in text
    for part in ("Python 3.11", "torch 2", "abacus", "commit c0ffee, with changes not committed", "Budget(0.5)"):
        assert part in text
    assert "seconds" not in text and "analytic, off by more than ±0.02" in text
    assert "one standard error of a share of 50,000 images" in text, "tables say what their numbers are held to"


def test_what_is_kept_is_a_page_a_paper_and_all_numbers(config: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "kept"
    place.mkdir()
    (place / "gone.md").write_text("of a paper that left")
    index, found = command.build(config)
    command.keep(index.parent, place)
    assert {path.name for path in place.iterdir()} == {f"{SLUG}.md", "boards.md", "literature.md", "numbers.csv"}
    text = (place / f"{SLUG}.md").read_text(encoding="utf-8")
    assert all(grids.escape_markdown(f"{SLUG}: {table.name}") in text for table in papers.load(SLUG).tables)
    numbers = list(csv.DictReader((place / "numbers.csv").open(encoding="utf-8")))
    assert len(numbers) == len(found) and {row["outcome"] for row in numbers} == {line.outcome for line in found}
    (place / "notes.txt").write_text("mine")
    with pytest.raises(PrunelabError, match=r"notes\.txt"):
        command.keep(index.parent, place)
    assert (place / f"{SLUG}.md").exists(), "nothing is lost where something is refused"


def test_the_index_tells_the_status_of_every_paper(config: dict[str, Any]) -> None:
    index, found = command.build(config)
    text = index.read_text(encoding="utf-8")
    count = Counter(line.outcome for line in found)
    words = {"within": "within tolerance", "off": "off", "ready": "ready", "stand-in": "stand-in only"}
    said = ", ".join(f"{count[outcome]} {word}" for outcome, word in words.items() if count[outcome])
    assert said in text and f'href="{SLUG}/index.html"' in text and f'id="{SLUG}"' in text
    reasons = Counter(p for line in found if line.within is None for p in set(line.reproduced.needs.split("; ")))
    assert len(reasons) > 3
    kinds = Counter(schema.REASONS[line.reason] for line in found if line.reason)
    assert f"can run {kinds.total()} of {len(found)} numbers" in text
    for reason, number in (*reasons.most_common(3), *kinds.items()):
        assert f'<span class="count">{number} ×</span> {Markup.escape(reason)}</li>' in text


def test_the_index_filters_by_taxonomy_model_and_hours_and_finds_models(config: dict[str, Any]) -> None:
    text = command.build(config)[0].read_text(encoding="utf-8")
    row = re.search(rf'<tr id="{SLUG}"[^>]*>', text)
    assert row
    said = dict(re.findall(r'data-(\w+)="([^"]*)"', row[0]))
    assert "target:tokens" in said["tags"].split() and "when:run_time" in said["tags"].split()
    assert said["models"].split() and set(said["models"].split()) <= set(re.findall(r'<option value="([^"]+)"', text))
    assert set(said["hours"].split()) <= {"nothing", "unknown", "more", *map(str, page.HOURS)}
    for key in ("tags", "models", "hours", "outcome", "family"):
        assert f'<select data-key="{key}">' in text
    assert 'data-also="shelves"' in text and re.search(r'<li data-search="[^"]+"><a href="literature/', text)


def test_a_papers_page_tells_what_the_rest_takes(config: dict[str, Any]) -> None:
    folder = command.build(config)[0].parent
    text = (folder / SLUG / "index.html").read_text(encoding="utf-8")
    row = re.search(rf'<tr id="{SLUG}".*?</tr>', (folder / "index.html").read_text(encoding="utf-8"), re.DOTALL)
    hours = re.search(r'data-label="GPU hours"[^>]*>([^<]+)<', row[0]) if row else None
    assert hours and f"takes {hours[1]} GPU hours on one" in text and f"plan --papers {SLUG} --gpu NAME" in text


@pytest.mark.parametrize(
    ("given", "limits", "shown"),
    [((0, 0, 0), ["nothing"], "–"), ((5, 3, 0), ["10", "100"], "5"), ((500, 3, 0), ["more"], "500"),
     ((0.5, 3, 1), ["unknown"], "0.5 or more"), ((0, 2, 2), ["unknown"], "unknown")],
)  # fmt: skip
def test_hours_keep_to_the_limits_that_readers_choose(given: Any, limits: list[str], shown: str) -> None:
    assert (page.Hours(*given).limits, page.Hours(*given).shown) == (limits, shown)


def test_one_run_that_stands_in_for_several_models_shows_its_number_once(config: dict[str, Any]) -> None:
    def line(row: str, record: str, value: float = 5.0) -> join.Line:
        number = schema.Reported("T", row, "c", 1.0, "1.0", "", "here", "primary")
        stood = join.Value("testbed", value, record=record)
        return join.Line(number, join.Value("not run: needs x"), None, None, None, {"testbed": stood})

    table = join.PaperTable("T", "", "", (line("small", "a"), line("large", "a"), line("other", "b")))
    assert tables.repeats(table) == {(1, "testbed"): "the run of small, c, which stands in here as well"}
    cells = [row[-1] for row in tables.table_grid("x", table).rows]
    assert cells[0].startswith("5.0") and cells[1].startswith("as above") and cells[2].startswith("5.0")


def test_latex_has_the_papers_own_rows_and_columns(config: dict[str, Any]) -> None:
    table = next(t for t in join_of(config)[0] if t.name == "DeiT-S main")
    grid = tables.printed_grid(SLUG, table)
    assert grid.header == ["", *dict.fromkeys(n.column for n in papers.reported(SLUG) if n.table == "DeiT-S main")]
    assert [row[0] for row in grid.rows] == list(
        dict.fromkeys(n.row for n in papers.reported(SLUG) if n.table == "DeiT-S main")
    )
    by = {row[0]: dict(zip(grid.header, row, strict=True)) for row in grid.rows}
    assert by["DeiT-S"]["GFLOPs"] == "4.55 (4.608)" and by["+Zero-TP-a"]["GFLOPs"].endswith("(2.971)")
    name = tables.identifier("DeiT-S main")
    folder = page_of(config).parent
    assert "4.55 (4.608)" in (folder / f"{name}-as-printed.tex").read_text(encoding="utf-8")
    assert f'href="{name}-as-printed.tex"' in (folder / "index.html").read_text(encoding="utf-8")


LAW_COLUMNS = ("average", "last", "loss")
DRAWN = sorted(path.parent.name for path in papers.METHODS.glob("*/figures.py"))


@pytest.mark.parametrize("slug", DRAWN)
def test_figures_of_a_paper_s_own_wait_for_their_records(slug: str, tmp_path: Path) -> None:
    config = lookup.settings({"papers": slug, "results": str(tmp_path)})
    index, found = command.build(config)
    assert index.exists() and (index.parent / slug / "index.html").exists() and len(found) == len(papers.reported(slug))


def test_figures_of_functions_are_drawn_from_what_those_return() -> None:
    cell = {"value": 50.0, "stderr": 1.0}
    kinds = ["unpruned", *(f"{label} n={n} per class" for label in explained.NAMES for n in by_explaining.PER_CLASS)]
    names = (f"{by_explaining.ACCURACY}/{data} {kind}/train accuracy" for data in explained.SETS for kind in kinds)
    toy = explained.charts(dict.fromkeys(names, cell))
    assert toy.count("<svg") == 3 and "relevance, 200 a class: " in toy and "weight, 1 a class: " in toy
    sparse = densities.chart({f"{ratio}/0.05/accuracy": cell for ratio in ("dense", "ERK", "uniform")})
    assert "ERK at 0.05: 50.0 %" in sparse and "uniform at 0.05" in sparse
    runs = {f"{kind}/{run}/{name}": cell for kind, run in (("dense", "a"), ("sparse", "b")) for name in LAW_COLUMNS}
    law = averages.chart(runs | {f"law//{name}": cell for name in ("e", "a", "alpha")})
    assert "sparse, last number: 50 parameters, loss 50.000" in law
    assert "from scratch: 50.0 %" in arms.chart(dict.fromkeys(("dense", *arms.ARMS), cell))


def hostile(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put a text wherever a paper's own data may bring one."""
    number = papers.reported(SLUG)[0]
    evil = replace(number, table="headline", row=text, column=text, unit=text, source=text, quality=text)
    given = (*papers.reported(SLUG), evil)
    monkeypatch.setattr(papers, "reported", lambda slug: given)
    paper = papers.load(SLUG)
    board = paper.boards[0].model_copy(update={"caption": text, "label": text, "cost_label": text})
    boards = [board.model_copy(update={"entries": {text: "full", "ToMe": "tome"}}), *paper.boards[1:]]
    changed = {"title": text, "venue": text, "status": text, "authors": [text], "links": {text: "javascript:alert(1)"}}
    bad = paper.model_copy(update={**changed, "family": text, "boards": boards})
    monkeypatch.setattr(papers, "load", lambda slug: bad)
    monkeypatch.setattr(page, "_readme", lambda slug: page.markdown(f"# {text}\n\n{text}\n\n<b onclick=1>x</b>"))


@pytest.mark.parametrize(
    "text", [EVIL, "\"'><img src=x onerror=alert(1)>", "</script></style><script>alert(1)</script>"]
)
def test_what_data_brings_is_escaped(bare: dict[str, Any], monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    hostile(monkeypatch, text)
    fill(bare)
    folder = command.build(bare)[0].parent
    for path in folder.rglob("*.html"):
        shown = path.read_text(encoding="utf-8")
        found = Links(shown)  # refuses attributes that run something
        assert found.scripts == 1 and "<script>alert" not in shown and "<img" not in shown and "<b " not in shown
        assert not [link for link in found.links if link.startswith("javascript:")]
        if "literature" not in str(path.relative_to(folder)):
            assert "alert" in shown, "it is shown, as text"
    for path in folder.rglob("*.md"):
        assert not re.search(r"(?<!\\)<", path.read_text(encoding="utf-8")), path


def test_only_the_sites_own_script_may_run(config: dict[str, Any]) -> None:
    text = page_of(config).read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and f"script-src 'sha256-{digest}'" in policy[1] and policy[1].startswith("default-src 'none'")


def test_readme_is_rendered_without_markup_of_its_own() -> None:
    links = "[web](https://example.org) [file](method.py) [bad](javascript:alert) ![image](x.png)"
    source = f"# Top\n\n{EVIL} {links}\n\n|a|b|\n|-|-|\n|1|2|\n"
    shown = page.markdown(source)
    assert "<h3>Top</h3>" in shown and '<a href="https://example.org">web</a>' in shown and "<table>" in shown
    assert "<script" not in shown and "<img" not in shown
    assert Links(str(shown)).links == ["https://example.org"]


def test_of_rehearsals_the_index_tells_only_how_many_passed(bare: dict[str, Any]) -> None:
    def shown() -> str:
        return command.build(bare)[0].read_text(encoding="utf-8")

    assert 'id="rehearsed"' not in shown()
    noted = [{"name": f"perplexity | {i}", "fault": "" if i else "KeyError: x"} for i in range(3)]
    Path(bare["results"]).mkdir(parents=True, exist_ok=True)
    (Path(bare["results"]) / workspace.REHEARSALS).write_text(json.dumps(noted), encoding="utf-8")
    page = shown()
    assert "2 of 3 combinations of task, method, model and data" in page and "KeyError" not in page


def test_page_without_records_says_so(bare: dict[str, Any]) -> None:
    index, found = command.build(bare)
    assert {line.outcome for line in found} == {"not run", "ready"}
    text = (index.parent / SLUG / "index.html").read_text(encoding="utf-8")
    assert "needs its record" in text and "Reported by the paper" in text and "Nothing has run yet" in text
    assert "No two methods have run" in (index.parent / "boards.html").read_text(encoding="utf-8")


# -- tolerances ------------------------------------------------------------------------------------------------------


def cell(text: str, metric: str, **column: Any) -> planning.Cell:
    number = schema.Reported("T", "r", "c", float(text), text, "%", "s", "primary")
    return planning.Cell(number, metric, "measured", schema.Column(**column), {"paper": ""})


def test_rounding_is_half_a_unit_of_the_last_printed_digit() -> None:
    assert [tolerance.rounding(text) for text in ("40", "4.55", "0.6007")] == pytest.approx([0.5, 0.005, 0.00005])
    found = tolerance.of(cell("4.55", "fvcore", task="macs"))
    assert found and found.value == 0.005 and found.reason == "half a unit of the last printed digit"
    assert found.allows(0.005) and found.allows(4.555 - 4.55) and not found.allows(0.0051)


def test_a_share_is_forgiven_one_standard_error_of_its_set() -> None:
    top1 = cell("80.0", "top1", task="classify", data="imagenet")
    found = tolerance.of(top1)
    assert found and found.value == pytest.approx(0.05 + 100 * (0.8 * 0.2 / 50000) ** 0.5, abs=1e-6)
    assert "50,000 images" in found.reason
    fewer = tolerance.of(top1, stderr=1.0, samples=1000)
    assert fewer and fewer.value == pytest.approx(0.05 + 100 * (0.8 * 0.2 / 1000) ** 0.5, abs=1e-6)
    task = tolerance.of(cell("70.7", "gsm8k exact_match,strict-match", task="zero_shot"))
    assert task and task.value == pytest.approx(0.05 + 100 * (0.707 * 0.293 / 1319) ** 0.5, abs=1e-6)


def test_an_average_is_forgiven_the_error_of_the_mean_of_its_sets() -> None:
    parts = ["boolq acc", "piqa acc_norm"]
    found = tolerance.of(cell("60", "average", task="zero_shot", settings={"average": parts}))
    assert found and found.value == pytest.approx(0.5 + 50 * (0.24 / 3270 + 0.24 / 1838) ** 0.5, abs=1e-6)
    mixed = cell("60", "average", task="zero_shot", settings={"average": [*parts, "longbench_qasper qa_f1_score"]})
    alone = tolerance.of(mixed)
    assert alone and alone.value == 0.5, "a mean of what is no share has no such error"


def test_other_means_have_the_error_that_our_run_found() -> None:
    rouge = cell("37.2", "rouge1_recall", task="summarise", data="duc2004")
    without, with_ = tolerance.of(rouge), tolerance.of(rouge, stderr=0.4, samples=50)
    assert without and with_ and (without.value, with_.value) == (0.05, 0.45)


def test_a_tolerance_by_hand_needs_its_reason() -> None:
    stated = {"value": 0.02, "because": "the printed figure is cut off, not rounded"}
    found = tolerance.of(cell("4.55", "fvcore", task="macs", tolerance=stated))
    assert found and (found.value, found.reason) == (0.02, stated["because"])
    for wrong in (0.02, {"value": 0.02}, {"value": 0.02, "because": "so"}, {**stated, "value": 0}):
        with pytest.raises(ValidationError):
            schema.Column(tolerance=wrong)  # type: ignore[arg-type]


def test_what_nothing_here_can_make_is_held_to_nothing(config: dict[str, Any]) -> None:
    for line in lines(config):
        cell_of = next(c for c in planning.cells(SLUG, config) if c.reported == line.reported)
        assert (line.tolerance is None) == (cell_of.column is None)


def test_evaluation_sets_are_data_sets_or_tasks() -> None:
    from prunelab.common.catalogue import lookup as entries
    from prunelab.common.catalogue.evaluation_sets import evaluation_sets

    known = entries._read("datasets.yaml")
    found = evaluation_sets()
    assert found["imagenet"].size == 50000 and "imagenet" in known
    used = {s for slug in papers.slugs() for c in planning.cells(slug, SETTINGS) if c.column
            for s in tolerance.sets(c.column, c.metric)}  # fmt: skip
    assert {found["imagenet"], found["boolq"], found["gsm8k"]} <= used


# -- to take along ---------------------------------------------------------------------------------------------------

SIGNS = '--a `&` b % $x_1^2 #3 {c} ~ \\ <d> |e| "f" [g] *h* ± − × ≈ – … ●'


def latex_text(cell_: str) -> str:
    """What LaTeX sets for an escaped cell; an assertion where a special sign is left bare."""
    commands = {f"\\{sign}": sign for sign in "&%$#_{}"}
    commands |= {v: k for k, v in grids._LATEX.items() if len(v) > 1} | {"-{}": "-"}
    out, rest = "", cell_
    while rest:
        found = max((c for c in commands if rest.startswith(c)), key=len, default="")
        assert found or rest[0] not in "\\{}$&#%_^~", rest
        out, rest = out + (commands[found] if found else rest[0]), rest[len(found or rest[0]) :]
    return out


def test_latex_escapes_what_latex_would_read() -> None:
    assert latex_text(grids.escape_latex(SIGNS)) == SIGNS
    assert grids.escape_latex("two\nlines\\input{x}") == r"two lines\textbackslash{}input\{x\}"


@pytest.mark.parametrize("count", [2, grids.LONG + 1])
def test_a_latex_table_is_whole(count: int) -> None:
    rows_ = [["[1] " + SIGNS, "2"] for _ in range(count)]
    grid = grids.Grid(SIGNS, (SIGNS,), ["name", "number"], [False, True], rows_, (SIGNS,), (SIGNS,))
    text = grids.latex(grid, "a-b")
    begun, ended = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
    assert begun == ended[::-1] and ("longtable" in begun) == (count > grids.LONG) == ("tabular" not in begun)
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:a-b}", "{lr}"))
    body = [line for line in text.splitlines() if line.endswith(r"\\") and line.startswith("{[}1")]
    assert len(body) == count
    for line in body:  # a bare [ behind a line's end would be its argument
        cells = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
        assert [latex_text(c) for c in cells] == ["[1] " + SIGNS, "2"]
    bare_ = re.sub(r"\\[{}\\]", "", text)
    assert bare_.count("{") == bare_.count("}")


def test_markdown_keeps_a_row_a_row() -> None:
    grid = grids.Grid("n", (), ["a", "b"], [False, True], [[EVIL + "|x\ny", "2"]])
    line = grids.markdown(grid).splitlines()[4]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3 and "\\<script\\>" in line


def test_bibtex_has_the_paper_and_the_reproduction() -> None:
    paper = papers.load(SLUG)
    text = cite.entries(paper, "c0ffee", "testbed")
    assert text.startswith(cite.bibtex(paper)) and "@software{prunelab_zero_tprune," in text
    assert "commit c0ffee" in text and "version = {0.1.0}" in text and "testbed scale" in text
    assert text.count("{") == text.count("}")
    evil = cite.entries(paper.model_copy(update={"title": "}} \\input{x} 100% a_b"}), None, "paper")
    assert evil.count("{") == evil.count("}") and "\\input" not in evil and "commit" not in evil.partition("@soft")[2]


def test_every_paper_has_bibtex_that_closes() -> None:
    for slug in papers.slugs():
        text = cite.bibtex(papers.load(slug))
        assert re.match(r"@\w+\{[^,{}\s]+,", text) and text.endswith("}") and text.count("{") == text.count("}"), slug


def test_citation_file_is_whole() -> None:
    given = yaml.safe_load((files.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "date-released", "license", "type"} <= set(given)
    assert given["cff-version"] == "1.2.0" and given["type"] == "software"
    project = tomllib.loads((files.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (given["version"], given["license"]) == (project["version"], project["license"])
    assert all(author.get("name") or author.get("family-names") for author in given["authors"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", given["date-released"]) and cite.software().year >= 2026


# -- boards across papers --------------------------------------------------------------------------------------------


def leaderboards(config: dict[str, Any], slugs: tuple[str, ...] = (SLUG,)) -> list[cross.Leaderboard]:
    records, plan = join.Records(Path(config["results"])), plans.made(config)
    return cross.leaderboards(((slug, board) for slug in slugs for board in join.boards(slug, plan, records)), records)


def test_methods_stand_in_order_beside_the_unpruned_model(config: dict[str, Any]) -> None:
    (leaderboard,) = leaderboards(config)
    assert set(leaderboard.budgets) == {"0.9cost", "0.8cost", "0.7cost", "0.6cost", "0.5cost"} and not leaderboard.lower
    for entries in leaderboard.blocks.values():
        values = [p.value.value for p in entries]
        assert len(entries) == 6 and values == sorted(values, reverse=True) and entries[0] is leaderboard.unpruned
        assert all(p.value.stderr and p.cost and p.value.status == "testbed" for p in entries)
        assert entries[1].difference == pytest.approx(-10) and entries[1].interval and entries[0].difference is None
    low, high = leaderboard.reach
    assert low < 80 < 90 < high and leaderboard.stands_for == "deit_small"


def test_who_lies_within_chance_of_the_best_shares_its_place(config: dict[str, Any]) -> None:
    (leaderboard,) = leaderboards(config)
    for places in leaderboard.ranks.values():  # the unpruned model, and five methods whose answers are the same
        assert places == ["1", "2=", "2=", "2=", "2=", "2="]
    assert "2=" in grids.markdown(cross.grid(leaderboard))
    assert tables.gap(-10.0, 3.0) == "−10.00 ± 3.00" and tables.gap(-2.0, 3.0) == "−2.00 ± 3.00, tied"


def test_runs_that_papers_share_stand_once(config: dict[str, Any]) -> None:
    (alone,), (twice,) = leaderboards(config), leaderboards(config, (SLUG, SLUG))
    assert {b: len(p) for b, p in twice.budgets.items()} == {b: len(p) for b, p in alone.budgets.items()}


def test_what_differs_in_settings_alone_is_told_apart(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for point in planning.points(SLUG, config):
        assert isinstance(point.run, Run)
        other = replace(point.run, settings={**point.run.settings, "samples": 7})
        write(other, classified(PRUNED, 1.0) if point.budget else classified(DENSE, 2.0), config)
    real = plans.Plan.points

    def both(plan: plans.Plan, slug: str) -> Any:
        for point in real(plan, slug):
            yield point
            more = {**point.run.settings, "samples": 7}
            yield replace(
                point, board=point.board.model_copy(update={"name": "b"}), run=replace(point.run, settings=more)
            )

    monkeypatch.setattr(plans.Plan, "points", both)
    found = leaderboards(config)
    assert len(found) == 2 and found[1].name == f"{found[0].name}-2" and found[0].settings != found[1].settings


def test_less_is_better_where_the_metric_says_so(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.get("classify")
    turned = replace(task.metrics["top1"], higher_is_better=False)
    monkeypatch.setattr(task, "metrics", {**task.metrics, "top1": turned})
    (leaderboard,) = leaderboards(config)
    assert all(entries[-1] is leaderboard.unpruned for entries in leaderboard.blocks.values())


def test_error_bars_are_drawn_where_records_have_errors(config: dict[str, Any]) -> None:
    text = page_of(config).read_text(encoding="utf-8")
    points = sum(1 for p in planning.points(SLUG, config) if p.budget)
    assert text.count('class="error ') == points
    boards = (Path(config["results"]) / "paper_tables" / "boards.html").read_text(encoding="utf-8")
    assert boards.count('class="error ') == points + 5  # and the unpruned model under each budget
    flat = join.Value("testbed", 1.0)
    assert 'class="error' not in page.interval(flat, (0.0, 2.0), None)


# -- pictures --------------------------------------------------------------------------------------------------------


def test_patterns_are_points_and_shares_a_curve() -> None:
    stated = schema.Board(name="b", task="perplexity", metric="perplexity", entries={}, budgets=())
    points = [join.Point("dense", None, "testbed", join.Value("testbed", 1.0, 0.1), 0.9)]
    points += [join.Point("Wanda", b, "testbed", join.Value("testbed", 2.0, 0.1), 0.5) for b in ("0.7", "0.5", "2:4")]
    board = join.BoardTable("b", "", "perplexity", "testbed", "parameters", tuple(points), stated)
    (drawn,) = figures.trade_off([board], {})
    line = re.search(r'<polyline[^>]*points="([^"]*)"', drawn.html)
    assert line and len(line[1].split()) == 2 and drawn.html.count("<polyline") == 1
    assert drawn.html.count('class="error ') == 3 and drawn.html.count('class="key"') == 1


def test_trainings_are_drawn_from_their_logs() -> None:
    stated = schema.Board(name="b", task="tune", metric="loss", entries={}, budgets=())
    log = [{"step": s, "loss": 1.0 / s, "parameters": 4e6 - s * 1e6, "seconds": 1.0} for s in (1, 2)]
    kept = {"a": {"metrics": {"training_loss": {"value": 0.5, "log": log}}}, "d": {"metrics": {"loss": {"value": 1.0}}}}
    points = [join.Point("dense", None, "testbed", join.Value("testbed", 1.0, record="d"))]
    points += [join.Point("PST", "0.5", "testbed", join.Value("testbed", 2.0, record="a"))]
    points += [join.Point("PST", "0.7", "testbed", join.Value("not run: needs a run"))]
    board = join.BoardTable("b", "", "loss", "testbed", "parameters", tuple(points), stated)
    records: Any = types.SimpleNamespace(at=kept.__getitem__)
    (drawn,) = figures.trainings([board], records)
    assert drawn.html.count("<polyline") == 2, "the loss, and the parameters that stay"
    assert "PST at 0.5" in drawn.html and "dense" not in drawn.html
    assert figures.trainings([replace(board, points=board.points[:1])], records) == []


def test_stages_show_what_is_removed_when() -> None:
    drawn = sheets.stages(["00ff", "ff00"], (2, 2), [("first", {0, 1, 3}), ("second", {3})], title="t")
    assert drawn.count("<image") == 3
    assert drawn.count('class="fresh"') == 1 + 2 and drawn.count('class="gone"') == 1


def test_gallery_records_what_stays_at_each_site(bare: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.vision_transformer import VisionTransformer

    from prunelab.common.experiments import runner
    from prunelab.common.models import loading

    model = VisionTransformer(
        img_size=40, patch_size=4, in_chans=1, embed_dim=48, depth=12, num_heads=3, num_classes=10
    )
    monkeypatch.setattr(loading, "load", lambda identity, config: (model.eval(), None))
    (job,) = planning.figures(SLUG, bare)
    assert isinstance(job.run, Run) and job.run.address in plans.made(bare).jobs()
    scenes = runner.measure(replace(job.run, settings={"samples": 2}, budget="0.5"), bare)["scenes"]
    assert scenes["value"] == len(scenes["items"]) == 2 and scenes["grid"] == [10, 10]
    for item in scenes["items"]:
        stages = [set(site["kept"]) for site in item["sites"]]
        assert [len(s) for s in stages] == [50, 25, 12]
        assert stages[2] < stages[1] < stages[0] <= set(range(100))
        assert [len(bytes.fromhex(row)) for row in item["image"]] == [40] * 40
    real = replace(job.run, ids=job.run.ids | {"data": {"loader": "imagenet_sample"}})
    with pytest.raises(PrunelabError, match="testbed's scenes alone"):
        runner.measure(real, bare)


def test_a_benchmark_of_unknown_size_is_named() -> None:
    number = cell("70.0", "new_bench acc", task="zero_shot", settings={"tasks": ["new_bench"]})
    with pytest.raises(PrunelabError, match=r"evaluation_sets.yaml lacks new_bench, which 'T', column 'c'"):
        tolerance.of(number)
    for slug in papers.slugs():
        for found in planning.cells(slug, lookup.settings({})):
            if found.column is not None and found.column.tolerance is None:
                assert not tolerance.unsized(found.column, found.metric), slug
