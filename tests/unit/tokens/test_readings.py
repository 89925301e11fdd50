"""Signals of other layers, and tokens that leave inside the image encoder, against the eager model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunelab.common.apply import apply
from prunelab.common.core import attention
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Plan, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.role import TokenPruner
from tests.contract.references import images as pictures
from tests.contract.references import vit
from tests.contract.tokens_references import EarlierLayers, InTower, TextAttention, TowerAttention
from tests.contract.vlms import film, images, prompt, typed, vlm
from tests.unit.tokens.test_vlm import pair


@dataclass(frozen=True)
class Reader(TokenPruner):
    """Reads, and keeps what `cut` says."""

    site: Site
    readings: tuple[Reading, ...]
    cut: tuple[Site, ...] = ()
    read: dict[Reading, Tensor] = field(default_factory=dict, compare=False, hash=False)

    name: ClassVar[str] = "reader"

    def sites(self, info: Any) -> Any:
        return [*self.cut, self.site]

    def requires(self, site: Site) -> Any:
        return frozenset(self.readings) if replace(site, index=0) == self.site else frozenset()

    def plan(self, site: Site, signals: Any, budget: Budget) -> Plan:
        if replace(site, index=0) != self.site:
            return Plan(signals.keep(budget, order=signals.candidates()))
        for reading in self.readings:
            self.read[reading] = signals.at(reading)
        self.read["indices"] = signals.indices  # type: ignore[index]
        return Plan(signals.keep(Budget(1.0), mask=signals.prunable))


@pytest.mark.parametrize("where", ["packed", "projected"])
@torch.no_grad()
def test_every_layer_of_the_tower_can_be_read(where):
    model, eager = vlm("llava"), vlm("llava")
    eager.set_attn_implementation({"vision_config": "eager"})
    given = prompt("llava", images("llava", 2))
    names = ("cls_row", "received", "hidden", "queries", "keys", "values")
    readings = tuple(Reading(name, layer, "tower") for name in names for layer in (0, -2, -1))
    reader = Reader(Site(0, where), readings)
    with apply(reader, model, 1.0):
        model(**given)
    tower = eager.model.vision_tower
    output = tower(given["pixel_values"], output_attentions=True, output_hidden_states=True)
    spots = slice(3, 19) if where == "packed" else slice(None)
    for layer in (0, -2, -1):
        number = layer % (len(tower.encoder.layers) - 1)  # features leave out the last layer
        maps, block = output.attentions[number], tower.encoder.layers[number].self_attn

        def got(name: str, layer: int = layer) -> Tensor:
            return reader.read[Reading(name, layer, "tower")]

        assert torch.allclose(got("cls_row")[..., spots], maps[:, :, 0, 1:], atol=1e-5)
        assert torch.allclose(got("received")[..., spots], maps.sum(2)[..., 1:], atol=1e-4)
        assert torch.allclose(got("hidden")[:, spots], output.hidden_states[number + 1][:, 1:], atol=1e-4)
        entered = tower.encoder.layers[number].layer_norm1(output.hidden_states[number])
        for name, projection in (("queries", block.q_proj), ("keys", block.k_proj), ("values", block.v_proj)):
            want = projection(entered).unflatten(-1, (3, -1)).transpose(1, 2)[:, :, 1:]
            assert torch.allclose(got(name)[:, :, spots], want, atol=1e-5), name


@torch.no_grad()
def test_earlier_layers_of_a_decoder_follow_the_tokens_that_are_left():
    model, eager = vlm("llava"), vlm("llava")
    eager.set_attn_implementation("eager")
    given = pair("llava", model)  # two samples, one of them padded
    readings = tuple(Reading(name, 0) for name in ("last_row", "received", "hidden", "queries", "keys", "values"))
    reader = Reader(Site(3, "input"), readings, (Site(1, "input"), Site(2, "input")))
    with apply(reader, model, 0.5):
        model(**given)
    output = eager(**given, output_attentions=True, output_hidden_states=True)
    index, mask = reader.read["indices"], given["attention_mask"].bool()  # type: ignore[index]
    maps = output.attentions[0]
    received = (maps * mask[:, None, :, None]).sum(2)
    for b in range(2):
        left = index[b][mask[b].gather(0, index[b])]
        here = mask[b].gather(0, index[b])
        assert len(left) < int(mask[b].sum())
        assert torch.allclose(reader.read[readings[0]][b][:, here], maps[b, :, -1][:, left], atol=1e-5)
        assert torch.allclose(reader.read[readings[1]][b][:, here], received[b][:, left], atol=1e-4)
        assert torch.allclose(reader.read[readings[2]][b][here], output.hidden_states[1][b][left], atol=1e-4)
    for reading in readings[3:]:
        assert reader.read[reading].shape == (2, 4, index.shape[1], 8)


@torch.no_grad()
def test_the_texts_rows_of_a_layer():
    model, eager = vlm("llava"), vlm("llava")
    eager.set_attn_implementation("eager")
    given = prompt("llava", images("llava", 2), text=5)
    reading = Reading("attention", 1, rows="text")
    reader = Reader(Site(2, "input"), (reading,))
    with apply(reader, model, 1.0):
        model(**given)
    want = eager(**given, output_attentions=True).attentions[1][:, :, -5:]
    assert torch.allclose(reader.read[reading], want, atol=1e-5)


@torch.no_grad()
def test_earlier_blocks_of_a_vit():
    model, x = vit(), pictures()
    readings = tuple(Reading(name, 1) for name in ("cls_row", "received", "hidden", "keys", "values"))
    reader = Reader(Site(4, "block_output"), readings, (Site(2, "block_output"), Site(3, "after_attention")))
    maps, states = [], []
    block = model.blocks[1]
    block.attn.fused_attn = False
    hooks = [
        block.attn.attn_drop.register_forward_pre_hook(lambda _, args: maps.append(args[0])),
        block.register_forward_hook(lambda _, __, out: states.append(out)),
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    block.attn.fused_attn = True
    with apply(reader, model, 0.5):
        model(x)
    index = reader.read["indices"]  # type: ignore[index]
    assert index.shape[1] == 1 + 4
    for b in range(3):
        assert torch.allclose(reader.read[readings[0]][b], maps[0][b, :, 0][:, index[b]], atol=1e-5)
        assert torch.allclose(reader.read[readings[1]][b], maps[0][b].sum(1)[:, index[b]], atol=1e-4)
        assert torch.allclose(reader.read[readings[2]][b], states[0][b][index[b]], atol=1e-5)


def test_what_cannot_be_read_is_named_before_work():
    wrong: list[tuple[Any, str, str]] = [
        (Reader(Site(0, "packed"), (Reading("hidden", 1),)), "llava", "no layer of the decoder has run"),
        (Reader(Site(2, "input"), (Reading("hidden", 2),)), "llava", "layers 0 to 1 have run"),
        (Reader(Site(0, "packed"), (Reading("hidden", 2, "tower"),)), "llava", "come from layer 1"),
        (Reader(Site(0, "packed"), (Reading("beauty", 0, "tower"),)), "llava", "read cls_row, hidden"),
        (Reader(Site(0, "packed"), (Reading("cls_row", 0, "tower"),)), "llava_onevision", "no class token"),
        (Reader(Site(0, "packed"), (Reading("hidden", 0, "tower"),)), "qwen2_5_vl", "read keys, received, values of"),
        (InTower((2,)), "llava", "has 2 layers before its features"),
    ]
    for method, family, message in wrong:
        with pytest.raises(PrunelabError, match=message), apply(method, vlm(family), 0.5):
            pass
    with (
        pytest.raises(PrunelabError, match="layers 0 to 0 have run"),
        apply(Reader(Site(1, "input"), (Reading("hidden", 1),)), vit(), 0.5),
    ):
        pass


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "llava_video"])
@torch.no_grad()
def test_tokens_leave_inside_the_tower(family):
    """The layers behind the site see fewer patches, and the decoder the features of those that are left."""
    model, given = vlm(family), prompt(family, images(family, 2))
    with apply(InTower(), model, 0.5) as handle:
        tokens = model(**given).past_key_values.layers[0].keys.shape[2]
        features = handle.adapter.encoded["image"].features
        ((site, kept),) = handle.kept()
        report = handle.report()
    assert site == Site(1, "tower") and report.macs < report.dense_macs
    tower = model.model.vision_tower
    special = int(family in ("llava", "llava_next"))
    pixels = given["pixel_values"].flatten(0, 1) if given["pixel_values"].dim() == 5 else given["pixel_values"]
    x = tower.embeddings(pixels)
    x = tower.pre_layrnorm(x) if special else x
    x = tower.encoder.layers[0](x, None)
    prefix = torch.zeros(len(kept), special, dtype=torch.long)
    x = torch.stack([row[i] for row, i in zip(x, torch.cat([prefix, kept + special], 1), strict=True)])
    for layer in tower.encoder.layers[1 : -1 if special else None]:
        x = layer(x, None)
    want = model.model.multi_modal_projector(x[:, special:])
    left = torch.cat(features)
    for crop, patches, rows in zip(left, kept, want, strict=True):
        assert torch.allclose(crop[patches], rows, atol=1e-4)
        assert int((crop.abs().sum(-1) > 0).sum()) == len(patches)
    dense = model(**given).past_key_values.layers[0].keys.shape[2]
    assert tokens < dense
    if family == "llava":
        assert tokens == dense - 8


@torch.no_grad()
def test_an_encoder_may_be_deeper_than_its_decoder():
    model, given = vlm("llava", tower=6), prompt("llava", images("llava", 2))
    with apply(InTower((4,)), model, 0.5) as handle:
        model(**given)
    assert [site for site, _ in handle.kept()] == [Site(4, "tower")]


@torch.no_grad()
def test_videos_lose_patches_inside_the_tower():
    model = vlm("llava_onevision")
    with apply(InTower(), model, 0.5) as handle:
        answer = model.generate(**film("llava_onevision", words=(4,)), max_new_tokens=3, do_sample=False)
        assert answer.shape[1] > 3 and handle.kept()[0][1].shape == (4, 4)
        assert handle.application.trace.attention[0] == 3 + 4 + 4 * 4 + 1, "four of nine patches a frame, a newline"


@torch.no_grad()
def test_scoring_costs_what_is_asked_for():
    """One row of attention a layer: products of one query with all keys, and no more."""
    model = vlm("llava")
    costs = []
    for last in (1, 2):
        with apply(TowerAttention(last), model, 0.5) as handle:
            costs.append(handle.report().scoring_macs)
    assert costs == [24 * 17, 2 * 24 * 17]
    with apply(TowerAttention(1, "received"), model, 0.5) as handle:
        assert handle.report().scoring_macs == 24 * 17 * 17


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llava", TowerAttention(2, "received")),
        ("llava", TowerAttention(2)),
        ("llava", TextAttention()),
        ("llava", EarlierLayers(reads=("received",))),
        ("vit", EarlierLayers((2,), "block_output", ("received", "cls_row"))),
    ],
    ids=str,
)
@torch.no_grad()
def test_no_square_of_attention_is_made_where_rows_or_sums_are_read(family, method, monkeypatch):
    model = vit(img_size=96) if family == "vit" else vlm("llava")
    x = torch.randn(1, 3, 96, 96)
    given = prompt("llava", images("llava", 1), text=60)

    def run() -> Tensor:
        with apply(method, model, 0.5):
            return model(x) if family == "vit" else model(**given).logits

    whole = run()
    monkeypatch.setattr(attention, "BLOCK", 1 << 10)
    seen = Largest()
    with seen:
        blocked = run()
    assert torch.allclose(whole, blocked, atol=1e-4)
    tokens, heads = (145, 3) if family == "vit" else (79, 4)
    assert seen.numel < heads * tokens * tokens or family != "vit"
    assert seen.numel <= max(heads * tokens * tokens - 1, *(p.numel() for p in model.parameters()), x.numel())


@pytest.mark.parametrize("frames", [0, 4])
def test_received_within_qwens_encoder_is_of_whole_frames_whose_windows_are_undone(frames: int) -> None:
    from transformers import AttentionInterface

    model = vlm("qwen2_5_vl", tower=4)
    model.config.vision_config.window_size = model.model.visual.window_size = 24  # three tokens wide, of four
    seen: dict[Any, list[Tensor]] = {}
    own: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    merged: list[Tensor] = []

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, **options: Any) -> Any:
        weights = (query @ key.mT * scaling).softmax(-1)
        seen.setdefault(module, []).append(weights.sum(2)[0])
        own.setdefault(module, []).append((key[0], value[0]))
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    given = film("qwen2_5_vl", frames, (4, 4)) if frames else prompt("qwen2_5_vl", images("qwen2_5_vl", 2))
    given = typed(model, given)
    names = ("received", "keys", "values")
    method = Reader(Site(0, "packed"), tuple(Reading(name, layer, "tower") for name in names for layer in (1, 2)))
    with torch.no_grad(), apply(method, model, 0.5) as handle:
        model(**given)
        adapter = handle.adapter
        (encoded,) = adapter.encoded.values()
        means = [adapter._of_patches(Reading(name, 1, "tower"), encoded) for name in ("keys", "values")]
        found = {layer: adapter._of_patches(Reading("received", layer, "tower"), encoded) for layer in (1, 2)}
    model.model.visual.config._attn_implementation = "spy"
    model.model.visual.merger.register_forward_hook(lambda module, args, out: merged.append(out))
    with torch.no_grad():
        encode = model.model.get_video_features if frames else model.model.get_image_features
        names = [name for name in given if "pixel" in name or "thw" in name]
        tokens = torch.cat(list(encode(**{name: given[name] for name in names}).pooler_output))
    order = adapter._windows((4, 4))
    assert order.tolist() != list(range(16)), "windows part the tiny picture"
    assert torch.equal(merged[0].unflatten(0, (-1, 16))[:, order.argsort()].flatten(0, 1), tokens)
    full = seen[model.model.visual.blocks[1].attn]  # a layer of full attention: one call a frame
    want = torch.stack(full).unflatten(2, (16, 4)).mean(3)[:, :, order.argsort()].mT
    assert torch.allclose(torch.cat(found[1]), want, atol=1e-5)
    for found_means, parts in zip(means, zip(*own[model.model.visual.blocks[1].attn], strict=True), strict=True):
        whole = torch.stack(parts).unflatten(2, (16, 4)).mean(3)[:, :, order.argsort()].transpose(1, 2).flatten(2)
        assert torch.allclose(torch.cat(found_means), whole, atol=1e-5)
    assert len(seen[model.model.visual.blocks[2].attn]) > len(full), "the next one attends within windows"
    assert torch.allclose(torch.cat(found[2]).sum(1), torch.tensor(16.0), atol=1e-3), "64 rows over 4 patches a token"


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_sublayers_are_read_of_the_tokens_that_are_left_and_the_coming_texts_rows_before_the_layer(family: str) -> None:
    model, eager = vlm(family), vlm(family)
    eager.set_attn_implementation("eager")
    given = pair(family, model)
    mask = given["attention_mask"].bool()
    names = ("attention_input", "attention_output", "mlp_input", "mlp_output")
    readings = tuple(Reading(name, layer) for layer in (0, 1) for name in names)
    want: dict[Reading, Tensor] = {}
    for layer in (0, 1):
        block = eager.model.language_model.layers[layer]
        modules = (block.input_layernorm, block.self_attn, block.post_attention_layernorm, block.mlp)
        for name, module in zip(names, modules, strict=True):

            def keep(module: Any, args: Any, output: Any, key: tuple[str, int] = (name, layer)) -> None:
                want[Reading(*key)] = output[0] if isinstance(output, tuple) else output

            module.register_forward_hook(keep)
    output = eager(**given, output_attentions=True)

    @dataclass(frozen=True)
    class Both(Reader):
        def requires(self, site: Any) -> Any:
            return frozenset({*self.readings, "coming_text"}) if site == self.site else frozenset()

        def plan(self, site: Site, signals: Any, budget: Any) -> Plan:
            if site.layer == self.site.layer:
                self.read["text"] = signals.coming_text  # type: ignore[index]
            return super().plan(site, signals, budget)

    reader = Both(Site(2, "input"), readings)
    with apply(reader, model, 1.0):
        logits = model(**given).logits
    assert torch.allclose(logits[mask], output.logits[mask], atol=1e-4)
    for reading in readings:
        assert torch.allclose(reader.read[reading][mask], want[reading][mask], atol=1e-4), str(reading)
    rows = reader.read["text"]  # type: ignore[index]
    assert rows.shape[2] == 6
    for sample, words in enumerate((6, 3)):  # behind each picture
        maps = output.attentions[2][sample]
        assert torch.allclose(rows[sample, :, -words:], maps[:, -words:], atol=1e-4)
        assert not bool(rows[sample, :, :-words].any())
