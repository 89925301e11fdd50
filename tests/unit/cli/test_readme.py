"""The README's code runs as it stands, and its claims about the command line hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prunelab.common.cli import app

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


SAYS = {  # a word of each block -> what it prints
    "zero_tprune": ["21.7 % saved"],
    "wanda": ["MiB of", "tokens a step", "sparsity   50.00 %"],
    "lexrank": ["Every layer of a model reads", "Pruning removes tokens, so that", "False"],
    "supports": [
        "['fastervlm', 'fastv', 'fastvid']",
        "'wanda'",
        "layer = 2: a whole number",
        "True",
        "no cache that can be pruned",
    ],
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[-1][:30])
def test_blocks_run(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    (said,) = [words for word, words in SAYS.items() if f'"{word}"' in block or f"{word}(" in block]
    assert [words for words in said if words not in printed] == []


def test_all_uses_are_shown():
    assert len(BLOCKS) == len(SAYS)


def test_commands_exist():
    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    for command in re.findall(r"^python -m prunelab (\S+)", README, re.MULTILINE):
        assert command in known
    assert known - {"run-records", "search"} <= set(re.findall(r"prunelab (\S+)", README))


def test_no_private_paths_are_committed():
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    pattern = re.compile("|".join(["/" + "work/", "/" + "root/", "pypi" + r"\.org", "python" + "hosted"]))
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path.suffix not in {".npz", ".safetensors"}:
            assert not pattern.search(path.read_text(errors="ignore")), name
