"""Which layers leave: a model whose layers differ in a known way tells."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures import perplexity
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.tasks import get
from tests.contract.references import language_model

IDS = {"model": {"testbed": "tiny"}, "calibration": {"loader": "stories"}}
STRENGTH = (1.0, 0.01, 0.3, 0.05, 0.6)  # of what a layer adds to the stream


@pytest.fixture
def model(monkeypatch):
    made = language_model(num_hidden_layers=len(STRENGTH))
    with torch.no_grad():
        for layer, strength in zip(made.model.layers, STRENGTH, strict=True):
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.mul_(strength)
    monkeypatch.setattr(loading, "language", lambda identity, config: (made, None))
    monkeypatch.setattr(perplexity.texts, "windows", lambda *arguments: [torch.arange(3, 19) for _ in range(2)])


def run(method, budget, options=None):
    task = get("layers")
    return task().measure(Bench("paper", IDS, task.read({"length": 16}), {}, method, options or {}, budget))


def test_layers_are_told_in_the_models_order_and_in_that_in_which_they_leave(model):
    found = {name: metric["value"] for name, metric in run("shortgpt", "0.4", {"final_norm": False}).items()}
    assert found["layers"] == 3
    assert [found[f"layer {i} of 3"] for i in (1, 2, 3)] == [1, 2, 3]
    assert [found[f"rank {i}"] for i in (1, 2, 3)] == [1, 3, 2]


def test_methods_that_search_tell_no_ranks(model):
    found = run("laco", "0.6")
    assert not any(name.startswith("rank") for name in found) and found["layers"]["value"] >= 1


def test_methods_without_layers_are_refused(model):
    with pytest.raises(PrunelabError, match="takes out no layers"):
        run("wanda", "0.5")


def test_metrics_are_places():
    task = get("layers")
    assert task.metric("layer 2 of 9") and task.metric("rank 9")
    for name in ("layer 0 of 9", "rank", "layer 2"):
        with pytest.raises(PrunelabError, match="gives no metric"):
            task.metric(name)
