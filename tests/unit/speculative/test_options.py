"""Drafts under all that `generate` offers: as without them, or refused before work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.rasd.method import RASD
from prunelab.methods.token_recycling.method import TokenRecycling
from tests.contract import vlms
from tests.contract.references import language_model

GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT = torch.tensor([[3, 9, 4, 9, 4, 11, 3, 9, 4, 9, 4]])


def target(**overrides: Any) -> Any:
    return language_model("llama", max_position_embeddings=128, **overrides).double()


class Streamer(transformers.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.over = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.over = True


def test_a_streamer_sees_every_token_and_the_end():
    model, streamers = target(), [Streamer(), Streamer()]
    plain = model.generate(PROMPT, streamer=streamers[0], **GREEDY)
    with apply(TokenRecycling(), model, 1.0):
        for _ in range(2):
            streamers[1] = Streamer()
            assert torch.equal(model.generate(PROMPT, streamer=streamers[1], **GREEDY), plain)
            assert streamers[1].tokens == streamers[0].tokens == plain[0].tolist()
            assert streamers[1].over


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}], ids=str)
def test_scores_and_logits_are_those_of_each_token(options):
    model = target()
    told = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = model.generate(PROMPT, **GREEDY, **options, **told)
    with apply(TokenRecycling(), model, 1.0) as handle:
        model.generate(PROMPT, **GREEDY, **options)
        drafted = model.generate(PROMPT, **GREEDY, **options, **told)
    assert handle.report().mat > 1
    for name in ("scores", "logits"):
        one, other = torch.cat(plain[name]), torch.cat(drafted[name])
        assert one.shape == other.shape == (16, 61)
        assert torch.allclose(one.float(), other.float(), atol=1e-4)


def test_stop_strings_end_the_text_where_they_do_without_drafts():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(["hello"], trainers.BpeTrainer(initial_alphabet=letters, special_tokens=["<s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    model = target(vocab_size=len(tokenizer))
    full = model.generate(PROMPT, **GREEDY)[0, PROMPT.shape[1] :].tolist()
    stop: dict[str, Any] = {"stop_strings": [next(t for t in map(tokenizer.decode, full[4:]) if "\ufffd" not in t)]}
    stop["tokenizer"] = tokenizer
    plain = model.generate(PROMPT, **GREEDY, **stop)
    assert plain.shape[1] < PROMPT.shape[1] + 16
    with apply(TokenRecycling(), model, 1.0):
        for _ in range(2):
            assert torch.equal(model.generate(PROMPT, **GREEDY, **stop), plain)
        with pytest.raises(PrunelabError, match="give tokenizer"):
            model.generate(PROMPT, **GREEDY, stop_strings=["x"])
        config = transformers.GenerationConfig(**GREEDY, stop_strings=stop["stop_strings"])
        assert torch.equal(model.generate(PROMPT, generation_config=config, tokenizer=tokenizer), plain)


def test_offloaded_models_draft_where_they_compute():
    plain = target().generate(PROMPT, **GREEDY)
    model = cpu_offload(target(), execution_device="cpu")
    assert model.device.type == "meta"
    with apply(TokenRecycling(), model, 1.0):
        assert torch.equal(model.generate(PROMPT, **GREEDY), plain)
    with apply(RASD(), target(), 1.0, services={"draft": model}) as handle:
        assert torch.equal(handle.model.generate(PROMPT, **GREEDY), plain)


class Counting(transformers.LogitsProcessor):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores


def test_what_would_not_be_as_without_drafts_is_refused_in_a_line():
    model = target()
    for said, options in (
        ("ClassifierFreeGuidance", {"guidance_scale": 3.0}),
        ("Counting", {"logits_processor": [Counting()]}),
        ("not inputs_embeds", {"inputs_embeds": model.get_input_embeddings()(PROMPT)}),
        ("without output_hidden_states", {"return_dict_in_generate": True, "output_hidden_states": True}),
    ):
        with apply(TokenRecycling(), model, 1.0), pytest.raises(PrunelabError, match=said) as error:
            model.generate(PROMPT, **GREEDY, **options)
        assert "\n" not in str(error.value)
    with apply(TokenRecycling(), model, 1.0):
        assert torch.equal(model.generate(PROMPT, **GREEDY), target().generate(PROMPT, **GREEDY))


def test_a_picture_is_not_left_unread():
    model = vlms.vlm("llava")
    given = vlms.prompt("llava", vlms.images("llava", 1))
    with (
        apply(TokenRecycling(), model, 1.0),
        pytest.raises(PrunelabError, match=r"reads token ids alone, not (mm_encoder_outputs|pixel_values)"),
    ):
        model.generate(**given, **GREEDY)


def test_a_draft_model_of_shorter_context_is_refused_before_work():
    draft = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=24, eos_token_id=None)
    ).double()
    model = target()
    plain = model.generate(PROMPT, **{**GREEDY, "max_new_tokens": 13})
    with apply(RASD(), model, 1.0, services={"draft": draft}):
        with pytest.raises(PrunelabError, match="a context of 24 tokens and the text may have 27"):
            model.generate(PROMPT, **GREEDY)
        assert torch.equal(model.generate(PROMPT, **{**GREEDY, "max_new_tokens": 13}), plain)  # up to its last place


def test_models_that_tell_tokens_apart_by_their_order_in_the_cache_are_refused():
    sizes = {"vocab_size": 61, "hidden_size": 32}
    neo = transformers.GPTNeoConfig(
        **sizes, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    )
    bloom = transformers.BloomConfig(**sizes, n_layer=2, n_head=4)
    for said, model in (
        ("a sliding window", transformers.GPTNeoForCausalLM(neo)),
        ("order in the cache", transformers.BloomForCausalLM(bloom)),
        ("a sliding window", language_model("mistral", sliding_window=8)),
    ):
        with pytest.raises(PrunelabError, match=said), apply(TokenRecycling(), model, 1.0):
            pass


def test_an_own_generate_is_called_and_put_back():
    model, calls = target(), []
    own = model.generate

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return own(*args, **options)

    model.generate = counted
    with apply(TokenRecycling(), model, 1.0):
        model.generate(PROMPT, **GREEDY)
    assert len(calls) == 1
    assert model.generate is counted
