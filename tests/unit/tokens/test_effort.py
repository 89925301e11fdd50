"""Layers that do less for visual tokens: against a decoder spelled out with whole matrices of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Effort, ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from tests.contract.references import language_model, vit
from tests.contract.vlms import IMAGE, film, images, prompt, typed, vlm
from tests.unit.tokens.test_vlm import pair

HEADS = (True, False, True, False)


@dataclass(frozen=True)
class Eased(TokenPruner):
    """Layers 1 and 3 do less; the budget is a share of neurons."""

    window: int = 3
    heads: tuple[bool, ...] | None = HEADS
    last: int = 3

    name: ClassVar[str] = "eased"
    eases: ClassVar[bool] = True

    def sites(self, info: ModelInfo) -> Any:
        return [Site(0, "input")]

    def requires(self, site: Site) -> Any:
        return frozenset()

    def plan(self, site: Site, signals: Any, budget: Budget) -> Plan:
        return Plan(signals.keep(Budget(1.0), mask=signals.prunable))

    def effort(self, layer: int, info: ModelInfo, budget: Budget) -> Effort | None:
        if layer not in (1, 3):
            return None
        return Effort(self.window, self.heads, layer < self.last, budget.amounts[0])


def grid(family: str) -> list[tuple[int, int, int] | None]:
    """Crop, row and column of each visual token; None for a newline."""
    if family == "llava":
        return [(0, i // 4, i % 4) for i in range(16)]
    found: list[tuple[int, int, int] | None] = [(0, i // 4, i % 4) for i in range(16)]
    for row in range(8):  # two by two crops of four by four, a newline behind each row
        for column in range(8):
            found.append((1 + row // 4 * 2 + column // 4, row % 4, column % 4))
        found.append(None)
    return found


@torch.no_grad()
def spelled_out(model: Any, states: Tensor, visual: Tensor, family: str, method: Eased, neurons: float) -> Tensor:
    """What leaves the last layer, for what enters the first, [1, N, D]."""
    decoder, places = model.model.language_model, grid(family)
    total = states.shape[1]
    seen = torch.ones(total, total).tril().bool()
    spots = visual.nonzero().squeeze(1).tolist()
    for i, p in zip(spots, places, strict=True):
        for j, q in zip(spots, places, strict=True):
            if p is not None and q is not None:
                seen[i, j] = p[0] == q[0] and abs(p[1] - q[1]) <= 1 and abs(p[2] - q[2]) <= 1
    x, turn = states, decoder.rotary_emb(states, torch.arange(total).unsqueeze(0))
    for number, layer in enumerate(decoder.layers):
        eased = number in (1, 3)
        h, attention = layer.input_layernorm(x), layer.self_attn
        q, k, v = (
            project(h).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *turn)
        k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v))
        mask = seen if eased else torch.ones(total, total).tril().bool()
        weights = (q @ k.mT * attention.scaling).masked_fill(~mask, float("-inf")).softmax(-1)
        heads = torch.tensor(HEADS).float()
        if eased:
            weights[..., visual] *= (heads if number < method.last else 0 * heads)[:, None, None]
        out = weights @ v
        if eased:
            out[:, :, visual] *= heads[:, None, None]
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        h = layer.post_attention_layernorm(x)
        inner = layer.mlp.act_fn(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h)
        if eased:
            inner[:, visual, int(neurons * inner.shape[2]) :] = 0
        x = x + layer.mlp.down_proj(inner)
    return x


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_layers_do_less_for_visual_tokens(family: str) -> None:
    model, given = vlm(family), prompt(family, images(family, 1))
    states: list[Tensor] = []
    layers = model.model.language_model.layers
    layers[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
    layers[-1].register_forward_hook(lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad(), apply(Eased(), model, 0.4):
        model(**given)
    visual = given["input_ids"][0] == IMAGE
    want = spelled_out(model, states[0], visual, family, Eased(), 0.4)
    assert torch.allclose(states[1], want, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_padded_samples_and_steps_of_decoding_are_as_whole_passes(family: str) -> None:
    model = vlm(family)
    given = pair(family, model)
    with apply(Eased(), model, 0.5):
        together = model(**given).logits
        if family == "llava":
            for sample in range(2):
                real = given["attention_mask"][sample].bool()
                one = {"pixel_values": given["pixel_values"][sample : sample + 1]}
                alone = model(input_ids=given["input_ids"][sample : sample + 1, real], **one).logits
                assert torch.allclose(together[sample, real], alone[0], atol=1e-4)
        words = model.generate(**given, max_new_tokens=4, do_sample=False)
        uncached = model.generate(**given, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(words, uncached)
    plain = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert plain.shape == words.shape


def test_a_part_of_the_mlp_is_less_work() -> None:
    model = vlm("llava")
    given = prompt("llava", images("llava", 1))
    saved = []
    for share in (1.0, 0.5, 0.25):
        with torch.no_grad(), apply(Eased(), model, share) as handle:
            model(**given)
            saved.append(handle.report().saving)
    assert saved[0] == pytest.approx(0, abs=1e-6)
    assert saved[2] / saved[1] == pytest.approx(1.5, rel=1e-3), "three quarters against a half of the same neurons"


def test_what_cannot_be_eased_is_named() -> None:
    for model in (vit(), language_model()):
        with pytest.raises(PrunelabError, match="do less for visual tokens"), apply(Eased(), model, 0.5):
            pass
    model = vlm("llava_onevision")
    with torch.no_grad(), pytest.raises(PrunelabError, match="pools them"), apply(Eased(), model, 0.5):
        model(**film("llava_onevision", words=(4,)))
    model = vlm("llava")
    given = typed(model, prompt("llava", images("llava", 1)))
    with torch.no_grad(), apply(Eased(window=0, last=9), model, 0.5):
        model(**given)
    with apply(Eased(), model, 0.5), pytest.raises(PrunelabError, match="already runs"), apply(Eased(), model, 0.5):
        pass
