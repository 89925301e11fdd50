"""Every stored case matches, and the runner notices when one does not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from tests.golden.__main__ import check, implemented, main

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("*/*.npz"))


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_case_matches(path):
    verdict = check(path)
    assert not verdict.problems, str(verdict)
    assert verdict.compared > 0


def test_every_golden_folder_says_where_it_comes_from():
    for slug in implemented():
        said = (HERE / slug / "README.md").read_text()
        assert re.search(r"MIT|Apache|BSD|CC BY|no licence", said), f"{slug}: name the licence, or that there is none"
        assert list((HERE / slug).glob("*.npz")), slug


def altered(tmp_path: Path, name: str, change) -> Path:
    with np.load(HERE / "tome" / f"{name}.npz") as stored:
        arrays = {n: stored[n].copy() for n in stored.files}
    change(arrays)
    folder = tmp_path / "tome"
    folder.mkdir(exist_ok=True)
    np.savez(folder / "case.npz", **arrays)
    return folder / "case.npz"


def test_a_wrong_value_is_noticed(tmp_path, capsys):
    path = altered(tmp_path, "bsm_cls_r13", lambda a: a["out_x"].__setitem__((0, 0, 0), 99.0))
    assert "out_x is off" in str(check(path))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.strip().endswith("1 cases, 0 match")


def test_a_wrong_index_is_noticed(tmp_path):
    path = altered(tmp_path, "bsm_cls_r13", lambda a: a["out_source"].__setitem__((0, 0, 0), 0))
    assert "differs in 1 places" in str(check(path))


def test_a_missing_output_and_a_wrong_shape_are_noticed(tmp_path):
    path = altered(tmp_path, "bsm_cls_r13", lambda a: a.update(out_unheard_of=np.zeros(3)))
    assert "out_unheard_of was not computed" in str(check(path))
    path = altered(tmp_path, "bsm_cls_r13", lambda a: a.update(out_x=a["out_x"][:, :-1]))
    assert "has shape" in str(check(path))


def test_cases_of_another_directory_run(tmp_path):
    altered(tmp_path, "bsm_nocls_r5", lambda a: None)
    assert main([str(tmp_path), "tome"]) == 0
    assert main([str(tmp_path), "nobody"]) == 1
    assert main([]) == 2


def test_the_full_collection_matches():
    folder = os.environ.get("PRUNELAB_GOLDEN")
    if not folder:
        pytest.skip("set PRUNELAB_GOLDEN to a folder of golden cases to compare with more of them")
    assert main([folder]) == 0
