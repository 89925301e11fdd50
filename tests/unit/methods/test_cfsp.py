"""CFSP against plain loops: block influence, the sharing out of neurons, and what the criteria really rank by."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune
from prunelab.methods.cfsp.method import CFSP, influence, kept_shares, neuron_scores
from tests.contract.references import language_model, token_ids

fast = settings(max_examples=60, deadline=None)


def test_the_angular_measure_is_the_angle():
    for degrees in (0, 1, 45, 90, 179, 180):
        angle = math.radians(degrees)
        before = torch.tensor([[2.0, 0.0]])
        after = 5 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        assert float(influence(before, after, "angular")) == pytest.approx(degrees / 180, abs=2e-4)
        assert float(influence(before, after, "cosine")) == pytest.approx(1 - math.cos(angle), abs=1e-6)
    zero = torch.zeros(1, 2)
    assert float(influence(zero, before, "angular")) == pytest.approx(1 / 3), "a zero state counts as 60 degrees"
    x = torch.randn(4, 3)
    assert torch.allclose(influence(x, x + 2, "mse"), torch.full((4,), 4.0))
    assert torch.allclose(influence(x, x - 2, "mae"), torch.full((4,), 2.0))
    scaled = torch.randn(200, 64)
    assert bool(torch.isfinite(influence(scaled, scaled * 3, "angular")).all()), "rounding past a cosine of one"


@fast
@given(influences=st.lists(st.floats(0, 1e5), min_size=1, max_size=8), keep=st.floats(0.05, 1), a=st.floats(0, 10))
def test_shares_average_to_the_budget_follow_influence_and_never_exceed_all(influences, keep, a):
    shares = kept_shares(torch.tensor(influences, dtype=torch.float64), keep, a)
    assert float(shares.mean()) == pytest.approx(keep)
    assert float(shares.max()) <= 1 + 1e-9 and float(shares.min()) > 0
    order = np.argsort(influences, kind="stable")
    assert bool((shares[order].diff() >= -1e-9).all())


def weights(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"gate": (20, 8), "up": (20, 8), "down": (8, 20)}
    return {role: torch.randn(shape, generator=g).double() for role, shape in shapes.items()}


def test_weights_cancel_out_of_every_criterion_but_wanda():
    activation = torch.rand(20, generator=torch.Generator().manual_seed(1))
    for criterion, factor, power in (
        ("three_w_one_wa", 3, 0.7),
        ("three_w_one_a", 3, 0.7),
        ("one_wa", 1, 0.7),
        ("one_a", 1, 0.5),
    ):
        scores = neuron_scores(weights(), activation, criterion, 2.0, 0.7)
        assert torch.allclose(scores, factor / 8 * activation**power, rtol=1e-4), criterion
    one, other = (neuron_scores(weights(seed), activation, "wanda", 1, 1) for seed in (0, 1))
    assert one.argsort().tolist() != other.argsort().tolist()
    plain = {role: weights()[role] for role in ("up", "down")}
    assert torch.allclose(neuron_scores(plain, activation, "three_w_one_wa", 1, 1), activation / 4, rtol=1e-4)
    dead = activation.clone()
    dead[3] = 0
    assert float(neuron_scores(weights(), dead, "three_w_one_wa", 1, 1)[3]) == 0


@torch.no_grad()
def plainly(model: nn.Module, ids: Tensor, ratio: float, a: float) -> list[list[int]]:
    """The released rules, in float64 and by loops: neurons that stay, by block."""
    influences, norms = [], []
    for block in model.model.layers:
        states: list[tuple[Tensor, Tensor]] = []
        inner: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda m, args, out, s=states: s.append((args[0][0], out[0]))),
            block.mlp.down_proj.register_forward_pre_hook(lambda m, args, s=inner: s.append(args[0][0])),
        ]
        for sequence in ids:
            model(sequence[None])
        for handle in handles:
            handle.remove()
        total = 0.0
        for before, after in states:
            for x, y in zip(before.double().numpy(), after.double().numpy(), strict=True):
                total += math.acos(x @ y / math.sqrt((x @ x) * (y @ y))) / math.pi
        influences.append(total)
        norms.append(torch.stack([x.double().square().sum(0) for x in inner]).mean(0).sqrt())
    middle = sum(influences) / len(influences)
    scores = [1 / (1 + math.exp(-a * (i - middle) / 1e4)) for i in influences]
    mean, most = sum(scores) / len(scores), max(scores)
    if most / mean * (1 - ratio) >= 1:
        factor = mean * (1 / (1 - ratio) - 1) / (most - mean) / 1.05
        scores = [mean + (s - mean) * factor for s in scores]
    kept = []
    for score, norm in zip(scores, norms, strict=True):
        count = int(round(len(norm) * score / mean * (1 - ratio), 6)) + 1
        kept.append(sorted(norm.argsort(descending=True)[:count].tolist()))
    return kept


@pytest.mark.parametrize(("ratio", "a"), [(0.3, 1.0), (0.3, 3000.0), (0.2, 20000.0), (0.6, 5000.0)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_whole_method_by_plain_loops(family, ratio, a):
    ids = token_ids()
    want = plainly(language_model(family), ids, ratio, a)
    plan = prune(CFSP(a=a), language_model(family), 1 - ratio, ids, progress=False)
    assert [decision.mask.nonzero().flatten().tolist() for _, decision in plan.decisions()] == want
    if a > 1000:
        assert len({len(block) for block in want}) > 1, "blocks keep different numbers"


def test_only_the_released_allocation_depends_on_the_number_of_sequences():
    def counts(method: CFSP, ids: Tensor) -> list[int]:
        plan = prune(method, language_model(), 0.6, ids, progress=False)
        return [decision.kept for _, decision in plan.decisions()]

    once, often = token_ids(), token_ids().repeat(40, 1)
    assert counts(CFSP(a=100), once) != counts(CFSP(a=100), often)
    exact = CFSP(a=0.5, released=False)
    assert counts(exact, once) == counts(exact, often)
    uniform = CFSP("uniform", released=False)
    assert counts(uniform, once) == [24] * 3 and counts(CFSP("uniform"), once) == [25] * 3


def test_kept_numbers_are_multiples():
    method = CFSP(multiple=128)
    assert [method.kept(11008, share) for share in (0.8, 0.3, 1.0)] == [8832, 3328, 11008]
    assert method.kept(512, 0.1) == 512, "released: no multiple at all keeps the block whole"
    assert CFSP(multiple=128, released=False).kept(512, 0.1) == 128
    assert method.kept(300, 0.99) == 256 and method.kept(320, 1.0) == 320
    assert CFSP().kept(10, 1.0) == 10 and CFSP(released=False).kept(10, 0.01) == 1
    plan = prune(CFSP("uniform", multiple=8), language_model(), 0.5, token_ids(), progress=False)
    assert [decision.kept for _, decision in plan.decisions()] == [24, 24, 24]  # 20 is between 16 and 24


def test_attention_is_not_touched():
    model, dense = language_model(), language_model()
    prune(CFSP("uniform"), model, 0.5, token_ids(), progress=False)
    for name, p in dense.named_parameters():
        assert "mlp" in name or torch.equal(p, model.get_parameter(name))
    assert model.config.intermediate_size == 21, "a uniform plan is an ordinary model of its family"


def test_bad_options_and_budgets_are_named():
    for wrong in ({"a": -1.0}, {"multiple": -8}):
        with pytest.raises(PrunelabError, match="cfsp"):
            CFSP(**wrong)
    for budget in (Budget((0.5, 0.5, 0.5)), Budget(4, "count")):
        with pytest.raises(PrunelabError, match="shares one ratio out"):
            prune(CFSP(), language_model(), budget, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="keep more"):
        prune(CFSP(), language_model(), 0.0, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="prunes channels, and this MixtralForCausalLM has none"):
        prune(CFSP(), language_model("mixtral"), 0.5, token_ids(), progress=False)
