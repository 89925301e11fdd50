"""SHRP: routing to one head, counts and ties, what is left behind, BERT, bad input."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training.engine import train
from prunelab.common.training.recipe import Recipe
from prunelab.methods.shrp import tables
from prunelab.methods.shrp.method import SHRP, Router, most_used, neuron_size, top1
from tests.contract.references import language_model, token_ids

RECIPE = Recipe(steps=10, batch=4, rate=1e-2)


def test_one_head_is_chosen_and_all_probabilities_learn():
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]], requires_grad=True)
    gates = top1(logits)
    assert gates.tolist() == [[0, 1, 0], [1, 0, 0]], "of equal ones the first"
    (gates * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    soft = logits.detach().clone().requires_grad_()
    (soft.softmax(-1) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.allclose(logits.grad, soft.grad)


def test_use_decides_and_ties_go_to_the_first():
    assert most_used(torch.tensor([3, 5, 5, 1]), 1).tolist() == [False, True, False, False]
    assert most_used(torch.tensor([2, 5, 2, 1]), 2).tolist() == [True, True, False, False]


def test_the_router_counts_only_while_it_is_asked_to():
    router = Router(4, 2, "first")
    with torch.no_grad():
        router.linear.weight.zero_()
        router.linear.weight[1] = 1
        router.linear.bias.zero_()
    hidden = torch.ones(3, 5, 4)
    hidden[1] = -1
    router.train()
    router.route(hidden)
    assert router.counts.tolist() == [0, 0] and router.gates.tolist() == [[0, 1], [1, 0], [0, 1]]
    router.counting = True
    router.route(hidden)
    router.eval()
    router.route(hidden)
    assert router.counts.tolist() == [1, 2], "an evaluation is no training"
    router.kept.copy_(torch.tensor([False, True]))
    router.settled = True
    router.route(hidden)
    assert router.gates.tolist() == [[False, True]] * 3


def test_the_most_used_head_of_every_layer_and_a_small_mlp_stay():
    model = language_model("llama_mha")
    sizes = [m.down_proj.in_features for m in (layer.mlp for layer in model.model.layers)]
    plan = train(SHRP(expander=4, dense=(1,)), model, "1count", token_ids(16), RECIPE, progress=False)
    kept = {(t.unit, t.block): d.kept for t, d in plan.decisions() if not t.loose}
    assert kept == {("heads", 0): 1, ("heads", 2): 1, ("channels", 0): 4, ("channels", 2): 4}
    assert model.model.layers[1].mlp.down_proj.in_features == sizes[1]
    assert bool(torch.isfinite(model(token_ids(1)).logits).all())


def test_what_trained_last_is_what_is_left():
    seen = []

    class Watched(SHRP):
        def after_step(self, training):
            seen.append([router.gates for _, router in self.routers(training)])

        def finish(self, training):
            found = super().finish(training)
            heads = [found[t.name].mask for t, _ in self.routers(training)]
            assert all(bool((g == h).all()) for g, h in zip(seen[-1], heads, strict=True)), "settled before the end"
            assert all(int(g.sum(-1).max()) == 1 for g in seen[0]), "one head an input while routing"
            return found

    train(Watched(), language_model("llama_mha"), 0.5, token_ids(16), RECIPE, progress=False)
    assert len(seen) == 10


def test_it_trains_bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=61, max_position_embeddings=24, num_labels=2))
    batch = {"input_ids": token_ids(4), "labels": torch.tensor([0, 1, 0, 1])}
    plan = train(SHRP(expander=4), model, "1count", lambda number: batch, RECIPE, progress=False)
    assert plan.report.removed > 0 and model.bert.encoder.layer[0].attention.self.query.out_features == 8


def test_neurons_are_as_large_as_their_rows_and_columns():
    up, down = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert neuron_size({"up": up, "down": down}).tolist() == [5.0, 2.0]
    assert neuron_size({"gate": 2 * up, "up": up, "down": down}).tolist() == [50.0, 4.0]


def test_the_abstracts_flops_come_out():
    assert tables.left() == pytest.approx(11.5, abs=0.05)
    assert 100 - tables.left(6) == pytest.approx(48, abs=0.5)


def test_no_head_left_is_refused():
    with pytest.raises(PrunelabError, match=r"leaves .* no head"):
        train(SHRP(), language_model("llama_mha"), "4removed", token_ids(16), RECIPE, progress=False)
