"""DToP: who leaves, and a pruned segmenter that does image by image what it does in a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.backbones.segvit import ATMHead, Prediction, Segmenter, segmenter
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo
from prunelab.common.measures.segment import window_macs
from prunelab.common.tokens.adapters import adapter_for
from prunelab.methods.dtop.figures import exits
from prunelab.methods.dtop.method import DToP, leaving, representatives
from prunelab.methods.random_drop.method import RandomDrop

TINY = {"window": 32, "patch": 4, "channels": 1, "width": 24, "depth": 6, "heads": 3, "stages": (1, 3, 5)}
LAYERS = (1, 3)


def tiny(head: str = "atm", classes: int = 4, **overrides) -> Segmenter:
    """A small random segmenter whose heads disagree from token to token."""
    torch.manual_seed(0)
    model = segmenter(classes=classes, head=head, head_width=12, head_heads=2, head_layers=2, **{**TINY, **overrides})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) * (0.5 if "qkv" in name or name.startswith("heads") else 0.2))
    return model.eval()


def pictures(batch: int = 4, seed: int = 1) -> Tensor:
    """Images of unlike contrast, so that they lose unlike numbers of tokens."""
    x = torch.randn(batch, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.2, 3, batch).view(-1, 1, 1, 1)


def middle(model: Segmenter, x: Tensor) -> float:
    """A threshold that a good part of the tokens passes at the first head."""
    with torch.no_grad():
        return float(model.stages(x)[0].confidence.amax(1).quantile(0.4))


# -- selection -------------------------------------------------------------------------------------------------------


def selected_by_loop(confidence: Tensor, active: Tensor, threshold: float, keep: int) -> Tensor:
    """The rule as the paper words it: image by image, class by class, token by token."""
    gone = torch.zeros_like(active)
    for b in range(len(confidence)):
        best, label = confidence[b].max(-1)
        for c in range(confidence.shape[-1]):
            mine = [n for n in range(len(best)) if active[b, n] and best[n] > threshold and label[n] == c]
            for n in sorted(mine, key=lambda n: -float(best[n]))[keep:]:
                gone[b, n] = True
    return gone


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 30), classes=st.integers(1, 6), keep=st.integers(1, 6),
    threshold=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_selection_equals_the_loop(batch, tokens, classes, keep, threshold, seed):
    g = torch.Generator().manual_seed(seed)
    confidence = torch.rand(batch, tokens, classes, generator=g)
    active = torch.rand(batch, tokens, generator=g) < 0.8
    want = selected_by_loop(confidence, active, threshold, keep)
    assert torch.equal(leaving(confidence, active, threshold, keep), want)


def test_feature_map_smaller_than_the_tokens_kept():
    confidence = torch.full((1, 4, 3), 0.99)
    assert not leaving(confidence, torch.ones(1, 4, dtype=torch.bool), 0.9, keep=5).any()


def test_a_grid_that_is_all_sure_keeps_one_token_as_key():
    confidence = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(0)) * 0.01 + 0.98
    active = torch.ones(2, 9, dtype=torch.bool)
    gone = leaving(confidence, active, 0.5, keep=0)
    assert gone.sum(1).tolist() == [8, 8]
    assert torch.equal((~gone).float().argmax(1), confidence.amax(-1).argmin(1)), "the least confident one stays"


def test_limit_lets_the_surest_others_leave():
    confidence = torch.tensor([[0.1, 0.5, 0.3, 0.95, 0.96, 0.7]]).unsqueeze(-1)
    active = torch.ones(1, 6, dtype=torch.bool)
    kept = ~leaving(confidence, active, 0.9, keep=1, limit=torch.tensor([3]))
    assert kept[0].tolist() == [True, False, True, False, True, False], "0.96 for context, then the least sure two"
    assert (~leaving(confidence, active, 0.9, keep=1, limit=torch.tensor([0]))).sum() == 1


def test_ties_go_to_the_earlier_token():
    best, label = torch.full((1, 5), 0.9), torch.zeros(1, 5, dtype=torch.long)
    assert (
        representatives(best, label, torch.ones(1, 5, dtype=torch.bool), 2, 2)[0].tolist() == [True] * 2 + [False] * 3
    )


# -- the pruned network ----------------------------------------------------------------------------------------------


def image_by_image(model: Segmenter, x: Tensor, threshold: float, keep: int, presence: str) -> Prediction:
    """The released procedure in its plainest form: one image, the tokens that are left, no padding and no mask."""
    masks, known = [], []
    vit = model.backbone
    for image in x:
        tokens = vit._pos_embed(vit.patch_embed(image[None]))
        here = torch.arange(tokens.shape[1])
        canvas = torch.zeros(model.classes, len(here))
        there = torch.zeros(model.classes, len(here))
        for layer, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if layer not in model.head_blocks:
                continue
            said = model.heads[model.head_blocks.index(layer)](tokens)
            canvas[:, here] = said.masks[0]
            if said.presence is not None:
                there[:, here if presence == "exit" else slice(None)] = said.presence[0]
            if layer != model.head_blocks[-1]:
                confidence = said.confidence.transpose(1, 2)
                active = torch.ones(1, len(here), dtype=torch.bool)
                stays = ~selected_by_loop(confidence, active, threshold, keep)[0]
                tokens, here = tokens[:, stays], here[stays]
        masks.append(canvas)
        known.append(there)
    said_presence = None if said.presence is None else torch.stack(known)
    return Prediction(torch.stack(masks), said_presence)


@pytest.mark.parametrize("presence", ["last", "exit"])
@pytest.mark.parametrize("head", ["atm", "setr"])
def test_batch_equals_the_loop_over_images(head, presence):
    model, x = tiny(head), pictures()
    model.presence = presence
    threshold = middle(model, x)
    with torch.no_grad():
        want = model.maps(image_by_image(model, x, threshold, 2, presence), (32, 32))
        with apply(DToP(threshold, keep=2, layers=LAYERS), model, 1.0) as handle:
            got = model(x)
        counts = [(places >= 0).sum(1).tolist() for _, places in handle.kept()]
    assert len(set(counts[0])) > 1, "the images must keep unlike numbers of tokens for this to mean anything"
    assert sum(counts[1]) < sum(counts[0]) < 4 * 64
    assert torch.allclose(got, want, atol=1e-5)


def test_what_left_keeps_the_masks_it_left_with():
    model, x = tiny(), pictures()
    with torch.no_grad():
        dense = model.stages(x)
        with apply(DToP(middle(model, x), layers=LAYERS), model, 1.0) as handle:
            model(x)
            first, second, last = handle.adapter.stages
            kept = [places for _, places in handle.kept()]
    assert torch.allclose(first.masks, dense[0].masks, atol=1e-5), "nothing has left before the first head"
    for b in range(len(x)):
        gone_first = torch.ones(64, dtype=torch.bool)
        gone_first[kept[0][b][kept[0][b] >= 0]] = False
        assert torch.equal(second.masks[b][:, gone_first], first.masks[b][:, gone_first])
        gone = torch.ones(64, dtype=torch.bool)
        gone[kept[1][b][kept[1][b] >= 0]] = False
        assert gone.sum() >= gone_first.sum()
        assert torch.equal(last.masks[b][:, gone], second.masks[b][:, gone])
    assert last.presence.shape[-1] == 1


def test_presence_at_exit_differs_from_the_last_heads():
    model, x = tiny(), pictures()
    with torch.no_grad(), apply(DToP(middle(model, x), layers=LAYERS), model, 1.0):
        released = model(x)
        model.presence = "exit"
        assert not torch.allclose(model(x), released, atol=1e-4)


def test_threshold_one_is_the_dense_network():
    model, x = tiny(), pictures()
    with torch.no_grad():
        dense = model(x)
        with apply(DToP(1.0, layers=LAYERS), model, 1.0) as handle:
            assert torch.equal(model(x), dense)
            report = handle.report()
    assert report.tokens[-1] == (64, 64)
    assert report.macs - report.scoring_macs == pytest.approx(report.dense_macs)


def test_budget_bounds_what_goes_on():
    model, x = tiny(), pictures()
    with torch.no_grad(), apply(DToP(1.0, layers=LAYERS), model, 0.5) as handle:
        model(x)
        assert [(places >= 0).sum(1).tolist() for _, places in handle.kept()] == [[32] * 4, [16] * 4]


def test_model_is_restored_and_the_next_pass_starts_anew():
    model, x = tiny(), pictures()
    method = DToP(middle(model, x), layers=LAYERS)
    with torch.no_grad():
        dense = model(x)
        with apply(method, model, 1.0):
            first = model(x)
            model(pictures(seed=2))
            assert torch.equal(model(x), first)
        assert torch.equal(model(x), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_everything_leaves():
    """Confidence above the threshold everywhere, and no context: one token an image goes on, and the map is whole."""
    model, x = tiny(), pictures()
    with torch.no_grad(), apply(DToP(0.0, keep=0, layers=LAYERS), model, 1.0) as handle:
        assert torch.isfinite(model(x)).all()
        assert [(places >= 0).sum(1).tolist() for _, places in handle.kept()] == [[1] * 4, [1] * 4]


def test_random_exit_keeps_the_budget_and_depends_on_the_seed():
    model, x = tiny(), pictures()
    kept = []
    for seed in (0, 0, 1):
        with torch.no_grad(), apply(RandomDrop(LAYERS, rest="halt"), model, 0.5, seed=seed) as handle:
            model(x)
            kept.append(handle.kept()[0][1])
    assert kept[0].shape[1] == 32 and torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    with torch.no_grad(), apply(RandomDrop(LAYERS, rest="halt"), model, 0.0) as handle:
        assert torch.isfinite(model(x)).all(), "with no token left, the map is what the first head said"
        assert [places.shape[1] for _, places in handle.kept()] == [0, 0]
        assert torch.equal(handle.adapter.stages[-1].masks, handle.adapter.stages[0].masks)


def test_gradients_reach_every_head_through_the_pruned_network():
    model, x = tiny().train(), pictures()
    with apply(DToP(middle(model, x), layers=LAYERS), model, 1.0) as handle:
        model(x)
        sum(said.confidence.sum() for said in handle.adapter.stages).backward()
    for name, p in model.named_parameters():
        assert name.endswith("k.bias") or bool(p.grad.abs().sum() > 0), name


def test_early_heads_are_read_from_the_adapter_while_tokens_leave():
    model, x = tiny(), pictures()
    with torch.no_grad(), apply(DToP(0.0, layers=LAYERS), model, 1.0), pytest.raises(PrunelabError, match="adapter"):
        model.stages(x)


def test_a_class_token_stays_and_makes_no_map():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=4, in_chans=1, num_classes=0, global_pool="", embed_dim=24, depth=6,
                            num_heads=3, class_token=True, final_norm=False)  # fmt: skip
    model, x = Segmenter(vit, [ATMHead(24, 4, 12, 2, 1) for _ in range(3)], (1, 3, 5)).eval(), pictures()
    with torch.no_grad():
        dense = model(x)
        with apply(DToP(1.0, layers=LAYERS), model, 1.0):
            assert torch.equal(model(x), dense)
        with apply(DToP(middle(model, x), keep=1, layers=LAYERS), model, 1.0) as handle:
            assert torch.isfinite(model(x)).all()
            for _, places in handle.kept():
                assert bool((places[:, 0] == 0).all()) and places.shape[1] < 65
            assert handle.adapter.stages[-1].masks.shape == (4, 4, 64)


# -- cost ------------------------------------------------------------------------------------------------------------


def test_cost_of_windows_is_exact_for_every_count():
    model, x = tiny(), pictures()
    with torch.no_grad(), apply(DToP(1.0, layers=LAYERS), model, 0.7) as handle:  # the same counts for all images
        model(x)
        report = handle.report()
        counts = torch.stack([(places >= 0).sum(1) for _, places in handle.kept()], 1)
    total, scoring = window_macs(handle, counts)
    assert total.tolist() == pytest.approx([report.macs] * 4)
    assert scoring.tolist() == pytest.approx([report.scoring_macs] * 4)
    with torch.no_grad(), apply(RandomDrop(LAYERS, rest="halt"), model, 0.7) as handle:
        model(x)
    same, _ = window_macs(handle, counts)
    assert same.tolist() == pytest.approx(total.tolist()), "the control costs as much at the same counts"


def test_mean_cost_is_not_the_cost_of_the_mean_count():
    model = tiny()
    with torch.no_grad(), apply(DToP(layers=LAYERS), model, 1.0) as handle:
        model(pictures())
    few, many, between = (float(window_macs(handle, torch.tensor([[n, n]]))[0]) for n in (4, 64, 34))
    assert (few + many) / 2 > between


def test_heads_to_leave_by_are_paid_for():
    model, x = tiny(), pictures()
    with torch.no_grad(), apply(DToP(middle(model, x), layers=LAYERS), model, 1.0) as handle:
        with pytest.raises(PrunelabError, match="run the model first"):
            handle.report()
        model(x)
        report = handle.report()
    assert 0 < report.scoring_macs < report.macs and report.tokens[-1][0] < 64


# -- misuse ----------------------------------------------------------------------------------------------------------


def test_blocks_without_a_head_are_refused():
    for layers in ((0,), (5,)):  # none, and the last one, behind which nothing follows
        with (
            pytest.raises(PrunelabError, match="heads to leave by behind blocks 1, 3"),
            apply(DToP(layers=layers), tiny(), 1.0),
        ):
            pass
    with pytest.raises(PrunelabError, match="set layers"), apply(DToP(), tiny(), 1.0):
        pass
    assert [s.layer for s in DToP().sites(ModelInfo("x", 24, 16, 1024, 1600))] == [7, 15]


def test_methods_that_drop_without_a_result_are_refused():
    dropping = registry.create("random_drop", layers=[1])
    with pytest.raises(PrunelabError, match="tokens can drop, those of segmenter can only halt"):
        apply(dropping, tiny(), 0.5).__enter__()


def test_nan_is_named():
    model = tiny()
    with torch.no_grad():
        model.heads[0].q.weight[0, 0] = float("nan")
        with apply(DToP(layers=LAYERS), model, 1.0), pytest.raises(PrunelabError, match="NaN or infinite"):
            model(pictures())


def test_the_segmenter_has_an_adapter_of_its_own():
    info = adapter_for(tiny()).info
    assert (info.family, info.depth, info.tokens, info.special, info.grid) == ("segmenter", 6, 64, 0, (8, 8))


def test_repr_round_trips():
    assert registry.parse(repr(DToP(0.9, layers=(1, 3)))) == DToP(0.9, layers=(1, 3))
    assert Budget.parse("1") == Budget(1.0)


def test_the_page_shows_what_left():
    row = "00" * 40
    sites = [{"layer": 5, "kept": list(range(60))}, {"layer": 7, "kept": [0, 1]}]
    item = {"classes": [3, 8], "right": 97.5, "image": [row] * 40, "sites": sites}
    html = exits({"grid": [10, 10], "items": [item, {**item, "classes": []}]})
    assert "block 5: 60 of 100" in html and "block 7: 2 of 100" in html
    assert "3, 8: 97.5 % of pixels right" in html and "no digit" in html
    assert html.count('class="fresh"') == 2 * (40 + 58)
