"""Token reduction as a matrix: the reconstruction's limits, and every other token reducer as a special case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Mix, Plan, Site
from prunelab.common.core.selection import bipartite_matching
from prunelab.common.models import loading
from prunelab.common.tokens import match
from prunelab.common.tokens.role import TokenPruner
from prunelab.methods.token_transforming.method import TokenTransforming, cosine, expand, mass, transforming_matrix
from tests.contract.families import SERVICES
from tests.contract.references import images, signals, vit

GOLDEN = sorted((Path(__file__).parents[2] / "golden/tome").glob("bsm_*.npz"))
SYNTHETIC = {"hidden", "queries", "keys", "values", "attention_logits", "attention", "cls_row", "last_row", "received",
             "sizes"}  # fmt: skip
READINGS = pytest.mark.parametrize("softmax", ["tokens", "anchors"])
SITE = Site(2)


def reducers() -> list[TokenPruner]:
    """Every registered token pruner that plans from a plain sequence and needs no learned parts."""
    info = signals()[0].info
    pruners = [c() for c in registry.load().values() if issubclass(c, TokenPruner)]
    return [m for m in pruners if m.build(info) is None and all(m.requires(s) <= SYNTHETIC for s in m.sites(info))]


def dense(method: TokenPruner, budget: Budget, **shape: int) -> tuple[Plan, torch.Tensor]:
    """A plan on synthetic signals and its matrix."""
    given_signals, _ = signals(**shape)
    given_signals.services = SERVICES
    plan = method.plan(method.sites(given_signals.info)[0], given_signals, budget)
    return plan, plan.reduce.matrix(given_signals.prunable.shape[1])


# -- every reducer is a matrix -----------------------------------------------------------------------------------------


def test_the_house_reducers_are_among_them():
    house = {"zero_tprune", "tome", "ats", "cls_attention", "random_drop", "token_transforming"}
    assert house <= {m.name for m in reducers()}


@pytest.mark.parametrize("method", reducers(), ids=lambda m: m.name)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 1.0])
def test_every_reducer_is_a_matrix_product(method, ratio):
    plan, matrix = dense(method, Budget(ratio), patches=20)
    x = torch.randn(2, 21, 5, generator=torch.Generator().manual_seed(9))
    real = torch.ones(matrix.shape[:2], dtype=torch.bool) if plan.reduce.valid is None else plan.reduce.valid
    assert torch.allclose((matrix @ x)[real], plan.reduce.apply(x)[real], atol=1e-6)
    assert torch.allclose(matrix.sum(-1), real.float(), atol=1e-6), "rows of real outputs sum to 1"
    assert bool((matrix >= 0).all())


@pytest.mark.parametrize("method", reducers(), ids=lambda m: m.name)
def test_the_three_forms_of_the_matrix(method):
    """Pruning: one-hot rows. Merging: disjoint rows. Transforming: a token in several rows."""
    if method.sites(signals()[0].info)[0].where == "projected":
        pytest.skip("before a language model maps are also resized, and merging may drop tokens")
    plan, matrix = dense(method, Budget(0.6), patches=20)
    uses = (matrix > 0).sum(1)  # [B, N] outputs a token contributes to
    if method.name == "token_transforming":
        assert bool((uses[:, 1:] == 12).all())
        assert bool((uses[:, 0] == 1).all()), "the class token goes nowhere else"
    else:
        assert bool((uses <= 1).all())
    if isinstance(plan.reduce, Gather):
        assert set(matrix.unique().tolist()) <= {0.0, 1.0}
        assert bool(((matrix > 0).sum(-1) <= 1).all())
    elif method.name != "token_transforming":
        assert bool((uses == 1).all()), "merging loses no token"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_tome_as_a_matrix_gives_the_official_output(path):
    case = {name: torch.from_numpy(value) for name, value in np.load(path).items() if value.dtype.kind in "fiub"}
    x = case["in_x"]
    matching = bipartite_matching(
        case["in_metric"],
        int(case["in_r"]),
        class_token=bool(case["in_class_token"]),
        distill_token=bool(case["in_distill_token"]),
    )
    sizes = case["in_size"].squeeze(-1) if "in_size" in case else torch.ones(x.shape[:2])
    matrix = matching.mix(sizes).matrix(x.shape[1])
    assert torch.allclose(matrix @ x, case["out_x"], atol=1e-5)
    assert torch.allclose(mass(matrix, sizes), case["out_size"].squeeze(-1), atol=1e-4)
    assert torch.allclose(Mix.from_matrix(matrix).apply(x), case["out_x"], atol=1e-5)


def test_there_are_tome_cases():
    assert len(GOLDEN) >= 5


# -- the transforming matrix -------------------------------------------------------------------------------------------


def setting(tokens: int = 12, anchors: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity [2, K, N] of some tokens' features to all, and the anchors' positions [2, K]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 6, generator=g)
    index = torch.stack([torch.randperm(tokens, generator=g)[:anchors].sort().values for _ in range(2)])
    return cosine(Gather(index).apply(x), x), index


@READINGS
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(2, 30), share=st.floats(0.05, 1), temperature=st.floats(0.05, 100), seed=st.integers(0, 99))
def test_rows_sum_to_one_and_mass_is_kept(softmax, tokens, share, temperature, seed):
    similarity, _ = setting(tokens, max(1, int(share * tokens)), seed)
    sizes = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)) + 0.5
    matrix = transforming_matrix(similarity, temperature, softmax, sizes)
    assert torch.allclose(matrix.sum(-1), torch.ones(matrix.shape[:2]), atol=1e-5)
    assert bool((matrix >= 0).all())
    used = sizes * (matrix.sum(1) > 0)
    assert torch.allclose(mass(matrix, sizes).sum(1), used.sum(1), rtol=1e-4)


def test_cold_over_tokens_is_pruning_to_the_anchors():
    similarity, index = setting()
    assert torch.allclose(transforming_matrix(similarity, 1e-6), Gather(index).matrix(12), atol=1e-6)


def test_cold_over_anchors_is_merging_with_the_nearest_anchor():
    similarity, _ = setting()
    matrix = transforming_matrix(similarity, 1e-6, "anchors")
    nearest = torch.nn.functional.one_hot(similarity.argmax(1), 5).transpose(1, 2).float()  # [B, K, N]
    assert torch.allclose(matrix, nearest / nearest.sum(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(mass(matrix, torch.ones(2, 12)), nearest.sum(-1), atol=1e-5)


@READINGS
@pytest.mark.parametrize("temperature", [1e6, float("inf")])
def test_hot_is_averaging(softmax, temperature):
    matrix = transforming_matrix(setting()[0], temperature, softmax)
    assert torch.allclose(matrix, torch.full_like(matrix, 1 / 12), atol=1e-5)


@READINGS
def test_a_token_of_size_three_counts_as_three_copies(softmax):
    similarity, _ = setting()
    sizes = torch.ones(2, 12)
    sizes[:, 7] = 3
    copies = torch.cat([similarity, similarity[..., 7:8], similarity[..., 7:8]], -1)
    three = transforming_matrix(copies, 0.3, softmax)
    one = transforming_matrix(similarity, 0.3, softmax, sizes)
    assert torch.allclose(one[..., 7], three[..., [7, 12, 13]].sum(-1), atol=1e-6)
    assert torch.allclose(mass(one, sizes), mass(three, torch.ones(2, 14)), atol=1e-5)


def test_the_matrix_is_float32_whatever_the_features_are():
    x = torch.randn(1, 6, 4).bfloat16()
    assert transforming_matrix(cosine(x, x), 0.1).dtype == torch.float32


# -- expansion ---------------------------------------------------------------------------------------------------------


def test_expansion_undoes_what_can_be_undone():
    g = torch.Generator().manual_seed(1)
    similarity, index = setting()
    y = torch.randn(2, 5, 3, generator=g)
    matrix = transforming_matrix(similarity, 0.3)
    assert torch.allclose(matrix @ expand(y, matrix, "pseudo-inverse"), y, atol=1e-4)

    pruning = Gather(index).matrix(12)
    for inverse in ("transpose", "pseudo-inverse"):
        back = expand(y, pruning, inverse)  # type: ignore[arg-type]
        assert torch.allclose(Gather(index).apply(back), y, atol=1e-5)
        assert torch.allclose(back.abs().sum(), y.abs().sum(), rtol=1e-5), "places that were dropped are zero"


def test_expansion_of_a_merge_gives_each_token_its_group():
    similarity, _ = setting()
    merge = transforming_matrix(similarity, 1e-6, "anchors")
    y = torch.randn(2, 5, 3)
    for inverse in ("transpose", "pseudo-inverse"):
        back = expand(y, merge, inverse)  # type: ignore[arg-type]
        assert torch.allclose(back, Gather(similarity.argmax(1)).apply(y), atol=1e-4)


# -- the method --------------------------------------------------------------------------------------------------------


@READINGS
@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("informative", ["class_attention", "received_attention"])
@pytest.mark.parametrize("feature", ["keys", "hidden"])
def test_every_variant_runs_on_a_model(softmax, proportional, informative, feature):
    method = TokenTransforming((1, 4), 0.2, softmax, informative, feature, proportional)
    model = vit()
    with torch.no_grad(), apply(method, model, 0.5) as handle:
        assert torch.isfinite(model(images())).all()
        assert [attention for attention, _ in handle.report().tokens] == [17, 17, 9, 9, 9, 5, 5, 5, 5]


def test_a_model_without_class_token_uses_received_attention():
    model = vit("average")
    with pytest.raises(PrunelabError, match="no class token"), apply(TokenTransforming(), model, 0.5):
        pass
    with torch.no_grad(), apply(TokenTransforming((1, 4), informative="received_attention"), model, 0.5):
        assert torch.isfinite(model(images())).all()


def test_anchors_are_what_the_class_token_attends_to():
    given_signals, _ = signals(patches=20)
    anchors = Gather(given_signals.cls_row.mean(1)[:, 1:].topk(10).indices.sort(-1).values + 1)
    matrix = (
        TokenTransforming(temperature=1e-6, softmax="tokens").plan(SITE, given_signals, Budget(0.5)).reduce.matrix(21)
    )
    assert torch.allclose(matrix[:, 1:], anchors.matrix(21), atol=1e-6)


@READINGS
def test_protected_tokens_are_carried_through_unchanged(softmax):
    given_signals, parts = signals(patches=20, special=3)
    reduce = TokenTransforming(temperature=1.0, softmax=softmax).plan(SITE, given_signals, Budget(0.5)).reduce
    assert torch.equal(reduce.apply(parts["hidden"])[:, :3], parts["hidden"][:, :3])
    assert bool((reduce.matrix(23)[:, 3:, :3] == 0).all())


@READINGS
def test_a_sample_that_keeps_everything_is_untouched_beside_longer_ones(softmax):
    given_signals, parts = signals(patches=8)
    given_signals.valid = torch.ones(2, 9, dtype=torch.bool)
    given_signals.valid[0, 5:] = False  # sample 0 has 4 patches, sample 1 has 8
    given_signals.prunable = given_signals.prunable & given_signals.valid
    reduce = TokenTransforming(softmax=softmax).plan(SITE, given_signals, Budget(4, "count")).reduce
    x = parts["hidden"]
    assert torch.equal(reduce.apply(x)[0], x[0, :5])
    assert not torch.allclose(reduce.apply(x)[1, 1:], x[1, 1:5])
    assert torch.isfinite(reduce.apply(x)).all()


def test_mass_follows_through_the_sites():
    method, totals = TokenTransforming((1, 4), proportional=True), []
    planned = TokenTransforming.plan

    def spy(self, site, given_signals, budget):
        plan = planned(self, site, given_signals, budget)
        totals.append(given_signals.state["mass"].sum(1))
        assert torch.allclose(plan.key_bias, given_signals.state["mass"].log())
        return plan

    model = vit()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), apply(method, model, 0.5):
        patch.setattr(TokenTransforming, "plan", spy)
        model(images())
    assert len(totals) == 2
    assert torch.allclose(torch.stack(totals), torch.full((2, 3), 17.0), rtol=1e-5), "16 patches and the class token"


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_makes_no_sense_is_refused(temperature):
    with pytest.raises(PrunelabError, match="a number above 0"):
        TokenTransforming(temperature=temperature)


def test_the_cost_of_the_headline_row():
    model = loading.architecture({"library": "timm", "name": "deit_small_patch16_224"})
    budget = match.match(TokenTransforming(), model, Budget(0.6, "cost"))
    with apply(TokenTransforming(), model, budget) as handle:
        assert handle.report().saving == pytest.approx(0.4, abs=0.005)
