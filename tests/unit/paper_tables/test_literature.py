"""The literature, joined: papers' numbers of the same run side by side."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunelab.common.catalogue import lookup
from prunelab.common.experiments import papers, planning, plans
from prunelab.common.experiments.run import Run
from prunelab.paper_tables import __main__ as command
from prunelab.paper_tables import join, literature

CONFIG: dict[str, Any] = {"papers": "hiprune,flowcut,aim,wanda,flap,gptq"}


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> literature.Literature:
    config = lookup.settings({**CONFIG, "results": str(tmp_path_factory.mktemp("results"))})
    plan, records = plans.of(config), join.Records(Path(config["results"]))
    tables = {slug: join.tables(slug, plan, records) for slug in plan.slugs}
    return literature.of(plan, ((slug, [(t.name, t) for t in ts]) for slug, ts in tables.items()))


def test_every_number_of_a_paper_scale_run_enters_once(joined: literature.Literature) -> None:
    config = lookup.settings(CONFIG)
    at = [cell.runs["paper"] for slug in planning.selected(config) for cell in planning.cells(slug, config)
          if cell.status == "measured"]  # fmt: skip
    wanted = [run for run in at if isinstance(run, Run) and any(kind == "model" for kind, _ in run.names)]
    assert sum(len(q.reports) for q in joined.quantities) == len(wanted) == joined.facts["numbers"]
    assert joined.facts["reported by several papers"] > 5


def test_papers_that_name_a_row_in_their_own_way_stand_side_by_side(joined: literature.Literature) -> None:
    shared = [q for q in joined.quantities if len(q.papers) > 1]
    assert any(len({r.line.reported.row for r in q.reports}) > 1 for q in shared)
    for quantity in shared:
        assert quantity.spread == max(quantity.values) - min(quantity.values)
        assert quantity.disagrees == (quantity.spread > quantity.allowed + 1e-9)
    assert joined.disagreements == sorted(joined.disagreements, key=lambda q: q.allowed - q.spread)


def test_no_number_hides_another(joined: literature.Literature) -> None:
    """Runs of one method under other conditions have rows of their own, and calibration makes no column."""
    for shelves in joined.shelves.values():
        for shelf in shelves:
            assert sum(len(by) for _, _, by in shelf.rows) == len(shelf.quantities)
    (half,) = (s for s in joined.shelves["llama-13b"] if s.budget == "0.5")
    assert half.metrics == ["perplexity, wikitext2"] and {"flap", "wanda_sp"} <= {m for m, *_ in half.rows}
    (whole,) = (s for s in joined.shelves["llama-13b"] if s.budget == literature.UNPRUNED)
    assert {"length=128", "length=2048"} <= {options for _, options, _ in whole.rows}


def test_budgets_are_told_as_readers_count() -> None:
    def run(method: str, budget: str | None, **settings: Any) -> Run:
        return Run("visual_tasks", "paper", method, {}, budget, settings)

    assert literature.budget(run("fastv", "64count"), "llava_1_5_7b") == "64 of 576 tokens"
    assert literature.budget(run("fastv", "0.25"), "llava_1_5_7b") == "144 of 576 tokens"
    assert literature.budget(run("holitom", "0.1", frames=32), "llava_onevision_7b").endswith("tokens")
    assert literature.budget(run("wanda", "0.5"), "llama2_7b") == "0.5"
    assert literature.budget(Run("perplexity", "paper"), "llama2_7b") == literature.UNPRUNED
    assert literature.published("llava_1_5_7b") == "llava-1.5-7b"


def test_what_papers_disagree_on_is_marked(joined: literature.Literature) -> None:
    one = next(q for q in joined.quantities if len(q.papers) > 1)
    low = one.reports[0]
    far = replace(low.line.reported, value=low.line.reported.value + 50, text="far")
    apart = replace(one, reports=(low, literature.Report("other", replace(low.line, reported=far), "")))
    assert apart.disagrees and apart.shown == f"{low.line.reported.text} to far" and apart.papers == [low.slug, "other"]


def test_the_site_has_a_page_a_model_found_by_name_and_tokens(tmp_path: Path) -> None:
    config = lookup.settings({**CONFIG, "papers": "hiprune", "results": str(tmp_path)})
    command.build(config)
    folder = tmp_path / "paper_tables"
    index = (folder / "literature.html").read_text()
    assert 'data-search="llava 1.5 7b 64 of 576 tokens"' in index
    assert 'href="literature/llava-1-5-7b.html#64-of-576-tokens"' in index
    page = (folder / "literature" / "llava-1-5-7b.html").read_text()
    assert 'id="64-of-576-tokens"' in page and "../hiprune/index.html#" in page
    rows = list(csv.DictReader(io.StringIO((folder / "literature" / "literature.csv").read_text())))
    assert len(rows) > 50 and {row["paper"] for row in rows} == {"hiprune"}
    assert all(row["reported"] for row in rows) and papers.load("hiprune").slug == rows[0]["paper"]
