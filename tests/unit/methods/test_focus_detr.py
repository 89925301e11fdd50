"""Focus-DETR on our detector and on transformers' Deformable DETR: adapter, selection, parts, labels, checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from prunelab.common.apply import apply
from prunelab.common.backbones.dino import dino_r50, dino_small, dino_swin_tiny, load_checkpoint
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Mix, Plan, Site
from prunelab.common.costs import meter
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.deformable_encoder import write_back
from prunelab.common.tokens.apply import PARTS
from prunelab.common.tokens.role import TokenPruner
from prunelab.methods.focus_detr import checkpoint
from prunelab.methods.focus_detr.method import FocusDETR, enhance, fill_padding, focus_counts, layer_count, rank, select
from prunelab.methods.focus_detr.modules import DualAttention, FocusParts
from prunelab.methods.focus_detr.supervision import foreground_loss, foreground_targets
from prunelab.methods.sparse_detr.method import SparseDETR

KEYS = Path(__file__).parents[2] / "golden" / "focus_detr" / "keys_r50.json"
ALL = (1.0, 1.0)  # a cascade that leaves nothing out of the two layers of the models here


def ours(**options):
    torch.manual_seed(0)
    sizes = {"width": 32, "feedforward": 64, "encoder_layers": 2, "decoder_layers": 2, "image_channels": 3}
    return dino_small(**(sizes | options)).eval()


def stock(two_stage: bool = True):
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    layers = {f"{part}_layers": 2 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    config = DeformableDetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=10,
        two_stage=two_stage,
        with_box_refine=two_stage,
        two_stage_num_proposals=10,
        num_labels=5,
        **layers,
        **heads,
    )
    return DeformableDetrForObjectDetection(config).eval()


def output(model, x, padded=None):
    """Logits of either family; padded is True where images were padded."""
    with torch.no_grad():
        if hasattr(model, "model"):
            return model(x, None if padded is None else (~padded).long()).logits
        return model(x, padded)["logits"]


def padding(batch: int, height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[1, :, width // 2 :] = True
    return mask


def parts_for(model, method=None) -> FocusParts:
    torch.manual_seed(1)
    return (method or FocusDETR(cascade=ALL)).build(adapter_for(model).info).eval()


both = pytest.mark.parametrize("build", [ours, stock], ids=["dino", "deformable_detr"])
X = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


# -- adapter ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("criterion", ["proposal", "class"])
@pytest.mark.parametrize("padded", [False, True])
def test_keeping_all_changes_nothing(build, criterion, padded):
    model, mask = build(), padding(2, 64, 96) if padded else None
    dense = output(model, X, mask)
    with apply(FocusDETR(cascade=ALL, criterion=criterion), model, 1.0):
        kept = output(model, X, mask)
    assert torch.allclose(kept, dense, atol=1e-5)


@both
def test_pruned_model_differs_and_is_restored(build):
    model = build()
    dense, before = output(model, X), [vars(m).get("forward") for m in model.modules()]
    method = FocusDETR(cascade=(1.0, 0.5))
    with apply(method, model, 0.5, parts=parts_for(model)) as handle:
        pruned = output(model, X)
        assert torch.equal(output(model, X), pruned)
        tokens = sum(h * w for h, w in handle.adapter.grids())
        most = tokens // 2 + 1
        assert [k.shape[1] for _, k in handle.kept()] == [most, most // 2]
        assert handle.report().tokens == ((most, most), (most // 2, most // 2))
    assert not torch.allclose(pruned, dense)
    assert torch.equal(output(model, X), dense)
    assert [vars(m).get("forward") for m in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError), apply(method, model, 0.5, parts=parts_for(model)):
        raise RuntimeError
    assert torch.equal(output(model, X), dense)


@both
def test_tokens_left_out_pass_by_unchanged(build):
    model = build()
    layer = adapter_for(model).blocks[1]
    seen = []
    method = FocusDETR(cascade=(0.0, 0.5), criterion="class")
    with apply(method, model, 0.5) as handle:
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
            layer.register_forward_hook(lambda _, __, out: seen.append(out)),
        ]
        output(model, X)
        (_, kept) = handle.kept()[1]
        for hook in hooks:
            hook.remove()
    changed = (seen[0] != seen[1]).any(-1)
    assert torch.equal(changed, torch.zeros_like(changed).scatter(1, kept, True))


@both
def test_a_query_of_few_equals_its_row_of_all(build):
    """The first layer's kept tokens come out as the dense layer would update them."""
    model = build()
    first = adapter_for(model).blocks[0]
    outputs = []
    hook = first.register_forward_hook(lambda _, __, out: outputs.append(out))
    output(model, X)
    with apply(FocusDETR(cascade=ALL, criterion="class"), model, 0.3) as handle:
        output(model, X)
        (_, kept) = handle.kept()[0]
    hook.remove()
    rows = kept.unsqueeze(-1).expand(-1, -1, 32)
    assert torch.allclose(outputs[0].gather(1, rows), outputs[1].gather(1, rows), atol=1e-6)


@both
def test_images_keep_their_own_counts(build):
    model, mask = build(), padding(2, 64, 96)
    with apply(FocusDETR(cascade=ALL), model, 0.5, parts=parts_for(model)) as handle:
        output(model, X, mask)
        valid = handle.adapter.running.tokens.valid.sum(1).tolist()
        for _, kept in handle.kept():
            assert (kept >= 0).sum(1).tolist() == [n // 2 + 1 for n in valid]
    assert valid[0] > valid[1]


@both
@pytest.mark.parametrize("criterion", ["learned", "proposal", "class"])
def test_batch_equals_single(build, criterion):
    model, method = build(), FocusDETR(cascade=(1.0, 0.5), criterion=criterion)
    parts = parts_for(model) if criterion == "learned" else None
    with apply(method, model, 0.4, parts=parts):
        together = output(model, X)
        alone = torch.cat([output(model, x.unsqueeze(0)) for x in X])
    assert torch.allclose(together, alone, atol=1e-4)


@both
def test_bfloat16_is_finite(build):
    model = build().to(torch.bfloat16)
    with apply(FocusDETR(cascade=(1.0, 0.5)), model, 0.4, parts=parts_for(model).to(torch.bfloat16)):
        assert torch.isfinite(output(model, X.to(torch.bfloat16)).float()).all()


@both
def test_bad_values_are_named(build):
    model, bad = build(), X.clone()
    bad[0, :, :40] = float("nan")
    with (
        pytest.raises(PrunelabError, match="'encoder_memory' holds NaN"),
        apply(FocusDETR(cascade=ALL), model, 0.4, parts=parts_for(model)),
    ):
        output(model, bad)


def test_repr_round_trips():
    for method in (FocusDETR(), FocusDETR((1.0, 0.5), "proposal", 0), SparseDETR("class")):
        assert registry.parse(repr(method)) == method


def test_write_back_skips_entries_that_do_not_count():
    hidden, updated = torch.zeros(2, 4, 1), torch.ones(2, 3, 1)
    index = torch.tensor([[0, 2, 3], [1, 0, 0]])
    kept = torch.tensor([[True, True, False], [True, False, False]])
    assert write_back(hidden, updated, index, kept).squeeze(-1).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert write_back(hidden, updated, index, None)[0].squeeze(-1).tolist() == [1, 0, 1, 1]


@both
def test_training_reaches_parts_and_model(build):
    model = build().train()
    method, parts = FocusDETR(cascade=ALL, objects=5), parts_for(model).train()
    wanted = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    with apply(method, model, 0.5, parts=parts):
        out = model(X)
        detections = out.logits.sum() if hasattr(out, "logits") else out["logits"].sum()
        loss = foreground_loss(parts, wanted, torch.tensor([[96, 64], [96, 64]]))
        (detections + loss).backward()
    assert [name for name, p in parts.named_parameters() if p.grad is None] == []
    assert parts.alpha.grad.abs().sum() > 0
    body = model.model if hasattr(model, "model") else model
    assert body.enc_output.weight.grad.abs().sum() > 0, "the scorer teaches the projection it reads"
    parts.eval()
    with apply(method, model.eval(), 0.5, parts=parts):
        output(model, X)
    assert parts.scored is None
    with pytest.raises(PrunelabError, match="no scores to learn from"):
        foreground_loss(parts, wanted, torch.tensor([[96, 64], [96, 64]]))


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (65, 97)])
def test_small_and_odd_images(size):
    """Fewer tokens than the 300 of the dual attention, and fewer than queries: all take part."""
    model = ours()
    with apply(FocusDETR(cascade=(1.0, 0.2)), model, 0.5, parts=parts_for(model)) as handle:
        assert torch.isfinite(output(model, torch.randn(1, 3, *size))).all()
        assert all(kept.shape[1] >= 1 for _, kept in handle.kept())


def test_nothing_kept_still_updates_one_token():
    model = ours()
    with apply(FocusDETR(cascade=(0.0, 0.0)), model, 0.0, parts=parts_for(model)) as handle:
        output(model, X)
        assert [k.shape[1] for _, k in handle.kept()] == [1, 1]


def test_cost_of_the_published_encoder():
    with torch.device("meta"):
        model = dino_r50(value="features").eval()
        info = adapter_for(model).info
        parts = FocusDETR().build(info).eval()
    assert info.tokens == 22223
    with apply(FocusDETR(), model, 0.5, parts=parts) as handle:
        report = handle.report()
    assert [t for t, _ in report.tokens] == [11112, 8889, 6667, 6667, 4444, 2222]
    encoder = meter.module_macs(model, adapter_for(model).example(), "encoder")
    n, d, ffn, samples = info.tokens, 256, 2048, 8 * 4 * 4
    a_query = d * 2 * samples + d * samples + d * d + 2 * d * ffn + 5 * samples * 32
    assert encoder == 6 * n * (d * d + a_query)
    dual = 6 * 300 * (4 * d * d + 2 * 300 * d)
    classes = sum(t for t, _ in report.tokens) * d * 80
    left = 6 * n * d * d + sum(t for t, _ in report.tokens) * a_query + dual + classes
    assert report.macs - report.scoring_macs == report.dense_macs - encoder + left


# -- what cannot be done ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe(TokenPruner):
    """Carries out a given plan."""

    rest: str = "drop"
    mix: bool = False
    layers: tuple[int, ...] = (0,)
    where: str = "input"

    name: ClassVar[str] = "probe"

    def sites(self, info):
        return [Site(layer, self.where) for layer in self.layers]  # type: ignore[arg-type]

    def requires(self, site):
        return frozenset()

    def plan(self, site, signals, budget):
        index = torch.arange(3).expand(signals.prunable.shape[0], -1)
        reduce = Mix(index, index, torch.ones(index.shape), 3) if self.mix else Gather(index)
        return Plan(reduce, rest=self.rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Probe(), "tokens can drop, those of deformable_encoder can only bypass"),
        (Probe("bypass", mix=True), "Gather plans only"),
        (Probe("bypass", layers=(0, 0)), "layer 0 behind layer 0"),
        (Probe("bypass", layers=(2,)), "layers 0 to 1"),
        (Probe("bypass", where="block_output"), "has only input"),
    ],
)
def test_plans_the_encoder_cannot_carry_out(method, message):
    model = ours()
    with pytest.raises(PrunelabError, match=message), apply(method, model, 0.5):
        output(model, X)
    with apply(Probe("bypass"), model, 0.5):
        output(model, X)


def test_wrong_uses_are_named():
    model = ours()
    with pytest.raises(PrunelabError, match="names 6 layers, this encoder has 2"), apply(FocusDETR(), model, 0.5):
        pass
    with pytest.raises(PrunelabError, match="learned parts"), apply(FocusDETR(cascade=ALL), model, 0.5):
        pass
    with pytest.raises(PrunelabError, match="must be one of"):
        FocusDETR(criterion="random")  # type: ignore[arg-type]
    with pytest.raises(PrunelabError, match="each from 0 to 1"):
        FocusDETR(cascade=(1.0, 1.2))
    for criterion in ("learned", "proposal"):
        method, one_stage = FocusDETR(cascade=ALL, criterion=criterion), stock(two_stage=False)  # type: ignore[arg-type]
        with pytest.raises(PrunelabError, match="two-stage"), apply(method, one_stage, 0.5):
            pass
    with apply(FocusDETR(cascade=ALL, criterion="class"), one_stage, 0.5):
        assert torch.isfinite(output(one_stage, X)).all()
    with pytest.raises(PrunelabError, match="4 levels met 2"):
        parts_for(model)(torch.randn(1, 5, 32), [(2, 2), (1, 1)])


# -- selection -------------------------------------------------------------------------------------------------------


def test_counts():
    assert focus_counts(Budget(0.5), [100, 61, 1]) == [51, 31, 1]
    assert focus_counts(Budget(0.0), [100]) == [1]
    assert focus_counts(Budget(1.0), [100]) == [100]
    assert focus_counts(Budget(30, "count"), [100, 20]) == [30, 20]
    assert layer_count(0.6, 129) == 77 and layer_count(0.0, 129) == 1


def test_selection_prefers_valid_tokens_even_at_the_least_score():
    valid = torch.tensor([[True, False, True, True]])
    scores = torch.tensor([[2.0, 9.0, -1.0, 3.0]])
    assert fill_padding(scores, valid).tolist() == [[2.0, -1.0, -1.0, 3.0]]
    assert rank(scores, valid).tolist() == [[3, 0, 2, 1]]


def test_layers_take_prefixes_and_images_their_own_count():
    ranking = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    whole = select(ranking, [4, 2], 1.0)
    assert whole.index.shape == (2, 4) and whole.valid is not None
    assert whole.valid.tolist() == [[True] * 4, [True, True, False, False]]
    half = select(ranking, [4, 2], 0.5)
    assert half.index.tolist() == [[3, 1], [0, 1]] and half.valid is None


def test_dual_attention_touches_the_objects_alone():
    torch.manual_seed(0)
    hidden, positions = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    foreground, logits = torch.tensor([[1.0, 1.0, -2.0, 1.0, 0.1, 0.1]]), torch.zeros(1, 6, 3)
    logits[0, :, 1] = torch.tensor([3.0, 0.5, -3.0, 2.0, 1.0, 1.0])
    logits[0, :, [0, 2]] = -9.0
    with torch.no_grad():
        out = enhance(hidden, positions, foreground, logits, DualAttention(8, 2).eval(), 2)
    changed = (out != hidden).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [0, 2], "the product of two negative logits ranks high, as released"


# -- supervision -----------------------------------------------------------------------------------------------------


def test_tokens_inside_boxes_of_their_scale_are_foreground():
    shapes = [(8, 8), (4, 4), (2, 2), (1, 1)]
    boxes = torch.tensor([[[0.0, 0.0, 16.0, 16.0], [-1.0, -1.0, -1.0, -1.0]]])
    found = foreground_targets(boxes, shapes)
    grid = found[0, :64].view(8, 8)
    assert grid[:2, :2].eq(1).all() and grid.sum() == 4 and found[0, 64:].sum() == 0
    assert foreground_targets(torch.full((1, 1, 4), -1.0), shapes).sum() == 0
    assert foreground_targets(torch.tensor([[[-900.0, -900.0, -800.0, -800.0]]]), shapes).sum() == 0, "outside"
    with pytest.raises(PrunelabError, match="as many strides and limits"):
        foreground_targets(boxes, shapes[:2])


def test_no_boxes_leave_a_finite_loss():
    model = ours()
    parts = parts_for(model).train()
    with apply(FocusDETR(cascade=ALL), model.train(), 0.5, parts=parts):
        model(X)
    none = [{"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}] * 2
    loss = foreground_loss(parts, none, torch.tensor([[96, 64], [96, 64]]))
    assert torch.isfinite(loss) and loss > 0


# -- the authors' checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    """Names and shapes of the authors' R50 checkpoint with made-up values, shared tensors equal."""
    shapes = json.loads(KEYS.read_text())
    base = {name: torch.full(shape, 0.001 * (i % 97)) for i, (name, shape) in enumerate(shapes.items())}
    for name in shapes:
        for shared in ("transformer.decoder.class_embed.", "transformer.decoder.bbox_embed."):
            if name.startswith(shared):
                base[name] = base[name.removeprefix("transformer.decoder.")]
        if "enhance_MCSP" in name:
            base[name] = base["class_embed.6." + name.rsplit(".", 1)[1]]
    return base


@pytest.fixture(scope="module")
def published():
    model = dino_r50(value="features")
    return model, FocusDETR().build(adapter_for(model).info)


def test_every_official_entry_has_a_place(official, published):
    model, parts = published
    assert len(official) == 705
    found, unknown = checkpoint.convert(official)
    assert not unknown
    names = set(model.state_dict()) | {checkpoint.PARTS + name for name in parts.state_dict()}
    assert set(found) == names
    learned = {id(p): p for p in (*model.parameters(), *parts.parameters())}
    assert sum(p.numel() for p in learned.values()) == 49_339_920
    assert sum(p.numel() for p in learned.values() if p.requires_grad) == 49_330_512


def test_every_entry_of_a_swin_has_a_place(official):
    depths, single = (2, 2, 6, 2), ["patch_embed.proj", "patch_embed.norm", "norm1", "norm2", "norm3"]
    layers = [f"layers.{i}.blocks.{j}." for i, depth in enumerate(depths) for j in range(depth)]
    single += [b + n for b in layers for n in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    single += [f"layers.{i}.downsample.norm" for i in range(3)]
    names = [f"{name}.{kind}" for name in single for kind in ("weight", "bias")]
    names += [f"layers.{i}.downsample.reduction.weight" for i in range(3)]
    names += [f"{b}attn.relative_position_{kind}" for b in layers for kind in ("bias_table", "index")]
    rest = {name: value for name, value in official.items() if not name.startswith("backbone.")}
    found, unknown = checkpoint.convert({**rest, **{f"backbone.{name}": torch.zeros(3) for name in names}})
    assert not unknown
    with torch.device("meta"):
        model = dino_swin_tiny(value="features")
        parts = FocusDETR().build(adapter_for(model).info)
    assert set(found) == set(model.state_dict()) | {checkpoint.PARTS + name for name in parts.state_dict()}


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "iteration": 9}]
)
def test_load(official, published, wrap):
    model, parts = published
    checkpoint.load(model, parts, wrap(official))
    fused = official["transformer.decoder.layers.2.attentions.0.attn.in_proj_weight"]
    assert torch.equal(model.decoder[2].self_attn.k_proj.weight, fused[256:512])
    assert torch.equal(parts.dual[3].norm.weight, official["transformer.encoder.layers.3.norm2.weight"])
    assert torch.equal(model.class_embed[6].weight, official["enhance_MCSP_layerlist.0.weight"])
    assert torch.equal(
        model.backbone.layer3[0].downsample[1].running_var, official["backbone.res4.0.shortcut.norm.running_var"]
    )


def test_all_that_is_wrong_is_listed_and_nothing_is_loaded(official, published):
    model, parts = published
    before = model.level_embed.clone()
    bad = dict(official) | {"surprise": torch.zeros(1), "transformer.level_embeds": torch.ones(4, 256)}
    del bad["transformer.alpha"], bad["transformer.tgt_embed.weight"]
    bad["label_enc.weight"] = torch.zeros(91, 256)
    with pytest.raises(PrunelabError) as caught:
        checkpoint.load(model, parts, bad)
    for part in (
        "2 missing: pruning_parts.alpha, query_content.weight",
        "1 unknown: surprise",
        "shape: label_content.weight",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.equal(model.level_embed, before)


def test_shared_entries_must_agree(official, published):
    bad = dict(official) | {"transformer.encoder.enhance_MCSP.2.bias": torch.ones(80)}
    with pytest.raises(PrunelabError, match=r"inconsistent.*enhance_MCSP\.2\.bias"):
        checkpoint.load(*published, bad)


def test_written_file_loads_as_one_model(official, tmp_path):
    model = dino_r50(value="features")
    model.add_module(PARTS, FocusDETR().build(adapter_for(model).info))
    torch.save({"model": official}, tmp_path / "authors.pth")
    checkpoint.main(str(tmp_path / "authors.pth"), str(tmp_path / "ours.safetensors"))
    load_checkpoint(model, tmp_path / "ours.safetensors")
    assert torch.equal(model.pruning_parts.alpha, official["transformer.alpha"])
    with pytest.raises(PrunelabError, match="no checkpoint of Focus-DETR"):
        checkpoint.main(str(tmp_path / "ours.safetensors"), str(tmp_path / "twice.safetensors"))


def test_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    assert checkpoint.read(tmp_path / "a.safetensors")["a"].sum() == 2
    assert checkpoint.read(tmp_path / "a.pth")["model"]["a"].sum() == 2
    (tmp_path / "b.pth").write_text("no checkpoint")
    with pytest.raises(PrunelabError, match="cannot be read"):
        checkpoint.read(tmp_path / "b.pth")
    with pytest.raises(PrunelabError, match="no checkpoint at"):
        checkpoint.read(tmp_path / "c.pth")
