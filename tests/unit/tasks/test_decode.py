"""Decoding with drafts, as the tables run it: a draft model that a pruner cuts first."""

from __future__ import annotations

from typing import Any

import pytest

from prunelab.common import tasks
from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import planning, runner, schema
from prunelab.common.experiments.run import Run

CUT = {"method": "shortgpt", "budget": "0.5"}


def run(**settings: Any) -> Run:
    config = lookup.settings({"papers": "token_recycling"})
    made = planning.resolve(
        "decode", "testbed", config, schema.Configuration(options={"decoding": "assistant"}),
        model="llama_code", data="source_code",
        settings={"new": 12, "prompt": 32, "samples": 2, "warmup": 0} | settings,
    )  # fmt: skip
    assert isinstance(made, Run)
    return made


def test_a_model_cut_in_depth_drafts_for_itself() -> None:
    whole, cut = (runner.measure(run(draft="llama_code", **more), lookup.settings()) for more in ({}, {"cut": CUT}))
    assert whole["identical"]["value"] == cut["identical"]["value"] == 100.0
    assert 1 <= cut["mat"]["value"] < whole["mat"]["value"], "half of its layers guess worse than all of them"


def test_who_cuts_is_in_the_address_of_such_runs_alone() -> None:
    plain, cut = run(draft="llama_code"), run(draft="llama_code", cut=CUT)
    assert {"methods/shortgpt/method.py", "common/weights/adapters/decoder.py"} <= set(cut.entries)
    assert not any("weights" in entry or "shortgpt" in entry for entry in plain.entries)
    assert plain.identity != cut.identity


def test_what_cannot_cut_is_refused() -> None:
    with pytest.raises(PrunelabError, match="fastv is a token_pruner, and a weight_pruner is wanted"):
        tasks.get("decode").read({"cut": {"method": "fastv"}})
    with pytest.raises(PrunelabError, match="no draft model to cut; name one of the catalogue"):
        runner.measure(run(cut=CUT), lookup.settings())
