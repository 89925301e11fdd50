"""The shipped models are what their logs say; detector and segmenter tell good choices of tokens from bad ones."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from prunelab.common import testbeds
from prunelab.common.apply import apply
from prunelab.common.data import code, detection, questions, segmentation
from prunelab.common.metrics.average_precision import average_precision, detections
from prunelab.common.testbeds.digits_qa import answers
from prunelab.common.training.recipe import read_extra, read_log
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.dtop.method import DToP
from prunelab.methods.fastv.method import FastV
from prunelab.methods.focus_detr.method import FocusDETR
from prunelab.methods.m3.method import M3
from prunelab.methods.random_drop.method import RandomDrop


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def detector():
    return testbeds.load("digits_detection")[0]


@pytest.fixture(scope="module")
def segmenter():
    return testbeds.load("digits_segmentation")[0]


def precision(model, scenes: int = 60) -> float:
    x, objects = detection.scenes("test", scenes, 1000)
    with torch.inference_mode():
        parts = [slice(i, i + 20) for i in range(0, scenes, 20)]
        found = [d for part in parts for d in detections(model(x[part]), objects[part], range(10))]
    return average_precision(objects, found)["AP"]


def miou(model, scenes: int = 150) -> float:
    x, labels = segmentation.scenes("test", scenes, 1000)
    with torch.inference_mode():
        maps = torch.cat([model(part).argmax(1) for part in x.split(50)])
    return 100 * float(segmentation.iou(segmentation.confusion(maps, labels, segmentation.CLASSES)).nanmean())


def test_detector_is_as_good_as_its_log(detector):
    assert precision(detector) == pytest.approx(read_log(testbeds.SHIPPED / "digits_detection")["test"]["ap"], abs=8)


def test_detection_tells_foreground_from_chance(detector):
    dense = precision(detector)
    with apply(FocusDETR(), detector, 0.3) as handle:
        focus, cost = precision(detector), handle.macs()
    with apply(RandomDrop(tuple(range(6)), "input", "bypass"), detector, 0.5) as handle:
        chance, more = precision(detector), handle.macs()
    assert more > cost, "the control may do more work"
    assert dense - chance > 10 and focus - chance > 10 and dense - focus < 8


def test_segmenter_is_as_good_as_its_log(segmenter):
    logged = 100 * read_log(testbeds.SHIPPED / "digits_segmentation")["test"]["miou"]
    assert miou(segmenter) == pytest.approx(logged, abs=6)


def test_segmentation_loses_by_leaving_at_random(segmenter):
    dense = miou(segmenter)
    with apply(DToP(0.98), segmenter, 1.0):
        sure = miou(segmenter)
    with apply(DToP(0.95), segmenter, 0.28):  # about the cost of the random exit below
        few = miou(segmenter)
    with apply(RandomDrop((5, 7), rest="halt"), segmenter, 0.3):
        chance = miou(segmenter)
    assert dense - sure < 2 and dense - few < 5 and dense - chance > 15


# -- the language models of source code ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out():
    """The held-out code in the shipped tokens, without the minute that the training text takes."""
    tokenizer = Tokenizer.from_str(read_extra(testbeds.SHIPPED / "code_lm", "tokenizer.json"))
    stream = code.encode(code.files("held_out"), tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "tokenizer", lambda vocabulary: tokenizer)
        patch.setattr(code, "stream", lambda split, vocabulary: stream)
        yield


@pytest.mark.parametrize("name", ["code_lm", "code_moe", "code_draft", "code_lm_tuned"])
def test_language_models_are_as_good_as_their_logs(name, held_out):
    model, log = testbeds.load(name)
    recipe = {key: tuple(value) if isinstance(value, list) else value for key, value in log["recipe"].items()}
    with torch.inference_mode():
        found = testbeds.get(name)(**recipe).evaluate(model, quick=True)
    last = log["curve"][-1]
    assert found["perplexity"] == pytest.approx(last["perplexity"], rel=0.01)
    if "recall" in found:
        assert found["recall"] == pytest.approx(last["recall"], abs=0.05) and last["recall"] > 0.75
    if "bigram_perplexity" in log["test"]:
        assert log["test"]["perplexity"] < 0.6 * log["test"]["bigram_perplexity"]


def test_heads_guess_ahead_as_well_as_their_log(held_out):
    heads, log = testbeds.load("code_medusa")
    assert sum(value.numel() for value in heads.state_dict().values()) < 70_000
    with torch.inference_mode():
        found = testbeds.get("code_medusa")(start=log["recipe"]["start"]).evaluate(heads, quick=True)
    last = log["curve"][-1]
    assert {name: last[name] for name in found} == pytest.approx(found, abs=0.01)
    assert found["head_1"] > found["head_2"] > found["head_4"] > 0.04


# -- the models that answer questions --------------------------------------------------------------------------------


def accuracy(model, name: str, count: int = 150) -> float:
    """Percent right on the samples that methods are measured on."""
    batch = questions.draw(testbeds.get(name).kind, "test", count, questions.SEED)
    with torch.inference_mode():
        given = answers(model, batch)
    return 100 * sum(a == sample.answer for a, sample in zip(given, batch, strict=True)) / count


@pytest.mark.parametrize("name", ["digits_qa", "digits_video_qa", "digits_film_qa"])
def test_answers_are_as_good_as_their_logs_and_are_lost_by_chance(name):
    model, log = testbeds.load(name)
    dense = accuracy(model, name)
    assert dense == pytest.approx(100 * log["test"]["accuracy"], abs=8)
    assert log["test"]["accuracy"] >= 0.85 and log["test"]["blind"] < 0.3
    with apply(RandomDrop((0,), "packed"), model, 0.25):
        chance = accuracy(model, name)
    assert dense - chance > 10


def test_moments_are_kept_by_what_they_show_and_lost_by_chance():
    model, _ = testbeds.load("digits_film_qa")
    with apply(DivPrune(), model, 0.25):
        found = accuracy(model, "digits_film_qa", 60)
    with apply(RandomDrop((0,), "packed"), model, 0.25):
        chance = accuracy(model, "digits_film_qa", 60)
    assert found - chance > 20


def test_the_question_says_which_tokens_matter():
    model, _ = testbeds.load("digits_qa")
    dense = accuracy(model, "digits_qa")
    with apply(FastV(3), model, 0.25):
        guided = accuracy(model, "digits_qa")
    with apply(RandomDrop((3,), "input"), model, 0.25):
        chance = accuracy(model, "digits_qa")
    assert dense - chance > 10 and guided - chance > 8


def test_the_answers_tokenizer_is_the_vocabulary():
    for name in ("digits_qa", "digits_video_qa", "digits_film_qa"):
        shipped = Tokenizer.from_str(read_extra(testbeds.SHIPPED / name, "tokenizer.json"))
        assert shipped.get_vocab() == questions.IDS


# -- fine-tuned with a token pruner at work ----------------------------------------------------------------------------


def test_scales_that_were_trained_are_worth_more_than_those_that_were_not():
    tuned, log = testbeds.load("digits_qa_m3")
    before, asked = testbeds.load("digits_qa")[0], questions.draw("picture", "test", 100, 1)
    with torch.inference_mode():
        for scale, gain in (("9count", 0.2), ("1count", 0.1)):
            found = []
            for model in (before, tuned):
                with apply(M3(), model, scale):
                    found.append(sum(a == s.answer for a, s in zip(answers(model, asked), asked, strict=True)) / 100)
            assert found[1] > found[0] + gain
            assert found[1] == pytest.approx(log["test"][f"accuracy_{scale}"], abs=0.12)


def test_modules_that_were_trained_leave_what_questions_need():
    tuned, log = testbeds.load("digits_qa_atp")
    method, asked = testbeds.get("digits_qa_atp")().pruner, questions.draw("picture", "test", 100, 1)
    with torch.inference_mode(), apply(method, tuned, 0.25) as handle:
        right = sum(a == s.answer for a, s in zip(answers(tuned, asked), asked, strict=True)) / 100
        seen = [through for through, _ in handle.report().tokens]
    assert right == pytest.approx(log["test"]["accuracy_0.25"], abs=0.1) and seen[-1] < 0.35 * seen[0]
