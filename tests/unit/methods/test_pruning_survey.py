"""The survey: its pairs are run, and its axes filter the list."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import listing, papers, schema
from prunelab.methods.pruning_survey import tables
from prunelab.methods.pruning_survey.tables import CONTRASTS, contrasts


def test_versions_compare_seven_and_eight_pairs():
    assert {key: value["value"] for key, value in contrasts().items()} == {
        "abstract/v1/contrast settings": 7, "abstract/v2/contrast settings": 8,
    }  # fmt: skip
    assert sum(pair.named for pair in CONTRASTS) == 4 and len({pair.name for pair in CONTRASTS}) == 8


def test_every_pair_stands_in_the_table():
    shown = [(contrast.name, *contrast.choices) for contrast in papers.load("pruning_survey").contrasts]
    assert sorted(shown) == sorted((pair.name, pair.first, pair.second) for pair in CONTRASTS)


def test_what_went_stays_away_while_a_network_trains(monkeypatch):
    monkeypatch.setattr(tables, "STEPS", 2)
    start = tables.network(0)
    masks = tables.smallest_gone(start, 0.05)
    for weight, mask in zip(tables.prunable(start), masks, strict=True):
        assert mask.sum() == max(1, round(0.05 * weight.numel()))
        assert weight.detach().abs()[mask].min() >= weight.detach().abs()[~mask].max()
    before = [weight.detach().clone() for weight in tables.prunable(start)]
    after = tables.prunable(tables.trained(start, masks, 0))
    for old, weight, mask in zip(before, after, masks, strict=True):
        assert not weight.detach()[~mask].any() and not torch.equal(weight.detach()[mask], old[mask])
    result = tables.trainings(seeds=1)
    assert {pair for c in papers.load("pruning_survey").contrasts if c.figure for pair in c.choices} <= set(result)
    assert result["pre-trained"] == result["fine-tuned"] and all("samples" in cell for cell in result.values())


def test_axes_filter_the_list():
    for axis, values in schema.AXES.items():
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
