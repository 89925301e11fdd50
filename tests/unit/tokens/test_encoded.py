"""Plans for features before the projector, and what can be read of the encoder's layers there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Mix, Plan, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.vlm_tower import followed
from prunelab.common.tokens.role import TokenPruner
from prunelab.methods.uniform_tokens.method import UniformTokens
from tests.contract.tokens_references import MergedFeatures, MergedInTower, WithClassToken
from tests.contract.vlms import film, images, prompt, vlm

PLAIN, CLASS = Site(0, "encoded"), Site(0, "encoded", class_token=True)


@dataclass(frozen=True)
class Fixed(TokenPruner):
    """Carries out one plan, and keeps what it read."""

    reduce: Any = None  # of the units, where it is not to keep them all
    site: Site = PLAIN
    readings: tuple[Any, ...] = ()
    layout: Any = None
    seen: dict[Any, Any] = field(default_factory=dict, compare=False, hash=False)

    name: ClassVar[str] = "fixed"
    positions = "renumber"

    def sites(self, info: Any) -> Any:
        return [self.site]

    def requires(self, site: Site) -> Any:
        return frozenset({"hidden", *self.readings})

    def plan(self, site: Site, signals: Any, budget: Budget) -> Plan:
        self.seen.update({r: signals.at(r) if isinstance(r, Reading) else getattr(signals, r) for r in self.readings})
        self.seen.update(hidden=signals.hidden, prunable=signals.prunable, grids=signals.grids, packed=signals.packed)
        reduce = self.reduce or (lambda signals: signals.keep(budget, mask=signals.prunable))
        return Plan(reduce(signals), positions=self.positions, layout=self.layout and self.layout(signals))


def embeddings(model: Any, given: dict[str, Any], method: TokenPruner, budget: Any = 1.0, **options: Any) -> Tensor:
    """What the decoder reads [B, N, D]."""
    read: list[Tensor] = []
    with torch.no_grad(), apply(method, model, budget, **options):
        hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
        model(**given)
        hook.remove()
    return read[0]


def features(model: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """[C, 1 + N, D] what the layer that gives features says of every crop, and what the projector makes of it."""
    pixels = given["pixel_values"]
    pixels = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        return hidden, model.model.multi_modal_projector(hidden)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "llava_video"])
@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_what_is_kept_before_the_projector_is_what_is_kept_behind_it(family, positions):
    model, given = vlm(family), prompt(family, images(family, 2))
    before, behind = (UniformTokens(where=where, positions=positions) for where in ("encoded", "projected"))
    assert torch.allclose(embeddings(model, given, before, 0.4), embeddings(model, given, behind, 0.4), atol=1e-5)
    with torch.no_grad():
        answers = []
        for method in (before, behind):
            with apply(method, model, 0.4) as handle:
                answers.append(model.generate(**given, max_new_tokens=4, num_beams=2))
                kept, report = handle.kept(), handle.report()
                answers.append(kept[0][1].float())
                answers.append(torch.tensor(report.macs))
    assert torch.equal(answers[0], answers[3]) and torch.equal(answers[1], answers[4])
    assert answers[2] < answers[5], "the projector sees less"


def test_only_what_goes_on_is_projected():
    model, given, seen = vlm("llava"), prompt("llava", images("llava", 2)), []
    hook = model.model.multi_modal_projector.linear_1.register_forward_hook(lambda *a: seen.append(a[2].shape))
    embeddings(model, given, UniformTokens(where="encoded", positions="renumber"), Budget(3, "count"))
    hook.remove()
    assert [shape[:2].numel() for shape in seen] == [6]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_mixtures_and_class_tokens_go_through_the_projector(family):
    """By hand: a weighted sum of unlike patches, and the class tokens of the crops, in the plan's own order."""
    model, given = vlm(family), prompt(family, images(family, 2))
    hidden, _ = features(model, given)
    crops = len(hidden) // 2
    target = torch.tensor([[0, 0, 0, 1, 2]]).expand(2, -1)
    source = torch.tensor([[3, 9, 0, 5, 0]]).expand(2, -1)
    weight = torch.tensor([[0.25, 0.5, 1.5, 1.0, 1.0]]).expand(2, -1)
    bare = lambda signals: torch.full((2, 3, 3), -1)  # noqa: E731
    mixing = Fixed(lambda signals: Mix(target, source, weight, 3), CLASS, layout=bare)
    got = embeddings(model, given, mixing)
    rows = hidden.unflatten(0, (2, crops))[:, 0]
    want = torch.stack([0.25 * rows[:, 3] + 0.5 * rows[:, 9] + 1.5 * rows[:, 0], rows[:, 5], rows[:, 0]], 1)
    with torch.no_grad():
        want = model.model.multi_modal_projector(want)
    assert torch.allclose(got[:, 3:6], want, atol=1e-5)
    assert got.shape[1] == 3 + 3 + 4
    prunable = mixing.seen["prunable"].unflatten(1, (crops, 17))
    assert not prunable[..., 0].any() and prunable[..., 1:].all()
    assert torch.equal(mixing.seen["hidden"], hidden.unflatten(0, (2, crops)).flatten(1, 2))
    assert mixing.seen["grids"] == ((4, 4),) * crops


def test_samples_may_keep_different_numbers():
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    _, projected = features(model, given)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    index = torch.tensor([[1, 4, 8], [2, 0, 0]])
    got = embeddings(model, given, Fixed(lambda signals: Gather(index, valid)))
    assert torch.allclose(got[0, 3:6], projected[0, 1 + index[0]], atol=1e-5)
    assert torch.allclose(got[1, 5], projected[1, 3], atol=1e-5), "padded in front"


def test_class_tokens_are_read_and_so_are_the_layers_behind_the_features():
    model, eager = vlm("llava"), vlm("llava")
    eager.set_attn_implementation({"vision_config": "eager"})
    given = prompt("llava", images("llava", 2))
    names = ("hidden", "queries", "keys", "values")
    readings = [Reading(name, -1, "encoder", rows=rows) for name in names for rows in (None, "class")]
    readings += [Reading("cls_row", -1, "encoder"), Reading("received", 2, "encoder"), "cls_row"]
    for site in (Site(0, "encoded"), CLASS, Site(0, "projected")):
        reader = Fixed(None, site, tuple(readings))
        embeddings(model, given, reader)
        output = eager.model.vision_tower(given["pixel_values"], output_attentions=True, output_hidden_states=True)
        first, block = (0 if site == CLASS else 1), eager.model.vision_tower.encoder.layers[-1]
        maps = output.attentions[-1]
        assert torch.allclose(reader.seen[readings[8]], maps[:, :, 0, first:], atol=1e-5)
        assert torch.allclose(reader.seen[readings[9]], maps.sum(2)[..., first:], atol=1e-4)
        assert torch.allclose(reader.seen["cls_row"], output.attentions[-2][:, :, 0, first:], atol=1e-5)
        assert torch.allclose(reader.seen[readings[0]], output.hidden_states[-1][:, first:], atol=1e-4)
        assert torch.allclose(reader.seen[readings[1]], output.hidden_states[-1][:, :1], atol=1e-4)
        entered = block.layer_norm1(output.hidden_states[-2])
        for at, projection in ((2, "q_proj"), (4, "k_proj"), (6, "v_proj")):
            want = getattr(block.self_attn, projection)(entered).unflatten(-1, (3, -1)).transpose(1, 2)
            assert torch.allclose(reader.seen[readings[at]], want[:, :, first:], atol=1e-5)
            assert torch.allclose(reader.seen[readings[at + 1]], want[:, :, :1], atol=1e-5)


def test_what_enters_the_decoder_is_read_behind_a_cut():
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    want = embeddings(model, given, UniformTokens())
    reader = Fixed(None, Site(3, "input"), (Reading("hidden", -1),))
    embeddings(model, given, reader)
    assert torch.equal(reader.seen[Reading("hidden", -1)], want)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_features_do_not_depend_on_who_else_is_in_the_batch(family):
    model, given = vlm(family), prompt(family, images(family, 2))
    for method in (MergedFeatures(), WithClassToken()):
        whole = embeddings(model, given, method, 0.3)
        for b in range(2):
            alone = embeddings(model, {name: t[b : b + 1] for name, t in given.items()}, method, 0.3)
            assert torch.allclose(whole[b], alone[0], atol=1e-5)


def test_videos_are_pruned_before_the_projector():
    model, given = vlm("llava_onevision"), film("llava_onevision", words=(4,))
    with torch.no_grad(), apply(UniformTokens(where="encoded", positions="renumber"), model, Budget(8, "count")) as h:
        answer = model.generate(**given, max_new_tokens=3, do_sample=False)
        assert answer.shape[1] > 3 and h.application.trace.attention[0] == 3 + 4 + 8 + 1, "and a newline"


def test_merged_tokens_stand_for_their_patches():
    model, given = vlm("llava_next"), prompt("llava_next", images("llava_next", 1))
    with torch.no_grad(), apply(WithClassToken(), model, 0.5) as handle:
        model(**given)
        ((_, masses),) = handle.application.trace.attribution.behind(0)
    (patches,) = masses["image"]
    assert patches.shape == (5, 16)
    assert float(patches.sum()) == pytest.approx(40, abs=1e-4), "class tokens and newlines stand for no patch"


def test_costs_follow_the_counts_of_single_images():
    @dataclass(frozen=True)
    class Above(Fixed):
        name: ClassVar[str] = "above"
        adaptive = True

        def plan(self, site: Site, signals: Any, budget: Budget) -> Plan:
            mask = torch.arange(16).expand(len(signals.hidden), -1) < 5
            every = torch.arange(16).expand(len(signals.hidden), -1)
            return Plan(Gather(every, mask), positions=self.positions)

    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    with torch.no_grad(), apply(Above(), model, 1.0) as handle:
        model(**given)
        adaptive = handle.report()
    uniform = UniformTokens(where="encoded", positions="renumber")
    with torch.no_grad(), apply(uniform, model, Budget(5, "count")) as handle:
        model(**given)
        fixed = handle.report()
    assert adaptive.macs == fixed.macs


def test_what_cannot_be_done_is_refused_in_one_line():
    wrong: list[tuple[TokenPruner, str, str]] = [
        (Fixed(None, CLASS), "llava_onevision", "this model's has none"),
        (Fixed(), "qwen2_5_vl", "has only projected"),
        (
            Fixed(None, Site(0, "packed"), (Reading("keys", 0, "tower", rows="class"),)),
            "llava",
            "one image is by itself",
        ),
        (Fixed(None, Site(0, "encoded"), (Reading("keys", 3, "encoder"),)), "llava", "layers 0 to 2"),
        (Fixed(None, Site(0, "encoded"), (Reading("keys", 0),)), "llava", "no layer of the decoder"),
        (Fixed(None, Site(1, "tower"), (Reading("keys", 1, "tower"),)), "llava", "layers 0 to 0 have run"),
        (Fixed(None, Site(0, "input"), (Reading("hidden", -1),)), "llava", "no layer has run"),
    ]
    for method, family, message in wrong:
        with pytest.raises(PrunelabError, match=message), apply(method, vlm(family), 0.5):
            pass
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    mix = Mix(torch.zeros(2, 2, dtype=torch.long), torch.arange(2).expand(2, -1), torch.ones(2, 2), 1)
    original = Fixed(lambda signals: mix)
    object.__setattr__(original, "positions", "original")
    with pytest.raises(PrunelabError, match="no place in the packed sequence"):
        embeddings(model, given, original)
    features = model.model.get_image_features(given["pixel_values"], return_dict=True)
    visual = {"inputs_embeds": model.get_input_embeddings()(given["input_ids"].clamp(max=59)).detach()}
    visual["inputs_embeds"][:, 3:19] = model.get_input_embeddings()(torch.tensor(60))
    for method in (Fixed(), UniformTokens(where="encoded", positions="renumber")):
        with torch.no_grad(), apply(method, model, 0.5), pytest.raises(PrunelabError, match="give it pixels"):
            model(input_ids=given["input_ids"], mm_encoder_outputs={"image": features})


def test_an_encoders_own_layers_are_read_inside_it():
    model, eager = vlm("llava", tower=4), vlm("llava", tower=4)
    given = prompt("llava", images("llava", 2))
    reader = Fixed(None, Site(2, "tower"), (Reading("values", 1, "tower"), Reading("hidden", 0, "tower")))
    embeddings(model, given, reader)
    tower = eager.model.vision_tower
    hidden = tower(given["pixel_values"], output_hidden_states=True).hidden_states
    block = tower.encoder.layers[1]
    values = block.self_attn.v_proj(block.layer_norm1(hidden[1])).unflatten(-1, (3, -1)).transpose(1, 2)
    assert torch.allclose(reader.seen[reader.readings[0]], values, atol=1e-5)
    assert torch.allclose(reader.seen[reader.readings[1]], hidden[1], atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_patches_are_merged_inside_the_tower(family):
    """By hand: the layers behind the site see pairs as their means, and so does the decoder, crop by crop."""
    model, given = vlm(family), prompt(family, images(family, 2))
    got = embeddings(model, given, MergedInTower())
    tower = model.model.vision_tower
    pixels = given["pixel_values"].flatten(0, 1) if family == "llava_next" else given["pixel_values"]
    with torch.no_grad():
        x = tower.encoder.layers[0](tower.pre_layrnorm(tower.embeddings(pixels)), None)
        x = torch.cat([x[:, :1], x[:, 1:9].unflatten(1, (4, 2)).mean(2), x[:, 9:]], 1)
        x = tower.encoder.layers[1](x, None)
        rows = model.model.multi_modal_projector(x[:, 1:]).unflatten(0, (2, -1)).flatten(1, 2)
    assert torch.allclose(got[:, 3 : 3 + rows.shape[1]], rows, atol=1e-4)
    with torch.no_grad(), apply(MergedInTower(), model, 0.5) as handle:
        answers = model.generate(**given, max_new_tokens=3, num_beams=2)
        assert len(answers) == 2
        model(**given)
        (_, masses), *_ = handle.application.trace.attribution.behind(0)
    assert float(masses["image"][0].sum()) == pytest.approx(rows.shape[1], abs=1e-4)


def test_signals_of_the_encoder_follow_tokens_that_were_merged_there():
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    row = Reading("cls_row", -1, "encoder")

    @dataclass(frozen=True)
    class Merging(Fixed):
        def sites(self, info: Any) -> Any:
            return [Site(1, "tower"), Site(1, "input")]

        def requires(self, site: Site) -> Any:
            return frozenset({"hidden"} if site.where == "tower" else {row, "hidden"})

        def plan(self, site: Site, signals: Any, budget: Budget) -> Plan:
            if site.where == "tower":
                return MergedInTower().plan(site, signals, budget)
            self.seen.update(row=signals.at(row))
            return super().plan(site, signals, budget)

    maps: list[Tensor] = []
    method = Merging()
    eager = vlm("llava")
    eager.set_attn_implementation({"vision_config": "eager"})
    layers = eager.model.vision_tower.encoder.layers

    def pairs(module: Any, args: Any) -> Any:
        x = args[0]
        return torch.cat([x[:, :1], x[:, 1:9].unflatten(1, (4, 2)).mean(2), x[:, 9:]], 1), *args[1:]

    with torch.no_grad():
        embeddings(model, given, method)
        layers[1].register_forward_pre_hook(pairs)
        layers[2].self_attn.register_forward_hook(lambda *a: maps.append(a[2][1]))
        eager.model.vision_tower(given["pixel_values"], output_attentions=True)
    assert torch.allclose(method.seen["row"][..., 3:15], maps[0][:, :, 0, 1:], atol=1e-5)
    assert not method.seen["row"][..., :3].any() and not method.seen["row"][..., 15:].any()


def test_reductions_follow_each_other():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 3, generator=generator)
    mix = Mix.from_matrix(torch.rand(2, 4, 6, generator=generator))
    other = Mix.from_matrix(torch.rand(2, 3, 4, generator=generator))
    gather, late = Gather(torch.tensor([[5, 0, 2, 1], [0, 1, 2, 3]])), Gather(torch.tensor([[3, 0], [1, 2]]))
    for first in (mix, gather):
        for then in (other, late):
            assert torch.allclose(followed(first, then, 6).apply(x), then.apply(first.apply(x)), atol=1e-5)
