"""The wheel, built from the sdist and installed in an environment of its own, works from a stranger's folder that has a
`common` and a `methods` itself. Third-party libraries are those of the environment that runs the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("prunelab", "common", "methods", "paper_tables", "configs")
FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "CITATION.cff")
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
ARTICLE = """Pruning removes the tokens that a model does not need. A model reads every token in every layer.
Removing tokens makes every layer of the model cheaper. The first steam engines pumped water out of mines.
Which tokens a model needs depends on the picture that it reads."""


CLEAN = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def build(what: str, source: Path, out: Path) -> Path:
    """An sdist or a wheel, by the build backend that pyproject.toml names."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(out)], cwd=source, env=CLEAN, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__", "generated")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    return build("build_sdist", source, out)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("build_wheel", next(folder.iterdir()), sdist.parent)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` of an environment that holds the wheel; libraries come from ours, this project's checkout does not."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--disable-pip-version-check", str(wheel)], check=True, env=CLEAN)
    ours = Path(sysconfig.get_paths()["purelib"])
    mine = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (mine / "libraries.pth").write_text(f"{ours}\n")
    return python.parent


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A project of somebody else's."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("common", "methods", "paper_tables", "configs"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('this package is not yours')\n")
    (folder / "article.txt").write_text(ARTICLE)
    return folder


def test_the_sdist_holds_every_file_once_and_real(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = [member.name.partition("/")[2] for member in members if not member.isdir()]
    assert len(names) == len(set(names))
    assert not any(member.issym() or member.islnk() for member in members)
    tops = {name.partition("/")[0] for name in names if "/" in name}
    assert tops == {"prunelab", "prunelab.egg-info"}
    assert {"README.md", "LICENSE", "NOTICE", "pyproject.toml"} <= set(names)


def test_the_wheel_holds_what_the_checkout_does_and_puts_one_name_into_site_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"prunelab"}
    data = {"*/*.yaml", "*/*.csv", "*/*.md", "*/*.py"}
    wanted = {f"prunelab/methods/{p.relative_to(ROOT / 'methods')}" for d in data for p in (ROOT / "methods").glob(d)}
    wanted |= {f"prunelab/common/{p.relative_to(ROOT / 'common')}" for p in (ROOT / "common").rglob("*.py")}
    weights = ROOT / "common" / "testbeds" / "weights"
    wanted |= {f"prunelab/common/testbeds/weights/{p.relative_to(weights)}" for p in weights.glob("*/*")}
    wanted |= {f"prunelab/configs/{p.name}" for p in (ROOT / "configs").glob("*.yaml")}
    wanted |= {f"prunelab/paper_tables/{p.name}" for p in (ROOT / "paper_tables").iterdir() if p.is_file()}
    assert sorted(wanted - names) == []
    strangers = [n for n in names if "__pycache__" in n or "/tests/" in n or "generated" in n]
    assert not strangers


COMMANDS = {
    "list": (["prunelab", "list", "fast*"], "fastervlm"),
    "cost": (["prunelab", "cost", "zero_tprune", "deit_small", "0.9,0.8,0.7"], "4.599 G"),
    "run": (["prunelab", "run", "lexrank", "T1", "d4s1", "--config", "results=OUT"], "measured"),
    "apply": (["prunelab", "apply", "lexrank", "article.txt", "2count"], "2 of 5 sentences kept"),
    "module": (["python", "-m", "prunelab", "show", "lexrank"], "Erkan"),
}


@pytest.mark.parametrize(("command", "says"), COMMANDS.values(), ids=COMMANDS)
def test_commands_run_from_a_strangers_folder(installed, elsewhere, tmp_path, command, says):
    program, *arguments = [str(tmp_path) if part == "OUT" else part.replace("OUT", str(tmp_path)) for part in command]
    done = subprocess.run(
        [str(installed / program), *arguments], cwd=elsewhere, env=CLEAN, capture_output=True, text=True
    )
    assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr


def test_the_facade_is_the_installed_one(installed, elsewhere):
    code = (
        "import prunelab, sys; print(prunelab.__file__); assert 'fastv' in prunelab.list_methods();"
        "print(prunelab.summarise('lexrank', open('article.txt').read(), '1count', centrality='continuous'))"
    )
    done = subprocess.run(
        [str(installed / "python"), "-c", code], cwd=elsewhere, env=CLEAN, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(installed.parent) in done.stdout.splitlines()[0] and "model" in done.stdout
