"""`python -m tests.versions [--sample] [VERSION ...]`: what hooks into transformers, tested on other releases of it.

Without versions on the oldest and the newest release within the bounds of pyproject.toml. Each gets an environment of
its own in `.venvs/`, which sees the packages of this one and has that release of transformers in front. `--sample` runs
the contracts of cache pruners and of composed methods alone, else also the adapters, drafts and the golden cases.
"""

from __future__ import annotations

import argparse
import os
import re
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ("tests/contract/test_cache_pruners.py", "tests/contract/test_composition.py")
WHOLE = (
    *SAMPLE,
    "tests/contract/test_expert_pruners.py",
    "tests/contract/test_token_pruners.py",
    "tests/contract/test_vlm_kin.py",
    "tests/contract/test_weight_pruners.py",
    "tests/unit/tokens",
    "tests/unit/kv_cache",
    "tests/unit/speculative",
    "tests/unit/weights",
    "tests/unit/methods",
    "tests/golden",
)


def bounds() -> tuple[str, str]:
    """The oldest release of transformers that pyproject.toml allows, and the newest that there is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = next(line for line in project["dependencies"] if line.startswith("transformers"))
    found = re.fullmatch(r"transformers>=(\d+)\.(\d+),<(\d+)\.(\d+)", wanted)
    if found is None:
        raise SystemExit(f"pyproject.toml has {wanted!r}; write transformers>=A.B,<C.D")
    told = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "transformers", "--disable-pip-version-check"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    released = [tuple(map(int, v.split("."))) for v in re.findall(r"\b(\d+\.\d+\.\d+)\b", told)]
    lowest, below = (int(found[1]), int(found[2])), (int(found[3]), int(found[4]))
    allowed = sorted(v for v in released if lowest <= v[:2] < below)
    oldest = min(v for v in allowed if v[:2] == allowed[0][:2])
    return ".".join(map(str, oldest)), ".".join(map(str, allowed[-1]))


def environment(release: str) -> Path:
    """The Python of an environment with that release of transformers in front of the packages of this one."""
    folder = ROOT / ".venvs" / f"transformers-{release}"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
        packages = next(folder.glob("lib/python*/site-packages"))
        (packages / "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([python, *install, f"transformers=={release}"], check=True)
        (folder / ".ready").touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--sample", action="store_true")
    arguments = parser.parse_args()
    failed = []
    for release in arguments.versions or dict.fromkeys(bounds()):
        python = environment(release)
        print(f"transformers {release}", flush=True)
        told = "import transformers as t; print(t.__version__)"
        used = subprocess.run([python, "-c", told], capture_output=True, text=True, check=True).stdout.strip()
        if used != release:
            raise SystemExit(f"the environment has transformers {used} instead; delete .venvs and try again")
        paths = SAMPLE if arguments.sample else WHOLE
        here = {**os.environ, "PYTHONPATH": str(ROOT)}
        if subprocess.run([python, "-m", "pytest", "-q", *paths], cwd=ROOT, env=here, check=False).returncode:
            failed.append(release)
    print(f"failed on transformers {', '.join(failed)}" if failed else "all releases pass")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
