"""QuoTA: sampling, decoupling, scoring, shares, and what the decoder reads of resized frames."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.apply import apply
from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures.frame_scoring import DECOUPLE, FrameScorer, decouple, frame_prompt, parse, speaker, timing
from prunelab.common.tokens.adapters.vlm_prompt import Prompt
from prunelab.methods.quota.method import (
    SCORES,
    QuoTA,
    assign,
    capped,
    frame_count,
    frame_places,
    grid_of,
    merged_axes,
    sharpened,
)
from tests.contract.vlms import VLMS, film, images, prompt, typed, vlm

ASSIGNERS = ("bilinear", "average", "linspace", "merge", "axes")

# -- sampling ----------------------------------------------------------------------------------------------------------


def test_longer_videos_give_more_frames():
    assert [frame_count(s) for s in (0, 56, 57, 3600, 5400)] == [96, 96, 97, 160, 192]
    assert frame_count(1800, 64, 32) == 80
    assert frame_places(100, 5) == [0, 24, 49, 74, 99]
    assert frame_places(3, 5) == [0, 0, 1, 1, 2]
    assert frame_places(9, 1) == [0]
    with pytest.raises(PrunelabError, match="0; both must be"):
        frame_places(0, 8)
    assert (
        timing(12.5, [0, 6.25]) == "The video is 12.50 seconds long. 2 of its frames are shown, taken at 0.00s, 6.25s."
    )


# -- shares ------------------------------------------------------------------------------------------------------------


@given(scores=st.lists(st.floats(0.001, 1), min_size=1, max_size=30), most=st.floats(0.01, 1))
def test_shares_add_up_and_none_is_above_the_cap(scores, most):
    shares = sharpened(torch.tensor(scores))
    assert float(shares.sum()) == pytest.approx(1)
    held = capped(shares, most)
    assert bool((held <= most).all()) and float(held.sum()) <= 1 + 1e-9
    assert bool((held >= shares.clamp(max=most) - 1e-12).all()), "who was below the cap loses nothing"
    assert bool((shares > most).any()) or torch.equal(held, shares)


def test_what_a_frame_cannot_take_goes_to_those_behind_it():
    held = capped(torch.tensor([0.7, 0.19, 0.1, 0.01], dtype=torch.float64), 0.2)
    extra, total = 0.5, 0.2 + 0.19 + 0.1 + 0.01
    second = 0.19 * (1 + extra / total)
    third = 0.1 * (1 + (extra + second - 0.2) / total)
    assert held.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.01 * (1 + (extra + second + third - 0.4) / total)])


def test_a_power_of_two_and_float64_truncation():
    shares = sharpened(torch.tensor([0.1, 0.2, 0.4]))
    assert shares.tolist() == pytest.approx([1 / 21, 4 / 21, 16 / 21])
    assert QuoTA("query").counts(210, 3, 9, torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)) == [10, 40, 160]
    assert QuoTA("query", "average").counts(60, 3, 9, torch.tensor([0.1, 0.2, 0.4])) == [8, 9, 9]
    assert QuoTA().counts(100, 3, 9, None) == [33, 33, 33]
    for bad in ([0.0, 0.0], [float("nan"), 1.0], [-0.1, 0.5]):
        with pytest.raises(PrunelabError, match="frame scores"):
            sharpened(torch.tensor(bad))


@given(tokens=st.integers(0, 2000))
def test_a_map_holds_at_most_its_tokens_and_no_larger_one_would(tokens):
    height, width = grid_of(tokens)
    assert height * width <= tokens and height - width in (0, 1)
    assert (height + 1) * width > tokens or height > width or not tokens
    assert width == math.isqrt(tokens)


# -- resizing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 2), (9, 7), (20, 19), (1, 1)])
def test_resizing_is_the_librarys(size):
    x = torch.randn(2, 9 * 7, 5, generator=torch.Generator().manual_seed(0))
    image = x.transpose(1, 2).unflatten(2, (9, 7))
    smooth = F.interpolate(image, size=size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    bins = F.adaptive_avg_pool2d(image, size).flatten(2).transpose(1, 2)
    assert torch.allclose(selection.resized((9, 7), size, batch=2).apply(x), smooth, atol=1e-6)
    assert torch.allclose(selection.resized((9, 7), size, "average", batch=2).apply(x), bins, atol=1e-6)


@pytest.mark.parametrize("how", ASSIGNERS)
def test_every_frame_gets_its_count_and_none_mixes_with_another(how):
    x = torch.randn(4, 36, 5, generator=torch.Generator().manual_seed(1))
    mix, layout = assign(x, [0, 9, 4, 1], (6, 6), how, torch.device("cpu"))
    assert mix.outputs == len(layout) == 14
    assert layout[:, 0].tolist() == [1] * 9 + [2] * 4 + [3]
    matrix = mix.matrix(4 * 36)[0]
    assert torch.allclose(matrix.sum(1), torch.ones(14), atol=1e-6), "every output is a mean"
    frames = torch.arange(4 * 36) // 36
    assert bool((matrix[:, :].ne(0) <= (frames == layout[:, :1])).all())
    flat = how in ("linspace", "merge")
    assert layout[0].tolist() == ([1, -1, -1] if flat else [1, 0, 0])
    assert flat or layout[8].tolist() == [1, 2, 2]


def test_axes_merge_within_rows_then_within_columns():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
    mix = merged_axes(x, (4, 5), (2, 3))
    rows = torch.stack([selection.merged(row.unsqueeze(0), 3).apply(row.unsqueeze(0))[0] for row in x.view(4, 5, 6)])
    columns = [rows[:, c].unsqueeze(0) for c in range(3)]
    want = torch.stack([selection.merged(column, 2).apply(column)[0] for column in columns], 1).flatten(0, 1)
    assert torch.allclose(mix.apply(x.unsqueeze(0))[0], want, atol=1e-6)


# -- in a model --------------------------------------------------------------------------------------------------------


def by_hand(model: Any, words: Tensor, frames: Tensor, counts: list[int]) -> Tensor:
    """Logits of the dense model for one sample's words [7] around frames [T, 9, D] resized by the library."""
    parts = []
    for frame, count in zip(frames, counts, strict=True):
        if count:
            image = frame.T.unflatten(1, (3, 3)).unsqueeze(0)
            parts.append(F.interpolate(image, size=grid_of(count), mode="bilinear")[0].flatten(1).T)
    embed = model.get_input_embeddings()(words)
    sequence = torch.cat([embed[:3], *parts, model.model.image_newline.unsqueeze(0), embed[3:]]).unsqueeze(0)
    hidden = model.model.language_model(inputs_embeds=sequence).last_hidden_state
    logits: Tensor = model.lm_head(hidden)[0]
    return logits


@torch.no_grad()
def test_the_decoder_reads_resized_frames():
    """Two videos of one batch, with other scores: frames grow beyond nine patches, shrink, and vanish."""
    model = vlm("llava_onevision")
    batch = film("llava_onevision")
    scores = [torch.tensor([0.9, 0.1, 0.3, 0.01]), torch.tensor([0.2, 0.2, 0.2, 0.2])]
    method, budget = QuoTA("query"), Budget(20, "count")
    counts = [method.counts(20, 4, 9, s) for s in scores]
    assert counts[0] == [17, 0, 1, 0] and counts[1] == [5] * 4
    with apply(method, model, budget, services={SCORES: scores}) as handle:
        output = model(**batch)
        features = handle.adapter.encoded["video"].features  # type: ignore[attr-defined]
        made = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape == (2, batch["input_ids"].shape[1] + 3)
    for b in range(2):
        words = torch.cat([batch["input_ids"][b, :3], batch["input_ids"][b, -4:]])
        want = by_hand(model, words, features[b], counts[b])
        assert torch.allclose(output.logits[b, -len(want) :], want, atol=5e-5)
    lengths = [len(by_hand(model, batch["input_ids"][0, :7], features[b], counts[b])) for b in range(2)]
    assert lengths == [7 + 16 + 1 + 1, 7 + 4 * 4 + 1] and output.logits.shape[1] == max(lengths)


@pytest.mark.parametrize("how", ASSIGNERS)
def test_every_assigner_runs_and_costs_what_it_keeps(how):
    model = vlm("llava_onevision")
    batch = film("llava_onevision")
    services = {SCORES: torch.tensor([[0.9, 0.3, 0.5, 0.1]] * 2)}
    method = QuoTA("query", how)
    with torch.no_grad(), apply(method, model, Budget(18, "count"), services=services) as handle:
        seen = model(**batch).past_key_values.layers[0].keys.shape[2]
        one = {"pixel_values_videos": torch.empty(1, 4, 3, 24, 24, device="meta")}
        report = handle.report(Prompt(one, text=7, modality="video"))
    assert report.tokens[0][0] == seen
    assert report.macs > 0 and report.scoring_macs < report.macs
    assert 7 + 18 // 2 <= seen <= 7 + 18 + 1


@pytest.mark.parametrize("family", VLMS)
def test_a_budget_of_everything_changes_nothing(family):
    model = vlm(family)
    batch = typed(model, prompt(family, images(family, 2)))
    with torch.no_grad():
        dense = model(**batch).logits
        with apply(QuoTA("even"), model, 1.0):
            assert torch.allclose(model(**batch).logits, dense, atol=2e-6)


def test_mistakes_are_named():
    model = vlm("llava_onevision")
    batch = film("llava_onevision")

    def run(services: Any, tokens: int = 20) -> None:
        with torch.no_grad(), apply(QuoTA("query"), model, Budget(tokens, "count"), services=services):
            model(**batch)

    with pytest.raises(PrunelabError, match="service 'frame_scores'"):
        run(None)
    with pytest.raises(PrunelabError, match="2 videos of 4 frames came, but 'frame_scores' has 1"):
        run({SCORES: [torch.ones(4), torch.ones(5)]})
    with pytest.raises(PrunelabError, match="not all zero"):
        run({SCORES: torch.zeros(2, 4)})
    with pytest.raises(PrunelabError, match="larger budget"):
        run({SCORES: torch.ones(2, 4)}, 3)


# -- asking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "things"),
    [
        ('Step 1: Yes\nStep 2: ["A Red Car", "speed"]\nStep 3: ["a red car"]', ("a red car",)),
        ("step 1 - yes, it does\nstep 2: [dog]\nstep 3: [dog,  red ball, dog]", ("dog", "red ball")),
        ("**Step 1:** yes\n**Step 3:**\n['chef\\'s hat', 'pan']", ("chef's hat", "pan")),
        ('Step 1: yes\nStep 3: ["the cat\'s bowl"]', ("the cat's bowl",)),
        ('Step 1: no\nStep 2: ["theme"]\nStep 3: ["theme"]', ()),
        ('Step 1: yes\nStep 2: ["theme"]\nStep 3: null', ()),
        ('Step 1: yes\nStep 2: ["theme"]', ()),
        ("Step 1: yes\nStep 3: []", ()),
        ("I cannot tell.", ()),
        ("", ()),
    ],
)
def test_answers_are_read_as_documented(answer, things):
    assert parse(answer) == things


def test_the_prompt_shows_three_examples_that_the_parser_reads():
    asked: list[str] = []
    decouple("Who waves?\nA. Ann\nB. Bob", lambda text: asked.append(text) or "step 1: no")
    assert asked[0].endswith("Question: Who waves?\nA. Ann\nB. Bob\n")
    examples = DECOUPLE.split("Question:")[1:4]
    assert [len(parse(example)) for example in examples] == [7, 7, 0]
    assert "feeling" not in parse(examples[1])
    assert "dog, ball" in frame_prompt("Who?", ("dog", "ball")) and "Who?" in frame_prompt("Who?")


def processor(letters: str = "A B") -> Any:
    """A real processor of LLaVA with a vocabulary of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *letters.split(),
        "Question",
        "image",
        "yes",
        "no",
        "dog",
        "Who",
        "?",
        ":",
    ]
    known = {word: i for i, word in enumerate(words)} | {"<image>": 60}
    model = Tokenizer(models.WordLevel(known, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=["<image>"]
    )
    shape = {"height": 32, "width": 32}
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %} :"
    )
    return LlavaProcessor(
        CLIPImageProcessor(size=shape, crop_size=shape),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    )


def test_a_score_is_the_probability_of_yes_among_all_words():
    model, reader = vlm("llava"), processor()
    frames = list(torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8))
    scores = FrameScorer(model, reader)(frames, "Who ?", ("dog",))
    assert torch.allclose(scores, FrameScorer(model, reader, batch=2)(frames, "Who ?", ("dog",)), atol=1e-6)
    assert not torch.allclose(scores, FrameScorer(model, reader)(frames, "Who ?"), atol=1e-4), "another prompt"
    text = "<image> " + frame_prompt("Who ?", ("dog",)) + " :"
    alone = reader(text=[text], images=[frames[3]], return_tensors="pt")
    assert int((alone["input_ids"] == 60).sum()) == 16
    with torch.no_grad():
        want = model(**alone).logits[0, -1].double().softmax(-1)[reader.tokenizer.convert_tokens_to_ids("A")]
    assert scores.shape == (5,) and float(scores[3]) == pytest.approx(float(want), abs=1e-6)
    assert len(scores.unique()) == 5
    with pytest.raises(PrunelabError, match="is 2 tokens"):
        FrameScorer(model, reader, letter="A B")(frames, "Who ?")
    with pytest.raises(PrunelabError, match="no frames"):
        FrameScorer(model, reader)([], "Who ?")


def test_a_language_model_speaks():
    model, reader = vlm("llava"), processor()
    answer = speaker(model, reader, words=4)("Who ?")
    assert isinstance(answer, str) and answer == speaker(model, reader, words=4)("Who ?")
