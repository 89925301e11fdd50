"""Average precision as pycocotools counts it, its uncertainty, and the task that measures detectors."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from prunelab.common import testbeds
from prunelab.common.backbones.dino import DINO, ConvPyramid
from prunelab.common.catalogue import lookup
from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter
from prunelab.common.data import detection
from prunelab.common.data.detection import Objects
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import detect
from prunelab.common.metrics import average_precision as ap
from prunelab.common.metrics import uncertainty
from prunelab.common.models import loading
from prunelab.common.testbeds import digits_detection
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import PARTS
from prunelab.common.training import trainer
from prunelab.methods.focus_detr import figures
from tests.contract.families import FAMILIES

SCENES = {"loader": "digit_detection"}
SETTINGS = lookup.settings({})


def boxes_in(n, generator, side=300.0):
    corner = side * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    size = 2 + 150 * torch.rand(n, 2, generator=generator, dtype=torch.float64) ** 2
    return torch.cat([corner, corner + size], 1)


def random_case(seed, images=12, classes=4):
    """Objects of all sizes with crowds, empty images and areas that are not the box's; detections of them that are
    moved, doubled, mislabelled, invented and tied in score."""
    g = torch.Generator().manual_seed(seed)

    def draw(below, *shape):
        return torch.randint(below, shape, generator=g)

    truth, found = [], []
    for i in range(images):
        m = 0 if i % 5 == 4 else int(draw(9))
        boxes, labels = boxes_in(m, g), draw(classes, m)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1) * (0.4 + 0.6 * torch.rand(m, generator=g))
        truth.append(Objects(480, 640, boxes, labels, torch.rand(m, generator=g) < 0.15, area))
        copies = boxes.repeat(3, 1)
        moved = copies + torch.randn(copies.shape, generator=g, dtype=torch.float64) * 6
        moved = torch.cat([moved, boxes_in(int(draw(60)), g)])
        named = torch.cat([labels.repeat(3), draw(classes, len(moved) - 3 * m)])
        named = torch.where(torch.rand(len(named), generator=g) < 0.1, draw(classes, len(named)), named)
        scores = torch.rand(len(moved), generator=g, dtype=torch.float64).mul(50).round() / 50
        scores[:m] += 0.5
        found.append(ap.Detections(moved, scores, named))
    return truth, found


def pycocotools_says(truth, found):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(entries, extra):
        for i, entry in enumerate(entries, 1):
            for j, (x0, y0, x1, y1) in enumerate(entry.boxes.tolist()):
                yield {"image_id": i, "bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": int(entry.labels[j])} | extra(
                    entry, j
                )

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        annotations = rows(truth, lambda o, j: {"area": float(o.area[j]), "iscrowd": int(o.crowd[j])})
        coco.dataset = {
            "images": [{"id": i, "height": o.height, "width": o.width} for i, o in enumerate(truth, 1)],
            "categories": [{"id": k} for k in sorted({int(k) for o in [*truth, *found] for k in o.labels})],
            "annotations": [{"id": i, **row} for i, row in enumerate(annotations, 1)],
        }
        coco.createIndex()
        results = coco.loadRes(list(rows(found, lambda d, j: {"score": float(d.scores[j])})))
        evaluation = COCOeval(coco, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * v if v >= 0 else math.nan for v in evaluation.stats[:6].tolist()]


# -- average precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools(seed):
    truth, found = random_case(seed)
    ours = ap.average_precision(truth, found)
    assert tuple(ours) == ap.MEASURES and 5 < ours["AP"] < 95
    assert list(ours.values()) == pytest.approx(pycocotools_says(truth, found), abs=1e-10, nan_ok=True)


def test_equals_pycocotools_where_a_size_does_not_occur():
    truth, found = detection.scenes("test", 20, 1)[1], random_case(0, images=20, classes=10)[1]
    ours = ap.average_precision(truth, found)
    assert math.isnan(ours["APl"])
    assert list(ours.values()) == pytest.approx(pycocotools_says(truth, found), abs=1e-10, nan_ok=True)


def test_perfect_and_empty_detections():
    truth = random_case(1)[0]
    perfect = [ap.Detections(o.boxes, torch.ones(len(o.labels)), o.labels) for o in truth]
    assert ap.average_precision(truth, perfect)["AP"] == pytest.approx(100)
    nothing = ap.Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert ap.average_precision(truth, [nothing] * len(truth))["AP"] == 0


def test_what_ap_is_not_defined_on_is_refused():
    truth, found = random_case(2)
    with pytest.raises(PrunelabError, match="12 images are annotated but 11 have detections"):
        ap.average_precision(truth, found[:-1])
    crowds = [Objects(o.height, o.width, o.boxes, o.labels, torch.ones_like(o.crowd), o.area) for o in truth]
    with pytest.raises(PrunelabError, match="at least one annotated object"):
        ap.average_precision(crowds, found)


def test_uncertainty_is_that_of_a_bootstrap_over_images():
    truth, found = random_case(3, images=60, classes=2)
    metric = ap.with_uncertainty(truth, found)["AP"]
    assert metric["value"] == pytest.approx(ap.average_precision(truth, found)["AP"], abs=1e-4)
    assert metric["n"] == 60 and len(metric["samples"]) == 30
    assert sum(metric["samples"]) / 30 == pytest.approx(metric["value"], abs=1e-3)
    draws = torch.randint(60, (60, 60), generator=torch.Generator().manual_seed(0)).tolist()
    values = [ap.average_precision([truth[i] for i in d], [found[i] for i in d])["AP"] for d in draws]
    assert metric["stderr"] == pytest.approx(torch.tensor(values).std().item(), rel=0.3)


def test_paired_differences_are_narrower_than_their_parts():
    truth, found = random_case(4, images=40)
    g = torch.Generator().manual_seed(0)
    worse = [ap.Detections(d.boxes + torch.randn(d.boxes.shape, generator=g), d.scores, d.labels) for d in found]
    ours, theirs = (ap.with_uncertainty(truth, side)["AP"] for side in (worse, found))
    difference, margin = uncertainty.paired_difference(ours, theirs)
    assert difference == pytest.approx(ours["value"] - theirs["value"], abs=1e-3)
    assert 0 < margin < 0.7 * 1.96 * math.hypot(ours["stderr"], theirs["stderr"])


def test_one_image_has_no_uncertainty():
    metric = ap.with_uncertainty(*(side[:1] for side in random_case(5)))["AP"]
    assert set(metric) == {"value", "n"}


# -- a detector's output ---------------------------------------------------------------------------------------------


def test_detections_are_in_the_images_own_pixels():
    logits = torch.full((2, 3, 2), -9.0)
    logits[0, 1, 1], logits[0, 1, 0], logits[1, 2, 0] = 3.0, 2.0, 1.0
    boxes = torch.tensor([0.5, 0.5, 0.5, 0.25]).expand(2, 3, 4)
    objects = random_case(0)[0][:2]
    first, second = ap.detections({"logits": logits, "boxes": boxes}, objects, (4, 8))
    assert first.labels[:2].tolist() == [1, 0] and int(second.labels[0]) == 0
    assert first.boxes[0].tolist() == [160, 180, 480, 300] == first.boxes[1].tolist()
    assert first.scores[0] == pytest.approx(torch.tensor(3.0).sigmoid().item())
    assert len(first.scores) == 3, "as many as queries, of which one may be several classes"


def test_detectors_that_count_by_category_id_are_read_too():
    logits = torch.randn(1, 5, 9, generator=torch.Generator().manual_seed(0))
    boxes = torch.rand(1, 5, 4)
    objects = random_case(0)[0][:1]
    (wide,) = ap.detections({"logits": logits, "boxes": boxes}, objects, (4, 8))
    (plain,) = ap.detections({"logits": logits[..., [4, 8]], "boxes": boxes}, objects, (4, 8))
    assert torch.equal(wide.labels, plain.labels) and torch.equal(wide.scores, plain.scores)
    with pytest.raises(PrunelabError, match="tells 9 classes apart, the data set has 2"):
        ap.detections({"logits": logits, "boxes": boxes}, objects, (4, 9))
    with pytest.raises(PrunelabError, match="NaN or infinite"):
        ap.detections({"logits": logits * float("nan"), "boxes": boxes}, objects, (4, 8))


# -- the task --------------------------------------------------------------------------------------------------------


class Oracle(DINO):
    """Answers from the annotations instead of the images; its costs are those of the detector it is."""

    def __init__(self, objects: Sequence[Objects], classes: int, **options: int) -> None:
        channels = (8, 8, 8)
        sizes = {"width": 16, "heads": 2, "feedforward": 16, "encoder_layers": 6, "decoder_layers": 1, "groups": 4}
        backbone = ConvPyramid(options.get("image_channels", 1), channels)
        super().__init__(
            backbone, channels, classes, **(sizes | {"image_size": (96, 96), "image_channels": 1} | options)
        )
        self.left = list(objects)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        output = super().forward(images[..., :96, :96])
        if images.device.type == "meta":
            return output
        targets = [self.left.pop(0).target() for _ in images]
        most = max(1, *(len(t["labels"]) for t in targets))
        logits, boxes = torch.full((len(images), most, self.classes), -20.0), torch.full((len(images), most, 4), 0.5)
        for i, target in enumerate(targets):
            m = len(target["labels"])
            logits[i, range(m), target["labels"]], boxes[i, :m] = 5.0, target["boxes"]
        return {"logits": logits, "boxes": boxes}


def execute(monkeypatch, model, method=None, budget=None, data=SCENES, config=SETTINGS, options=None, **settings):
    monkeypatch.setattr(loading, "load", lambda identity, config: (model.eval(), None))
    run = Run("detect", "testbed", method, options or {}, budget, settings, {"model": {}, "data": data})
    return runner.measure(run, config)


def small(objects=None, parts=True, **options):
    torch.manual_seed(0)
    model = Oracle(detection.scenes("test", 24, detection.SEED)[1] if objects is None else objects, 10, **options)
    if parts:
        model.add_module(PARTS, registry.create("focus_detr").build(adapter_for(model).info))
    return model


@pytest.fixture(scope="module")
def runs():
    """The metrics of an unpruned and of a pruned run, the latter with pictures."""
    with pytest.MonkeyPatch.context() as patch:
        return execute(patch, small(), samples=24), execute(patch, small(), "focus_detr", "0.3", samples=24, shown=3)


def test_the_task_measures_an_unpruned_detector(runs):
    found, _ = runs
    assert found["ap"]["value"] == pytest.approx(100) and found["ap"]["n"] == 24
    assert {"ap50", "ap75", "aps", "apm"} <= set(found) and "apl" not in found
    assert found["gmacs"]["value"] == round(meter.macs(small(), adapter_for(small()).example()) / 1e9, 6)
    assert 0 < found["encoder_gmacs"]["value"] < found["gmacs"]["value"]
    assert found["saving"]["value"] == found["encoder_saving"]["value"] == found["scoring_gmacs"]["value"] == 0
    json.dumps(found, allow_nan=False)


def test_the_task_measures_a_pruned_detector(runs):
    dense, found = runs
    assert found["ap"]["value"] == pytest.approx(100), "an oracle does not mind"
    assert found["encoder_gmacs"]["value"] < dense["encoder_gmacs"]["value"]
    saved = dense["gmacs"]["value"] - found["gmacs"]["value"]
    assert saved == pytest.approx(dense["encoder_gmacs"]["value"] - found["encoder_gmacs"]["value"], abs=2e-6)
    assert found["saving"]["value"] == pytest.approx(100 * saved / dense["gmacs"]["value"], abs=0.1)
    assert found["encoder_saving"]["value"] > found["saving"]["value"] > 0
    assert found["scoring_gmacs"]["value"] > 0 and found["budget"]["text"] == "0.3"


def test_what_a_picture_needs(runs):
    x, objects = detection.scenes("test", 24, detection.SEED)
    found = runs[1]["scenes"]
    assert found["value"] == len(found["items"]) == 3
    for item, scene, annotated in zip(found["items"], x, objects[:3], strict=False):
        assert len(item["image"]) == 96 and {len(row) for row in item["image"]} == {2 * 96}
        ink = torch.tensor([list(bytes.fromhex(row)) for row in item["image"]]) / 255
        assert torch.allclose(ink, (scene[0] * 0.25 + 0.1).clamp(0, 1), atol=0.003)
        assert [row[2:] for row in item["annotated"]] == annotated.boxes.tolist()
        assert sorted(row[0] for row in item["found"]) == sorted(annotated.labels.tolist())
        assert item["grids"] == [[12, 12], [6, 6], [3, 3], [2, 2]]
        assert [site["layer"] for site in item["sites"]] == list(range(6))
        counts = [sum(map(len, site["kept"])) for site in item["sites"]]
        assert counts == [int(0.3 * 193) + 1, 46, 34, 34, 23, 11]
        for levels in (site["kept"] for site in item["sites"]):
            assert all(max(level, default=0) < h * w for level, (h, w) in zip(levels, item["grids"], strict=True))
    json.dumps(found)


def test_the_picture_says_what_was_found(runs):
    html = figures.cascades(runs[1]["scenes"])
    assert html.count("<svg") == 3 and html.count("layer 5: 11 of 193") == 3
    objects = detection.scenes("test", 3, detection.SEED)[1]
    for found in objects:
        assert f"{len(found.labels)} of {len(found.labels)} found, 0 boxes too many" in html
    box = [3, 0.9, 0.0, 0.0, 10.0, 10.0]
    assert figures.agree(box, [3, 0.5, 0.0, 0.0, 10.0, 6.0]) and not figures.agree(box, [3, 0.5, 0.0, 0.0, 10.0, 4.0])
    assert not figures.agree(box, [4, *box[1:]]) and not figures.agree(box, [3, 0.5, 10.0, 0.0, 20.0, 10.0])


def test_photographs_are_not_shown(monkeypatch):
    with pytest.raises(PrunelabError, match="testbed's scenes alone"):
        execute(monkeypatch, small(), data={"loader": "coco"}, shown=1)


def test_boxes_of_padded_images_end_where_they_were_annotated(monkeypatch, tmp_path):
    entries = {"images": [], "categories": [{"id": k} for k in (3, 17)], "annotations": []}
    (tmp_path / "val").mkdir()
    for i, size in enumerate([(64, 48), (48, 64), (50, 50)], 1):
        Image.new("RGB", size).save(tmp_path / "val" / f"{i}.png")
        entries["images"].append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
        for category, box in ((3, [2.5, 3.0, 20.0, 30.5]), (17, [30.0, 1.0, 15.0, 16.0]))[: i % 3]:
            entries["annotations"].append({"id": len(entries["annotations"]), "image_id": i, "category_id": category,
                                           "bbox": box, "iscrowd": 0, "area": 99.0})  # fmt: skip
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    identity = {"loader": "coco", "setting": "coco", "images": "val", "annotations": "boxes.json"}
    config = {"coco": str(tmp_path)}
    model = Oracle(detection.load(identity, config, None).objects, 2, image_channels=3)
    found = execute(monkeypatch, model, data=identity, config=config, batch=2)
    assert found["ap"]["value"] == pytest.approx(100) and found["ap"]["n"] == 3


def test_output_that_is_not_finite_is_refused(monkeypatch):
    model = small(parts=False)
    monkeypatch.setattr(model, "forward", lambda x, mask: {"logits": x.new_full((len(x), 1, 10), math.nan),
                                                           "boxes": x.new_zeros(len(x), 1, 4)})  # fmt: skip
    with pytest.raises(PrunelabError, match="NaN or infinite"):
        execute(monkeypatch, model, samples=2)


def test_a_stock_detector_of_transformers_goes_the_whole_way(monkeypatch, tmp_path):
    FAMILIES["deformable_detr"]().save_pretrained(tmp_path / "own" / "checkpoint")
    identity = {"hub": "own/checkpoint", "local": "", "class": "DeformableDetrForObjectDetection"}
    model, transform = loading.load(identity, {**SETTINGS, "hub": str(tmp_path)})
    assert transform is None and not model.training
    with pytest.raises(PrunelabError, match="cannot be had"):
        loading.load({**identity, "hub": "own/nothing"}, {**SETTINGS, "hub": str(tmp_path)})

    x = torch.rand(2, 3, 192, 128, generator=torch.Generator().manual_seed(0))
    nowhere = torch.zeros(2, 192, 128, dtype=torch.bool)
    below = nowhere.clone()
    below[1, 128:] = True
    with torch.no_grad():
        plain, unmasked, masked = (detect.detected(model, x, mask)["logits"] for mask in (None, nowhere, below))
    assert torch.equal(plain, unmasked), "the mask of transformers marks the image, ours the padding"
    assert torch.allclose(plain[0], masked[0], atol=1e-5) and not torch.allclose(plain[1], masked[1], atol=1e-2)

    picture = Image.fromarray((255 * x[0].permute(1, 2, 0)).byte().numpy())
    collection = detection.Collection(
        lambda i: detection.to_tensor(picture),
        [Objects(192, 128, boxes_in(2, torch.Generator().manual_seed(i)), torch.tensor([1, 2]), torch.zeros(2).bool(),
                 torch.ones(2)) for i in range(3)],
        tuple(range(7)),
    )  # fmt: skip
    monkeypatch.setattr(detection, "load", lambda *_: collection)
    dense = execute(monkeypatch, model, data={"loader": "coco"})
    options = {"layers": list(range(6)), "where": "input", "rest": "bypass"}
    pruned = execute(monkeypatch, model, "random_drop", "0.5", {"loader": "coco"}, options=options)
    assert dense["ap"]["n"] == 3 and pruned["encoder_gmacs"]["value"] < dense["encoder_gmacs"]["value"]


@pytest.mark.skipif(not os.environ.get("PRUNELAB_ASSETS"), reason="needs PRUNELAB_ASSETS, a folder with coco128")
def test_real_photographs_go_the_whole_way(monkeypatch):
    identity, config = lookup.dataset("coco")["assets"], {"assets": os.environ["PRUNELAB_ASSETS"]}
    whole = detection.load(identity, config, None)
    assert len(whole.objects) == 128 and len(whole.classes) == 80
    assert sum(len(o.labels) for o in whole.objects) == 903 and sum(int(o.crowd.sum()) for o in whole.objects) == 5
    model = Oracle(whole.objects[:12], 80, image_channels=3)
    found = execute(monkeypatch, model, data=identity, config=config, samples=12)
    assert found["ap"]["value"] == pytest.approx(100, abs=0.01) and found["apl"]["n"] == 12

    truth = list(whole.objects)  # and pycocotools, on the annotations as they are
    g = torch.Generator().manual_seed(0)
    moved = [o.boxes + 8 * torch.randn(o.boxes.shape, generator=g) for o in truth]
    scores = [torch.rand(len(o.labels), generator=g) for o in truth]
    guesses = [ap.Detections(b, s, o.labels) for b, s, o in zip(moved, scores, truth, strict=True)]
    ours = ap.average_precision(truth, guesses)
    assert list(ours.values()) == pytest.approx(from_file(Path(config["assets"]) / "coco128", guesses), abs=1e-9)


def from_file(folder: Path, guesses) -> list[float]:
    """What pycocotools makes of the annotation file itself."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances_val128.json"))
        ids, kinds = [image["id"] for image in coco.dataset["images"]], sorted(coco.getCatIds())
        rows = [
            {"image_id": image, "category_id": kinds[k], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": s}
            for image, d in zip(ids, guesses, strict=True)
            for (x0, y0, x1, y1), s, k in zip(d.boxes.tolist(), d.scores.tolist(), d.labels.tolist(), strict=True)
        ]
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * v for v in evaluation.stats[:6].tolist()]


# -- the testbed -----------------------------------------------------------------------------------------------------


def test_training_teaches_detector_and_parts_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_detection, "QUICK", 5)
    monkeypatch.setattr(digits_detection, "FULL", 5)
    recipe = {"steps": 3, "batch": 4, "width": 16, "heads": 2, "feedforward": 16, "decoder_layers": 1, "queries": 5,
              "copies": 4, "channels": (8, 8, 16), "check_every": 3, "save_every": 2, "dense": 0.0}  # fmt: skip
    testbed = digits_detection.DigitsDetection(**recipe)
    log = trainer.fit(testbed, tmp_path / "straight", seed=1)
    assert {"ap", "ap_0.3", "scenes"} <= set(log["test"]) and math.isfinite(log["curve"][-1]["loss"])
    torch.manual_seed(1)
    before, (after, _) = testbed.build(), testbeds.load("digits_detection", tmp_path / "straight")
    moved = {n for n, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[n])}
    assert {n for n in moved if n.startswith(f"{PARTS}.scorer")} == {f"{PARTS}.{n}" for n in
            getattr(before, PARTS).state_dict() if n.startswith("scorer")}  # fmt: skip
    assert any(n.startswith(f"{PARTS}.dual") for n in moved) and any(n.startswith("encoder.") for n in moved)

    step, calls = trainer._step, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(testbed, tmp_path / "broken", seed=1)
    monkeypatch.setattr(trainer, "_step", step)
    assert trainer.fit(testbed, tmp_path / "broken", seed=1)["sha256"] == log["sha256"]


def test_unpruned_steps_leave_the_parts_alone():
    testbed = digits_detection.DigitsDetection(batch=2, width=16, heads=2, feedforward=16, queries=5, dense=1.0)
    model = testbed.build().train()
    testbed.loss(model, 0.5, torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is None for p in getattr(model, PARTS).parameters())
    assert all(p.grad is not None for p in model.encoder.parameters())
