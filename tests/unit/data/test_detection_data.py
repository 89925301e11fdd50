"""Images with boxes: scenes of digits, COCO folders, the test transform, padded batches."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import detection, digits

ENTRY = {"loader": "coco", "setting": "coco", "images": "val2017", "annotations": "annotations.json"}


# -- scenes ----------------------------------------------------------------------------------------------------------


def test_scenes_are_the_same_for_the_same_seed_and_whatever_follows():
    x, objects = detection.scenes("test", 20, 3)
    again, fewer = detection.scenes("test", 7, 3)
    assert x.shape == (20, 1, 96, 96) and x.dtype == torch.float32 and len(objects) == 20
    assert torch.equal(x[:7], again)
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(objects[:7], fewer, strict=True))
    assert not torch.equal(x, detection.scenes("test", 20, 4)[0])
    assert not torch.equal(x, detection.scenes("train", 20, 3)[0])
    assert detection.scenes("test", 0, 3)[0].shape == (0, 1, 96, 96)


def test_boxes_hold_the_ink_and_nothing_less(monkeypatch):
    monkeypatch.setattr(digits, "NOISE", 0.0)
    monkeypatch.setattr(detection, "CONTRAST", (1.0, 1.0))
    x, objects = detection.scenes("test", 64, 5, clutter=0.0)
    ink = (x * digits.SCALE + digits.SHIFT)[:, 0] > detection.INK
    for seen, found in zip(ink, objects, strict=True):
        left = seen.clone()
        for x0, y0, x1, y1 in found.boxes.int().tolist():
            inside = seen[y0:y1, x0:x1]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            left[y0:y1, x0:x1] = False
        assert not left.any(), "ink outside every box"


def test_digits_do_not_overlap_and_most_of_a_scene_is_background():
    objects = detection.scenes("test", 200, 6)[1]
    for found in objects:
        low = torch.maximum(found.boxes[:, None, :2], found.boxes[None, :, :2])
        high = torch.minimum(found.boxes[:, None, 2:], found.boxes[None, :, 2:])
        shared = (high - low).clamp(min=0).prod(-1)
        assert torch.equal(shared.diagonal(), found.area)
        assert shared.sum() == found.area.sum()
        assert bool((found.boxes >= 0).all()) and bool((found.boxes <= 96).all())
    assert 0.07 < sum(float(o.area.sum()) for o in objects) / 200 / 96**2 < 0.2
    counts = [len(o.labels) for o in objects]
    assert min(counts) == 0 and max(counts) == detection.MOST
    assert torch.cat([o.labels for o in objects]).unique().tolist() == list(range(10))
    sides = torch.cat([o.boxes for o in objects])
    assert (sides[:, 3] - sides[:, 1]).quantile(0.9) > 2 * (sides[:, 3] - sides[:, 1]).quantile(0.1)


def test_a_digit_that_fits_nowhere_is_left_out(monkeypatch):
    monkeypatch.setattr(detection, "SIZES", (60.0, 61.0))  # two of them never fit side by side
    counts = [len(o.labels) for o in detection.scenes("test", 32, 1)[1]]
    assert max(counts) == 1 and min(counts) == 0


# -- targets ---------------------------------------------------------------------------------------------------------


def objects(boxes, crowd=None, size=(100, 200)):
    boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    crowd = torch.zeros(len(boxes), dtype=torch.bool) if crowd is None else torch.tensor(crowd)
    return detection.Objects(*size, boxes, torch.arange(len(boxes)), crowd, (boxes[:, 2:] - boxes[:, :2]).prod(1))


def test_targets_are_cut_at_the_border_and_leave_crowds_out():
    target = objects([[-20, 10, 20, 50], [0, 0, 200, 100], [150, 90, 210, 130]], [False, True, False]).target()
    assert target["labels"].tolist() == [0, 2]
    assert torch.allclose(target["boxes"], torch.tensor([[0.05, 0.3, 0.1, 0.4], [0.875, 0.95, 0.25, 0.1]]))
    assert target["boxes"].dtype == torch.float32


def test_an_image_may_show_nothing():
    target = objects([]).target()
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


# -- COCO folders ----------------------------------------------------------------------------------------------------


def annotations(**changes):
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 30, "width": 40},
            {"id": 3, "file_name": "b.png", "height": 50, "width": 20},
            {"id": 5, "file_name": "c.png", "height": 30, "width": 40},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1.5, 2.0, 10.25, 20.0], "area": 99.0, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [30.0, 5.0, 20.0, 10.0], "area": 50.0, "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 90, "bbox": [0.0, 0.0, 4.0, 4.0]},
        ],
    }
    return content | changes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "val2017").mkdir()
    for name, size in (("a.png", (40, 30)), ("b.png", (20, 50)), ("c.png", (40, 30))):
        Image.new("RGB", size, (124, 116, 104)).save(tmp_path / "val2017" / name)
    (tmp_path / "annotations.json").write_text(json.dumps(annotations()))
    return tmp_path


def load(folder, samples=None):
    return detection.load(ENTRY, {"coco": str(folder)}, samples)


def test_a_coco_folder_is_read_in_the_files_order(folder):
    found = load(folder)
    assert found.classes == (1, 90)
    a, b, c = found.objects
    assert a.labels.tolist() == [0, 1] and a.crowd.tolist() == [True, False] and a.area.tolist() == [50.0, 16.0]
    assert a.boxes.tolist() == [[30.0, 5.0, 50.0, 15.0], [0.0, 0.0, 4.0, 4.0]], "as annotated, also over the border"
    assert (
        b.labels.tolist() == [1] and b.boxes.tolist() == [[1.5, 2.0, 11.75, 22.0]] and (b.height, b.width) == (50, 20)
    )
    assert len(c.labels) == 0
    assert len(load(folder, 2).objects) == 2


def test_batches_are_padded_and_masked(folder):
    (x, mask, first), (y, none, second) = load(folder).batches(2)
    assert [len(first), len(second)] == [2, 1]
    assert x.shape == (2, 3, 1333, 1067) and mask.shape == (2, 1333, 1067)  # 30 x 40 is 800 x 1067, 50 x 20 1333 x 533
    assert not mask[0, :800].any() and mask[0, 800:].all() and not mask[1, :, :533].any() and mask[1, :, 533:].all()
    assert torch.allclose(x[0, :, :800], torch.zeros(()), atol=0.02)  # ImageNet's mean colour
    assert not x[:, :, 1333:].any() and x[0, :, 800:].eq(0).all()
    assert y.shape == (1, 3, 800, 1067) and none is None


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((200, 600), (444, 1333)), ((333, 333), (800, 800)),
     ((1, 5000), (1, 1333)), ((427, 640), (800, 1199))],
)  # fmt: skip
def test_test_sizes(size, wanted):
    assert detection.resized(*size) == wanted


@pytest.mark.parametrize(
    ("box", "words"),
    [([40.0, 0.0, 5.0, 5.0], "nothing is in the image"), ([-9.0, 0.0, 9.0, 5.0], "nothing is in the image"),
     ([3.0, 3.0, 0.0, 5.0], "nothing is in the image"), ([3.0, 3.0, float("nan"), 5.0], "nothing is in the image"),
     ([3.0, 3.0, -2.0, 5.0], "nothing is in the image")],
)  # fmt: skip
def test_boxes_without_a_place_are_refused(folder, box, words):
    entry = {"id": 41, "image_id": 7, "category_id": 1, "bbox": box}
    (folder / "annotations.json").write_text(json.dumps(annotations(annotations=[entry])))
    with pytest.raises(PrunelabError, match=f"annotation 41.*{words}"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"images": []}, "list no image"),
     ({"images": annotations()["images"] * 2}, "one twice"),
     ({"categories": []}, "annotation 1 of .* names an image or a category"),
     ({"annotations": [{"id": 9, "image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "annotation 9"),
     ({"annotations": [{"id": 9, "image_id": 7, "category_id": 1}]}, "not in COCO's layout.*bbox"),
     ({"annotations": [{"id": 9, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3]}]}, "not in COCO's layout")],
)  # fmt: skip
def test_annotations_that_do_not_add_up_are_named(folder, change, words):
    (folder / "annotations.json").write_text(json.dumps(annotations(**change)))
    with pytest.raises(PrunelabError, match=words):
        load(folder)


def test_missing_and_broken_files_are_named(folder):
    Image.new("RGB", (41, 30)).save(folder / "val2017" / "a.png")
    with pytest.raises(PrunelabError, match="41 x 30 pixels, its annotations 40 x 30"):
        next(load(folder).batches(1))
    (folder / "val2017" / "a.png").unlink()
    with pytest.raises(PrunelabError, match=r"a\.png does not exist"):
        next(load(folder).batches(1))
    (folder / "annotations.json").write_text("{")
    with pytest.raises(PrunelabError, match="not in COCO's layout"):
        load(folder)
    (folder / "annotations.json").unlink()
    with pytest.raises(PrunelabError, match=r"annotations\.json are missing"):
        load(folder)
