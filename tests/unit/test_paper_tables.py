"""What `python -m paper_tables` writes, from records made by hand."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from common import catalogue, metrics, papers, provenance, svg
from common.errors import PrunelabError
from paper_tables import __main__ as command
from paper_tables import join, page, tables

SLUG = "zero_tprune"
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


def write(run: papers.Run, values: dict[str, Any], config: dict[str, Any], **changes: Any) -> Path:
    record = {"identity": run.identity, "sources": run.sources, "run": asdict(run), "metrics": values}
    record |= {"environment": ENVIRONMENT, "timing": {"seconds": 1.0}} | changes
    path = Path(config["results"]) / "records" / f"{record['identity']}-{record['sources']}.json"
    provenance.write(path, record)
    return path


def run_of(table: str, row: str, column: str, scale: str, config: dict[str, Any]) -> papers.Run:
    for cell in papers.cells(SLUG, config):
        r = cell.reported
        if (r.table, r.row, r.column) == (table, row, column):
            run = cell.runs[scale]
            assert isinstance(run, papers.Run)
            return run
    raise AssertionError


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings for one paper and an empty results folder."""
    monkeypatch.setattr(catalogue, "_testbed_hash", lambda name: "0" * 64)
    for key in ("assets", "scale", "papers", "results", "gpu", "imagenet", "duc"):
        monkeypatch.delenv(f"PRUNELAB_{key.upper()}", raising=False)
    return catalogue.settings({"papers": SLUG, "results": str(tmp_path / "results")})


@pytest.fixture
def config(bare: dict[str, Any]) -> dict[str, Any]:
    """The same with a few records: an exact cost within and one off, stand-ins, a board and a gallery."""
    write(run_of("DeiT-S main", "+Zero-TP-a", "GFLOPs", "paper", bare), {"fvcore": {"value": 2.9712}}, bare)
    write(run_of("DeiT-S main", "DeiT-S", "GFLOPs", "paper", bare), {"fvcore": {"value": 4.608}}, bare)
    for point in papers.points(SLUG, bare):
        assert isinstance(point.run, papers.Run)
        write(point.run, classified(PRUNED, 1.0) if point.budget else classified(DENSE, 2.0), bare)
    sites = [{"layer": 2, "where": "block_output", "kept": [0, 1, 3]}, {"layer": 5, "where": "input", "kept": [3]}]
    items = [{"label": EVIL, "dense": 1, "pruned": 1, "image": ["00ff", "ff00"], "sites": sites}]
    for job in papers.figures(SLUG, bare):
        assert isinstance(job.run, papers.Run)
        write(job.run, {"scenes": {"value": 1, "grid": [2, 2], "items": items}}, bare)
    return bare


def rows(config: dict[str, Any], name: str) -> list[dict[str, str]]:
    with (Path(config["results"]) / "paper_tables" / SLUG / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines(config: dict[str, Any]) -> list[join.Line]:
    found = join.tables(SLUG, config, join.Records(Path(config["results"])))
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
        else:
            assert row["status"].startswith("not run: ") and row["needs"]
            assert not row["difference"] and not row["within_tolerance"]
        if row.get("testbed_status"):  # a table without a stand-in has no such column
            assert row["testbed_status"] == "stand-in" if row["testbed"] else ": " in row["testbed_status"]
        assert all(row[key] for key in row if key.endswith("_status"))


def test_a_stand_in_is_never_taken_for_the_papers_number(config: dict[str, Any]) -> None:
    command.build(config)
    dense = next(r for r in rows(config, "deit-s-main") if r["row"] == "DeiT-S" and r["column"] == "top-1")
    assert dense["testbed"] == "90" and dense["testbed_samples"] == "100" and dense["testbed_record"]
    assert dense["reproduced"] == "" and dense["status"].startswith("not run: needs the ImageNet-1k")
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


def test_a_record_of_other_sources_is_stale_at_paper_scale(bare: dict[str, Any], tmp_path: Path) -> None:
    config = bare | {"scale": "paper", "imagenet": str(tmp_path)}
    run = run_of("DeiT-S main", "DeiT-S", "top-1", "paper", config)
    write(run, classified(DENSE, 4.6), config, sources="0123456789ab")
    line = next(v for v in lines(config) if v.reported.row == "DeiT-S" and v.reported.column == "top-1")
    assert line.outcome == line.reproduced.status == "stale"
    assert line.reproduced.record == f"{run.identity}-0123456789ab"


def test_differences_on_boards_are_paired(config: dict[str, Any]) -> None:
    (board,) = join.boards(SLUG, config, join.Records(Path(config["results"])))
    base, point = board.points[0], board.points[1]
    assert base.budget is None and base.difference is None
    expected = metrics.mean([100.0 * (a - b) for a, b in zip(PRUNED, DENSE, strict=True)])
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
    monkeypatch.setattr(
        command, "write_text", lambda path, text: (order.append(path), provenance.write_text(path, text))
    )
    index, _ = command.build(config)
    first = {path: path.read_bytes() for path in order}
    assert order[-1] == index and len(first) == len(order) == 2 * (len(papers.load(SLUG).tables) + 1) + 1
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
    code = "import sys, paper_tables.__main__, methods.zero_tprune.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=papers.ROOT, check=False).returncode == 0


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


def test_page_stands_alone_and_its_links_lead_somewhere(config: dict[str, Any]) -> None:
    index, _ = command.build(config)
    text = index.read_text(encoding="utf-8")
    found = Links(text)
    assert found.loads and all(load.startswith("data:image/png;base64,") for load in found.loads)
    assert found.scripts == 1 and "url(" not in text and "@import" not in text
    assert len(found.ids) == len(set(found.ids))
    for link in found.links:
        if link.startswith("#"):
            assert link[1:] in found.ids
        elif not link.startswith("https://"):
            assert (index.parent / link).exists(), link


def test_page_shows_how_each_number_was_obtained(config: dict[str, Any]) -> None:
    text = command.build(config)[0].read_text(encoding="utf-8")
    run = run_of("DeiT-S main", "+Zero-TP-a", "GFLOPs", "paper", config)
    assert f'href="#r-{run.address}"' in text and f'id="r-{run.address}"' in text
    for part in ("Python 3.11", "torch 2", "abacus", "commit c0ffee, with changes not committed", "Budget(0.5)"):
        assert part in text
    assert "seconds" not in text and "analytic, off by more than ±0.02" in text


def test_what_data_brings_is_escaped(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    number = papers.reported(SLUG)[0]
    evil = replace(number, table="headline", row=EVIL, column=EVIL, unit=EVIL, source=EVIL, quality=EVIL)
    given = (*papers.reported(SLUG), evil)
    monkeypatch.setattr(papers, "reported", lambda slug: given)
    text = command.build(config)[0].read_text(encoding="utf-8")
    assert Links(text).scripts == 1 and "<script>alert" not in text and "&lt;script&gt;alert" in text
    written = (Path(config["results"]) / "paper_tables" / SLUG / "headline.md").read_text(encoding="utf-8")
    assert "<script>" not in written.replace("\\<", "")


def test_readme_is_rendered_without_markup_of_its_own() -> None:
    links = "[web](https://example.org) [file](method.py) [bad](javascript:alert) ![image](x.png)"
    source = f"# Top\n\n{EVIL} {links}\n\n|a|b|\n|-|-|\n|1|2|\n"
    shown = page.markdown(source)
    assert "<h4>Top</h4>" in shown and '<a href="https://example.org">web</a>' in shown and "<table>" in shown
    assert "<script" not in shown and "<img" not in shown
    assert Links(str(shown)).links == ["https://example.org"]


def test_page_without_records_says_so(bare: dict[str, Any]) -> None:
    index, found = command.build(bare)
    assert {line.outcome for line in found} == {"not run"}
    assert "needs its record" in index.read_text(encoding="utf-8")
    assert "Reported by the paper" in index.read_text(encoding="utf-8")


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (76.1, 79.8), (0.0012, 0.0025), (-3, 1200), (1e6, 1e6 + 1)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = svg.ticks(low, high)
    assert 3 <= len(found) <= 9 and found == sorted(found)
    assert low - 1e-6 <= found[0] and found[-1] <= high + 1e-6


def test_charts_escape_and_tell_marks_apart() -> None:
    marks = (svg.Mark(1, 2, 0.5, label=EVIL), svg.Mark(2, 3, hollow=True))
    chart = svg.chart([svg.Series(EVIL, marks)], title=EVIL, x_label=EVIL, y_label=EVIL, level=(EVIL, 4.0))
    assert "<script" not in chart and chart.count("hollow") == 1 and chart.count('class="error') == 1
    one = svg.chart([svg.Series("a", (svg.Mark(1, 1),))], title="", x_label="", y_label="")
    assert "nan" not in one
    assert svg.chart([], title="", x_label="", y_label="") == ""
    shapes = [svg.marker(0, 0, style).replace(f"s{style}", "") for style in range(svg.STYLES)]
    assert len(set(shapes)) == svg.STYLES


def test_stages_show_what_is_removed_when() -> None:
    drawn = svg.stages(["00ff", "ff00"], (2, 2), [("first", {0, 1, 3}), ("second", {3})], title="t")
    assert drawn.count("<image") == 3
    assert drawn.count('class="fresh"') == 1 + 2 and drawn.count('class="gone"') == 1


def test_gallery_records_what_stays_at_each_site(bare: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.vision_transformer import VisionTransformer

    from common import models
    from common.tasks import gallery

    model = VisionTransformer(
        img_size=40, patch_size=4, in_chans=1, embed_dim=48, depth=12, num_heads=3, num_classes=10
    )
    monkeypatch.setattr(models, "load", lambda identity, config: (model.eval(), None))
    (job,) = papers.figures(SLUG, bare)
    assert isinstance(job.run, papers.Run) and job.run.address in papers.jobs(bare)
    scenes = gallery.execute(replace(job.run, settings={"samples": 2}, budget="0.5"), bare)["scenes"]
    assert scenes["value"] == len(scenes["items"]) == 2 and scenes["grid"] == [10, 10]
    for item in scenes["items"]:
        stages = [set(site["kept"]) for site in item["sites"]]
        assert [len(s) for s in stages] == [50, 25, 12]
        assert stages[2] < stages[1] < stages[0] <= set(range(100))
        assert [len(bytes.fromhex(row)) for row in item["image"]] == [40] * 40
    real = replace(job.run, ids=job.run.ids | {"data": {"loader": "imagenet_sample"}})
    with pytest.raises(PrunelabError, match="testbed's scenes alone"):
        gallery.execute(real, bare)
