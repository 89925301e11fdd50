"""Faithfulness of attributions as a run: contexts, controls, and prompts from a file."""

from __future__ import annotations

import pytest

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import texts
from prunelab.common.measures.bench import Bench
from prunelab.common.tasks import get

IDS = {"model": {"testbed": "code_lm"}, "data": {"loader": "lines", "setting": "reagent", "file": "prompts.txt"}}
PROMPTS = "import numpy as\n\nfor index in range(len(values)):\ndef forward(self, x):\nclass Error(Exception):\n"


def run(folder, method, options=None, **settings):
    (folder / "prompts.txt").write_text(PROMPTS)
    task = get("attribute")
    bench = Bench("testbed", IDS, task.read(settings), {"reagent": str(folder)}, method, options or {})
    return task().measure(bench)


@pytest.mark.parametrize("method", ["reagent", "integrated_gradients", "attention_importance"])
def test_prompts_of_a_file_are_explained(tmp_path, method):
    found = run(tmp_path, method, new=2, draws=8)
    assert found["soft_ns"]["n"] == 4 == found["soft_nc"]["n"] and found == run(tmp_path, method, new=2, draws=8)
    assert found["passes"]["value"] >= 1


def test_the_control_of_the_control_is_about_zero(tmp_path):
    found = run(tmp_path, "random_importance", {"seed": 3}, new=4, draws=64)
    assert abs(found["soft_nc"]["value"]) < 1 and found["passes"]["value"] == 0
    assert run(tmp_path, "integrated_gradients", {"steps": 7}, draws=8)["passes"]["value"] == 7


def test_what_cannot_be_explained_is_refused(tmp_path):
    with pytest.raises(PrunelabError, match="name one under"):
        run(tmp_path, None)
    with pytest.raises(PrunelabError, match="one prompt a line"):
        texts.load(IDS["data"], {"reagent": str(tmp_path / "elsewhere")})
    with pytest.raises(PrunelabError, match="to measure on"):
        texts.load(IDS["data"], {"reagent": str(tmp_path)}, "train")
