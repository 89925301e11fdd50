"""The figure of what is left of the testbeds' scenes: its record, and the picture made of it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from prunelab.common import testbeds
from prunelab.common.catalogue import lookup
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import questions
from prunelab.common.drawing import sheets
from prunelab.common.experiments import papers, runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import looks
from prunelab.common.models import loading
from prunelab.common.tokens.inspection import Stage

SLUGS = ("holitom", "quota", "divprune", "fastv")


@pytest.fixture
def job(monkeypatch):
    """A figure's run by paper and data, with the testbeds' weights at random."""

    def load(identity, config):
        torch.manual_seed(0)
        return testbeds.get(identity["testbed"])().build().eval(), None

    monkeypatch.setattr(loading, "vision_language", load)

    def find(slug, data):
        task = next(f for f in papers.load(slug).figures if f.name == "looks" and f.data == data)
        chosen = papers.load(slug).configuration(task.configuration)
        testbed = {"digit_videos": "digits_video_qa", "digit_questions": "digits_qa"}[data]
        ids = {"model": {"testbed": testbed}, "data": lookup.dataset(data)["testbed"]}
        return Run("looks", "testbed", chosen.method, dict(chosen.options), task.budget, {"samples": 2}, ids, (), None)

    return find


@pytest.mark.parametrize(
    ("slug", "data"),
    [(s, "digit_videos") for s in SLUGS] + [("divprune", "digit_questions"), ("fastv", "digit_questions")],
)
def test_a_record_tells_and_draws_what_is_left(job, slug, data):
    run = job(slug, data)
    found = runner.measure(run, {})["looks"]
    assert found["value"] == len(found["items"]) == 2
    asked = questions.samples(run.ids["data"], 2)
    for item, sample in zip(found["items"], asked, strict=True):
        assert (item["question"], item["answer"]) == (sample.question, sample.word)
        assert item["dense"] in questions.WORDS and item["pruned"] in questions.WORDS
        frames = len(sample.shown)
        assert len(item["frames"]) == len(item["tokens"]) == frames
        assert bytes.fromhex("".join(item["frames"][0])) == bytes(sample.shown[0].flatten().tolist())
        assert sum(item["tokens"]) == questions.visual_tokens(sample.kind) - (sample.kind == "video"), (
            "but for a newline"
        )
        for stage in item["stages"]:
            assert len(stage["shares"]) == len(stage["tokens"]) == frames
            assert 0 < sum(stage["tokens"]) < sum(item["tokens"])
            assert len(bytes.fromhex(stage["shares"][0])) == item["grid"][0] * item["grid"][1]
    html = sheets.looks(found)
    first = found["items"][0]
    assert html.count("<image") == sum(len(i["frames"]) * (1 + len(i["stages"])) for i in found["items"])
    assert all(text in html for text in (first["question"], first["stages"][0]["name"]))
    assert files.digest(found) == files.digest(runner.measure(run, {})["looks"]), "the same each time"


def test_only_the_testbeds_scenes_are_shown(job):
    run = job("divprune", "digit_questions")
    with pytest.raises(PrunelabError, match="testbeds' scenes alone"):
        runner.measure(replace(run, ids=run.ids | {"data": {"loader": "imagenet"}}), {})
    with pytest.raises(PrunelabError, match="name one under"):
        runner.measure(replace(run, method=None), {})
    with pytest.raises(PrunelabError, match="wanda is a weight_pruner"):
        runner.measure(replace(run, method="wanda", options={}), {})


def test_shares_as_bytes_and_covers():
    stage = Stage("here", [1.0], [torch.tensor([[1.0, 1.0, 0.5], [0.0, 3.0, 0.0]])])
    (row,) = looks.shares(stage)
    assert list(bytes.fromhex(row)) == [100, 100, 50, 0, 255, 0]
    drawn = sheets.cover(sheets.Panel("", "", (2, 3), bytes.fromhex(row)), 0.0, 0.0, 30.0, 20.0)
    assert drawn.count("<rect") == 4, "whole cells stay clear"
    assert re.findall(r'opacity="([\d.]+)"', drawn) == ["0.45", "0.9", "0.46", "0.9"]
    assert sheets.amount(2.25) == "2.2"


def test_words_are_escaped():
    hostile = "<script>alert(1)</script>"
    item = {
        "question": hostile, "answer": "a", "dense": hostile, "pruned": "a", "frames": [["00ff00ff00ff"] * 2],
        "tokens": [4.0], "grid": [1, 2], "stages": [{"name": hostile, "tokens": [1.5], "shares": ["0064"]}],
    }  # fmt: skip
    html = sheets.looks({"items": [item]})
    assert "<script>" not in html and html.count("&lt;script&gt;") >= 3
