"""RSQ beyond the golden cases: rotations, weights that stay those of the unquantised layer, expansion, bad input."""

from __future__ import annotations

import copy

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.hadamard import hadamard, order, random_hadamard, turn
from prunelab.common.weights.targets import Observation
from prunelab.methods.rsq.method import RSQ, distance, mean_one, parts, stretched, without_lowest
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids


@pytest.mark.parametrize("width", [2, 8, 12, 20, 28, 36, 40, 172, 352])
def test_hadamard_rotations_are_orthogonal_and_flat(width):
    matrix = hadamard(width)
    assert torch.allclose(matrix.T @ matrix, torch.eye(width), atol=1e-5)
    part, power = order(width)
    flat = matrix[: part * power, : part * power].abs() * (part * power) ** 0.5
    assert torch.allclose(flat, torch.ones_like(flat), atol=1e-5)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(turn(x), x @ matrix, atol=1e-5) and torch.allclose(turn(turn(x), back=True), x, atol=1e-5)


def test_channels_apart_are_turned_together_and_odd_widths_refused():
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(turn(x, 6), x @ torch.kron(hadamard(4), torch.eye(6)), atol=1e-6)
    with pytest.raises(PrunelabError, match="no Hadamard matrix fits a width of 7"):
        turn(torch.ones(7))
    signs = random_hadamard(8, torch.Generator().manual_seed(0)) / hadamard(8)
    assert torch.allclose(signs.abs(), torch.ones(8, 8)) and torch.allclose(signs, signs[:, :1].expand(8, 8))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
def test_the_rotated_model_computes_the_same(family):
    model, ids = language_model(family), token_ids()
    turned = copy.deepcopy(model)
    adapter = weight_adapter(turned)
    adapter.rotate(RSQ().rotations(adapter.widths(), torch.Generator().manual_seed(0)))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, turned(ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_eight_bits_leave_the_model_nearly_as_it_was(family, tmp_path):
    model, ids = language_model(family), token_ids()
    with torch.no_grad():
        want = model(ids).logits
    plan = prune(RSQ(), model, "8bits", ids, progress=False)
    turned = {t.role.rpartition(".")[2]: d.code.turned for t, d in plan.decisions()}
    assert turned["q_proj"] == 0 and turned["o_proj"] > 1
    assert turned["down_proj" if family == "llama" else "down"] == 1
    with torch.no_grad():
        assert float((model(ids).logits - want).norm() / want.norm()) < 0.05
    plan.save(tmp_path)
    again = language_model(family)
    WeightPlan.load(tmp_path).apply(again)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_tokens_weigh_what_they_did_before_the_layer_was_quantised(monkeypatch):
    seen = []
    original = RSQ.weights
    monkeypatch.setattr(RSQ, "weights", lambda self, observed: seen.append(1) or original(self, observed))
    prune(RSQ(), language_model(), "2bits", token_ids(4), progress=False)
    assert len(seen) == 3 * 4  # once a layer and sequence, though every layer is passed four times


def test_every_importance_runs_and_tells_tokens_apart():
    plans = [
        prune(RSQ(importance=i, rotation="none"), language_model(), "3bits", token_ids(), progress=False)
        for i in ("alike", "attention", "parts", "norm", "change", "frequency", "distance")
    ]
    assert all(plan.diff(plans[0]) != "the plans are equal" for plan in plans[1:])


def test_expansion_shifts_every_sequence_by_equal_steps():
    x = torch.arange(6)
    shifts = [[0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 2, 3], [2, 3, 4, 5, 0, 1]]
    assert [s.tolist() for s in RSQ(expand=3).prepared([x])] == shifts
    assert RSQ().prepared([x])[0] is x
    with pytest.raises(PrunelabError, match="only sequences of tokens"):
        RSQ(expand=2).prepared([torch.ones(3, 4)])


def test_edges_of_the_importance():
    assert parts(10, (0, 3), 4).tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 0, 0]
    assert stretched(torch.ones(3), 0.1, 1).tolist() == [1, 1, 1]
    assert without_lowest(torch.tensor([3.0, 1, 2]), 0.34, ones=True).tolist() == [1, 0, 1]
    assert mean_one(torch.tensor([1.0, 3])).tolist() == [0.5, 1.5]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(distance(x), (x[:, None] - x).square().sum(-1).mean(1), atol=1e-5)


def test_what_it_cannot_do_is_refused():
    for options in ({"low": 2}, {"quantile": 0.5}, {"masked": 1}, {"bins": 1}, {"parts": (8,)}, {"expand": 0}):
        with pytest.raises(PrunelabError, match="rsq"):
            RSQ(**options)
    with pytest.raises(PrunelabError, match="rotation='none'"):
        prune(RSQ(), WEIGHT_FAMILIES["gpt2"](), "3bits", token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="2 or more bits"):
        prune(RSQ(), language_model(), "1bits", token_ids(), progress=False)


def test_every_part_of_a_sequence_counts_once_and_the_rest_where_it_is_asked_for():
    assert parts(7, (1,), 2).tolist() == [0, 0, 0, 1, 1, 1, 0] and parts(7, (1,), 2, rest=True)[-1] == 1
    assert parts(3, (0,), 8).sum() == 0, "parts of no token"
    with pytest.raises(PrunelabError, match="no token of a sequence counts"):
        mean_one(parts(3, (0,), 8))


@pytest.mark.parametrize("importance", ["norm", "change", "frequency", "distance", "product", "cluster", "attention"])
def test_importance_can_be_reversed_and_is_scaled_before_or_after_its_sign(importance):
    g = torch.Generator().manual_seed(0)
    before, after = torch.randn(12, 5, generator=g), torch.randn(12, 5, generator=g)
    counts, received = torch.arange(1, 13).float(), torch.rand(12, generator=g) + 0.1
    seen = Observation(before, {}, before, after, counts, attend=lambda: received, count=lambda: counts)
    kinds = {name: RSQ(importance=importance, clusters=3, **options) for name, options in
             {"plain": {}, "reverse": {"reverse": True}, "square": {"scale": "square"}}.items()}  # fmt: skip
    plain, reverse, square = (method.weights(seen) for method in kinds.values())
    assert torch.equal(plain.argsort(), reverse.argsort(descending=True)) and not torch.equal(plain, square)
    if importance != "product":  # whose squares lose the sign
        assert torch.equal(plain.argsort(), square.argsort())
    if importance in ("norm", "distance", "product", "cluster"):
        assert not torch.equal(plain, RSQ(importance=importance, clusters=3, side="output").weights(seen))
    other = RSQ(importance=importance, clusters=3, normalise="queries", quantile=0.9).weights(seen)
    assert other.min() >= 0.005 and other.max() <= 1


def test_options_that_would_give_no_weights_are_refused():
    for options, match in (
        ({"importance": "norm", "reverse": True, "scale": "root"}, "have no root"),
        ({"importance": "change", "stretch": False}, "not negative"),
        ({"quantile": 0.5}, "not 0.5"),
    ):
        with pytest.raises(PrunelabError, match=match):
            RSQ(**options)
