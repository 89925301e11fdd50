"""GBLM-Pruner against autograd by hand, finite differences and a plain run of Wanda's loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune
from prunelab.common.weights.targets import Target
from prunelab.methods.gblm.method import GBLM, GradientNorm, importance
from prunelab.methods.wanda.method import Wanda
from tests.contract.references import language_model, token_ids


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Loss gradients [N, out, in] of every linear of the blocks, one a sequence, by plain autograd."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    found: dict[str, list[Tensor]] = {name: [] for name in linears}
    for sequence in ids:
        loss = model(input_ids=sequence[None], labels=sequence[None]).loss
        for name, gradient in zip(
            linears, torch.autograd.grad(loss, [m.weight for m in linears.values()]), strict=True
        ):
            found[name].append(gradient)
    return {name: torch.stack(all_of) for name, all_of in found.items()}


@torch.no_grad()
def pruned_plainly(model: nn.Module, ids: Tensor, norms: dict[str, Tensor], alpha: float) -> None:
    """The paper's criterion the long way: rows sorted, the whole pruned model run anew for every block."""
    for index, block in enumerate(model.model.layers):
        linears = {f"model.layers.{index}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        squares = {name: torch.zeros(m.in_features) for name, m in linears.items()}
        handles = []
        for name, m in linears.items():

            def note(module: nn.Module, args: tuple[Tensor], total: Tensor = squares[name]) -> None:
                total += args[0][0].square().sum(0) / len(ids)

            handles.append(m.register_forward_pre_hook(note))
        for sequence in ids:
            model(sequence[None])
        for handle in handles:
            handle.remove()
        for name, m in linears.items():
            scores = m.weight.abs() * squares[name].sqrt() + m.weight.abs() * alpha * norms[name]
            m.weight.scatter_(1, scores.argsort(dim=1, stable=True)[:, : m.in_features // 2], 0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_whole_method_by_a_plain_run(family, norm):
    ids = token_ids()
    ours, plain = language_model(family), language_model(family)
    by_sequence = gradients(language_model(family), ids)
    norms = {n: g.abs().sum(0) if norm == "l1" else g.square().sum(0).sqrt() for n, g in by_sequence.items()}
    prune(GBLM(norm, 30.0, half=False), ours, 0.5, ids, progress=False)
    pruned_plainly(plain, ids, norms, 30.0)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_gradient_term_is_the_first_order_change_of_the_loss():
    """|W G| of one sequence is how fast the loss changes as a weight shrinks, by finite differences."""
    model, ids = language_model(num_hidden_layers=1).double(), token_ids(1)
    linear = model.model.layers[0].mlp.up_proj
    norm = gradients(model, ids)["model.layers.0.mlp.up_proj"].abs().sum(0)
    scores = importance(linear.weight.detach(), None, norm)

    def loss() -> float:  # transformers' own rounds the logits to float32
        logits = model(input_ids=ids).logits[0, :-1]
        return float(nn.functional.cross_entropy(logits, ids[0, 1:]))

    with torch.no_grad():
        for place in scores.flatten().topk(5).indices.tolist():
            entry, step = linear.weight.view(-1)[place : place + 1], 1e-2
            before, ends = float(entry), []
            for factor in (1 - step, 1 + step):
                entry.fill_(before * factor)
                ends.append(loss())
            entry.fill_(before)
            found = abs(ends[1] - ends[0]) / (2 * step)
            assert float(scores.flatten()[place]) == pytest.approx(found, rel=0.01)


def test_norms_over_sequences_are_sums_and_not_means():
    g = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    for norm, want in (("l1", g.abs().sum(0)), ("l2", g.square().sum(0).sqrt())):
        for half, tolerance in ((False, 1e-6), (True, 2e-3)):
            accumulator = GradientNorm(Target("linear", "w", 0, "w", (3, 4)), norm, 10.0, half)
            for gradient in g:
                accumulator.update(gradient)
            value = accumulator.value()
            assert value.dtype == (torch.float16 if half else torch.float32)
            assert torch.allclose(value.float(), 10 * want, rtol=tolerance)


def test_the_gradient_term_vanishes_with_alpha():
    ids, models = token_ids(), [language_model() for _ in range(3)]
    for model, method in zip(
        models, (Wanda(), GBLM(scale=1e-12, half=False), GBLM(scale=1e4, half=False)), strict=True
    ):
        prune(method, model, 0.5, ids, progress=False)
    masks = [model.model.layers[0].mlp.up_proj.weight != 0 for model in models]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_options_rank_as_they_say():
    weight, activation = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([4.0, 9.0, 16.0])
    gradient = torch.tensor([[10.0, 1.0, 100.0]])
    assert importance(weight, activation, gradient).tolist() == [[12, 8, 312]]
    assert importance(weight, None, gradient).tolist() == [[10, 2, 300]]
    assert torch.allclose(importance(weight, activation, gradient, inverse=True), torch.tensor([[0.2, 6.0, 0.12]]))
    ids, plans = token_ids(), []
    for method in (GBLM(), GBLM(inverse=True), GBLM(gradient_only=True)):
        plans.append(prune(method, language_model(), "2:4", ids, progress=False))
        assert all(bool((d.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()) for _, d in plans[-1].decisions())
    assert plans[0].diff(plans[1]) != "the plans are equal" != plans[0].diff(plans[2])


def test_experts_have_gradients_of_their_own():
    ids = token_ids()
    plan = prune(GBLM(), language_model("mixtral"), 0.5, ids, progress=False)
    experts = [target for target in plan.targets if target.expert >= 0]
    assert len(experts) == 3 * 4 * 3
    assert plan.report.sparsity == pytest.approx(0.5)


def test_an_interrupted_run_keeps_its_gradients(tmp_path, monkeypatch):
    whole, resumed, ids = language_model(), language_model(), token_ids()
    prune(GBLM(), whole, 0.5, ids, progress=False)
    solve, calls = GBLM.solve, []

    def crash(self, target, *rest):
        calls.append(target)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return solve(self, target, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(GBLM, "solve", crash)
        with pytest.raises(KeyboardInterrupt):
            prune(GBLM(), language_model(), 0.5, ids, folder=tmp_path, progress=False)
    with monkeypatch.context() as patch:  # the dense model is gone by then; its gradients must come from the folder
        patch.setattr(GBLM, "precompute", lambda self, probe: pytest.fail("gradients were taken again"))
        prune(GBLM(), resumed, 0.5, ids, folder=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_bad_options_and_overflow_are_named():
    for wrong in ({"scale": 0.0}, {"inverse": True, "gradient_only": True}):
        with pytest.raises(PrunelabError, match="gblm"):
            GBLM(**wrong)
    with pytest.raises(PrunelabError, match=r"exceed float16; set half=False"):
        prune(GBLM(scale=1e8), language_model(), 0.5, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="needs a calibration set"):
        prune(GBLM(gradient_only=True), language_model(), 0.5, progress=False)
