"""Adapters of image and video language models, against a full forward of the same kept tokens with explicit masks and
positions, at prefill and while decoding."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.core.attention_interface import NAME, record
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Plan, Site
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm_prompt import closed, with_newlines
from prunelab.common.tokens.role import TokenPruner
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.fastervlm.method import FasterVLM
from prunelab.methods.fastv.method import FastV
from prunelab.methods.random_drop.method import RandomDrop
from tests.contract.vlms import IMAGE, VIDEO, VLMS, ids, images, patched, prompt, typed, vlm

every = pytest.mark.parametrize("family", VLMS)
CUTS = [
    RandomDrop((0,), "packed"),
    RandomDrop((0,), "packed", positions="renumber"),
    RandomDrop((2,), "input"),
    RandomDrop((2,), "input", positions="renumber"),
    RandomDrop((0, 3), "input"),
    FastV(1),
]


def pair(family: str, model: Any) -> dict[str, Any]:
    """Two images, one a sample, with questions of different length: a padded batch."""
    given = prompt(family, images(family, 2))
    counts = (given["input_ids"] == IMAGE).sum(1).tolist()
    runs = [[("text", 3), (IMAGE, n), ("text", words)] for n, words in zip(counts, (6, 3), strict=True)]
    return typed(model, given | ids(runs))


@torch.no_grad()
def oracle(model: Any, given: dict[str, Any], kept: list[tuple[Site, Tensor]], renumber: bool) -> Tensor:
    """Logits [B, N, V] of the dense model on the whole sequence, where from each site's layer on no query sees a key
    that the method dropped, and positions are those of the kept tokens. Rows of dropped tokens mean nothing."""
    total = given["input_ids"].shape[1]
    prompt_length = int(given.pop("prompt_length", total))
    mask = given["attention_mask"].bool()
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    if "token_type_ids" in given:  # the prompt sees all of itself
        seen[:prompt_length, :prompt_length] = True
    seen = seen & mask[:, None, None, :]
    aids: dict[int, dict[str, Any]] = {}
    state: dict[str, Tensor] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        batch = len(mask)
        positions = kwargs.get("position_ids")
        positions = torch.arange(total).expand(batch, -1) if positions is None else positions
        positions = positions[-3:] if positions.dim() == 3 else positions.expand(batch, -1)
        state["embeddings"] = kwargs["inputs_embeds"]
        for site, places in kept:
            on = torch.zeros(batch, total + 1, dtype=torch.bool).scatter(1, places % (total + 1), True)[:, :total]
            on[:, prompt_length:] = True
            here = positions
            if renumber:
                here = positions.clone()
                for b in range(batch):
                    real = on[b] & mask[b]
                    used = here[..., b, real].unique()
                    here[..., b, real] = torch.searchsorted(used, here[..., b, real].contiguous())
            rotary = decoder.rotary_emb(kwargs["inputs_embeds"], here)
            own = torch.eye(total, dtype=torch.bool)
            aids[site.layer] = {"attention_mask": seen & on[:, None, None, :] | own, "position_embeddings": rotary}

    def change(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            latest = [aids[k] for k in sorted(aids) if k <= layer]
            return args, kwargs | (latest[-1] if latest else {})

        return hook

    decoder = adapter_for(model).decoder
    hooks = [decoder.register_forward_pre_hook(note, with_kwargs=True)]
    hooks += [block.register_forward_pre_hook(change(i), with_kwargs=True) for i, block in enumerate(decoder.layers)]
    try:
        return model(**given).logits
    finally:
        for hook in hooks:
            hook.remove()


@every
@pytest.mark.parametrize("method", CUTS, ids=repr)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_prefill_equals_the_oracle(family, method, padded):
    model = vlm(family)
    given = pair(family, model) if padded else typed(model, prompt(family, images(family, 2)))
    with torch.no_grad(), apply(method, model, 0.5) as handle:
        pruned = model(**given)
        kept = handle.kept()
        held = [layer.keys.shape[2] for layer in pruned.past_key_values.layers]
    want = oracle(model, given, kept, getattr(method, "positions", "") == "renumber")
    places = kept[-1][1]
    for b in range(2):
        real = places[b] >= 0
        assert torch.allclose(pruned.logits[b, real], want[b, places[b, real]], atol=5e-5)
    counts = {site.layer: place.shape[1] for site, place in kept}
    full = given["input_ids"].shape[1]
    assert held == [next((counts[k] for k in sorted(counts, reverse=True) if k <= layer), full) for layer in range(4)]


@every
@pytest.mark.parametrize("method", [CUTS[1], CUTS[2], CUTS[3], DivPrune(), FastV()], ids=repr)
@pytest.mark.parametrize("how", ["greedy", "sampling", "beams"])
def test_generate_equals_the_oracle(family, method, how):
    model = vlm(family)
    check_generation(model, pair(family, model), method, how)


def check_generation(model: Any, given: dict[str, Any], method: TokenPruner, how: str) -> None:
    """What two padded prompts are answered with, word by word, against the oracle."""
    options = {
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "top_k": 20},
        "beams": {"num_beams": 3, "length_penalty": 0.0, "do_sample": False},
    }[how]
    if how == "beams" and type(method) is RandomDrop:
        inside = method.where == "input"
        method = FastV(2, method.positions) if inside else DivPrune(positions=method.positions)
    torch.manual_seed(0)
    bad = [[IMAGE], [VIDEO]]
    with apply(method, model, 0.5) as handle:
        made = model.generate(
            **given,
            **options,
            max_new_tokens=5,
            min_new_tokens=5,
            bad_words_ids=bad,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
        )
        kept = handle.kept()
    start, tokens = given["input_ids"].shape[1], made.sequences[:, given["input_ids"].shape[1] :]
    longer = given | {
        "input_ids": made.sequences,
        "attention_mask": torch.cat([given["attention_mask"], torch.ones_like(tokens)], 1),
        "prompt_length": start,
    }
    if how == "beams":
        kept = [(site, place.view(2, 3, -1)[:, 0]) for site, place in kept]
    if "mm_token_type_ids" in given:
        longer["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], torch.zeros_like(tokens)], 1)
    if "token_type_ids" in given:
        longer["token_type_ids"] = torch.cat([given["token_type_ids"], torch.ones_like(tokens)], 1)
    longer["position_ids"] = model._prepare_position_ids_for_generation(
        longer["input_ids"], {k: v for k, v in longer.items() if k != "prompt_length"}
    )
    logits = oracle(model, longer, kept, method.positions == "renumber")[:, start - 1 : -1]
    if how != "beams":
        assert torch.allclose(torch.stack(made.logits, 1), logits, atol=1e-4)
    else:
        scores = logits.log_softmax(-1).gather(2, tokens.unsqueeze(-1)).sum((1, 2))
        assert torch.allclose(made.sequences_scores, scores, atol=1e-4)


def test_before_the_decoder_pruning_is_the_librarys_own_seam():
    """Features pruned by hand, placeholders shortened, `mm_encoder_outputs`: the same logits and the same words."""
    model = vlm("llava")
    given = prompt("llava", images("llava", 1))
    with torch.no_grad(), apply(DivPrune(), model, 0.5) as handle:
        pruned = model(**given).logits
        words = model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        places = handle.kept()[0][1]
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def features() -> Any:
        whole = model.model.get_image_features(given["pixel_values"], return_dict=True).pooler_output[0]
        chosen = places[0][(places[0] >= 3) & (places[0] < 19)] - 3
        return {"image": BaseModelOutputWithPooling(pooler_output=[whole[chosen]])}

    short = {"input_ids": given["input_ids"].gather(1, places)}
    short["attention_mask"] = torch.ones_like(short["input_ids"])
    with torch.no_grad():
        assert torch.allclose(model(**short, mm_encoder_outputs=features()).logits, pruned, atol=1e-5)
        same = model.generate(
            **short, mm_encoder_outputs=features(), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
    assert torch.equal(words[:, -6:], same[:, -6:])


def test_a_cache_filled_step_by_step_numbers_as_generate_does():
    model = vlm("llava")
    given = prompt("llava", images("llava", 2))
    for method in (RandomDrop((0,), "packed"), RandomDrop((0,), "packed", positions="renumber"), FastV()):
        with torch.no_grad(), apply(method, model, 0.5) as handle:
            output = model(**given)
            kept, tokens = handle.kept(), given["input_ids"]
            for _ in range(3):
                step = output.logits[:, -1:, :50].argmax(-1)  # a word, no placeholder
                tokens = torch.cat([tokens, step], 1)
                output = model(input_ids=step, past_key_values=output.past_key_values)
        longer = given | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "prompt_length": 23}
        want = oracle(model, longer, kept, method.positions == "renumber")[:, -1]
        assert torch.allclose(output.logits[:, -1], want, atol=5e-5)


# -- signals ---------------------------------------------------------------------------------------------------------


class Reader(TokenPruner):
    """Keeps every token and remembers what it read."""

    name: ClassVar[str] = "reader"

    def __init__(self, site: Site, *names: str) -> None:
        self.site, self.names = site, names
        self.read: dict[str, Tensor] = {}

    def sites(self, info: Any) -> list[Site]:
        return [self.site]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset(self.names)

    def plan(self, site: Site, signals: Any, budget: Budget) -> Plan:
        self.read = {name: getattr(signals, name) for name in self.names}
        self.grids, self.modality = signals.grids, signals.modality
        return Plan(signals.keep(Budget(1.0), scores=torch.zeros(signals.prunable.shape)))


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_decoder_signals_are_the_eager_attention(family):
    model, eager = vlm(family), vlm(family)
    eager.set_attn_implementation("eager")
    given = pair(family, model)
    names = ("last_row", "attention", "received", "attention_logits", "queries", "keys", "hidden")
    reader = Reader(Site(2, "input"), *names)
    with torch.no_grad():
        with apply(reader, model, 1.0):
            model(**given)
        output = eager(**given, output_attentions=True, output_hidden_states=True)
    want, mask = output.attentions[1], given["attention_mask"].bool()
    for b in range(2):
        got = reader.read["attention"][b][:, mask[b]]
        assert torch.allclose(got, want[b][:, mask[b]], atol=1e-5)
    assert torch.allclose(reader.read["last_row"], want[:, :, -1], atol=1e-5)
    assert torch.allclose(reader.read["received"], (want * mask[:, None, :, None]).sum(2), atol=1e-4)
    assert torch.allclose(reader.read["hidden"][mask], output.hidden_states[2][mask], atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_coming_row_is_what_the_layer_then_attends_to(family):
    model, eager = vlm(family), vlm(family)
    eager.set_attn_implementation("eager")
    given = pair(family, model)
    mask = given["attention_mask"].bool()
    with torch.no_grad():
        want = eager(**given, output_attentions=True)
        for layer in (0, 2):
            reader = Reader(Site(layer, "input"), "coming_row", "normed", "hidden")
            with apply(reader, model, 1.0):
                output = model(**given)
            normed = model.model.language_model.norm(reader.read["hidden"])
            assert torch.equal(reader.read["normed"], normed)
            assert torch.allclose(reader.read["coming_row"], want.attentions[layer][:, :, -1], atol=5e-5)
            assert torch.allclose(output.logits[mask], want.logits[mask], atol=1e-4), "the cache and the pass are whole"


@pytest.mark.parametrize("where", ["packed", "projected"])
def test_tower_signals_are_the_eager_attention_of_the_layer_that_gives_features(where):
    model, eager = vlm("llava"), vlm("llava")
    eager.set_attn_implementation({"vision_config": "eager"})
    given = prompt("llava", images("llava", 2))
    reader = Reader(Site(0, where), "cls_row", "received", "hidden")
    with torch.no_grad():
        with apply(reader, model, 1.0):
            model(**given)
        output = eager.model.vision_tower(given["pixel_values"], output_attentions=True, output_hidden_states=True)
        features = eager.model.get_image_features(given["pixel_values"], return_dict=True).pooler_output
    maps = output.attentions[-2]
    spots = slice(3, 19) if where == "packed" else slice(None)
    assert torch.allclose(reader.read["cls_row"][..., spots], maps[:, :, 0, 1:], atol=1e-5)
    assert torch.allclose(reader.read["received"][..., spots], maps.sum(2)[..., 1:], atol=1e-4)
    assert torch.allclose(reader.read["hidden"][:, spots], torch.stack(features), atol=1e-5)
    if where == "packed":
        assert not reader.read["cls_row"][..., :3].any()


def test_large_images_pack_their_signals_as_their_features():
    """The packed class row of LLaVA-NeXT, at every token that a patch became."""
    model = vlm("llava_next")
    given = prompt("llava_next", images("llava_next", 1))
    packed, projected = Reader(Site(0, "packed"), "cls_row"), Reader(Site(0, "projected"), "cls_row")
    with torch.no_grad():
        for reader in (packed, projected):
            with apply(reader, model, 1.0) as handle:
                model(**given)
                order = handle.adapter.encoded["image"].order()[0]
    assert projected.grids == ((4, 4),) * 5
    assert order is not None
    assert int((order < 0).sum()) == 8, "a newline behind each of two times four rows"
    rows = packed.read["cls_row"][0][:, 3 : 3 + len(order)]
    assert not rows[:, order < 0].any()
    assert torch.equal(rows[:, order >= 0], projected.read["cls_row"][0][:, order[order >= 0]])


# -- packing ---------------------------------------------------------------------------------------------------------


def test_newlines_follow_the_rows_that_still_hold_a_token():
    model = vlm("llava_next")
    given = prompt("llava_next", images("llava_next", 1))
    with torch.no_grad():
        with apply(FasterVLM(newlines=True), model, Budget(1, "count")) as handle:
            with_rows = model(**given).past_key_values.layers[0].keys.shape[2]
            patches = handle.kept()[0][1][0]
        with apply(FasterVLM(newlines=False), model, Budget(1, "count")):
            without = model(**given).past_key_values.layers[0].keys.shape[2]
    assert len(patches) == 5, "one a crop"
    crops = patches[1:] // 16 - 1
    rows = {(int(c) // 2 * 4 + int(p) % 16 // 4) for c, p in zip(crops, patches[1:], strict=True)}
    assert without == 7 + 5
    assert with_rows == 7 + 5 + len(rows)


def test_layouts_become_newlines():
    tokens, newline = torch.arange(5.0).unsqueeze(1), torch.tensor([9.0])
    layout = torch.tensor([[0, 0, 1], [0, 0, 2], [0, 2, 0], [1, 2, 0], [1, 2, 3]])
    assert with_newlines(tokens, layout, newline, "row").flatten().tolist() == [0, 1, 9, 2, 9, 3, 4, 9]
    assert with_newlines(tokens, layout, newline, "end").flatten().tolist() == [0, 1, 2, 3, 4, 9]


def test_closing_up_positions():
    assert closed(torch.tensor([[0, 4, 7]]), None).tolist() == [[0, 1, 2]]
    assert closed(torch.tensor([[1, 1, 5, 6]]), torch.tensor([[False, False, True, True]])).tolist() == [[0, 0, 0, 1]]
    axes = torch.tensor([[[0, 3, 3, 9]], [[0, 3, 6, 9]], [[0, 5, 3, 9]]])  # numbers in use: 0 3 5 6 9
    assert closed(axes, None)[:, 0].tolist() == [[0, 1, 1, 4], [0, 1, 3, 4], [0, 2, 1, 4]]


def test_several_images_a_sample_and_mixed_numbers_of_them():
    model = vlm("llava")
    pixels = images("llava", 3)
    runs = [[("text", 2), (IMAGE, 16), ("text", 1), (IMAGE, 16), ("text", 3)], [("text", 4), (IMAGE, 16), ("text", 3)]]
    given = {"pixel_values": pixels} | ids(runs)
    with torch.no_grad():
        for method in (FasterVLM(), FasterVLM("packed"), DivPrune(), FastV()):
            with apply(method, model, 0.5) as handle:
                output = model(**given)
                together = model.generate(**given, max_new_tokens=4, min_new_tokens=4, num_beams=2)[:, -4:]
                assert output.past_key_values.layers[-1].keys.shape[2] == 6 + 16
                assert handle.kept()
            alone = {"pixel_values": pixels[2:]} | ids(runs)
            row = given["attention_mask"][1].bool()
            alone |= {k: given[k][1:, row] for k in ("input_ids", "attention_mask")}
            with apply(method, model, 0.5):
                assert torch.allclose(model(**alone).logits[:, -1], output.logits[1:, -1], atol=1e-5)
                single = model.generate(**alone, max_new_tokens=4, min_new_tokens=4, num_beams=2)[:, -4:]
            assert torch.equal(single, together[1:])


@pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])
def test_several_images_of_onevision_are_one_crop_each(family):
    model = vlm(family)
    pixels = images(family, 2).unsqueeze(0).transpose(0, 1)  # two images of one crop
    side = pixels.shape[-1]
    tokens = (side // 8) ** 2 + 1
    given = {
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[side, side]] * 2),
        "batch_num_images": torch.tensor([2]),
    } | ids([[("text", 2), (IMAGE, tokens), ("text", 1), (IMAGE, tokens), ("text", 3)]])
    with torch.no_grad():
        dense = model(**given).logits
        for method in (RandomDrop((0,), "projected"), DivPrune()):
            with apply(method, model, 1.0):
                assert torch.allclose(model(**given).logits, dense, atol=1e-5)
        with apply(RandomDrop((0,), "projected", positions="renumber"), model, Budget(3, "count")):
            assert model(**given).logits.shape[1] == 6 + 2 * (3 + 1)


def test_qwen_keeps_the_geometry_of_images_of_different_size():
    model = vlm("qwen2_5_vl")
    grids = torch.tensor([[1, 8, 8], [1, 4, 8]])
    big = patched(images("qwen", 1))
    given = {"pixel_values": torch.cat([big, big[:32]]), "image_grid_thw": grids}
    given = typed(model, given | ids([[("text", 3), (IMAGE, 16), ("text", 4)], [("text", 5), (IMAGE, 8), ("text", 4)]]))
    with torch.no_grad():
        for method in (RandomDrop((0,), "packed"), DivPrune(), RandomDrop((0,), "projected", positions="renumber")):
            with apply(method, model, 0.5) as handle:
                pruned, kept = model(**given), handle.kept()
            if method.where == "projected":
                continue
            want = oracle(model, given, kept, method.positions == "renumber")
            assert torch.allclose(pruned.logits[:, -1], want[:, -1], atol=5e-5)


# -- restoring and refusing ------------------------------------------------------------------------------------------


@every
def test_everything_is_as_before_afterwards(family):
    model = vlm(family)
    given = typed(model, prompt(family, images(family, 1)))
    with torch.no_grad():
        dense = model(**given).logits
        before = [c._attn_implementation for c in (model.config.vision_config, model.config.text_config)]
        with apply(FastV(), model, 0.5):
            assert model.config.text_config._attn_implementation == NAME
            model(**given)
        assert [c._attn_implementation for c in (model.config.vision_config, model.config.text_config)] == before
        assert "get_image_features" not in vars(model.model)
        assert torch.equal(model(**given).logits, dense)


def test_a_layer_has_as_many_recorders_as_are_asked_for_and_nested_recording_is_undone():
    model = vlm("llava").model.language_model
    layers = model.layers
    first, again = record(layers[0].self_attn), record(layers[0].self_attn)
    second = record(layers[1].self_attn)
    model(inputs_embeds=torch.ones(1, 3, 32))
    assert first[0].shown() is again[0].shown()
    again[1]()
    second[1]()
    assert layers[0].self_attn.config._attn_implementation == NAME
    first[1]()
    assert layers[0].self_attn.config._attn_implementation == "sdpa"


def test_mistakes_are_named():
    model, given = vlm("llava"), prompt("llava", images("llava", 1))
    words = {k: v[:, :3] for k, v in given.items() if k != "pixel_values"}
    with torch.no_grad():
        with apply(DivPrune(), model, 0.5), pytest.raises(PrunelabError, match="no visual token"):
            model(**words)
        with apply(DivPrune(), model, 0.5), pytest.raises((PrunelabError, ValueError), match="placeholders"):
            model(**given | {k: v[:, 1:] for k, v in ids([[("text", 3), (IMAGE, 15), ("text", 4)]]).items()})
        features = {"image": model.model.get_image_features(given["pixel_values"], return_dict=True)}
        rest = {k: v for k, v in given.items() if k != "pixel_values"}
        for method in (FasterVLM(), FasterVLM("packed")):
            with apply(method, model, 0.5), pytest.raises(PrunelabError, match="give"):
                model(**rest, mm_encoder_outputs=dict(features))
        other = {"image": model.model.get_image_features(-given["pixel_values"], return_dict=True)}
        with apply(FasterVLM("packed"), model, 0.5):
            model(**given)
            with pytest.raises(PrunelabError, match="not features"):  # what was recorded is another image's
                model(**rest, mm_encoder_outputs=other)
        with apply(DivPrune(), model, 0.5):
            assert model(**rest, mm_encoder_outputs=dict(features)).logits.shape[1] == 15
        cache = model(**given).past_key_values
        with apply(FastV(), model, 0.5), pytest.raises(PrunelabError, match="without the method"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(PrunelabError, match="not to be had"), apply(FastV(0), model, 0.5):
        pass
    with pytest.raises(PrunelabError, match="layers 0 to 3"), apply(FastV(9), model, 0.5):
        pass
    with pytest.raises(PrunelabError, match="no class token"), apply(FasterVLM(), vlm("llava_onevision"), 0.5):
        pass
    with pytest.raises(PrunelabError, match="out of range"):
        Budget(1.2)
    with apply(RandomDrop((0,), "projected"), vlm("llava_onevision"), 0.5):
        pass


def test_eager_models_prune_alike():
    plain, eager = vlm("llava"), vlm("llava")
    eager.set_attn_implementation("eager")
    given = pair("llava", plain)
    for method in (DivPrune(), FastV(), RandomDrop((2,), "input")):
        found = []
        for model in (plain, eager):
            with torch.no_grad(), apply(method, model, 0.5):
                words = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
                found.append((model(**given).logits[:, -1], words))
        assert torch.allclose(found[0][0], found[1][0], atol=5e-5)
        assert torch.equal(found[0][1], found[1][1])


@every
def test_costs_before_the_decoder_follow_the_tokens(family):
    model = vlm(family)
    adapter = adapter_for(model)
    tokens, text = adapter.info.tokens, adapter.example().text
    with apply(DivPrune(), model, 0.25) as handle:
        assert handle.report().tokens == ((text + (tokens - text) // 4,) * 2,) * 4
    with apply(RandomDrop((0,), "projected", positions="renumber"), model, Budget(1, "count")) as handle:
        report = handle.report()
    newlines = {"llava_next": 8, "llava_onevision": 6, "llava_video": 10}.get(family, 0)
    assert report.tokens[0] == (text + 1 + newlines,) * 2, "without values, every row is taken to hold a token"
    assert report.macs < report.dense_macs


@every
def test_costs_follow_the_tokens(family):
    model = vlm(family)
    adapter = adapter_for(model)
    tokens = adapter.info.tokens
    text = adapter.example().text
    with apply(FastV(2), model, 0.5) as handle:
        report = handle.report()
    half = text + (tokens - text) // 2
    assert report.tokens == ((tokens, tokens),) * 2 + ((half, half),) * 2
    assert report.cache_bytes == 2 * (tokens + half) * 2 * 2 * 8 * 4, "two tensors, two heads of 8, four bytes"
    assert 0 < report.scoring_macs < report.macs < report.dense_macs
    layer = report.dense_macs - report.macs + report.scoring_macs
    flat = (tokens - half) * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 40)
    attention = 2 * 2 * 32 * (tokens**2 - half**2)
    assert layer == pytest.approx(flat + attention), "the output layer reads the last token alone"


class Biased(TokenPruner):
    """Keeps every other token, and has attention to each of them biased."""

    name: ClassVar[str] = "biased"

    def __init__(self, where: Any) -> None:
        self.where = where

    def sites(self, info: Any) -> list[Site]:
        return [Site(0, self.where)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def plan(self, site: Site, signals: Any, budget: Budget) -> Plan:
        number = (signals.prunable.cumsum(1) - 1) * signals.prunable  # of each among the visual ones
        kept = signals.keep(mask=number % 2 == 0)
        bias = (number % 5 - 2.0) * signals.prunable
        return Plan(kept, key_bias=bias.gather(1, kept.index))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_bias_of_attention_follows_projected_tokens(family):
    """As it does those that are packed: in a padded batch, and while writing."""
    model, found = vlm(family), {}
    given = pair(family, model)
    for where in ("projected", "packed"):
        with apply(Biased(where), model, 0.5):
            written = model.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
            found[where] = (model(**given).logits, written)
    with apply(RandomDrop((0,), "packed"), model, 0.5):
        other = model(**given).logits
    assert torch.allclose(found["projected"][0][:, -1], found["packed"][0][:, -1], atol=1e-5)
    assert torch.equal(found["projected"][1], found["packed"][1])
    assert not torch.allclose(found["projected"][0][:, -1], other[:, -1], atol=1e-2)


@torch.no_grad()
def test_newlines_among_biased_tokens_have_no_bias():
    model = vlm("llava_next")
    given = prompt("llava_next", images("llava_next", 1))
    read: list[Tensor] = []
    with apply(Biased("projected"), model, 0.5) as handle:
        first = model.model.language_model.layers[0]
        hook = first.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        model(**given)
        hook.remove()
        bias = handle.adapter.running.tokens.bias
    newlines = (read[0] == model.model.image_newline).all(-1)
    assert int(newlines.sum()) == 8 and not bias[newlines].any()
    assert bias[0, 3:-4].unique().tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert not bias[0, :3].any() and not bias[0, -4:].any()
