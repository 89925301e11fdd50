"""The contract of weight pruning, over every registered method and the reference methods, on tiny language models; what
follows activations back through a classifier, on tiny convolutional networks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, prune
from prunelab.common.weights.role import WeightPruner
from tests.contract.families import WEIGHT_FAMILIES, answer, images
from tests.contract.references import MagnitudeWeights, NormChannels, invariant, language_model, token_ids
from tests.contract.weights_references import REFERENCES, triplets

SMALLER: dict[str, dict[str, Any]] = {  # searches as long as a paper's are beyond a test
    "tyr": {"iterations": 2, "generations": 2, "offspring": 4, "tokens": (24,), "survivors": (2,), "least_neurons": 2},
}
METHODS = [c(**SMALLER.get(c.name, {})) for c in registry.load().values() if issubclass(c, WeightPruner)]
METHODS += [MagnitudeWeights(), NormChannels(), *REFERENCES]
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def families(method: WeightPruner) -> list[str]:
    if method.traces:
        return ["vgg", "resnet"]
    return ["mixtral", "olmoe"] if "experts" in method.units else ["llama", "llama_mha", "qwen3"]


def build(family: str, seed: int = 0):
    return WEIGHT_FAMILIES[family]() if family in ("vgg", "resnet") else language_model(family, seed)


def half(method: WeightPruner) -> Budget:
    """A budget that takes about half of what there is."""
    return Budget(4, "bits") if method.quantises else Budget(0.5)


def most(method: WeightPruner) -> Budget:
    return Budget(8, "bits") if method.quantises else Budget(1.0)


def run(method: WeightPruner, budget: Budget, family: str = "", dtype: torch.dtype = torch.float32, **options):
    model = build(family or families(method)[0]).to(dtype)
    base = build(family or families(method)[0], seed=5).to(dtype) if method.needs_base else None
    plan = prune(method, model, budget, base=base, progress=False, **data(method), **options)
    return model, plan


def data(method: WeightPruner) -> dict[str, Any]:
    """What the method is calibrated on."""
    if method.traces:
        return {"calibration": (images("vgg"), torch.tensor([1, 4, 6]))}
    if not method.corpora:
        return {"calibration": token_ids()}
    corpora = {"domain": triplets(4, 1), "general": triplets(3, 2)}
    return {"calibration": corpora, "objective": "contrastive"}


def logits(model) -> torch.Tensor:
    if not hasattr(model, "config"):
        return answer(copy.deepcopy(model).float(), "vgg")
    with torch.no_grad():
        return model(token_ids(2, seed=9)).logits


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@every
def test_keep_all_is_the_identity(method):
    with invariant("keep_all", method):
        for family in families(method):
            model, plan = run(method, most(method), family)
            assert all(bool(decision.mask.all()) for _, decision in plan.decisions())
            assert torch.allclose(logits(model), logits(build(family)), atol=1e-6)


@every
def test_budget_is_met_exactly(method):
    with invariant("budget", method):
        for family, ratio in itertools.product(families(method), (0.5, 0.75)):
            budget = Budget(8 * ratio, "bits") if method.quantises else Budget(ratio)
            plan = run(method, budget, family)[1]
            whole = [decision.kept for target, decision in plan.decisions() if target.whole]
            assert sum(whole) == len(whole) - Budget(ratio).pruned(len(whole)), "layers are counted together"
            for target, decision in plan.decisions():
                if target.whole:
                    continue
                kept = decision.mask.sum(-1)
                wanted = target.shape[-1] - Budget(ratio).pruned(target.shape[-1])
                assert bool((kept == wanted).all()), target.name


@every
def test_pruned_model_runs_generates_and_stays_finite(method):
    for family in families(method):
        for dtype in (torch.float32, torch.bfloat16):
            model, plan = run(method, half(method), family, dtype)
            report = plan.report
            assert 0 < report.bits < 8 and report.bytes < report.dense_bytes if report.bits else 0 < report.sparsity < 1
            assert bool(torch.isfinite(logits(model)).all())
            assert {p.dtype for p in model.parameters()} == {dtype}
        if method.traces:
            continue
        grown = model.generate(token_ids(1), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert grown.shape == (1, 15) or int(grown[0, -1]) == 2


@every
def test_same_seed_same_plan_and_the_plan_repeats_it(method, tmp_path):
    model, plan = run(method, half(method), seed=1)
    again, _ = run(method, half(method), seed=1)
    assert same(model, again)
    plan.save(tmp_path)
    dense = build(families(method)[0])
    WeightPlan.load(tmp_path).apply(dense)
    assert same(model, dense)
    assert plan.diff(WeightPlan.load(tmp_path)) == "the plans are equal"


@every
def test_an_interrupted_run_resumes_to_the_same_weights(method, tmp_path, monkeypatch):
    whole, _ = run(method, half(method))
    step = "solve" if method.sequential else "score"
    original, seen, crashed = getattr(type(method), step), [], []

    def crashing(self, target, *rest):
        seen.append(target.block)
        once = len(seen) == 2 and method.traces  # their network is one block
        if (once or (target.block == 1 and seen.count(0))) and not crashed:
            crashed.append(1)
            raise KeyboardInterrupt
        return original(self, target, *rest)

    monkeypatch.setattr(type(method), step, crashing)
    with pytest.raises(KeyboardInterrupt):
        run(method, half(method), folder=tmp_path)
    seen.clear()
    resumed, plan = run(method, half(method), folder=tmp_path)
    assert same(whole, resumed)
    if not method.traces:
        assert method.rounds.count > 1 or set(seen) == {1, 2}, "block 0 was done before the crash"
        assert {target.block for target in plan.targets} == {0, 1, 2}


@every
def test_nan_weights_and_a_missing_calibration_set_are_named(method):
    model = build(families(method)[0])
    needs = any(method.statistics(unit) for unit in method.units)
    base = build(families(method)[0], seed=5) if method.needs_base else None
    if needs:
        with pytest.raises(PrunelabError, match="calibration set"):
            prune(method, model, half(method), base=base, progress=False)
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[0] = float("nan")
        with pytest.raises(PrunelabError, match="NaN"):
            prune(method, model, half(method), base=base, progress=False, **data(method))


@every
def test_a_budget_that_leaves_nothing_is_refused_before_any_work(method):
    with invariant("empty", method):
        model = build(families(method)[0])
        before = {name: p.clone() for name, p in model.named_parameters()}
        base = build(families(method)[0], seed=5) if method.needs_base else None
        with pytest.raises(PrunelabError, match="keep more"):
            prune(method, model, Budget(0, half(method).unit), base=base, progress=False, **data(method))
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
