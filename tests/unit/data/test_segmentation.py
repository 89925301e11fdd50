"""The segmenter, its official names and printed costs, its loss, and the data it is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from prunelab.common.backbones import segvit
from prunelab.common.backbones.segvit import ATMHead, NaiveHead, Segmenter, segmenter, sliding
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter
from prunelab.common.data import segmentation
from prunelab.common.data.segmentation import IGNORED, LAYOUTS
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import segment
from prunelab.common.testbeds.digits_segmentation import DigitsSegmentation, atm_loss
from tests.unit.methods.test_dtop import tiny

KEYS = Path(__file__).parents[2] / "golden" / "dtop"


# -- official checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "make"), [("vitb", segvit.segvit_base), ("vitl", segvit.segvit_large)])
def test_official_names_and_shapes_load_strictly(file, make):
    shapes = json.loads((KEYS / f"keys_segvit_{file}_ade20k.json").read_text())
    with torch.device("meta"):
        model, state = make(), {name: torch.empty(shape) for name, shape in shapes.items()}
    segvit.load_official(model, state)
    used = {segvit.official_name(name) for name in model.state_dict()}
    left = shapes.keys() - used
    assert left == {"backbone.cls_token"} | {n for n in shapes if n.endswith(segvit.TRAINING_ONLY)}


def official(model: Segmenter) -> dict[str, torch.Tensor]:
    """The model's weights as an official checkpoint holds them."""
    state = {segvit.official_name(name): value.clone() for name, value in model.state_dict().items()}
    place = state["backbone.pos_embed"]
    state["backbone.pos_embed"] = torch.cat([torch.full_like(place[:, :1], 7.0), place], 1)
    return state | {"backbone.cls_token": torch.zeros(1, 1, place.shape[-1])}


def test_a_checkpoint_loads_and_gives_the_same_maps(tmp_path):
    model, x = tiny(), torch.randn(2, 1, 32, 32)
    path = tmp_path / "model.safetensors"
    save_file(official(model) | {"decode_head." + segvit.TRAINING_ONLY: torch.ones(2)}, path)
    other = segmenter(classes=4, head_width=12, head_heads=2, head_layers=2, window=32, patch=4, channels=1, width=24,
                      depth=6, heads=3, stages=(1, 3, 5)).eval()  # fmt: skip
    segvit.load_checkpoint(other, path)
    torch.save({"state_dict": official(model), "meta": {"epoch": 1}}, tmp_path / "model.pth")
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        segvit.load_checkpoint(other, tmp_path / "model.pth")
        assert torch.equal(other(x), model(x))


def test_every_misfit_is_listed_at_once():
    model, state = tiny(), official(tiny())
    del state["backbone.layers.2.ln1.bias"], state["decode_head.q.weight"]
    state["neck.weight"] = torch.zeros(1)
    state["auxiliary_head.0.q.weight"] = torch.zeros(9, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PrunelabError) as error:
        segvit.load_official(model, state)
    for part in ("missing: backbone.layers.2.ln1.bias, decode_head.q.weight", "unexpected: neck.weight",
                 "auxiliary_head.0.q.weight is [9, 12], not [4, 12]"):  # fmt: skip
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_that_hold_more_than_weights_are_refused(tmp_path):
    torch.save({"state_dict": official(tiny()), "message_hub": SimpleNamespace(log=1)}, tmp_path / "run.pth")
    with pytest.raises(PrunelabError, match="save the `state_dict` alone as safetensors"):
        segvit.load_checkpoint(tiny(), tmp_path / "run.pth")
    with pytest.raises(PrunelabError, match="does not exist"):
        segvit.load_checkpoint(tiny(), tmp_path / "none.pth")


# -- costs -----------------------------------------------------------------------------------------------------------

PRINTED = [  # GFLOPs of the unpruned SegViT in the official README
    (segvit.segvit_base, {}, 109.9),
    (segvit.segvit_large, {}, 617.0),
    (segvit.segvit_large, {"classes": 59, "window": 480, "head_heads": 16}, 315.4),
    (segvit.segvit_large, {"classes": 171, "window": 512, "head_heads": 16}, 366.9),
]


@pytest.mark.parametrize(("make", "arguments", "printed"), PRINTED)
def test_dense_cost_is_the_printed_one_to_the_digit(make, arguments, printed):
    """fvcore counts a MAC as one, 5 an element of a LayerNorm and 4 of a bilinear resize; there are two resizes."""
    with torch.device("meta"):
        model = make(**arguments).eval()
    example = torch.empty(1, 3, *model.window, device="meta")
    resized = 2 * 4 * model.classes * model.window[0] * model.window[1]
    total = meter.macs(model, example) + 5 * meter.norm_elements(model, example) + resized
    assert round(total / 1e9, 1) == printed


# -- heads and maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: ATMHead(16, 5, 12, 3, 2), lambda: NaiveHead(16, 5, 12)])
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(make, training):
    torch.manual_seed(0)
    head = make().train(training)
    for module in head.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            module.eval()
    x, noise = torch.randn(2, 9, 16), 50 * torch.randn(2, 4, 16)
    valid = (torch.arange(13) < 9).expand(2, -1)
    bare, padded = head(x), head(torch.cat([x, noise], 1), valid)
    assert torch.allclose(padded.masks[..., :9], bare.masks, atol=1e-5)
    if bare.presence is not None:
        assert torch.allclose(padded.presence, bare.presence, atol=1e-5)


def test_setr_may_classify_before_it_resizes():
    torch.manual_seed(0)
    head, x = NaiveHead(16, 5, 12).eval(), torch.randn(2, 36, 16)
    features = head.bn(head.conv(head.norm(x)).flatten(0, 1)).view(2, 36, 12).relu()
    larger = F.interpolate(features.transpose(1, 2).unflatten(-1, (6, 6)), scale_factor=4, mode="bilinear")
    late = head.conv_seg(larger.movedim(1, -1)).movedim(-1, 1)
    early = F.interpolate(head(x).masks.unflatten(-1, (6, 6)), scale_factor=4, mode="bilinear")
    assert torch.allclose(early, late, atol=1e-5)


def test_confidences_are_what_the_heads_mean():
    masks = torch.randn(2, 3, 4)
    assert torch.allclose(segvit.Prediction(masks).confidence.sum(1), torch.ones(2, 4))
    both = segvit.Prediction(masks, torch.zeros(2, 3, 1))
    assert torch.allclose(both.confidence, 0.5 * masks.sigmoid())


def test_windows_cover_an_image_and_end_with_it():
    assert segvit.starts(683, 512, 341) == [0, 171]
    assert segvit.starts(512, 512, 341) == [0]
    assert segvit.starts(1200, 512, 341) == [0, 341, 682, 688]


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (7, 40), (1, 1), (64, 33)])
def test_images_of_any_size(size):
    model = tiny()
    images = torch.randn(2, 1, *size)
    with torch.no_grad():
        scores = sliding(model, images, 20)
        assert scores.shape == (2, 4, *size) and bool(scores.isfinite().all())
        if size == (32, 32):
            assert torch.equal(scores, model(images))
        if size == (64, 33):  # the upper left corner is seen by the first window alone
            assert torch.allclose(scores[..., :20, :1], model(images[..., :32, :32])[..., :20, :1], atol=1e-6)


def test_other_sizes_are_refused_by_the_model_itself():
    with pytest.raises(PrunelabError, match="32 x 32 pixels, these are 37 x 51"):
        tiny()(torch.randn(1, 1, 37, 51))
    with pytest.raises(PrunelabError, match="stride 33"):
        sliding(tiny(), torch.randn(1, 1, 40, 40), 33)


def test_segmenters_that_cannot_be():
    with pytest.raises(PrunelabError, match="no multiple of the patch"):
        tiny(window=30)
    with pytest.raises(PrunelabError, match="rise to block 5"):
        tiny(stages=(1, 3))


# -- the loss --------------------------------------------------------------------------------------------------------


def test_loss_equals_the_definition_mask_by_mask():
    torch.manual_seed(0)
    said = segvit.Prediction(torch.randn(2, 4, 9), torch.randn(2, 4, 1))
    labels = torch.tensor([0, 2])[torch.randint(2, (2, 6, 6))]
    labels[1] = 3
    labels[0, 0, 0] = IGNORED
    logits = F.interpolate(said.masks.unflatten(-1, (3, 3)), (6, 6), mode="bilinear", align_corners=False)
    focal, dice, masks, entropy, weights = 0.0, 0.0, 0, 0.0, 0.0
    for b in range(2):
        there = [c for c in labels[b].unique().tolist() if c != IGNORED]
        for c in range(4):
            p = said.presence[b, c, 0].sigmoid()
            w = 1.0 if c in there else 0.1
            entropy, weights = entropy - w * (p if c in there else 1 - p).log(), weights + w
        for c in there:
            target, q = (labels[b] == c).float(), logits[b, c].sigmoid()
            right = torch.where(target == 1, q, 1 - q)
            focal += (torch.where(target == 1, 0.25, 0.75) * (1 - right) ** 2 * -right.log()).mean()
            dice += 1 - (2 * (q * target).sum() + 1) / (q.sum() + target.sum() + 1)
            masks += 1
    want = entropy / weights + (20 * focal + dice) / masks
    assert torch.allclose(atm_loss(said, (3, 3), labels), want, atol=1e-5)


def test_an_image_without_labels_has_a_finite_loss():
    said = segvit.Prediction(torch.randn(1, 4, 9), torch.randn(1, 4, 1))
    assert bool(atm_loss(said, (3, 3), torch.full((1, 6, 6), IGNORED)).isfinite())


def test_training_lowers_the_loss_on_one_batch():
    torch.manual_seed(0)
    testbed = DigitsSegmentation(width=24, heads=2, depth=3, stages=(0, 1, 2), batch=4, head_width=16)
    model = testbed.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(30):
        loss = testbed.loss(model, 1.0, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


# -- data ------------------------------------------------------------------------------------------------------------


def test_scenes_are_deterministic_and_labelled():
    x, y = segmentation.scenes("test", 40, 3)
    again, labels = segmentation.scenes("test", 40, 3)
    assert torch.equal(x, again) and torch.equal(y, labels)
    assert x.shape == (40, 1, 40, 40) and y.shape == (40, 40, 40) and y.dtype == torch.int64
    assert set(y.unique().tolist()) == set(range(segmentation.CLASSES))
    assert not torch.equal(x, segmentation.scenes("train", 40, 3)[0])
    inked = y != segmentation.BACKGROUND
    assert x[:, 0][inked].mean() > x[:, 0][~inked].mean() + 0.5, "labels lie where the ink is"
    assert 0.05 < inked.float().mean() < 0.4


def test_scenes_differ_in_difficulty():
    easy, hard = (segmentation.scenes("test", 200, 0, hardest=h) for h in (0.0, 1.0))
    assert torch.equal(easy[1] == 10, hard[1] == 10), "digits lie in the same places"

    def ground(x, y):
        return x[:, 0][y == 10].std()

    assert ground(*hard) > 1.1 * ground(*easy), "the ground is busier"


def test_a_digit_lies_whole_within_its_quarter(monkeypatch):
    strokes = torch.ones(64, 8, 8)
    tiles = segmentation._place(strokes, torch.linspace(11, 17, 64), torch.rand(64, 2))
    assert torch.allclose(tiles.sum((1, 2)).sqrt(), torch.linspace(11, 17, 64), rtol=0.12)


def write(root: Path, loader: str, marks: list[list[int]], size: tuple[int, int] = (60, 44)) -> None:
    """A data set of two images in a layout."""
    layout = LAYOUTS[loader]
    for folder in (layout.images, layout.labels):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", size, (10, 20, 30)).save(root / layout.images / f"{name}.jpg")
        Image.frombytes("L", (len(marks[0]), len(marks)), bytes(v for row in marks for v in row)).save(
            root / layout.labels / f"{name}{layout.suffix}"
        )
    if layout.listing:
        (root / layout.listing).parent.mkdir(parents=True)
        (root / layout.listing).write_text("b\na\n")


@pytest.mark.parametrize("loader", LAYOUTS)
def test_data_sets_on_disk(tmp_path, loader):
    write(tmp_path, loader, [[0, 1, 4], [255, 2, 3]])
    identity, config = {"loader": loader, "setting": "root"}, {"root": str(tmp_path)}
    found = list(segmentation.batches(identity, config, None, 50, (2048, 22), "half"))
    assert len(found) == 2
    images, labels = found[0]
    assert images.shape == (1, 3, 22, 30), "the short side fits, the ratio is kept"
    assert images[0, :, 0, 0].tolist() == pytest.approx([(v - 127.5) / 127.5 for v in (10, 20, 30)], abs=0.02)
    assert labels[0].tolist() == [[IGNORED, 0, 3], [IGNORED, 1, 2]]
    assert len(list(segmentation.batches(identity, config, 1, 50))) == 1


def test_a_broken_data_set_says_what_is_missing(tmp_path):
    identity, config = {"loader": "ade20k", "setting": "root"}, {"root": str(tmp_path)}
    with pytest.raises(PrunelabError, match="no images in"):
        next(segmentation.batches(identity, config, None, 1))
    with pytest.raises(PrunelabError, match=r"val\.txt is missing"):
        next(segmentation.batches({"loader": "pascal_context", "setting": "root"}, config, None, 1))
    write(tmp_path, "ade20k", [[0, 1]])
    label = tmp_path / LAYOUTS["ade20k"].labels / "b.png"
    Image.new("RGB", (2, 2)).save(label)
    with pytest.raises(PrunelabError, match="not a label map"):
        list(segmentation.batches(identity, config, None, 1))
    label.write_bytes(b"no image")
    with pytest.raises(PrunelabError, match="cannot be decoded"):
        list(segmentation.batches(identity, config, None, 1))
    label.unlink()
    with pytest.raises(PrunelabError, match=r"b\.png is missing"):
        next(segmentation.batches(identity, config, None, 1))


def test_confusion_and_iou():
    labels = torch.tensor([[0, 0, 1, 1, IGNORED]])
    table = segmentation.confusion(torch.tensor([[0, 1, 1, 1, 2]]), labels, 4)
    assert table.sum() == 4
    each = segmentation.iou(table)
    assert each[:2].tolist() == pytest.approx([1 / 2, 2 / 3]) and bool(each[2:].isnan().all())
    found = segment.quality(table)
    assert found["miou"]["value"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2, abs=1e-4)
    assert found["accuracy"]["value"] == 75.0
    with pytest.raises(PrunelabError, match="go up to 7"):
        segmentation.confusion(torch.tensor([0]), torch.tensor([7]), 4)
    with pytest.raises(PrunelabError, match="no pixel has a label"):
        segment.quality(torch.zeros(2, 2, dtype=torch.long))


# -- the task --------------------------------------------------------------------------------------------------------


def task(
    monkeypatch, method: str | None = None, budget: str | None = None, stride: int | None = None, **settings
) -> dict:
    torch.manual_seed(0)
    model = segmenter(classes=11, head_width=12, head_heads=2, head_layers=1, window=40, patch=4, channels=1, width=24,
                      depth=3, heads=2, stages=(0, 1, 2)).eval()  # fmt: skip
    monkeypatch.setattr("prunelab.common.models.loading.load", lambda identity, config: (model, None))
    options = {"layers": [0, 1]} | ({"threshold": 0.3} if method == "dtop" else {"rest": "halt"}) if method else {}
    ids = {"model": {"windows": {"stride": stride}} if stride else {}, "data": {"loader": "digit_maps"}}
    return runner.measure(Run("segment", "testbed", method, options, budget, {"samples": 40} | settings, ids), {})


def test_task_measures_dense_and_pruned(monkeypatch):
    dense = task(monkeypatch)
    assert dense["saving"]["value"] == 0 and dense["scoring_gmacs"]["value"] == 0 and "tokens" not in dense
    pruned = task(monkeypatch, "random_drop", "0.5")
    assert pruned["tokens"]["sites"] == [0.5, 0.25]
    assert 0 < pruned["gmacs"]["value"] < dense["gmacs"]["value"] + pruned["scoring_gmacs"]["value"]
    adaptive = task(monkeypatch, "dtop", "1.0")
    assert adaptive["gmacs"]["n"] == 40 and 0 <= adaptive["tokens"]["value"] <= 1
    assert set(adaptive) == {"miou", "accuracy", "tokens", "gmacs", "scoring_gmacs", "saving", "budget"}


def test_task_meets_a_cost(monkeypatch):
    dense = task(monkeypatch)["gmacs"]["value"]
    for method in ("dtop", "random_drop"):
        found = task(monkeypatch, method, "0.9cost")
        assert found["gmacs"]["value"] <= 0.93 * dense, method


def test_images_larger_than_a_window_count_every_window(monkeypatch):
    monkeypatch.setattr(
        segmentation, "batches",
        lambda *a, **k: iter([(torch.randn(1, 1, 50, 40), torch.randint(11, (1, 25, 20)))]),
    )  # fmt: skip
    assert task(monkeypatch, "dtop", "1.0", stride=20)["gmacs"]["n"] == 2


def test_gallery_tells_what_left_where(monkeypatch):
    found = task(monkeypatch, "dtop", "1.0", gallery=3)
    scenes = found["scenes"]
    assert found["gmacs"]["n"] == 40, "the scenes shown are not measured twice"
    assert scenes["value"] == len(scenes["items"]) == 3 and scenes["grid"] == [10, 10]
    for item in scenes["items"]:
        first, second = (set(site["kept"]) for site in item["sites"])
        assert second <= first <= set(range(100)) and 0 <= item["right"] <= 100
        assert len(item["image"]) == 40 and len(item["image"][0]) == 80
    with pytest.raises(PrunelabError, match="testbed's scenes alone"):
        segment.gallery(tiny(), None, (torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32)))
