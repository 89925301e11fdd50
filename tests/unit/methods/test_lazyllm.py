"""LazyLLM: its schedule, its scores, and what it does to a small model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from prunelab.common.apply import apply
from prunelab.common.catalogue import lookup
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo
from prunelab.common.data import code, texts
from prunelab.common.models import loading
from prunelab.common.tokens.role import TokenPruner
from prunelab.methods.lazyllm.method import LazyLLM, boundaries, confidence, schedule
from prunelab.methods.random_drop.method import RandomDrop
from tests.unit.tokens.test_causal_lm import Slow, ids, model_of


def info(depth: int) -> ModelInfo:
    return ModelInfo("causal_lm", depth, 4, 32, 64)


def test_confidence_is_the_newest_tokens_attention_averaged_over_heads():
    row = torch.tensor([[[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]]])
    assert torch.allclose(confidence(row), torch.tensor([[0.3, 0.4, 0.3]]))


def test_groups_of_layers_are_those_of_figure_7():
    assert boundaries(32, (0.3, 0.6, 0.9)) == (9, 19, 28)  # 1-9, 10-19, 20-28, 29-32 counted from one
    assert [site.layer for site in LazyLLM().sites(info(32))] == [9, 19, 28]
    assert {site.where for site in LazyLLM().sites(info(32))} == {"input"}


@pytest.mark.parametrize("depth", range(2, 81))
def test_boundaries_lie_between_layers(depth):
    found = boundaries(depth, (0.3, 0.6, 0.9))
    assert 1 <= found[0] <= found[-1] < depth
    assert list(found) == sorted(set(found))
    if depth >= 4:
        assert len(found) == 3


def test_a_model_of_one_layer_is_refused():
    with pytest.raises(PrunelabError, match="two layers or more"):
        LazyLLM().sites(info(1))


def test_the_schedule_leaves_the_shares_of_figure_4():
    left = [math.prod(schedule().amounts[: i + 1]) for i in range(3)]
    assert left == pytest.approx([0.7, 0.4, 0.1], abs=1e-5)
    with pytest.raises(PrunelabError, match="out of range"):
        schedule(sites=4)


@torch.no_grad()
def test_generation_equals_the_token_by_token_reference():
    model, tokens = model_of().double(), ids(1, 24, seed=7)
    shares = (0.7, 0.571429, 0.25)
    slow = Slow(model, (1, 3, 5), shares, 24)
    want = slow.generate(tokens[0], 12)
    with apply(LazyLLM(), model, schedule()):
        assert model.generate(tokens, max_new_tokens=12, do_sample=False)[0, 24:].tolist() == want
    assert slow.came_back > 5


@torch.no_grad()
def test_the_prompt_is_computed_bit_by_bit_and_at_most_once():
    model, tokens = model_of(), ids(3, 30)
    shares = []
    for words in (1, 4, 16):
        with apply(LazyLLM(), model, 0.5) as handle:
            model.generate(tokens, max_new_tokens=words, do_sample=False)
            shares.append([attention for attention, _ in handle.report().tokens])
    first, some, many = shares
    assert first == [30, 15, 15, 8, 8, 4]  # the last token and the half of 29, of 14 and of 7
    assert all(a <= b <= c <= 30 for a, b, c in zip(first, some, many))
    assert many[5] > some[5] > first[5]
    assert many[0] == 30


@torch.no_grad()
def test_without_return_nothing_is_computed_later():
    model, tokens = model_of(), ids(2, 30)
    with apply(LazyLLM(layers=(2,), rest="drop"), model, 0.5) as handle:
        model.generate(tokens, max_new_tokens=8, do_sample=False)
        assert [attention for attention, _ in handle.report().tokens] == [30, 30, 15, 15, 15, 15]


@torch.no_grad()
def test_what_is_attended_to_is_what_the_answer_needs():
    """The testbed model gives back constants that its prompt defines: half of it, chosen or by lot."""
    settings = lookup.settings({})
    model, tokenizer = loading.language({"testbed": "code_lm"}, settings)
    inner = tokenizer.backend_tokenizer
    data = lookup.resolve("dataset", "source_code", "testbed", settings).identity
    stream = code.encode(texts.load(data, settings), inner)
    asked = code.Recalls.of(inner).draw(stream, 16, 256, 4, torch.Generator().manual_seed(1))
    want = asked.tokens[:, asked.answers]

    def recall(method: TokenPruner, share: float) -> float:
        with apply(method, model, share):
            cache = DynamicCache(config=model.config)
            said = [model(asked.tokens[:, : asked.start], past_key_values=cache).logits[:, -1]]
            for token in asked.tokens[:, asked.start : -1].split(1, 1):
                said.append(model(token, past_key_values=cache).logits[:, -1])
        words = torch.stack(said, 1).argmax(-1)
        return float((words[:, asked.answers - asked.start] == want).float().mean())

    whole, lazy = recall(LazyLLM(layers=(2,)), 1.0), recall(LazyLLM(layers=(2,)), 0.5)
    assert whole > 0.9
    assert lazy > recall(RandomDrop((2,), "input", "defer"), 0.5) + 0.3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_and_precision(dtype):
    model, tokens = model_of("Qwen3").to(dtype), ids(2)
    with apply(LazyLLM(), model, Budget((0.6, 0.5, 0.0))):
        torch.manual_seed(0)
        once = model.generate(tokens, max_new_tokens=6, do_sample=True, top_k=20)
        torch.manual_seed(0)
        assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=True, top_k=20), once)
    assert once.shape == (2, 26)


@torch.no_grad()
def test_the_share_of_the_prompt_that_was_computed_grows_by_what_came_back():
    prompt = ids(1, 16)
    shares = []
    for new in (1, 8):
        model = model_of()
        with apply(LazyLLM(layers=(1,)), model, Budget(0.5)) as handle:
            model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        shares.append(handle.computed)
    depth = model.config.num_hidden_layers
    assert shares[0] == pytest.approx((1 + 0.5 * (depth - 1)) / depth, abs=0.04)  # the newest token always stays
    assert shares[0] <= shares[1] <= 1
