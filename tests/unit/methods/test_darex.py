"""DARE and DAREx: what is dropped and rescaled, the search, the analytic q against a loop, AdamR against Adam."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.targets import Target, WeightSignals
from prunelab.methods.darex.adamr import AdamR
from prunelab.methods.darex.analytic import analytic_q, phi, q_by_name
from prunelab.methods.darex.method import Dare, Darex, logit_error, search, top_logits
from tests.contract.references import language_model, token_ids


def fine_tuned(family: str = "llama", size: float = 0.02) -> tuple[nn.Module, nn.Module]:
    """A model and what it was before: every parameter moved a little."""
    base, fine = language_model(family), language_model(family)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=g))
    return fine, base


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(weight_adapter(model).loss(sample)) for sample in token_ids()) / 4


# -- drop and rescale ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [None, 0.6])
def test_kept_deltas_are_rescaled_and_dropped_ones_are_the_base_again(q):
    fine, base = fine_tuned()
    before = {name: p.detach().clone() for name, p in fine.named_parameters()}
    plan = prune(Dare(q=q), fine, 0.3, base=base, progress=False)
    touched = set()
    for target, decision in plan.decisions():
        name = f"{target.name}.weight"
        touched.add(name)
        old, new, start = before[name], fine.get_parameter(name), base.get_parameter(name)
        assert torch.equal(new[~decision.mask], start[~decision.mask])
        want = start + (old - start) / (0.3 if q is None else q)
        assert torch.allclose(new[decision.mask], want[decision.mask], atol=1e-6)
    for name, parameter in fine.named_parameters():
        assert (name in touched) == ("self_attn" in name or "mlp" in name)
        assert name in touched or torch.equal(parameter, before[name]), "everything else stays fine-tuned"
    report = plan.report
    assert report.reset == sum(int((~d.mask).sum()) for _, d in plan.decisions()) and report.zeroed == 0
    assert report.sparsity == pytest.approx(0.7, abs=0.02) and "stays dense" in str(report)


def test_dare_keeps_the_expectation():
    rng = torch.Generator().manual_seed(0)
    fine, base = torch.randn(2, 8, 10, generator=rng)
    signals = WeightSignals({"weight": fine}, base={"weight": base}, rng=rng)
    target, draws, errors = Target("linear", "up", 0, "up", (8, 10)), 2000, {}
    for q in (None, 0.5):
        merged = [Dare(q=q).solve(target, signals, Budget(0.2)).values["weight"] for _ in range(draws)]
        errors[q] = float((torch.stack(merged).mean(0) - fine).norm() / (fine - base).norm())
    # Of one draw the relative error is sqrt(p / (1 - p)) = 2.
    assert errors[None] < 2 * 2 / math.sqrt(draws)
    assert errors[0.5] == pytest.approx(1 - 0.2 / 0.5, abs=0.1), "a larger q shrinks the deltas"


def test_a_plan_repeats_the_merged_model_without_the_base(tmp_path):
    fine, base = fine_tuned("qwen2")
    plan = prune(Dare(scope="all"), fine, 0.3, base=base, folder=tmp_path / "run", progress=False)
    plan.save(tmp_path / "plan")
    again, _ = fine_tuned("qwen2")
    WeightPlan.load(tmp_path / "plan").apply(again)
    assert all(torch.equal(p, q) for p, q in zip(fine.parameters(), again.parameters(), strict=True))


def test_all_covers_biases_norms_and_embeddings_but_no_classifier():
    fine, base = fine_tuned("qwen2")
    names = {target.name for target in prune(Dare(scope="all"), fine, 0.3, base=base, progress=False).targets}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= names
    assert "lm_head.weight" not in names
    fine, base = fine_tuned("qwen2")
    names = {target.name for target in prune(Dare(), fine, 0.3, base=base, progress=False).targets}
    assert "model.layers.0.self_attn.q_proj.bias" in names and "model.norm.weight" not in names


def test_experts_are_covered_once():
    fine, base = fine_tuned("mixtral")
    plan = prune(Dare(scope="all"), fine, 0.3, base=base, progress=False)
    assert plan.report.prunable == sum(p.numel() for n, p in fine.named_parameters() if n != "lm_head.weight")


# -- the search ------------------------------------------------------------------------------------------------------


def test_the_search_is_coarse_then_fine():
    tried: list[float] = []

    def score(x: float) -> float:
        tried.append(x)
        return -((x - 0.337) ** 2)

    assert search(score, 0.1, 1.0, 0.1) == pytest.approx(0.34)
    assert tried[:7] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), "four worse in a row end the first walk"
    assert tried[7:] == pytest.approx([0.21 + 0.01 * i for i in range(len(tried) - 7)])
    assert tried[-1] == pytest.approx(0.38), "0.34 is best, and four worse ones end the second"


def test_the_search_keeps_the_first_of_equals_and_its_limit():
    assert search(lambda x: 0.0, 0.1, 0.3, 0.1) == 0.1
    tried: list[float] = []
    search(lambda x: tried.append(x) or x, 0.8, 1.0, 0.1, limit=1.0)
    assert max(tried) <= 1.0


@pytest.mark.parametrize("objective", ["loss", "logits"])
def test_a_searched_q_beats_dare_at_extreme_rates(objective):
    def error(model: nn.Module) -> float:
        if objective == "loss":
            return loss(model)
        with torch.no_grad():
            whole, found = (m(token_ids()).logits.flatten(0, 1) for m in (fine_tuned()[0], model))
        return logit_error(found, *top_logits(whole))

    errors = {}
    for method in (Dare(), Darex(search=objective)):
        fine, base = fine_tuned()
        calibration = token_ids() if isinstance(method, Darex) else None
        prune(method, fine, 0.02, calibration, base=base, progress=False)
        errors[method.name] = error(fine)
    assert errors["darex"] < errors["dare"]


def test_the_model_is_whole_again_where_a_trial_fails(monkeypatch):
    fine, base = fine_tuned()
    before = {name: p.detach().clone() for name, p in fine.named_parameters()}
    monkeypatch.setattr("prunelab.common.weights.probe.ModelProbe.loss", lambda self, sample: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(Darex(), fine, 0.1, token_ids(), base=base, progress=False)
    assert all(torch.equal(before[name], p) for name, p in fine.named_parameters())


# -- the analytic q --------------------------------------------------------------------------------------------------


def row_by_row(c: Tensor, p: float, eta: float) -> Tensor:
    """The grid search with a Python loop over rows that knows nothing of a common end."""
    found = []
    for row in c:
        total, squares = row.sum(), (row**2).sum()
        best, q = float("inf"), 1 - p
        for step in range(int((1 - p) * 1000), 999):
            value = step * 0.001
            spread = eta**2 * phi(p) * squares / (4 * value**2) + math.log(40)
            residual = float((eta * ((1 - (1 - p) / value) * total) + spread).abs())
            if residual <= best:
                best, passed, q = residual, residual == best, value
            else:
                passed = True
            if passed:
                break
        found.append(q)
    return torch.tensor(found)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.9, 0.99]), st.floats(0.1, 1.5))
def test_a_single_row_ends_at_its_first_tie(seed, p, eta):
    c = (0.05 * torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))).half()
    assert torch.allclose(analytic_q(c, p, eta).flatten(), row_by_row(c, p, eta))


def test_half_precision_decides_the_analytic_q():
    c = 0.05 * torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    half, single = analytic_q(c.half(), 0.99, 0.37), analytic_q(c, 0.99, 0.37)
    assert float(single.mean()) > 2 * float(half.mean())


def test_phi_is_whole_at_one_half():
    assert phi(0.5) == pytest.approx(phi(0.5 + 1e-7), abs=1e-6) == pytest.approx(phi(0.5 - 1e-7), abs=1e-6)


def test_biases_follow_their_layer_and_others_the_mean():
    names = ["a", "a.bias", "b", "norm.weight", "norm.bias"]
    assert q_by_name(names, {"a": 0.2, "b": 0.4}) == pytest.approx(
        {"a": 0.2, "a.bias": 0.2, "b": 0.4, "norm.weight": 0.3, "norm.bias": 0.3}
    )


@pytest.mark.parametrize("eta", [0.37, None])
def test_every_layer_has_its_own_analytic_q(eta):
    fine, base = fine_tuned("qwen2", size=0.5)
    old = {name: p.detach().clone() for name, p in fine.named_parameters()}
    method = Darex(rule="analytic", eta=eta, step=0.3)
    plan = prune(method, fine, 0.1, token_ids(), base=base, progress=False)
    factors: dict[str, float] = {}
    for target, decision in plan.decisions():
        name = target.name if target.unit == "tensor" else f"{target.name}.weight"
        start, kept = base.get_parameter(name), decision.mask
        if bool(kept.any()):
            deltas = (old[name] - start).detach()[kept], (fine.get_parameter(name) - start).detach()[kept]
            factors[name] = float(deltas[0].norm() / deltas[1].norm())
    assert all(0.0989 < q < 0.9995 for q in factors.values())
    assert len({round(q, 4) for q in factors.values()}) > 4
    for name, q in factors.items():
        if name.endswith(".bias"):
            assert q == pytest.approx(factors[name.replace(".bias", ".weight")], rel=1e-3)


# -- AdamR -----------------------------------------------------------------------------------------------------------


def descend(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int = 20) -> Tensor:
    target = torch.linspace(-2, 2, parameter.numel()).view_as(parameter)
    for _ in range(steps):
        optimizer.zero_grad()
        (parameter - target).square().sum().backward()
        optimizer.step()
    return parameter.detach()


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_without_decay_it_is_adam(amsgrad):
    ours, theirs = parameter(), parameter()
    a = descend(AdamR([ours], lr=0.05, weight_decay=0.0, amsgrad=amsgrad), ours)
    b = descend(torch.optim.Adam([theirs], lr=0.05, amsgrad=amsgrad), theirs)
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("l1", [False, True])
def test_decay_keeps_deltas_small_and_the_anchor_where_it_was(l1):
    moved = []
    for decay in (0.0, 1.0, 5.0):
        p, start = parameter(), parameter().detach()
        moved.append(float((descend(AdamR([p], lr=0.05, weight_decay=decay, l1=l1), p) - start).norm()))
    assert moved[0] > moved[1] > moved[2]


def test_a_run_of_adamr_goes_on_from_its_state():
    whole, first = parameter(), parameter()
    descend(AdamR([whole], lr=0.05, weight_decay=0.5), whole)
    stopped = AdamR([first], lr=0.05, weight_decay=0.5)
    descend(stopped, first, 8)
    second = nn.Parameter(first.detach().clone())
    resumed = AdamR([second], lr=0.05, weight_decay=0.5)
    resumed.load_state_dict(stopped.state_dict())
    assert torch.allclose(descend(resumed, second, 12), whole.detach())


def test_a_parameter_without_gradient_stays():
    used, idle = parameter(), parameter()
    optimizer = AdamR([used, idle], lr=0.05, weight_decay=1.0)
    descend(optimizer, used, 2)
    assert torch.equal(idle, parameter()) and not torch.equal(used, parameter())


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_says_what_to_do(tmp_path):
    for method in (Dare, Darex):
        for q in (0.0, -0.1, 1.5):
            with pytest.raises(PrunelabError, match="q must be a number above 0"):
                method(q=q)
    for wrong in ({"step": 0.0}, {"gamma": 1.0}, {"stop": 0.0}, {"bounds": (0.5, 0.1)}, {"bounds": (0.0, 1.0)}):
        with pytest.raises(PrunelabError, match="darex"):
            Darex(**wrong)
    fine, base = fine_tuned()
    with pytest.raises(PrunelabError, match="needs base="):
        prune(Dare(), fine, 0.1, progress=False)
    with pytest.raises(PrunelabError, match="share of the deltas"):
        prune(Dare(), fine, "2:4", base=base, progress=False)
    with pytest.raises(PrunelabError, match="calibration set"):
        prune(Darex(), fine, 0.1, base=base, progress=False)
    with pytest.raises(PrunelabError, match="needs a rate between"):
        prune(Darex(rule="analytic", eta=1.0), fine, 1.0, token_ids(), base=base, progress=False)
    with pytest.raises(PrunelabError, match=r"mlp\..* in the base model"):
        prune(Dare(), fine, 0.1, base=language_model(intermediate_size=48), progress=False)
    with pytest.raises(PrunelabError, match="lr, eps"):
        AdamR([parameter()], lr=-1.0)
    with pytest.raises(PrunelabError, match="anchors"):
        AdamR([parameter()], [torch.zeros(2)])


def test_an_interrupted_run_goes_on_with_the_same_base_only(tmp_path, monkeypatch):
    fine, base = fine_tuned()
    solve = Dare.solve

    def crash(self, target, signals, budget):
        if target.block == 1:
            raise KeyboardInterrupt
        return solve(self, target, signals, budget)

    monkeypatch.setattr(Dare, "solve", crash)
    with pytest.raises(KeyboardInterrupt):
        prune(Dare(), fine, 0.1, base=base, folder=tmp_path, progress=False)
    monkeypatch.undo()
    with pytest.raises(PrunelabError, match="other base"):
        prune(Dare(), fine_tuned()[0], 0.1, base=language_model(seed=9), folder=tmp_path, progress=False)
    prune(Dare(), fine_tuned()[0], Budget(0.1), base=base, folder=tmp_path, progress=False)
