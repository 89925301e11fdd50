"""Memory that outlives a pass, gates while training, tokens that pass by a layer, and tokens that all leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.dtop.method import DToP
from tests.contract.families import FAMILIES
from tests.contract.references import images as pictures
from tests.contract.references import vit
from tests.contract.tokens_references import Leaving, PassingBy, Remembering, SoftGate
from tests.contract.vlms import images, prompt, vlm
from tests.unit.tokens.test_causal_lm import ids, model_of
from tests.unit.tokens.test_vlm import pair

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def eager_rows(model: Any, given: dict[str, Any], layer: int, words: int) -> Tensor:
    """[B, H, N] what the written words look at among the prompt's tokens, summed, without pruning."""
    model.set_attn_implementation("eager")
    output = model.generate(
        **given, **GREEDY, max_new_tokens=words, output_attentions=True, return_dict_in_generate=True
    )
    rows = [step[layer][:, :, -1, : given["input_ids"].shape[1]] for step in output.attentions[1:]]
    return torch.stack(rows).sum(0)


@torch.no_grad()
def test_memory_outlives_a_pass_until_it_is_reset():
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    want = eager_rows(vlm("llava"), given, 1, 4).mean(1)
    with apply(Remembering(), model, 1.0) as handle:
        model.generate(**given, **GREEDY, max_new_tokens=4)
        assert torch.allclose(handle.memory["seen"], want, atol=1e-5)
        handle.report()
        assert torch.allclose(handle.memory["seen"], want, atol=1e-5), "counting costs leaves it alone"
        handle.reset()
        assert not handle.memory
    with apply(Remembering(), model, 0.5) as handle:
        model(**given)
        first = handle.kept()[0][1]
        model.generate(**given, **GREEDY, max_new_tokens=4)
        seen = handle.memory["seen"]
        lost = torch.ones_like(seen).scatter(1, first, 0)
        assert not seen[lost.bool()].any() and seen.sum() > 1
        handle.memory["seen"] = -torch.arange(23.0).expand(2, -1)
        model(**given)
        assert handle.kept()[0][1].tolist() == [[0, 1, 2, *range(3, 11), *range(19, 23)]] * 2, "by what is remembered"
        handle.reset()
        model(**given)
        assert torch.equal(handle.kept()[0][1], first)


@torch.no_grad()
def test_a_language_model_shows_its_steps_too():
    model, tokens = model_of(), ids()
    want = eager_rows(model_of(), {"input_ids": tokens}, 1, 4).mean(1)
    with apply(Remembering(), model, 1.0) as handle:
        model.generate(tokens, **GREEDY, max_new_tokens=4)
        assert torch.allclose(handle.memory["seen"], want, atol=1e-5)
    with pytest.raises(PrunelabError, match="generates nothing"), apply(Remembering(), vit(), 0.5):
        pass


def test_gates_weigh_attention_while_training_and_learn():
    for model, given in ((vit(), None), (vlm("llava"), pair("llava", vlm("llava")))):
        model.train()
        method = SoftGate()
        width = 24 if given is None else 32

        def run(model: Any = model, given: Any = given) -> Tensor:
            return model(pictures()) if given is None else model(**given).logits[:, -1]

        with torch.no_grad():
            dense = run()
        parts = torch.nn.Linear(width, 1)
        with apply(method, model, 0.5, parts=parts) as handle:
            with torch.no_grad():
                parts.bias.fill_(50.0)  # open gates change nothing, and every token goes on
                parts.weight.fill_(0.0)
            logits = run()
            assert torch.allclose(logits, dense, atol=1e-4)
            assert handle.kept()[0][1].shape[1] == (17 if given is None else given["input_ids"].shape[1])
            with torch.no_grad():
                parts.bias.fill_(-1.0)
                parts.weight.normal_(0, 0.5)
            run().square().sum().backward()
            assert float(parts.weight.grad.abs().sum()) > 0, "the scorer learns through attention"
            with torch.no_grad():
                parts.bias.fill_(-80.0)
                parts.weight.fill_(0.0)
            closed = run()
            assert not torch.allclose(closed, dense, atol=1e-3)
            model.eval()
            with torch.no_grad():
                pruned = run()
            assert handle.kept()[-1][1].shape[1] < (17 if given is None else given["input_ids"].shape[1])
        assert torch.isfinite(pruned).all()


def test_closed_gates_are_as_good_as_leaving():
    """With one layer behind the site, the tokens that are read see nothing of those whose gates are closed."""
    model, given = vlm("llava").train(), prompt("llava", images("llava", 2))
    parts = torch.nn.Linear(32, 1)
    with torch.no_grad():
        parts.weight.fill_(0.0)
        parts.bias.fill_(-1e4)
    with apply(SoftGate(3), model, 0.5, parts=parts):
        gated = model(**given).logits[:, -1]
    model.eval()
    with torch.no_grad(), apply(Leaving(3), model, 1.0):
        left = model(**given).logits[:, -1]
    assert torch.allclose(gated, left, atol=1e-4)


def test_a_prompt_read_with_gates_is_continued_with_them():
    model, given = vlm("llava").train(), pair("llava", vlm("llava"))
    torch.manual_seed(0)
    parts = torch.nn.Linear(32, 1)
    word = torch.full((2, 1), 7)
    longer = {**given, "input_ids": torch.cat([given["input_ids"], word], 1)}
    longer["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(word)], 1)
    with apply(SoftGate(1), model, 0.5, parts=parts):
        whole = model(**longer).logits[:, -1]
        first = model(**given, use_cache=True)
        again = model(input_ids=word, attention_mask=longer["attention_mask"], past_key_values=first.past_key_values)
    assert torch.allclose(again.logits[:, -1], whole, atol=1e-4)


def test_families_without_a_gate_say_so():
    class Gated(DToP):
        def plan(self, site: Any, signals: Any, budget: Budget) -> Any:
            from dataclasses import replace

            return replace(super().plan(site, signals, budget), gate=torch.ones(signals.prunable.shape))

    model = FAMILIES["segmenter"]().train()
    with apply(Gated(layers=(5, 7)), model, 1.0):
        with pytest.raises(PrunelabError, match="weighs tokens by a gate"):
            model(pictures())
        with torch.no_grad():
            model(pictures())


@torch.no_grad()
def test_tokens_pass_by_one_layer_and_come_back():
    model, x = vit(), pictures()
    states: list[Tensor] = []
    with apply(PassingBy((2,)), model, 0.5) as handle:
        blocks = model.blocks[2:4]
        hooks = [block.register_forward_pre_hook(lambda _, args: states.append(args[0])) for block in blocks]
        model(x)
        kept = handle.kept()[0][1]
    for hook in hooks:
        hook.remove()
    before = states[0]
    with_all = model.blocks[:2](model.norm_pre(model._pos_embed(model.patch_embed(x))))
    assert before.shape[1] == kept.shape[1] == 9
    want = with_all.clone()
    for b in range(3):
        want[b, kept[b]] = model.blocks[2](with_all[b : b + 1, kept[b]])[0]
    assert torch.allclose(states[1], want, atol=1e-5)
    for layer in (0, 1, 3):
        assert handle.application.trace.mlp[layer] == 3 * 17
    assert handle.application.trace.mlp[2] == 3 * 9


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "causal_lm"])
@pytest.mark.parametrize("layers", [(0,), (1, 2), (3,)])
@torch.no_grad()
def test_decoders_let_tokens_pass_by(family, layers):
    """The layers behind see every token, the caches of the layer hold those that went through, and a word written with
    the cache is the one that a single pass gives."""
    if family == "causal_lm":
        model = model_of()
        given: dict[str, Any] = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
        given["attention_mask"][1, :6] = 0
    else:
        model = vlm(family)
        given = pair(family, model)
    total = given["input_ids"].shape[1]
    with apply(PassingBy(layers), model, 0.5) as handle:
        output = model(**given, use_cache=True)
        sizes = [layer.keys.shape[2] for layer in output.past_key_values.layers]
        report = handle.report()
        answer = model.generate(**given, **GREEDY, max_new_tokens=4)
        beams = model.generate(**given, **GREEDY, max_new_tokens=4, num_beams=2)
    assert output.logits.shape[1] == total and answer.shape == beams.shape == (2, total + 4)
    assert all((size < total) == (layer in layers) for layer, size in enumerate(sizes))
    assert report.macs - report.scoring_macs < report.dense_macs
    dense = vlm(family) if family != "causal_lm" else model_of()
    with apply(PassingBy(layers), model, 1.0):
        kept = model(**given).logits
    real = given["attention_mask"].bool()
    assert torch.allclose(kept[real], dense(**given).logits[real], atol=1e-4)
    assert not torch.allclose(kept[:, -1], output.logits[:, -1], atol=1e-3)


@torch.no_grad()
def test_all_visual_tokens_leave_at_a_layer():
    for family in ("llava", "llava_onevision", "qwen2_5_vl"):
        model = vlm(family)
        given = pair(family, model)
        with apply(Leaving(), model, 1.0) as handle:
            answer = model.generate(**given, **GREEDY, max_new_tokens=3, return_dict_in_generate=True)
            visual = handle.adapter.running.cached.visual
        text = int((given["attention_mask"].bool() & ~visual).sum(1).max())
        sizes = [layer.keys.shape[2] for layer in answer.past_key_values.layers]
        assert sizes[2:] == [text + 2] * 2 and sizes[0] == given["input_ids"].shape[1] + 2


@dataclass(frozen=True)
class FromThePrompt(Remembering):
    """The same, which counts the row of the prompt's last token as well: it writes the first new one."""

    name: ClassVar[str] = "reference_from_the_prompt"
    observes_prompt = True


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_prompts_own_row_is_observed_where_a_method_asks(padding):
    given = pair("llava", vlm("llava"))
    model = vlm("llava")
    model.set_attn_implementation("eager")
    if padding == "right":
        short = given["attention_mask"][1].argmax()
        for name in ("input_ids", "attention_mask"):
            given[name][1] = given[name][1].roll(-int(short))
    ends = given["attention_mask"].shape[1] - 1 - given["attention_mask"].flip(1).argmax(1)
    maps = model(**given, output_attentions=True).attentions[1]
    want = torch.stack([maps[b, :, end].mean(0) for b, end in enumerate(ends)])
    model = vlm("llava")
    with apply(FromThePrompt(), model, 1.0) as handle:
        model(**given)
        assert torch.allclose(handle.memory["seen"], want, atol=1e-5)


@torch.no_grad()
def test_a_language_model_shows_the_prompts_own_row():
    model, tokens = model_of(), ids()
    eager = model_of()
    eager.set_attn_implementation("eager")
    want = eager(tokens, output_attentions=True).attentions[1][:, :, -1].mean(1)
    with apply(FromThePrompt(), model, 1.0) as handle:
        model(tokens)
        assert torch.allclose(handle.memory["seen"], want, atol=1e-5)


@dataclass(frozen=True)
class InGroups(TokenPruner):
    """Names groups of pictures' tokens, and sees them in the decoder."""

    where: str = "projected"
    name = "in_groups"

    def sites(self, info: ModelInfo) -> list[Site]:
        return [Site(0, self.where), Site(1, "input", 1), Site(2, "input", 2)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.memory[site.index] = signals.groups
        if site.index:
            return Plan(signals.keep(mask=signals.prunable & (signals.groups & 7 != 1)))
        every = torch.arange(signals.prunable.shape[1]).expand(signals.prunable.shape)
        return Plan(Gather(every), positions="original", groups=every % 3)


@torch.no_grad()
def test_groups_of_a_picture_are_known_in_the_decoder():
    model = vlm("llava")
    given = prompt("llava", images("llava", 2))
    with apply(InGroups(), model, 1.0) as handle:
        model(**given)
    assert handle.memory[0] is None, "before they are named"
    visual = (given["input_ids"] == model.config.image_token_id)[0]
    first, then = handle.memory[1], handle.memory[2]
    assert (first[:, visual] & 7).tolist() == [[n % 3 for n in range(16)]] * 2
    assert bool((first[:, ~visual] == -1).all())
    assert len(first[:, visual].unique()) == 6, "those of two pictures are unlike"
    assert not (then & 7 == 1).any() and then.shape[1] == first.shape[1] - 5, "they follow the tokens that stay"
    with pytest.raises(PrunelabError, match="groups are of single images"), apply(InGroups("packed"), model, 1.0):
        model(**given)


@dataclass(frozen=True)
class Skipping(TokenPruner):
    """Every second unit passes by some layers; while training by a gate. What a later layer is shown is kept."""

    layers: tuple[int, ...] = (1, 2)
    open: float = 0.0

    name = "skipping"
    rest = "bypass"

    def sites(self, info):
        return [Site(layer, "input") for layer in self.layers]

    def requires(self, site):
        return frozenset({"hidden", "last_row", "received", "keys"} if site.layer > self.layers[0] else {"hidden"})

    def plan(self, site, signals, budget):
        stays = (torch.arange(signals.prunable.shape[1]) % 2 == 0) | ~signals.prunable
        if site.layer > self.layers[0]:
            signals.memory["shown"] = (signals.last_row, signals.received, signals.keys, stays)
        gate = torch.where(stays, 1.0, self.open) + 0 * signals.hidden.mean(-1)
        return Plan(signals.keep(mask=stays), rest="bypass", gate=gate)


def decoders():
    yield vlm("llava"), pair("llava", vlm("llava"))
    yield model_of(), {"input_ids": ids()}


def test_a_gate_at_a_layer_that_tokens_pass_by_weighs_what_it_changes():
    for model, given in decoders():

        def run(method: Any, model: Any = model, given: Any = given) -> Tensor:
            with apply(method, model, 0.5):
                logits = model(**given, use_cache=False).logits
            return logits[given.get("attention_mask", torch.ones(logits.shape[:2])).bool()]

        with torch.no_grad():
            dense, skipped = run(Skipping(())), run(Skipping())
        model.train()
        assert torch.allclose(run(Skipping(open=1.0)), dense, atol=1e-4), "open gates change nothing"
        assert torch.allclose(run(Skipping()), skipped, atol=1e-4), "closed gates are as good as passing by"
        assert not torch.allclose(skipped, dense, atol=1e-3)
        run(Skipping(open=0.5)).sum().backward()


@torch.no_grad()
def test_what_a_layer_shows_of_tokens_that_passed_by_is_zero():
    for model, given in decoders():
        with apply(Skipping(), model, 0.5) as handle:
            model(**given, use_cache=False)
            last, received, keys, stays = handle.memory["shown"]
        assert last.shape[2] == received.shape[2] == keys.shape[2] == stays.shape[1]
        gone = ~stays
        for seen in (last.sum(1), received.sum(1), keys.abs().sum((1, 3))):
            assert bool((seen[gone] == 0).all())
        real = given.get("attention_mask", torch.ones_like(gone)).bool()
        assert torch.allclose(last.sum(2), torch.ones(last.shape[:2]), atol=1e-5)
        assert torch.allclose(
            received.sum(2), (stays & real).sum(1, keepdim=True).float().expand(-1, last.shape[1]), atol=1e-3
        )


def test_a_prompt_of_a_language_model_that_was_read_with_gates_is_not_continued():
    model, tokens = model_of().train(), ids()
    with apply(Skipping(open=0.5), model, 0.5):
        read = model(tokens, use_cache=True)
        with pytest.raises(PrunelabError, match="while its tokens' gates learn"):
            model(tokens[:, :1], past_key_values=read.past_key_values)
