"""Stable Diffusion's components: who is pruned by what, edges of the released thresholds, a pipeline of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, prune
from prunelab.methods.sd_pruning import tables
from prunelab.methods.sd_pruning.method import (
    SDPruning,
    above,
    keep_ratios,
    outlier_share,
    signal_to_noise,
    wanda_mask,
)
from tests.contract.references import language_model, token_ids


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, sample, step):
        return self.out((self.conv(sample).movedim(1, -1) + self.time(step)[:, None, None]).relu())


class Pipeline(nn.Module):
    """A module that has components, as our testbed is one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.components = {"text_encoder": language_model(), "unet": Denoiser(), "tokenizer": object()}


def zeros(module: nn.Module) -> float:
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Linear) and m.out_features != 61]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("way", ["magnitude", "wanda", "owl_magnitude", "owl_wanda"])
def test_the_unet_is_pruned_by_magnitude_and_needs_no_calibration(way, tmp_path):
    pipeline, plain = Pipeline(), Pipeline()
    budget = Budget.by({"text_encoder": 0.5, "unet": 0.75})
    given = None if way == "magnitude" else {"text_encoder": token_ids()}
    prune(SDPruning(way=way), pipeline, budget, given, progress=False, folder=tmp_path)
    prune(SDPruning(), plain, budget, progress=False)
    unet, text = (pipeline.components[name] for name in ("unet", "text_encoder"))
    assert torch.equal(unet.time.weight, plain.components["unet"].time.weight)
    assert torch.equal(unet.conv.weight, Pipeline().components["unet"].conv.weight), "convolutions stay"
    assert zeros(unet) == 14 / 56 and zeros(text) == pytest.approx(0.5, abs=0.02)
    assert (way == "magnitude") == all(
        torch.equal(a, b) for a, b in zip(text.parameters(), plain.components["text_encoder"].parameters(), strict=True)
    )
    again = Pipeline()
    WeightPlan.load(tmp_path).apply(again.components)
    assert torch.equal(again.components["unet"].out.weight, unet.out.weight)


def test_components_that_are_named_are_calibrated():
    step, sample = torch.ones(1, 4), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    method = SDPruning(way="wanda", components=("text_encoder", "unet"))
    budget = Budget.by({"text_encoder": 0.5, "unet": 0.5})
    with pytest.raises(PrunelabError, match="calibration set for unet"):
        prune(method, Pipeline(), budget, {"text_encoder": token_ids()}, progress=False)
    calls = [{"sample": sample, "step": step}]
    pipeline = Pipeline()
    prune(method, pipeline, budget, {"text_encoder": token_ids(), "unet": calls}, progress=False)
    assert bool(((pipeline.components["unet"].time.weight == 0).sum(1) == 2).all()), "the same number of each row"


def test_thresholds_take_ties_and_wrap_as_released():
    weight = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
    assert above(weight, 1).tolist() == [[False, False], [False, True]]
    assert above(weight, 0).sum() == 3 and above(weight, -1).sum() == 0
    assert above(weight.half(), -2).tolist() == [[False, False], [False, True]]
    with pytest.raises(PrunelabError, match="no place 4"):
        above(weight, 4)
    model = language_model()
    plan = prune(SDPruning(), model, 1 - 1e-5, progress=False)
    assert plan.report.zeroed == 0, "less than one weight of each matrix"
    with pytest.raises(PrunelabError, match="would remove all weights"):
        prune(SDPruning(wraps=True), language_model(), 1 - 1e-5, progress=False)


def test_shares_follow_outliers_and_have_the_asked_mean():
    found = keep_ratios([0.2, 1.0, 0.6], 0.6, 0.08)
    assert found.tolist() == pytest.approx([0.32, 0.48, 0.40])
    assert np.allclose(keep_ratios([0.5, 0.5], 0.6, 0.08), 0.4), "no difference, no division by it"
    assert outlier_share([torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 9.0]])], 2.5) == 25.0
    assert signal_to_noise([torch.tensor([10.0])], [torch.tensor([1.0])]) == pytest.approx(20.0)
    assert signal_to_noise([torch.ones(2)], [torch.zeros(2)]) == 0.0


def test_budgets_are_shares():
    with pytest.raises(PrunelabError, match="prunes a share"):
        prune(SDPruning(), language_model(), "8count", progress=False)


def test_the_headline_is_met():
    found = {name.rpartition("/")[2]: value["value"] for name, value in tables.recommended().items()}
    assert found["text encoder sparsity"] == pytest.approx(47.5, abs=0.01)
    assert found["overall sparsity with minimal loss"] == pytest.approx(38.5, abs=0.05)


def test_linears_of_the_published_components_are_counted():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=96, block_out_channels=tables.LEVELS, cross_attention_dim=tables.CONTEXT,
            attention_head_dim=[5, 10, 20, 20], use_linear_projection=True,
        )  # fmt: skip
    sizes = [m.weight.numel() for m in unet.modules() if isinstance(m, nn.Linear)]
    assert {size: sizes.count(size) for size in sizes} == tables.unet_linears()
    assert sum(p.numel() for p in unet.parameters()) == tables.PARAMETERS["unet"]


def test_the_smallest_weights_can_be_spared_and_patterns_kept():
    def gone(method, budget):
        torch.manual_seed(0)
        model = Denoiser()
        before = {n: w.clone() for n, w in model.state_dict().items()}
        prune(method, model, budget, progress=False)
        return {n: (w == 0) & (before[n] != 0) for n, w in model.state_dict().items()}, before

    masks, before = gone(SDPruning(spare=0.25), 0.5)
    size, sizes = before["time.weight"].abs(), before["time.weight"].abs().flatten().sort().values
    # As released, the pair of thresholds are the weights at both places, and both go.
    assert torch.equal(masks["time.weight"], (size >= sizes[8 - 1]) & (size <= sizes[16 - 1]))
    model = language_model()
    prune(SDPruning(), model, "2:4", progress=False)
    assert bool((model.model.layers[0].mlp.up_proj.weight.unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all())
    with pytest.raises(PrunelabError, match="not with OWL"):
        SDPruning(way="owl_wanda", spare=0.1)
    with pytest.raises(PrunelabError, match="without OWL a pattern"):
        prune(SDPruning(way="owl_magnitude"), language_model(), "2:4", token_ids(), progress=False)
    scores = torch.arange(12.0).view(2, 6)
    assert wanda_mask(scores, 0.5, 1 / 3).tolist() == [[True, True, False, True, True, True]] * 2
