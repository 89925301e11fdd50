"""Codes: grids, rounding, compensation, packing; budgets in bits; rotations; tokens weighed by attention."""

from __future__ import annotations

import copy

import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.accumulators import Accumulators
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.calibration import Stream
from prunelab.common.weights.obs import falling, inverse_factor, sweep
from prunelab.common.weights.plan import packed, packed_codes, unpacked, unpacked_codes
from prunelab.common.weights.quantisation import Quantiser, gptq, rounded
from prunelab.common.weights.targets import Accumulator, Decision, Observation, Target
from prunelab.methods.wanda.method import Wanda
from tests.contract.references import language_model, token_ids
from tests.contract.weights_references import NearestCodes, RotatedCodes


def weight(rows: int = 6, columns: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [0, 5, 8])
def test_rounding_errs_by_half_a_step_at_most_and_knows_zero(bits, symmetric, group):
    w = weight()
    code = rounded(w, Quantiser(bits, symmetric, group))
    step = code.scale.repeat_interleave(code.group, 1)[:, :20]
    inside = (w < w.abs().amax(1, keepdim=True)) | (not symmetric)  # the last positive step of a symmetric grid is cut
    assert bool((((code.dense() - w).abs() <= step / 2 + 1e-6) | ~inside | (symmetric & (w > 0))).all())
    assert int(code.codes.max()) < 2**bits
    assert torch.equal(rounded(torch.zeros(2, 3), Quantiser(bits, symmetric)).dense(), torch.zeros(2, 3))


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    w = weight()
    assert torch.allclose(rounded(w, Quantiser(1)).dense(), w.sign() * w.abs().mean(1, keepdim=True))


def test_a_searched_grid_is_never_worse_and_fits_outliers_less():
    w = weight(6, 400)
    w[:, 0] = 6
    plain, searched = (rounded(w, Quantiser(3, search=s, power=2.0)).dense() for s in (False, True))
    assert bool(((searched - w).square().sum(1) <= (plain - w).square().sum(1) + 1e-5).all())
    assert float((searched - w).square().sum()) < 0.9 * float((plain - w).square().sum())


def test_compensation_is_nearest_rounding_under_a_diagonal_hessian_and_better_otherwise():
    w, x = weight(), weight(200, 20, seed=1) @ weight(20, 20, seed=2)
    quantiser = Quantiser(3)
    alone = gptq(w, torch.eye(20), quantiser)
    assert torch.equal(alone.codes, rounded(w, quantiser).codes)
    hessian = x.T @ x
    nearest = ((rounded(w, quantiser).dense() - w) @ x.T).square().sum()
    order = hessian.diagonal().argsort(descending=True)
    for columns, factor in (
        (None, inverse_factor(hessian, 0.01)),
        (order, inverse_factor(hessian[order][:, order], 0.01)),
    ):
        for width in (7, 128):
            code = gptq(w, factor, quantiser, width, columns)
            assert ((code.dense() - w) @ x.T).square().sum() < 0.8 * nearest


def test_a_sweep_that_settles_nothing_changes_nothing():
    class Same:
        ahead = None

        def enter(self, columns, weight, diagonal): ...

        def settle(self, column, block, diagonal, at):
            return block[:, at]

    w = weight()
    assert torch.equal(sweep(w, inverse_factor(w.T @ w, 0.1), 8, Same()), w)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_to_their_bits(bits):
    codes = torch.randint(2**bits, (5, 13), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stored = packed_codes(codes, bits)
    assert len(stored) == -(-65 * bits // 8)
    assert torch.equal(unpacked_codes(stored, bits, (5, 13)), codes)
    code = rounded(weight(), Quantiser(bits, group=6))
    mask = weight(seed=1) > 0
    again = unpacked(Target("linear", "x", 0, "x", (6, 20)), packed(Decision(mask, code=code)))
    assert torch.equal(again.mask, mask) and again.code is not None and torch.equal(again.code.dense(), code.dense())
    assert (again.code.bits, again.code.group, again.code.symmetric) == (bits, 6, False)


def test_budgets_in_bits():
    assert Budget.parse("3bits") == Budget(3, "bits") and str(Budget(2.5, "bits")) == "2.5bits"
    for method, budget, says in (
        (Wanda(), Budget(3, "bits"), "wanda takes a budget in what stays, not bits"),
        (NearestCodes(), Budget(0.5), "takes a budget in bits a weight, such as 3bits"),
        (NearestCodes(), Budget(9, "bits"), "1 to 8 whole bits, not 9bits"),
        (RotatedCodes(), Budget(0, "bits"), "keep more"),
    ):
        with pytest.raises(PrunelabError, match=says):
            prune(method, language_model(), budget, token_ids(), progress=False)


def test_a_report_counts_packed_bytes_and_an_average_is_met():
    model = language_model()
    linear = sum(t.units for t in weight_adapter(model).targets("linear"))
    dense = sum(p.numel() for p in model.parameters())
    plan = prune(NearestCodes(8), model, Budget(4, "bits"), progress=False)
    want = 4 * (dense - linear) + sum(d.code.bytes for _, d in plan.decisions())
    assert plan.report.bytes == want and plan.report.dense_bytes == 4 * dense and plan.report.zeroed == 0
    assert plan.report.bits == pytest.approx(4 + 20 / 8, abs=0.05)  # a group of 8 shares 16 + 4 bits
    assert "a prunable parameter" in str(plan.report)
    plan = prune(NearestCodes(), language_model(), Budget(2 + 1 / 3, "bits"), progress=False)
    assert {(t.block, d.code.bits) for t, d in plan.decisions()} == {(0, 2), (1, 2), (2, 3)}


@pytest.mark.parametrize("family", ["llama", "llama_mha", "qwen2", "qwen3", "mixtral", "olmoe", "qwen2_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_computes_the_same(family, tied):
    model = language_model(family, tie_word_embeddings=tied)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    turned, ids = copy.deepcopy(model), token_ids()
    adapter, rng = weight_adapter(turned), torch.Generator().manual_seed(0)
    rotations = {n: torch.linalg.qr(torch.randn(s, s, generator=rng)).Q for n, s in adapter.widths().items()}
    assert set(rotations) == ({"residual"} if family == "olmoe" else {"residual", "values"})
    adapter.rotate(rotations)
    with torch.no_grad():
        a, b = model(ids).logits, turned(ids).logits
        assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(a.abs().max()))
    assert not torch.allclose(
        model.model.layers[0].mlp.parameters().__next__(), next(turned.model.layers[0].mlp.parameters())
    )
    assert bool((turned.model.norm.weight == 1).all()) and model.config.tie_word_embeddings == tied


def test_what_cannot_be_rotated_is_refused():
    from tests.contract.families import WEIGHT_FAMILIES

    for family in ("gemma2", "gpt2", "t5"):
        adapter = weight_adapter(WEIGHT_FAMILIES[family]())
        assert adapter.widths() == {}
        with pytest.raises(PrunelabError, match="no rotation"):
            adapter.rotate({"residual": torch.eye(32)})
    adapter = weight_adapter(language_model())
    with pytest.raises(PrunelabError, match="not orthogonal"):
        adapter.rotate({"residual": 2 * torch.eye(32)})
    with pytest.raises(PrunelabError, match="32 x 32"):
        adapter.rotate({"residual": torch.eye(31)})


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_plan_comes_back_from_disk(family, tied, tmp_path):
    model = language_model(family, tie_word_embeddings=tied)
    plan = prune(RotatedCodes(), model, Budget(3, "bits"), token_ids(), progress=False)
    save_pruned(model, plan, tmp_path)
    ids = token_ids(2, seed=9)
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(load_pruned(tmp_path)(ids).logits, want)
        again = language_model(family, tie_word_embeddings=tied)
        WeightPlan.load(tmp_path / "plan").apply(again)
        assert torch.equal(again(ids).logits, want)


class Received(Accumulator):
    def __init__(self, target: Target) -> None:
        self.seen: list[torch.Tensor] = []

    def update(self, observed: Observation) -> None:
        assert len(observed.received) == len(observed.inputs)
        self.seen.append(observed.received)

    def value(self) -> torch.Tensor:
        return torch.cat(self.seen)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_received_attention_is_that_of_the_eager_model(family, monkeypatch):
    from prunelab.common.weights.adapters import pretrained

    monkeypatch.setattr(pretrained, "QUERIES", 5)  # so that queries come in several pieces
    model, ids = language_model(family), token_ids(1)[0]
    adapter = weight_adapter(model)
    targets = [t for t in adapter.targets("linear") if t.block == 1]

    class Asking:
        def statistics(self, unit):
            return {"received": Received}

    accumulators = Accumulators(Asking(), targets)
    before = model.config._attn_implementation
    with torch.no_grad():
        stream = Stream(adapter, [ids])
        stream.through(0)
        stream.through(1, accumulators.taps(adapter), accumulators.visit)
        model.set_attn_implementation("eager")
        attention = model(ids[None], output_attentions=True).attentions[1]
        model.set_attn_implementation(before)
    want = attention[0].sum((0, 1))
    for target in targets:
        got = accumulators.values(target)["received"]
        if target.expert < 0:
            assert torch.allclose(got, want, atol=1e-5), target.name
        else:
            assert bool(torch.isin(got.round(decimals=4), want.round(decimals=4)).all())


@pytest.mark.parametrize("order", [False, True])
def test_weights_that_went_stay_zero_and_others_make_up_for_them(order):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draws) @ torch.randn(6, 16, generator=draws) + torch.randn(
        400, 16, generator=draws
    )
    weight = torch.randn(8, 16, generator=draws)
    gone = weight.abs() < weight.abs().median()
    pruned = weight.masked_fill(gone, 0)
    hessian = 2 * x.T @ x
    taken = falling(hessian.diagonal()) if order else None
    factor = inverse_factor(hessian if taken is None else hessian[taken][:, taken], 0.01)
    quantiser = Quantiser(3, symmetric=True, group=8)
    code = gptq(pruned, factor, quantiser, 8, taken, static=True, gone=gone)
    assert bool((code.dense()[gone] == 0).all()) and bool((code.dense()[~gone] != 0).any())
    plain = rounded(pruned, quantiser).dense()
    error, nearest = (((w - pruned) @ x.T).square().sum() for w in (code.dense(), plain))
    assert error < nearest
    assert not bool((gptq(pruned, factor, quantiser, 8, taken, static=True).dense()[gone] == 0).all())
