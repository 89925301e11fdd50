"""PAT beyond the golden cases: merging is exact, widths, gates at both ends, disk, bad input."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training import engine
from prunelab.common.training.recipe import Recipe
from prunelab.common.weights import load_pruned, save_pruned
from prunelab.methods.pat.method import PAT
from prunelab.methods.pat.sparsification import HiddenMask, Sparsified, fixed_gates, gates, mask_loss
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids

RECIPE = Recipe(steps=12, batch=4, rate=3e-3)


def train(method=None, model=None, budget=0.75):
    model = language_model() if model is None else model
    return model, engine.train(method or PAT(), model, budget, token_ids(16), RECIPE, progress=False)


def test_gates_are_open_at_first_and_steps_at_last():
    proxy = torch.tensor([-2.0, 0.0, 2.0])
    assert torch.allclose(gates(torch.zeros(3), 0, 100), torch.ones(3))
    late = gates(proxy, 99, 100)
    assert float(late[0]) < 1e-3 and float(late[2]) > 0.999
    assert torch.allclose(fixed_gates(4, 2, 0, 10), torch.ones(4)) and float(fixed_gates(4, 2, 30, 10)[3]) < 1e-4
    trained = torch.zeros(3, requires_grad=True)
    assert gates(trained, 10, 100).requires_grad and not gates(trained, 80, 100).requires_grad


def test_the_loss_on_the_mask_is_a_number_where_no_proxy_is_on_one_side():
    assert float(mask_loss(torch.full((4,), 0.5), 2)) == pytest.approx(10.0)
    assert float(mask_loss(torch.full((4,), -0.5), 2)) == pytest.approx(10.0)
    proxy = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    mask_loss(proxy, 1).backward()
    assert bool((proxy.grad > 0).all()), "too many are open: all proxies are pushed down"


def test_merging_is_what_the_module_does():
    g = torch.Generator().manual_seed(0)
    mask = HiddenMask(12, 7, 10, 0.8, True, 2.77)
    module = Sparsified(mask, 3).eval()
    with torch.no_grad():
        for p in (mask.proxy, module.up, module.scale):
            p.copy_(torch.randn(p.shape, generator=g))
        weight, x = torch.randn(12, 5, generator=g), torch.randn(4, 5, generator=g)
        assert torch.allclose(x @ module.merged(weight).T, module(x @ weight.T), atol=1e-5)
        assert int((module(x @ weight.T)[0] != 0).sum()) == 7


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_the_narrow_model_is_the_one_that_was_trained(family, kind, tmp_path):
    model, plan = train(PAT(mask=kind), language_model(family))
    assert model.get_input_embeddings().weight.shape == (61, 24) and model.config.hidden_size == 24
    kept = plan.decision("hidden").mask
    assert int(kept.sum()) == 24 and (kind == "learned" or bool(kept[:24].all()))
    save_pruned(model, plan, tmp_path)
    with torch.no_grad():
        ids = token_ids(2, seed=9)
        assert torch.equal(load_pruned(tmp_path)(ids).logits, model(ids).logits)


def test_training_moves_the_loss_and_leaves_no_hook():
    before = language_model()
    model, _ = train(budget=1.0)
    ids = token_ids(16)
    with torch.no_grad():
        losses = [float(m(input_ids=ids, labels=ids).loss) for m in (before, model)]
    assert losses[1] < losses[0]
    assert not any(m._forward_hooks for m in model.modules())


def test_what_it_cannot_narrow_is_refused():
    with pytest.raises(PrunelabError, match="prunes hidden"):
        train(model=WEIGHT_FAMILIES["gpt2"]())
    with pytest.raises(PrunelabError, match="tied parameter"):
        train(model=language_model(tie_word_embeddings=True))
    with pytest.raises(PrunelabError, match="has a bias"):
        train(model=language_model(attention_bias=True))
