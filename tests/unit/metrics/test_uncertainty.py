"""Several seeds of one run as one: means that still pair up sample by sample."""

import pytest

from prunelab.common import tasks
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.metrics import uncertainty


def metric(samples):
    return uncertainty.mean(samples)


def test_means_over_seeds_are_of_samples_first():
    merged = uncertainty.over_seeds([{"loss": metric([1.0, 3.0])}, {"loss": metric([3.0, 5.0])}])["loss"]
    assert (merged["value"], merged["n"], merged["samples"]) == (3.0, 2, [2.0, 4.0])
    assert merged["stderr"] == metric([2.0, 4.0])["stderr"] and merged["protocol"] == "mean over 2 seeds"
    difference, interval = uncertainty.paired_difference(merged, metric([1.0, 3.0]))
    assert (difference, interval) == (1.0, 0.0)


def test_answers_right_or_wrong_become_shares_of_seeds():
    right, wrong = {"value": 100.0, "n": 2, "bits": f"{0b111:x}"}, {"value": 50.0, "n": 2, "bits": f"{0b110:x}"}
    merged = uncertainty.over_seeds([{"top1": right}, {"top1": wrong}])["top1"]
    assert merged["value"] == 75.0 and merged["samples"] == [100.0, 50.0] and "bits" not in merged


def test_what_has_no_number_or_no_samples_stays_plain():
    merged = uncertainty.over_seeds(
        [{"a": {"text": "x"}, "b": {"value": 1.0}}, {"a": {"text": "y"}, "b": {"value": 2.0}}]
    )
    assert merged["a"] == {"text": "x"} and merged["b"] == {"value": 1.5, "protocol": "mean over 2 seeds"}


def test_a_run_of_several_seeds_is_measured_under_each(monkeypatch):
    seen = []

    class Fake(tasks.get("perplexity")):
        def measure(self, bench):
            seen.append(bench.seed)
            return {"loss": {"value": float(bench.seed)}}

    monkeypatch.setattr(tasks, "get", lambda name: Fake)
    run = Run("perplexity", "testbed", settings={"length": 8, "seed": 4, "seeds": 3})
    assert runner.measure(run, {})["loss"]["value"] == 5.0 and seen == [4, 5, 6]
    with pytest.raises(PrunelabError, match="seeds"):
        runner.measure(Run("perplexity", "testbed", settings={"length": 8, "seeds": 0}), {})
