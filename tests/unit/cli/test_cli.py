"""The command line: what it shows, and that every mistake is one line with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from prunelab.common.cli import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prunelab", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).save(path)
    return path


@pytest.fixture
def article(tmp_path) -> Path:
    path = tmp_path / "article.txt"
    path.write_text("Tokens cost time. Pruning removes tokens. Pruning tokens saves time. Nobody asked the weather.")
    return path


def test_list_filters(cli):
    assert "zero_tprune" in cli("list")[1]
    assert "lexrank" not in cli("list", "--role", "token_pruner")[1]
    assert "lexrank" in cli("list", "--family", "text")[1]
    assert "lexrank" in cli("list", "--tag", "target=sentences")[1]
    assert "zero_tprune" not in cli("list", "--tag", "sentences")[1]


def test_show_gives_card_defaults_and_tables(cli):
    out = cli("show", "zero_tprune")[1]
    assert "CVPR 2024" in out
    assert "variance_range" in out
    assert "DeiT-S main" in out


def test_cost_needs_no_weights(cli):
    out = cli("cost", "zero_tprune", "deit_small", "0.9,0.8,0.7")[1]
    assert "4.599 G" in out
    assert "99" in out
    assert "saved" in cli("cost", "tome", "vit_base_patch16_224", "8removed")[1]


def test_apply_to_an_image(cli, picture, tmp_path):
    code, out, _ = cli("apply", "zero_tprune", str(picture), "0.7", "--out", str(tmp_path / "kept.png"))
    assert code == 0
    assert "MACs" in out
    with Image.open(tmp_path / "kept.png") as kept:
        assert kept.size == (4 * 224 + 3 * 8, 224)


def test_apply_to_a_text(cli, article, tmp_path):
    code, out, _ = cli("apply", "lexrank", str(article), "2count", "--out", str(tmp_path / "summary.txt"))
    assert code == 0
    assert "2 of 4 sentences kept" in out
    assert len((tmp_path / "summary.txt").read_text().splitlines()) == 2


def test_run_one_row(cli, tmp_path):
    arguments = ("run", "lexrank", "T1", "d4s1", "--config", f"results={tmp_path}")
    code, out, _ = cli(*arguments)
    assert code == 0
    assert "measured" in out
    record = next((tmp_path / "records").glob("*.json"))
    made = record.stat().st_mtime_ns
    assert cli(*arguments)[1] == out
    assert record.stat().st_mtime_ns == made, "a record at hand is read, not made again"


MISTAKES = [
    (("show", "zero_prune"), "did you mean"),
    (("list", "--tag", "nothing"), "no method matches"),
    (("cost", "zero_tprune", "deit_huge", "0.5"), "neither in configs/models.yaml nor a timm model"),
    (("cost", "zero_tprune", "deit_small", "1.5"), "out of range"),
    (("cost", "zero_tprune", "deit_small", "much"), "cannot read the budget"),
    (("cost", "zero_tprune", "deit_small", "0.5", "--set", "layer=3"), "no option 'layer'"),
    (("cost", "zero_tprune", "deit_small", "0.5", "--set", "layers"), "key=value"),
    (("cost", "lexrank", "deit_small", "0.5"), "ranks sentences"),
    (("apply", "zero_tprune", "missing.png", "0.5"), "missing.png does not exist"),
    (("apply", "lexrank", "EMPTY", "2count"), "holds no sentence"),
    (("apply", "zero_tprune", "EMPTY", "0.5"), "cannot be decoded"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--model", "deit_tiny"), "no weights for 'deit_tiny'"),
    (
        ("apply", "zero_tprune", "PICTURE", "0.5", "--model", "deit_tiny", "--weights", "EMPTY"),
        "does not hold the weights",
    ),
    (("run", "zero_tprune", "DeiT-S main", "nobody"), "no reported row 'nobody'"),
    (("run", "nobody", "x", "y"), "no paper 'nobody'"),
    (("train", "nobody"), "nobody"),
    (("search", "tome", "deit_small", "3.0"), "no search space"),
    (("nonsense",), "nonsense"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_mistakes_are_one_line(cli, arguments, message, tmp_path, picture):
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    code, _, err = cli(*({"EMPTY": str(empty), "PICTURE": str(picture)}.get(a, a) for a in arguments))
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "prunelab", "show", "zero_prune"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no method 'zero_prune'")
