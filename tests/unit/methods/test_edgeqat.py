"""EdgeQAT beyond the golden cases: its place in the model, tokens of few bits, both signs, bad input."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training import engine
from prunelab.common.training.recipe import Recipe
from prunelab.methods.edgeqat.method import EdgeQAT
from prunelab.methods.edgeqat.quantisers import (
    ActivationQuantised,
    QuantisedAttention,
    TokenQuantised,
    Tokens,
    low_bit_tokens,
)
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids

RECIPE = Recipe(steps=6, batch=4, rate=1e-3)


def train(method=None, model=None, teacher=None, **options):
    model = language_model() if model is None else model
    teacher = language_model() if teacher is None else teacher
    given = {"services": {"teacher": teacher}, "progress": False} | options
    return model, engine.train(method or EdgeQAT(), model, 1.0, token_ids(16), RECIPE, **given)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 3.0])
def test_activations_take_as_many_values_as_bits_allow(bits, shift):
    x = torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(0)) + shift
    x = x if shift else x.abs()
    module = ActivationQuantised(bits)
    y = module(x)
    assert len(y.unique()) <= 2**bits and bool(module.signed) == bool((x < 0).any())
    module(x - 100)
    assert bool(module.signed) == bool((x < 0).any()), "the first tensor decides for good"


def test_few_bits_are_for_the_chosen_tokens_alone():
    tokens = Tokens()
    module, x = TokenQuantised(tokens, 8, 2), torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0))
    plain = module(x)
    tokens.low = torch.tensor([4, 1])
    mixed = module(x)
    assert torch.equal(mixed[:, [0, 2, 3, 5]], plain[:, [0, 2, 3, 5]]) and len(mixed[:, [1, 4]].unique()) <= 4
    assert len(TokenQuantised(tokens, 8, 2, first=True)(x).unique()) > 4 and tokens.low is None


def test_tokens_that_attend_least_to_the_first_are_chosen():
    column = torch.tensor([[[3.0, 1, 2, 0, 5]]])
    assert low_bit_tokens(column, 0.5).tolist() == [3, 1] and len(low_bit_tokens(column, 0.1)) == 0


def test_many_bits_attend_as_the_model_does():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 8, generator=g) for heads in (4, 2, 2))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    module = QuantisedAttention(Tokens(), 8, 8, 0.5).eval()
    got = module(q, k, v, None, 8**-0.5).detach()
    assert float((got - want).norm() / want.norm()) < 0.2 and module.seen is None


def test_weights_leave_as_codes_and_nothing_is_left_on_teacher_or_model():
    teacher = language_model()
    model, plan = train(teacher=teacher)
    codes = [d.code for t, d in plan.decisions() if t.unit == "linear"]
    assert all(code is not None and code.bits == 4 for code in codes) and plan.report.bits == pytest.approx(4, abs=1)
    for each in (model, teacher):
        assert not any(name.startswith("_prunelab") for module in each.modules() for name in module._modules)
        assert each.config._attn_implementation == "sdpa"
    again = language_model()
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))


def test_both_signs_and_either_half_train():
    found = [
        train(EdgeQAT(**options))[0].lm_head.weight
        for options in ({}, {"likeness": "towards"}, {"share": 0}, {"entropy": 0, "distribution": 0})
    ]
    assert all(not torch.equal(found[0], other) for other in found[1:])


def test_what_does_not_fit_is_refused():
    with pytest.raises(PrunelabError, match="needs the service 'teacher'"):
        engine.train(EdgeQAT(), language_model(), 1.0, token_ids(16), RECIPE, progress=False)
    with pytest.raises(PrunelabError, match="attention layers"):
        train(teacher=language_model(num_hidden_layers=2))
    with pytest.raises(PrunelabError):
        train(model=WEIGHT_FAMILIES["resnet"]())
