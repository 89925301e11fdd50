"""The command line: what it shows, and that every mistake is one line with exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from prunelab.common.cli import main
from prunelab.common.cli.methods import _filled
from prunelab.common.core import index
from prunelab.common.data import images
from prunelab.common.experiments import listing, papers, schema

ROOT = Path(__file__).resolve().parents[3]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def no_assets(monkeypatch):
    """What is shown here does not depend on a folder of the user's."""
    monkeypatch.delenv("PRUNELAB_ASSETS", raising=False)


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


def test_a_line_a_method_in_80_columns(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("list")[1].splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(index.entries())
    assert max(map(len, lines)) == 80 and all(
        entry.role in line for entry, line in zip(index.entries().values(), lines[1:])
    )


def test_methods_without_a_paper_yet_are_listed(cli, monkeypatch):
    monkeypatch.setattr(listing, "paper", lambda slug: None if slug == "tome" else papers.load(slug))
    assert "no paper.yaml yet" in cli("list", "tome")[1]
    assert "proportional" in cli("show", "tome")[1]


def test_plan_counts_runs_and_what_is_lacking(cli, tmp_path):
    arguments = ("plan", "--config", f"results={tmp_path}", "--config", "papers=lexrank,wanda")
    out = cli(*arguments)[1]
    assert re.search(r"in all +\d+ +0 *\n", out) and "snakemake paper_tables" in out
    needed = re.search(r"(\d+) of (\d+) reported numbers", out)
    assert needed and 0 < int(needed[1]) < int(needed[2])
    told = json.loads(cli("plan", "--json", "--papers", "lexrank,wanda", "--config", f"results={tmp_path}")[1])
    assert told["numbers"] == int(needed[2]) == told["executable"] + sum(told["reasons"].values())
    assert told["executable"] > 0 and told["reasons"].keys() <= schema.REASONS.keys() and told["reasons"]["licence"]
    outlook = ("plan", "--papers", "wanda,lexrank", "--config", f"results={tmp_path}")
    shown = cli(*outlook, "--gpu", "h200")[1]
    assert re.search(r"in all +\d+ +\d+", shown) and "foretold for H200" in shown and "snakemake paper_tables" in shown
    whole, part = (
        json.loads(cli(*outlook, *more, "--json")[1])["total"] for more in (("--gpu", "a100"), ("--fit", "30m"))
    )
    assert 0 < part["gpu_hours"] <= 0.51 < whole["gpu_hours"] and part["numbers"] < whole["numbers"]
    assert "write it as 48h" in cli(*outlook, "--fit", "soon")[2]
    assert cli(*outlook, "--fit", "30m", "--all")[1].count("--column") == part["numbers"], "each is named"
    cli("run", "lexrank", "T1", "d4s1", "--config", f"results={tmp_path}")
    assert re.search(r"function +any +\d+ +1 *\n", cli(*arguments)[1])
    shown, everything = (
        cli("plan", "--config", "papers=quota,holitom,divprune", *more)[1] for more in ((), ("--all",))
    )
    assert "further reasons; --all" in shown and len(everything) > len(shown) and "…" not in everything


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder that is not the one with the user's files."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def test_apply_to_an_image_writes_into_the_working_folder(cli, picture, folder, tmp_path):
    beside = sorted(p.name for p in tmp_path.iterdir())
    code, out, _ = cli("apply", "zero_tprune", str(picture), "0.7", "--set", "layers=3")
    assert code == 0 and "MACs" in out and "is a toy of ours" in out
    assert [p.name for p in folder.iterdir()] == ["photo.zero_tprune.svg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == beside, "nothing goes beside the user's file"
    drawn = ElementTree.parse(folder / "photo.zero_tprune.svg").getroot()
    assert len(drawn.findall(f"{SVG}image")) == 2 and drawn.findall(f"{SVG}rect[@class='gone']")
    words = [line.text for line in drawn.findall(f"{SVG}text")]
    assert "layer 3: 70 of 100" in words and "a toy of ours: of photos it knows nothing" in " ".join(words)


def test_apply_reads_a_photo_with_a_model_that_knows_photos(cli, picture, folder, tmp_path):
    """A checkpoint of timm in the hub's cache goes before our toys; its weights are at random here."""
    cached = tmp_path / "hub" / "models--timm--tiny_vit" / "snapshots" / "0"
    cached.mkdir(parents=True)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=1000)
    save_file(model.state_dict(), cached / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 1000, "model_args": {"img_size": 32, "depth": 4}}
    (cached / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 32, 32]}}))
    arguments = ("apply", "tome", str(picture), "1removed", "--config", f"hub={tmp_path / 'hub'}")
    code, out, err = cli(*arguments)
    assert code == 0, err
    assert out.startswith("timm/tiny_vit: ") and "toy" not in out and "class " not in out.splitlines()[0]
    assert cli(*arguments, "--model", "timm/tiny_vit")[1] == out


@pytest.mark.parametrize("mode", ["I;16", "L", "RGBA", "P", "1"])
def test_any_picture_is_read(cli, folder, tmp_path, mode):
    path = tmp_path / "picture.png"
    ramp = np.tile(np.linspace(0, 65535, 64), (64, 1)).astype(np.uint16)
    image = Image.fromarray(ramp) if mode == "I;16" else Image.fromarray((ramp >> 8).astype(np.uint8)).convert(mode)
    image.save(path)
    assert cli("apply", "random_drop", str(path), "0.5")[0] == 0
    with Image.open(path) as stored:
        read = np.asarray(images.rgb(stored))[0, :, 0].astype(int)
    assert read[0] == 0 and read[-1] == 255
    assert mode == "1" or abs(np.diff(read)).max() <= 9, "16 bits are scaled, not cut off"


def test_apply_to_a_text(cli, article, tmp_path):
    code, out, _ = cli("apply", "lexrank", str(article), "2count", "--out", str(tmp_path / "summary.txt"))
    assert code == 0
    assert "2 of 4 sentences kept" in out and "score the same" not in out
    assert len((tmp_path / "summary.txt").read_text().splitlines()) == 2


def test_ties_are_told(cli, tmp_path):
    path = tmp_path / "alike.txt"
    path.write_text("Tokens cost time here. Tokens cost time there. Tokens cost time now.")
    assert "score the same" in cli("apply", "lexrank", str(path), "1count", "--set", "without_background=uniform")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tova", "0.5"), "cache  "),
        (("lazyllm", "0.5"), "MACs  "),
        (("token_recycling", "1.0"), "tokens a step; the text is the same"),
        (("rasd", "1.0"), "tokens a step; the text is the same"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_a_language_model_reads_a_text(cli, article, folder, arguments, says):
    method, budget = arguments
    code, out, err = cli("apply", method, str(article), budget, "--out", str(folder))
    assert code == 0, err
    assert says in out and "code_lm, unpruned" in out
    assert (folder / f"article.{method}.txt").read_text().strip()


def test_run_one_row(cli, tmp_path):
    arguments = ("run", "lexrank", "T1", "d4s1", "--config", f"results={tmp_path}")
    code, out, _ = cli(*arguments)
    assert code == 0
    assert "measured" in out
    record = next((tmp_path / "records").glob("*.json"))
    made = record.stat().st_mtime_ns
    assert cli(*arguments)[1] == out
    assert record.stat().st_mtime_ns == made, "a record at hand is read, not made again"
    lacking = cli("run", "fastv", "T1", "LLaVA-1.5-7B baseline", "--column", "MMMU")[1]
    assert "not run at testbed" in lacking and "nothing" not in lacking


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
    (("apply", "lexrank", "PICTURE", "2count"), "give a text file, not the picture"),
    (("apply", "lexrank", "EMPTY", "2:4"), "holds no sentence"),
    (("apply", "zero_tprune", "EMPTY", "0.5"), "holds no text"),
    (("apply", "zero_tprune", "FOLDER", "0.5"), "is no file"),
    (("apply", "zero_tprune", "BROKEN", "0.5"), "cannot be decoded"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--set", "layers=a"), "layers must be whole numbers such as 2,5"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--set", "layers=2,2"), "layer 2 behind layer 2"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--set", "layers=99"), "layers 0 to 11"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--set", "layer=3"), "did you mean layers"),
    (("apply", "zero_tprune", "PICTURE", "64"), "64count"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--out", "PICTURE"), "itself; give another"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--out", "x.png"), "give --out x.svg"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--model", "no/such"), "no/such does not exist"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--model", "digits_segmentation"), "does not classify images"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--model", "code_lm"), "reads no images"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--weights", "none.safetensors"), "none.safetensors does not exist"),
    (("apply", "dtop", "PICTURE", "0.5"), "no model at hand can be pruned by dtop"),
    (("apply", "zero_tprune", "TEXT", "0.5"), "MixtralForCausalLM); name another with --model"),
    (("apply", "snapkv", "PICTURE", "0.5"), "works while a language model writes"),
    (("apply", "snapkv", "TEXT", "0.5", "--model", "digits_vit"), "reads no text"),
    (("apply", "snapkv", "TEXT", "0.5", "--model", "nobody"), "no language model 'nobody'"),
    (("apply", "wanda", "TEXT", "0.5"), 'prunelab.prune("wanda"'),
    (("apply", "awrs", "TEXT", "0.5"), "methods/awrs/README.md"),
    (("list", "--role", "token"), "there are cache_pruner"),
    (("plan", "--config", "scale=huge"), "no scale 'huge'"),
    (("replay", "EMPTY"), "is no run record; give a JSON file of results/records"),
    (("apply", "zero_tprune", "PICTURE", "0.5", "--model", "deit_tiny"), "no weights for 'deit_tiny'"),
    (
        ("apply", "zero_tprune", "PICTURE", "0.5", "--model", "deit_tiny", "--weights", "EMPTY"),
        "does not hold the weights",
    ),
    (("run", "zero_tprune", "DeiT-S main", "nobody"), "no reported row 'nobody'"),
    (("run", "nobody", "x", "y"), "no paper 'nobody'"),
    (("train", "nobody"), "nobody"),
    (("rehearse", "--papers", "hiprun"), "did you mean hiprune"),
    (("rehearse", "--sample", "0"), "greater than or equal to 1"),
    (("search", "tome", "deit_small", "3.0"), "no search space"),
    (("nonsense",), "nonsense"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_mistakes_are_one_line(cli, arguments, message, tmp_path, picture, article):
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:60])
    files = {"EMPTY": empty, "PICTURE": picture, "TEXT": article, "FOLDER": tmp_path, "BROKEN": tmp_path / "broken.png"}
    code, _, err = cli(*(str(files.get(a, a)) for a in arguments))
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


EARLY = [
    ("apply", "zero_tprune", "missing.png", "0.5"),
    ("apply", "zero_tprunes", "missing.png", "0.5"),
    ("apply", "zero_tprune", "README.md", "0.5", "--set", "layer=3"),
    ("apply", "lexrank", "README.md", "2pages"),
    ("cost", "zero_tprune", "deit_small", "much"),
    ("cost", "zero_tprunes", "deit_small", "0.5"),
    ("replay", "missing.json"),
    ("run", "lexrank", "T1", "nobody"),
]


def test_what_can_be_told_early_is_told_before_libraries_load():
    code = f"""
import sys
from prunelab.common.cli import main
from prunelab.common.cli.methods import _filled
for arguments in {EARLY!r}:
    sys.argv = ["prunelab", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 2, arguments
    assert "torch" not in sys.modules, arguments
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(EARLY)


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "prunelab", "show", "zero_prune"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no method 'zero_prune'")


def test_docstrings_are_filled_anew_and_lose_nothing():
    entry = index.entries()["fastv"]
    shown = _filled(entry.doc, 60)
    assert max(map(len, shown.splitlines())) <= 60 and shown.split() == entry.doc.split()
    assert "\nlayer : int\n    K, the first layer" in shown
