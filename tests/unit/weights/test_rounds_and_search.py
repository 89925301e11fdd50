"""Rounds, candidates kept on disk, learned parts that are re-used, components, and named corpora."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.memory import Live
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.checkpoints import Work
from prunelab.common.weights.corpora import corpus, loss_of
from prunelab.common.weights.plan import Tally
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.rounds import Rounds
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Decision
from prunelab.methods.flap.method import FLAP
from prunelab.methods.gblm.method import GBLM
from prunelab.methods.magnitude.method import Magnitude
from prunelab.methods.random_weights.method import RandomWeights
from prunelab.methods.sparsegpt.method import SparseGPT
from prunelab.methods.wanda.method import Wanda
from tests.contract.references import language_model, token_ids
from tests.contract.weights_references import (
    DomainFisher,
    LearnedChannels,
    MeanSquare,
    RoundedMagnitude,
    SearchedChannels,
    triplets,
)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


# -- rounds ----------------------------------------------------------------------------------------------------------


def test_rounds_are_ways_to_a_budget():
    assert [b.amounts[0] for b in Rounds(4).budgets(Budget(0.2))] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [b.amounts[0] for b in Rounds(2, "geometric").budgets(Budget(0.25))] == pytest.approx([0.5, 0.25])
    assert [b.amounts[0] for b in Rounds(3).budgets(Budget(10, "removed"))] == [3, 7, 10]
    assert Rounds().budgets(Budget(3, "bits")) == [Budget(3, "bits")]
    with pytest.raises(PrunelabError, match="reached at once"):
        Rounds(2).budgets(Budget.parse("2:4"))
    with pytest.raises(PrunelabError, match="at least one round"):
        Rounds(0)
    for unit in ("layers", "sublayers"):
        with pytest.raises(PrunelabError, match=f"{unit} leave at once"):
            prune(RandomWeights((unit,)), language_model(), 0.5, rounds=2, progress=False)


ROUNDED = [Wanda(), SparseGPT(), Magnitude("model"), RoundedMagnitude(), FLAP("UL-UM")]


@pytest.mark.parametrize("method", ROUNDED, ids=repr)
def test_what_goes_stays_gone_and_each_round_meets_its_budget(method, monkeypatch):
    masks, written = [], Tally.write

    def noting(self, adapter, target, decision):
        if target.block == 1:
            masks.append((target.name, decision.mask.clone(), decision.remove))
        written(self, adapter, target, decision)

    monkeypatch.setattr(Tally, "write", noting)
    model = language_model()
    plan = prune(method, model, 0.4, token_ids(), rounds=3, progress=False)
    for name in {name for name, _, _ in masks}:
        rounds = [mask for n, mask, _ in masks if n == name]
        assert len(rounds) == 3
        assert not bool((rounds[1] & ~rounds[0]).any() or (rounds[2] & ~rounds[1]).any()), name
        shares = [float(mask.float().mean()) for mask in rounds]
        assert shares[0] >= shares[1] >= shares[2] < shares[0]
    loose = next(iter(plan.targets)).loose
    assert [remove for _, _, remove in masks][-1] and (loose or not masks[0][2])
    with torch.no_grad():
        assert bool(model(token_ids(2)).logits.isfinite().all())
    assert plan.header["rounds"] == repr(Rounds(3))


def test_silencing_in_between_changes_nothing_where_scores_do_not_depend_on_it():
    at_once, in_rounds = language_model(), language_model()
    prune(RandomWeights(("heads", "channels")), at_once, 0.5, progress=False)
    prune(RandomWeights(("heads", "channels")), in_rounds, 0.5, rounds=4, progress=False)
    assert same(at_once, in_rounds)


def test_a_later_round_measures_the_model_that_is_left():
    once, rounds = (prune(GBLM(), language_model(), 0.3, token_ids(), rounds=n, progress=False) for n in (1, 3))
    assert "units only in" in once.diff(rounds)


def trainer(log: list[int], rate: float = 0.05):
    def tune(model: nn.Module, number: int) -> None:
        log.append(number)
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=0.01)
        for step in range(3):
            ids = token_ids(2, seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return tune


@pytest.mark.parametrize("method", [Wanda(), RoundedMagnitude()], ids=repr)
def test_tuning_between_rounds_trains_what_is_left(method, tmp_path):
    log, model, plain = [], language_model(), language_model()
    plan = prune(method, model, 0.5, token_ids(), rounds=2, tune=trainer(log), progress=False)
    prune(method, plain, 0.5, token_ids(), rounds=2, progress=False)
    assert log == [0, 1] and not model.training and plan.header["tuned"]
    if method.units == ("linear",):
        for target, decision in plan.decisions():
            weight = weight_adapter(model).weights(target)["weight"]
            assert bool((weight[~decision.mask] == 0).all()), target.name
    ids = token_ids(2, seed=0)
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 0.95 * plain(input_ids=ids, labels=ids).loss
        save_pruned(model, plan, tmp_path)
        assert torch.equal(load_pruned(tmp_path)(ids).logits, model(ids).logits)


def test_an_interrupted_tuning_goes_on_from_its_last_round(tmp_path):
    whole, log = language_model(), []
    prune(RoundedMagnitude(), whole, 0.4, token_ids(), tune=trainer(log), progress=False)
    assert log == [0, 1, 2]
    calls: list[int] = []
    steady = trainer(calls)

    def crashing(model, number):
        if number == 1 and calls.count(0) == 1:
            raise KeyboardInterrupt
        steady(model, number)

    options = {"folder": tmp_path / "run", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        prune(RoundedMagnitude(), language_model(), 0.4, token_ids(), tune=crashing, **options)
    resumed, calls[:] = language_model(), []
    prune(RoundedMagnitude(), resumed, 0.4, token_ids(), tune=steady, **options)
    assert calls == [1, 2] and same(whole, resumed)
    assert not list((tmp_path / "run").glob("round_*"))


# -- search ----------------------------------------------------------------------------------------------------------


def searching(depth: int, folder) -> int:
    """The most bytes a search holds beyond the model's own."""
    model = language_model(num_hidden_layers=depth, hidden_size=64, intermediate_size=160, num_attention_heads=4)
    with Live(model) as live:
        prune(SearchedChannels(generations=1), model, 0.5, token_ids(), folder=folder, progress=False)
    return live.peak - live.own


def test_a_search_holds_no_more_in_a_deeper_model(tmp_path):
    two, eight = searching(2, tmp_path / "two"), searching(8, tmp_path / "eight")
    assert eight < 1.2 * two
    assert not list(tmp_path.glob("*/shelf_*"))


def test_candidates_are_what_pruning_decides_and_are_taken_up_again(tmp_path):
    model, ids = language_model(), list(token_ids())
    adapter = weight_adapter(model)
    targets, solved = adapter.targets("channels"), []
    before = copy.deepcopy(model)

    def solve(target, signals, budget):
        solved.append(target.name)
        return SearchedChannels().decided(target, signals, budget)

    def candidates():
        probe = ModelProbe(adapter, targets, ids, work=Work(tmp_path))
        levels = {t.name: [Budget(0.25), Budget(0.5)] for t in targets}
        statistics = {"channels": {"input_norm": InputNorm}}
        return probe, probe.candidates(levels, solve, statistics, dict.fromkeys(levels, 1))

    probe, found = candidates()
    assert len(solved) == 6 and same(model, before)
    pruned = copy.deepcopy(model)  # sequentially, at half
    plan = prune(SearchedChannels(generations=0), pruned, 0.5, ids, progress=False)
    for target in targets:
        assert torch.equal(found.decision(target.name, 1).mask, plan.decision(target).mask)
        assert found.decision(target.name, 0).kept == 10 and not found.decision(target.name, 0).remove
    with torch.no_grad(), probe.trial(found.decisions({t.name: 1 for t in targets})):
        assert torch.allclose(model(token_ids(2)).logits, pruned(token_ids(2)).logits, atol=1e-6)
        with pytest.raises(PrunelabError, match="one trial at a time"), probe.trial([]):
            pass
    assert same(model, before)
    candidates()
    assert len(solved) == 6, "they were on disk"


def test_silenced_channels_are_counted_as_zeros_and_come_back_from_disk(tmp_path):
    model = language_model()
    plan = prune(SearchedChannels(), model, 0.5, token_ids(), progress=False)
    report, zeros = plan.report, sum(int((b.mlp.down_proj.weight == 0).sum()) for b in model.model.layers)
    assert report.removed == 0 and report.zeroed == zeros > 0 and report.parameters == report.dense_parameters
    assert not plan.removes and plan.header["stock"]
    plan.save(tmp_path)
    again = language_model()
    WeightPlan.load(tmp_path).apply(again)
    assert same(model, again)


# -- learned parts ---------------------------------------------------------------------------------------------------


def test_what_was_learned_serves_another_model_of_the_same_width(tmp_path):
    first, deeper = language_model(), language_model(num_hidden_layers=5, seed=3)
    plan = prune(LearnedChannels(), first, 0.5, token_ids(), progress=False)
    plan.save(tmp_path)
    learned = WeightPlan.load(tmp_path).learned
    assert learned.keys() == {"weight", "bias"}
    again = prune(LearnedChannels(steps=10**9), deeper, 0.5, token_ids(), learned=learned, progress=False)
    assert all(torch.equal(again.learned[name], value) for name, value in learned.items()), "not trained again"
    policy = nn.Linear(32, 1)
    policy.load_state_dict(learned)
    up = language_model(num_hidden_layers=5, seed=3).model.layers[4].mlp.up_proj.weight
    ranks = policy(up).flatten().detach()
    kept = again.decision("model.layers.4.mlp").mask
    assert float(ranks[kept].min()) >= float(ranks[~kept].max())
    for wrong, says in ((nn.Linear(31, 1), "other shapes"), ({"weight": torch.zeros(1)}, "other shapes")):
        with pytest.raises(PrunelabError, match=says):
            prune(LearnedChannels(), language_model(), 0.5, token_ids(), learned=wrong, progress=False)
    with pytest.raises(PrunelabError, match="wanda learns nothing"):
        prune(Wanda(), language_model(), 0.5, token_ids(), learned=policy, progress=False)


# -- components ------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """A module of no known family, called by name, that gives no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.time, self.out = nn.Linear(4, 8), nn.Linear(8, 3, bias=False)

    def forward(self, sample, step, context=None):
        hidden = self.conv(sample).movedim(1, -1) + self.time(step)[:, None, None]
        hidden = hidden if context is None else hidden + context.mean()
        return {"sample": self.out(F.silu(hidden)).movedim(-1, 1)}


def pipeline():
    torch.manual_seed(0)
    return {"text": language_model(), "denoiser": Denoiser()}


NOISE = torch.randn(3, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
CALLS = [{"sample": noise, "step": torch.full((1, 4), float(i))} for i, noise in enumerate(NOISE)]


def zeros(module: nn.Module) -> float:
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Linear) and m.out_features != 61]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("method", [Magnitude("row"), Wanda()], ids=repr)
def test_components_have_budgets_of_their_own(method):
    parts = pipeline()
    budget = Budget.by({"text": 0.75, "denoiser": 0.5})
    plan = prune(method, parts, budget, {"text": token_ids(), "denoiser": CALLS}, progress=False)
    assert zeros(parts["text"]) == 0.25 and zeros(parts["denoiser"]) == 0.5
    assert bool((parts["denoiser"].conv.weight != 0).all())
    alone = language_model()
    prune(method, alone, 0.75, token_ids(), progress=False)
    assert same(alone, parts["text"]), "as if it were pruned alone"
    assert plan.report.prunable == sum(t.units for t in plan.targets)


def test_a_components_linears_are_scored_by_what_they_read():
    parts = pipeline()
    prune(Wanda(), parts, 0.5, {"text": token_ids(), "denoiser": CALLS}, progress=False)
    fresh, seen = Denoiser(), []
    fresh.load_state_dict(pipeline()["denoiser"].state_dict())
    fresh.out.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for call in CALLS:
            fresh(**call)
    scores = fresh.out.weight.abs() * torch.stack([x.square().sum(0) for x in seen]).mean(0).sqrt()
    order = scores.argsort(dim=1, stable=True)[:, :4]
    assert bool((parts["denoiser"].out.weight.gather(1, order) == 0).all())


def test_a_pipeline_is_the_holder_of_its_components(tmp_path):
    class Pipeline:
        def __init__(self, parts):
            self.components = {**parts, "tokenizer": object()}

    parts, again = pipeline(), pipeline()
    budget = Budget.parse("denoiser=0.5")
    assert budget == Budget.by({"denoiser": 0.5}) and str(budget) == "denoiser=0.5"
    plan = prune(Magnitude(), Pipeline(parts), budget, progress=False, folder=tmp_path)
    assert zeros(parts["text"]) == 0 and zeros(parts["denoiser"]) >= 0.5
    WeightPlan.load(tmp_path).apply(again)
    assert same(parts["denoiser"], again["denoiser"])
    with pytest.raises(PrunelabError, match=r"name the components to prune .* has text, denoiser"):
        prune(Magnitude(), Pipeline(pipeline()), 0.5, progress=False)
    with pytest.raises(PrunelabError, match="name the components"):
        prune(Magnitude(), pipeline(), Budget.by({"vae": 0.5}), progress=False)
    with pytest.raises(PrunelabError, match="no components by name"):
        prune(Magnitude(), language_model(), Budget.by({"text": 0.5}), progress=False)
    with pytest.raises(PrunelabError, match="needs a calibration set for denoiser"):
        prune(Wanda(), pipeline(), 0.5, {"text": token_ids()}, progress=False)
    with pytest.raises(PrunelabError, match="'domain' is no component"):
        prune(Wanda(), pipeline(), 0.5, {"domain": token_ids()}, progress=False)
    with pytest.raises(PrunelabError, match="is no model"):
        prune(Magnitude(), "llama", 0.5, progress=False)
    assert plan.header["model"].endswith("Pipeline")


def test_one_allocation_reaches_over_components():
    parts = pipeline()
    prune(Magnitude("model"), parts, 0.5, progress=False)
    shares = zeros(parts["text"]), zeros(parts["denoiser"])
    assert shares[0] != shares[1], "the smallest weights of all go, wherever they lie"


def test_an_interrupted_run_over_components_goes_on(tmp_path, monkeypatch):
    whole, resumed = pipeline(), pipeline()
    given = {"calibration": {"text": token_ids(), "denoiser": CALLS}, "progress": False}
    prune(SparseGPT(), whole, 0.5, **given)
    solve, seen = SparseGPT.solve, []

    def crashing(self, target, *rest):
        seen.append(target.block)
        if target.component == "denoiser" and len(seen) < 30:
            raise KeyboardInterrupt
        return solve(self, target, *rest)

    monkeypatch.setattr(SparseGPT, "solve", crashing)
    with pytest.raises(KeyboardInterrupt):
        prune(SparseGPT(), pipeline(), 0.5, **given, folder=tmp_path)
    seen[:] = [0] * 30
    prune(SparseGPT(), resumed, 0.5, **given, folder=tmp_path)
    assert set(seen[30:]) == {3} and all(same(whole[name], resumed[name]) for name in whole)


# -- corpora and objectives ------------------------------------------------------------------------------------------


def test_gradients_are_those_of_one_corpus_and_its_objective():
    model = language_model()
    corpora = {"domain": corpus(triplets(4, 1)), "general": corpus(triplets(3, 2))}
    adapter = weight_adapter(model)
    targets = [t for t in adapter.targets("linear") if t.role == "mlp.up_proj"]
    loss = loss_of(adapter, "contrastive", model)
    got = ModelProbe(adapter, targets, [], corpora=corpora, objective=loss).gradients(
        {"f": MeanSquare}, corpus="domain", batch=2
    )
    want = [torch.zeros(t.shape) for t in targets]
    items = corpora["domain"].items
    for pair in (items[:2], items[2:]):
        q = torch.stack([model.model(input_ids=i["query"][None]).last_hidden_state[0, -1] for i in pair])
        against = [i[name][None] for name in ("positive", "negative") for i in pair]
        others = [model.model(input_ids=ids).last_hidden_state[0, -1] for ids in against]
        cosines = F.cosine_similarity(q[:, None], torch.stack(others)[None], dim=-1)
        model.zero_grad()
        F.cross_entropy(20 * cosines, torch.arange(2)).backward()
        for w, t in zip(want, targets, strict=True):
            w += adapter.parameter(t).grad.square() / 2
    for w, t in zip(want, targets, strict=True):
        assert torch.allclose(got[t.name]["f"], w, rtol=1e-4, atol=1e-9)
    with pytest.raises(PrunelabError, match="no corpus 'medical'; it has 'domain', 'general'"):
        ModelProbe(adapter, targets, [], corpora=corpora).gradients({"f": MeanSquare}, corpus="medical")


def test_an_objective_may_be_a_function_and_labels_are_read():
    ids, labels = token_ids(3), token_ids(3, seed=8)
    model = language_model()
    adapter = weight_adapter(model)
    seen = []
    pairs = corpus([(i[None], t[None]) for i, t in zip(ids, labels, strict=True)])
    with torch.no_grad():
        own = loss_of(adapter, "lm", model)(pairs.items[:1])
        assert torch.allclose(own, model(input_ids=ids[:1], labels=labels[:1]).loss)
        logits = model(input_ids=ids[:1]).logits[0]
        assert torch.allclose(loss_of(adapter, "labels", model)(pairs.items[:1]), F.cross_entropy(logits, labels[0]))

    def objective(given, batch):
        seen.append((given, len(batch)))
        return given(input_ids=batch[0]["query"][None]).logits.square().mean()

    data = {"domain": triplets(3, 0), "general": triplets(2, 1)}
    prune(DomainFisher(), model, 0.5, data, objective=objective, progress=False)
    assert [n for _, n in seen] == [2, 1, 2] and all(given is model for given, _ in seen)
    for name, says in (("contrastive", "query, positive"), ("labels", "pairs of inputs"), ("mse", "is one of")):
        with pytest.raises(PrunelabError, match=says):
            prune(GBLM(), language_model(), 0.5, ids, objective=name, progress=False)


def test_a_decision_may_leave_a_unit_in_its_place():
    model = language_model()
    adapter = weight_adapter(model)
    (target, *_) = adapter.targets("heads")
    adapter.write(target, Decision(torch.tensor([True, False]), remove=False))
    assert bool((model.model.layers[0].self_attn.o_proj.weight[:, 16:] == 0).all())
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)
