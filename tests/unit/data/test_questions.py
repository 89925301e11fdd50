"""Questions about digits: what is true of a picture or video is what is asked and answered."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from prunelab.common import testbeds
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import pictures, questions
from prunelab.common.data.questions import FORMS, IDS, WORDS
from prunelab.common.testbeds.digits_qa import answers, together

COUNT = 200


@pytest.fixture(scope="module")
def shown():
    draws = torch.Generator().manual_seed(0)
    return {
        "picture": pictures.pictures("test", COUNT, draws),
        "video": pictures.videos("test", COUNT, draws),
        "film": pictures.films("test", COUNT, draws),
        "long film": pictures.films("test", COUNT, draws, frames=pictures.LONG_FILM),
    }


def asked(kind, form, facts):
    """Filling and answering words of a form for every sample."""
    words, answer = questions.ask(kind, form, facts, torch.Generator().manual_seed(1))
    assert words.shape == (COUNT, 5)
    return [(WORDS[row[-1]], WORDS[right]) for row, right in zip(words.tolist(), answer.tolist(), strict=True)]


# -- pictures and videos ---------------------------------------------------------------------------------------------


def test_what_a_picture_shows(shown):
    facts = shown["picture"]
    assert facts.pixels.shape == (COUNT, 3, 36, 36) and facts.owner.shape == (COUNT, 81)
    number = (facts.digit >= 0).sum(1)
    assert number.min() == pictures.FEWEST and number.max() == pictures.MOST
    assert torch.equal((facts.owner >= 0).sum(1), 4 * number), "a digit covers four cells"
    for digit, ink, favourite in zip(facts.digit, facts.ink, facts.favourite, strict=True):
        there = digit[digit >= 0]
        assert len(ink[digit >= 0].unique()) == len(there), "every digit has a colour of its own"
        others = there[there != favourite]
        assert len(others.unique()) == len(others), "only the favourite comes more than once"


def test_digits_have_their_ink_in_their_cells(monkeypatch):
    monkeypatch.setattr(pictures, "NOISE", 0.0)
    facts = pictures.pictures("test", 20, torch.Generator().manual_seed(2), clutter=0.0)
    light = pictures.displayed(facts.pixels).float().unfold(1, 4, 4).unfold(2, 4, 4).flatten(-2).amax(-1)
    light = light.flatten(1, 2)  # [20, 81, 3]
    assert light[facts.owner < 0].max() == 0
    for scene, owner, digit, ink in zip(light, facts.owner, facts.digit, facts.ink, strict=True):
        for zone in (digit >= 0).nonzero().flatten().tolist():
            colour = scene[owner == zone].amax(0)
            assert torch.equal(colour.argmax(), pictures.INKS[ink[zone]].argmax()) and colour.max() > 200


def test_what_a_video_shows(shown):
    facts = shown["video"]
    assert facts.pixels.shape == (COUNT, 8, 3, 32, 32) and facts.owner.shape == (COUNT, 8, 64)
    rest = facts.owner == pictures.CROSSING
    assert (rest.sum(2) == 4).all(), "in four cells of every frame, which nothing crosses"
    assert torch.equal(rest, rest[:, :1].expand_as(rest)), "at one place"
    for slot in range(pictures.CROSSING):
        there = facts.digit[:, slot] >= 0
        assert torch.equal((facts.owner == slot).any(-1).any(-1), there)
        owner = facts.owner[there, slot * pictures.SLOT : (slot + 1) * pictures.SLOT].unflatten(-1, (8, 8))
        place = (owner == slot).nonzero().unflatten(0, (-1, 2, 4))
        corner = place[:, :, 0, 2:]  # [n, 2, 2]: upper left cell in both frames
        assert torch.equal(corner[:, 1] - corner[:, 0], pictures.STEP * pictures.WAYS[facts.way[there, slot]])


@pytest.mark.parametrize("kind", ["film", "long film"])
def test_what_a_film_shows(shown, kind):
    facts, length = shown[kind], questions.LENGTHS[kind]
    assert facts.pixels.shape == (COUNT, length, 3, 32, 32) and facts.owner.shape == (COUNT, length, 64)
    number = (facts.digit >= 0).sum(1)
    assert number.min() == 2 and number.max() == pictures.MOMENTS
    frames = facts.owner.amax(2)  # [B, T]
    assert torch.equal((frames >= 0).sum(1), number), "a digit is in one frame, and no other in it"
    pooled = facts.owner.view(COUNT, length, 4, 2, 4, 2).transpose(3, 4).flatten(4)  # [B, T, 4, 4, 4 cells]
    assert torch.equal(pooled.amin(-1), pooled.amax(-1)), "and in one of the tokens that the model pools cells into"
    for film, (owner, digit, quarter) in enumerate(zip(facts.owner, facts.digit, facts.quarter, strict=True)):
        times = [int((owner == m).any(-1).nonzero()) for m in (digit >= 0).nonzero().flatten().tolist()]
        assert times == sorted(times), film
        for moment in (digit >= 0).nonzero().flatten().tolist():
            cell = int((owner == moment).nonzero()[0, 1])
            assert cell // 8 // 4 * 2 + cell % 8 // 4 == quarter[moment]
    assert facts.cells(facts.digit).amax() <= 9 and torch.equal(facts.cells(facts.digit) >= 0, facts.owner >= 0)


def test_nothing_moves_in_the_background_but_what_crosses(monkeypatch):
    monkeypatch.setattr(pictures, "NOISE", 0.0)
    facts = pictures.videos("test", 20, torch.Generator().manual_seed(2))
    cut = facts.pixels.unfold(3, 4, 4).unfold(4, 4, 4).permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(2, 3)
    crossed = (facts.owner >= 0) & (facts.owner < pictures.CROSSING)
    changed = (cut[:, 1:] != cut[:, :-1]).any(-1)
    assert changed.any() and not (changed & ~(crossed[:, 1:] | crossed[:, :-1])).any()


# -- questions and answers -------------------------------------------------------------------------------------------


def test_answers_about_pictures(shown):
    facts = shown["picture"]
    rows = list(zip(facts.digit.tolist(), facts.ink.tolist(), strict=True))
    for form in FORMS["picture"]:
        for (digit, ink), (gap, right) in zip(rows, asked("picture", form, facts), strict=True):
            named = [str(d) for d in digit]
            if form == "place":
                assert named[questions.PLACES.index(gap)] == right
            elif form == "colour":
                found = [n for n, i in zip(named, ink, strict=True) if n != "-1" and questions.COLOURS[i] == gap]
                assert found == [right]
            elif form == "where":
                assert [p for p, n in zip(questions.PLACES, named, strict=True) if n == gap] == [right]
            elif form == "count":
                assert named.count(gap) == int(right)
            else:
                assert (gap in named) == (right == "yes")


def test_answers_about_videos(shown):
    facts = shown["video"]
    rows = list(zip(facts.digit.tolist(), facts.way.tolist(), facts.resting.tolist(), strict=True))
    for form in FORMS["video"]:
        for (digit, way, resting), (gap, right) in zip(rows, asked("video", form, facts), strict=True):
            crossing = [str(d) for d in digit if d >= 0]
            if form == "order":
                assert right == crossing[0 if gap == "first" else -1]
            elif form == "motion":
                assert [str(d) for d, w in zip(digit, way, strict=True) if questions.WAYS[w] == gap] == [right]
            elif form == "rest":
                assert right == str(resting)
            elif form == "count":
                assert int(right) == len(crossing)
            else:
                assert (gap in [*crossing, str(resting)]) == (right == "yes")


def test_answers_about_films(shown):
    facts = shown["film"]
    rows = list(zip(facts.digit.tolist(), facts.quarter.tolist(), strict=True))
    for form in FORMS["film"]:
        for (digit, quarter), (gap, right) in zip(rows, asked("film", form, facts), strict=True):
            moments = [str(d) for d in digit if d >= 0]
            there = {questions.QUARTERS[q]: str(d) for d, q in zip(digit, quarter, strict=True) if d >= 0}
            if form == "order":
                assert right == moments[0 if gap == "first" else -1]
            elif form == "place":
                assert there[gap] == right
            elif form == "where":
                assert there[right] == gap
            else:
                assert (gap in moments) == (right == "yes")


@pytest.mark.parametrize("kind", ["picture", "video", "film", "long film"])
def test_words_alone_say_little(kind):
    batch = questions.draw(kind, "test", 1000, 3)
    assert 0.15 < questions.blind(batch) < 0.3


@pytest.mark.parametrize("loader", questions.LOADERS)
def test_samples_are_deterministic_and_of_one_length(loader):
    few, more = questions.samples({"loader": loader}, 7), questions.samples({"loader": loader}, 70)
    assert [(s.question, s.answer) for s in few] == [(s.question, s.answer) for s in more[:7]]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(few, more))
    forms = list(FORMS[few[0].kind])
    assert [s.form for s in more] == [forms[i % len(forms)] for i in range(70)]
    given = questions.inputs(more)
    holder = IDS[questions.IMAGE if few[0].kind == "picture" else questions.VIDEO]
    assert ((given["input_ids"] == holder).sum(1) == questions.visual_tokens(few[0].kind)).all()
    assert few[0].shown.shape[-1] == 3 and few[0].shown.dtype == torch.uint8


def test_vocabulary_reads_its_own_questions():
    tokenizer = Tokenizer.from_str(questions.tokenizer().to_str())
    for kind in FORMS:
        for sample in questions.draw(kind, "test", 20, 0):
            spoken = sample.prompt[-5:].tolist()
            assert tokenizer.encode(sample.question).ids == spoken == questions.encoded(sample.question + " ?").tolist()
            assert tokenizer.decode([sample.answer]) == sample.word


@pytest.mark.parametrize("question", ["which dog is at top", ""])
def test_unknown_words_are_refused(question):
    with pytest.raises(PrunelabError, match=r"ask with|empty"):
        questions.encoded(question)


def test_no_or_mixed_samples_are_refused():
    both = [questions.draw(kind, "test", 1, 0)[0] for kind in FORMS]
    for batch in ([], both):
        with pytest.raises(PrunelabError, match="all about pictures"):
            questions.inputs(batch)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_qa", "digits_video_qa", "digits_film_qa"])
def test_questions_of_one_sequence_do_not_see_one_another(name):
    """Several questions behind one picture get the logits that each gets alone: training and use agree."""
    testbed = testbeds.get(name)()
    torch.manual_seed(0)
    model = testbed.build().eval()
    batch = questions.draw(testbed.kind, "test", 3, 0)
    given = questions.inputs(batch[:1])
    pixels = {key: value for key, value in given.items() if key.startswith("pixel")}
    lead, words = questions.prefix(testbed.kind), torch.stack([sample.prompt[-5:] for sample in batch])
    mask, places = together(len(lead), 3, 5)
    tokens = torch.cat([lead, words.flatten()]).unsqueeze(0)
    with torch.inference_mode():
        joint = model(input_ids=tokens, attention_mask=mask, position_ids=places, **pixels).logits[0, len(lead) :]
        for i, question in enumerate(words):
            alone = model(input_ids=torch.cat([lead, question]).unsqueeze(0), **pixels).logits[0, len(lead) :]
            torch.testing.assert_close(joint[5 * i : 5 * i + 5], alone, atol=1e-4, rtol=1e-4)


def test_early_layers_learn_slowly():
    testbed = testbeds.get("digits_qa")()
    paces = [testbed.scale(f"model.language_model.layers.{i}.mlp.up_proj.weight") for i in range(testbed.depth)]
    assert paces == sorted(paces) and paces[0] < 0.1 and paces[-1] == 1 == testbed.scale("lm_head.weight")


@pytest.mark.parametrize("name", ["digits_qa", "digits_video_qa", "digits_film_qa"])
def test_loss_reaches_every_part(name):
    testbed = testbeds.get(name)(batch=2)
    torch.manual_seed(0)
    model = testbed.build()
    testbed.loss(model, 1.0, torch.Generator().manual_seed(0)).backward()
    silent = {key.split(".layers")[0] for key, p in model.named_parameters() if p.grad is None}
    unused = {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}
    assert {key.replace("vision_model.", "") for key in silent} <= unused
    assert len(answers(model.eval(), questions.draw(testbed.kind, "test", 3, 0))) == 3
