"""The survey: its pairs are run, and its axes filter the list."""

from __future__ import annotations

import pytest

from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import listing, papers
from prunelab.methods.pruning_survey.tables import CONTRASTS, contrasts


def test_versions_compare_seven_and_eight_pairs():
    assert {key: value["value"] for key, value in contrasts().items()} == {
        "abstract/v1/contrast settings": 7, "abstract/v2/contrast settings": 8,
    }  # fmt: skip
    assert sum(pair.named for pair in CONTRASTS) == 4 and len({pair.name for pair in CONTRASTS}) == 8


def test_both_sides_of_a_pair_are_run():
    shown = [entry for board in papers.load("pruning_survey").boards for entry in board.entries]
    for pair in CONTRASTS:
        if pair.name not in ("weights", "retraining"):  # need a training from scratch
            assert {pair.first, pair.second} <= set(shown), pair.name


def test_axes_filter_the_list():
    for axis, values in papers.AXES.items():
        for value in values:
            if any(value in papers.load(slug).taxonomy[axis] for slug in papers.slugs()):
                try:
                    found = listing.methods(tag=f"{axis}={value}")
                except PrunelabError:  # only papers without a method have it
                    continue
                assert all(value in papers.load(entry.slug).taxonomy[axis] for entry in found)
    assert {entry.name for entry in listing.methods(tag="target=training_tokens")} >= {"rho1", "sstoken", "q_tuning"}
    with pytest.raises(PrunelabError, match="no method matches the tag"):
        listing.methods(tag="target=nothing")
