"""The DINO detector: its parts, its losses, and bad input."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import generalized_box_iou

from prunelab.common.backbones import detection
from prunelab.common.backbones.dino import Pyramid, dino_r50, dino_small, level_shapes, sine
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter


def targets(*boxes: list[list[float]]) -> list[dict[str, torch.Tensor]]:
    return [{"labels": torch.arange(len(b)), "boxes": torch.tensor(b).reshape(-1, 4)} for b in boxes]


def small(**options):
    torch.manual_seed(0)
    return dino_small(**({"width": 32, "feedforward": 64, "encoder_layers": 2, "decoder_layers": 2} | options))


def test_published_size():
    with torch.device("meta"):
        model = dino_r50()
    # 49,339,920 of Focus-DETR less its own parts; the stem does not learn
    assert sum(p.numel() for p in model.parameters()) == 47_650_316
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 47_650_316 - 64 * 3 * 49


@pytest.mark.parametrize("size", [(96, 128), (75, 101), (1, 1)])
def test_forward_of_odd_sizes(size):
    model = small().eval()
    with torch.no_grad():
        out = model(torch.randn(2, 1, *size))
    tokens = sum(h * w for h, w in level_shapes(size, 8, 4))
    assert out["logits"].shape == (2, min(60, tokens), 10), "fewer tokens than queries: one query a token"
    assert bool(((out["boxes"] >= 0) & (out["boxes"] <= 1)).all())


def test_level_shapes_are_those_of_the_backbones():
    model = small(image_size=(75, 101)).eval()
    with torch.no_grad():
        assert model.pyramid(torch.zeros(1, 1, 75, 101), None).shapes == model.grids()
    assert level_shapes((800, 1333), 8, 4) == [(100, 167), (50, 84), (25, 42), (13, 21)]


def test_mask_without_padding_is_no_mask():
    model, x = small().eval(), torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        bare, masked = model(x), model(x, torch.zeros(2, 64, 64, dtype=torch.bool))
    assert torch.equal(bare["logits"], masked["logits"]) and torch.equal(bare["boxes"], masked["boxes"])


def test_what_lies_in_padding_reaches_no_valid_token():
    model = small().eval()
    shapes, n = [(8, 8), (4, 4), (2, 2), (1, 1)], 85
    valid = torch.cat([torch.arange(w).expand(h, w).flatten() < max(1, w // 2) for h, w in shapes]).expand(1, -1)
    features, positions = torch.randn(1, n, 32), torch.randn(1, n, 32)
    with torch.no_grad():
        outputs = []
        for noise in (0.0, 5.0):
            spoiled = torch.where(valid.unsqueeze(-1), features, features + noise)
            pyramid = Pyramid(spoiled, positions, valid, shapes)
            hidden = model.encoder(pyramid)
            outputs.append((hidden[valid], model.select(hidden, pyramid)[0]))
    for one, other in zip(*outputs):
        assert torch.allclose(one, other, atol=1e-5)


def test_centres_and_ratios_follow_the_valid_part():
    valid = torch.tensor([[[True, True, False, False], [True, True, False, False]]]).flatten(1)
    pyramid = Pyramid(torch.zeros(1, 8, 4), torch.zeros(1, 8, 4), valid, [(2, 4)])
    assert pyramid.ratios().tolist() == [[[0.5, 1.0]]]
    assert pyramid.centres()[0, :2].tolist() == [[0.25, 0.25], [0.75, 0.25]]
    assert torch.allclose(pyramid.references()[0, 1, 0], torch.tensor([0.375, 0.25]))


def test_value_is_hidden_or_features():
    x = torch.randn(1, 1, 64, 64)
    hidden, features = small().eval(), small(value="features").eval()
    with torch.no_grad():
        assert not torch.allclose(hidden(x)["logits"], features(x)["logits"])
        one = Pyramid(torch.randn(1, 85, 32), torch.randn(1, 85, 32), None, [(8, 8), (4, 4), (2, 2), (1, 1)])
        for model in (hidden, features):
            del model.encoder.layers[1:]
        assert torch.equal(hidden.encoder(one), features.encoder(one)), "the first layer sees features either way"
    with pytest.raises(PrunelabError, match="hidden or features"):
        small(value="both")


def test_sine_tells_coordinates_apart():
    code = sine(torch.tensor([[0.1, 0.2], [0.2, 0.1]]), 8)
    assert code.shape == (2, 16)
    assert torch.equal(code[0, :8], code[1, 8:]) and not torch.equal(code[0], code[1])
    assert torch.allclose(code[0, 0], torch.tensor(0.2 * torch.pi).sin())
    assert torch.allclose(code[0, 1], torch.tensor(0.2 * torch.pi).cos())


# -- training --------------------------------------------------------------------------------------------------------


def test_loss_reaches_every_parameter_and_is_the_sum():
    model = small()
    wanted = targets([[0.5, 0.5, 0.2, 0.3], [0.2, 0.2, 0.1, 0.1]], [])
    losses = model.loss(torch.randn(2, 1, 64, 64), None, wanted, torch.Generator().manual_seed(0))
    assert torch.allclose(losses["total"], sum(v for k, v in losses.items() if k != "total"))
    losses["total"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_loss_is_reproducible():
    model, x, wanted = small(), torch.randn(1, 1, 64, 64), targets([[0.5, 0.5, 0.2, 0.3]])
    totals = [model.loss(x, None, wanted, torch.Generator().manual_seed(s))["total"].item() for s in (1, 1, 2)]
    assert totals[0] == totals[1] != totals[2]


def test_zero_boxes_leave_the_class_loss():
    model = small()
    losses = model.loss(torch.randn(2, 1, 64, 64), None, targets([], []))
    assert losses["box"] == 0 and losses["giou"] == 0 and losses["class"] > 0
    assert not any(name.startswith("denoise") for name in losses)
    losses["total"].backward()


def test_training_lowers_the_loss():
    model = small(copies=0)
    x, wanted = torch.randn(1, 1, 64, 64), targets([[0.4, 0.5, 0.3, 0.3]])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    history = []
    for _ in range(12):
        loss = model.loss(x, None, wanted)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]


def test_boxes_are_cut_at_the_border_and_those_outside_dropped():
    given = targets([[0.5, 0.5, 0.2, 0.2], [0.0, 0.0, 0.4, 0.4], [1.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.0, 0.1]])
    kept = detection.clean_targets(given, 10)[0]
    assert kept["labels"].tolist() == [0, 1]
    assert torch.allclose(kept["boxes"], torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]]))


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([[0.5, 0.5, -0.1, 0.1]], [0], "negative size"),
        ([[0.5, float("nan"), 0.1, 0.1]], [0], "not finite"),
        ([[0.5, 0.5, 0.1, 0.1]], [10], "label is not in 0 to 9"),
        ([[0.5, 0.5, 0.1, 0.1]], [0, 1], "as many labels"),
        ([[0.5, 0.5, 0.1]], [0], "cxcywh"),
    ],
)
def test_bad_targets_are_named(boxes, labels, message):
    bad = {"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}
    with pytest.raises(PrunelabError, match=message):
        small().loss(torch.randn(1, 1, 64, 64), None, [bad])


def test_an_image_of_padding_alone_is_refused():
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[1] = True
    with pytest.raises(PrunelabError, match="nothing but padding"):
        small()(torch.randn(2, 1, 64, 64), mask)


def test_matching_is_the_cheapest_assignment():
    logits = torch.full((1, 3, 2), -3.0)
    logits[0, 2, 1] = logits[0, 0, 0] = 3.0
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]]])
    wanted = [{"labels": torch.tensor([1, 0]), "boxes": torch.tensor([[0.8, 0.8, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]])}]
    (queries, found) = detection.match(logits, boxes, wanted)[0]
    assert dict(zip(queries.tolist(), found.tolist())) == {0: 1, 2: 0}
    with pytest.raises(PrunelabError, match="not finite"):
        detection.match(logits * float("nan"), boxes, wanted)


def test_set_losses_by_hand():
    logits = torch.zeros(1, 2, 1)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    wanted = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.6, 0.5, 0.2, 0.2]])}]
    found = detection.set_losses(logits, boxes, wanted, [(torch.tensor([0]), torch.tensor([0]))], 1)
    assert found["box"].item() == pytest.approx(5 * 0.1)
    giou = generalized_box_iou(detection.corners(boxes[0, :1]), detection.corners(wanted[0]["boxes"])).item()
    assert found["giou"].item() == pytest.approx(2 * (1 - giou), rel=1e-5)
    # focal loss at p = 1/2: a quarter of log 2, weighed 1/4 for the match and 3/4 for the background
    assert found["class"].item() == pytest.approx(0.25 * 0.6931472 * (0.25 + 0.75), rel=1e-5)


def test_denoising_copies():
    wanted = targets([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.1]], [[0.5, 0.5, 0.4, 0.4]])
    copies = detection.noised(wanted, 10, number=10, label_noise=0.0, generator=torch.Generator().manual_seed(0))
    assert copies is not None and (copies.groups, copies.slots) == (5, 2)
    assert copies.labels.shape == (2, 5 * 2 * 2)
    assert copies.labels[1].tolist() == [0, -1] * 10
    centre, size = torch.tensor([0.5, 0.5]), 0.2
    corners = detection.corners(copies.boxes[0].view(5, 2, 2, 4)[:, :, 0])  # [group, positive or negative, 4]
    moved = (corners - torch.cat([centre - size / 2, centre + size / 2])).abs() / (size / 2)
    assert bool((moved[:, 0] <= 1 + 1e-5).all()) and bool((moved[:, 1] >= 1 - 1e-5).all())
    assert bool((moved[:, 1] <= 2 + 1e-5).all())
    blocked = copies.blocked(3)
    assert blocked.shape == (23, 23)
    assert bool(blocked[20:, :20].all()), "matching queries see no copy"
    assert not bool(blocked[:, 20:].any()), "copies see matching queries"
    assert not bool(blocked[:4, :4].any()) and bool(blocked[:4, 4:20].all())
    positives = copies.matches(wanted)
    assert positives[0][0].tolist()[:4] == [0, 1, 4, 5] and positives[0][1].tolist()[:4] == [0, 1, 0, 1]
    assert torch.equal(copies.labels[0][positives[0][0]], wanted[0]["labels"][positives[0][1]])


def test_label_noise_redraws_half_of_its_share():
    wanted = [{"labels": torch.zeros(50, dtype=torch.long), "boxes": torch.full((50, 4), 0.5)}]
    copies = detection.noised(wanted, 1000, number=5000, label_noise=0.5, generator=torch.Generator().manual_seed(0))
    assert copies is not None
    assert (copies.labels != 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_copies_do_not_reach_the_matching_queries():
    model = small(label_noise=0.0, box_noise=0.0)
    x, wanted = torch.randn(1, 1, 64, 64), targets([[0.5, 0.5, 0.2, 0.3]])
    with_copies = model.loss(x, None, wanted)
    model.noise["number"] = 0
    without = model.loss(x, None, wanted)
    for name in ("class", "box", "giou", "encoder_class"):
        assert torch.allclose(with_copies[name], without[name], rtol=1e-5)


def test_encoder_macs_count_sampling():
    model = small().eval()
    image = torch.empty(1, 1, 64, 64, device="meta")
    del model.encoder.layers[1:]
    one = meter.macs(model, image)
    del model.encoder.layers[:]
    n, d, ffn, samples = 85, 32, 64, 4 * 4 * 4  # heads, levels, points
    linear = d * d + d * 2 * samples + d * samples + d * d + 2 * d * ffn
    assert one - meter.macs(model, image) == n * (linear + 5 * samples * (d // 4))


# -- against transformers' own Deformable DETR -----------------------------------------------------------------------


def test_encoder_and_first_stage_equal_those_of_deformable_detr():
    from transformers import DeformableDetrConfig, ResNetConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrModel

    torch.manual_seed(0)
    config = DeformableDetrConfig(
        backbone_config=ResNetConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, embedding_size=8, layer_type="basic"),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_attention_heads=4,
        two_stage=True,
        with_box_refine=True,
    )
    stock, model = DeformableDetrModel(config).eval(), small().eval()
    model.encoder.layers.load_state_dict(stock.encoder.layers.state_dict())
    model.enc_output.load_state_dict(stock.enc_output.state_dict())
    model.enc_output_norm.load_state_dict(stock.enc_output_norm.state_dict())

    shapes, widths = [(8, 10), (4, 5), (2, 3), (1, 2)], [(10, 5, 3, 2), (6, 3, 2, 1)]
    columns = [torch.arange(w).expand(h, w).flatten() for h, w in shapes]
    valid = torch.stack([torch.cat([c < limit for c, limit in zip(columns, limits)]) for limits in widths])
    pyramid = Pyramid(torch.randn(2, 108, 32), torch.randn(2, 108, 32), valid, shapes)
    with torch.no_grad():
        ratios = torch.stack([stock.get_valid_ratio(v.view(2, *s)) for v, s in zip(pyramid.split(valid), shapes)], 1)
        assert torch.allclose(pyramid.ratios(), ratios)
        levels = pyramid.spread()
        theirs = stock.encoder(
            inputs_embeds=pyramid.features,
            attention_mask=valid,
            spatial_position_embeddings=pyramid.positions,
            valid_ratios=ratios,
            **levels,
        ).last_hidden_state
        hidden = model.encoder(pyramid)
        assert torch.allclose(hidden, theirs, atol=1e-5)
        memory, proposals = stock.gen_encoder_output_proposals(theirs, ~valid, shapes)
        anchors, usable = pyramid.anchors()
        assert torch.allclose(anchors, proposals, atol=1e-5)
        assert torch.allclose(model.memory(hidden, usable), memory, atol=1e-5)


def test_positions_equal_those_of_deformable_detr():
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrSinePositionEmbedding

    model, padded = small().eval(), torch.zeros(2, 64, 96, dtype=torch.bool)
    padded[1, 40:] = True
    padded[1, :, 50:] = True
    with torch.no_grad():
        pyramid = model.pyramid(torch.randn(2, 1, 64, 96), padded)
        for level, (shape, positions) in enumerate(zip(pyramid.shapes, pyramid.split(pyramid.positions))):
            valid = pyramid.split(pyramid.valid)[level].view(2, *shape)
            embed = DeformableDetrSinePositionEmbedding(16, normalize=True)
            theirs = embed(torch.Size((2, 32, *shape)), torch.device("cpu"), torch.float32, valid)
            assert torch.allclose(positions - model.level_embed[level], theirs.flatten(2).transpose(1, 2), atol=1e-5)
