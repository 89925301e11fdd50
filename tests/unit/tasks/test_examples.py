"""Examples before a question of lmms-eval, and a model that reads a picture whole. The library is not needed."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import papers
from prunelab.common.measures.examples import Examples, answer, drawn
from prunelab.common.models import loading
from tests.contract.kin import KIN, asked, kin
from tests.contract.vlms import IMAGE, checkpoint, ids, images, patched, vlm

DOCUMENTS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(9)]


def ask(document):
    return [{"role": "user", "content": [{"type": "text", "text": document["question"]}]}]


def test_examples_are_other_questions_each_with_its_answer_and_come_again_with_the_seed():
    shown = Examples(4, 0, {"some": "answer"})
    turns = shown.before(ask, "some", DOCUMENTS, 3)
    said = [turn["content"][0]["text"] for turn in turns]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4 and "q3" not in said
    assert [q[1:] for q in said[::2]] == [a[1:] for a in said[1::2]] and len(set(said)) == 8
    assert turns == shown.before(ask, "some", DOCUMENTS, 3) != shown.before(ask, "some", DOCUMENTS, 4)
    assert turns != Examples(4, 1, {"some": "answer"}).before(ask, "some", DOCUMENTS, 3)
    assert Examples().before(ask, "some", DOCUMENTS, 3) == []


def test_every_other_question_can_be_drawn_and_the_question_never():
    for place in range(5):
        assert sorted(drawn(4, 5, place, "seed")) == [n for n in range(5) if n != place]
    with pytest.raises(PrunelabError, match="take fewer"):
        drawn(5, 5, 0, "seed")


@pytest.mark.parametrize(
    ("document", "target", "wanted"),
    [
        ({"answer": "a"}, "answer", "a"),
        ({"label": "B", "answer": "a"}, "label", "B"),
        ({"answer": None, "answers": ["x", "y", "y"]}, "answer", "y"),
        ({"answers": [{"answer": "x"}, {"answer": "y"}]}, "answer", "x"),
        ({"multiple_choice_answer": "net", "answers": [{"answer": "x"}]}, "answer", "net"),
        ({"n": 3}, lambda document: str(document["n"]), "3"),
        ({"n": 3}, None, None),
    ],
)
def test_an_answer_is_found_where_the_task_or_its_data_have_it(document, target, wanted):
    assert answer(document, target) == wanted


def test_questions_without_an_answer_are_no_examples():
    with pytest.raises(PrunelabError, match="tell no answer"):
        Examples(1).before(ask, "some", [{"question": "q"}] * 3, 0)


def test_llava_next_reads_a_picture_whole_where_its_entry_says_so(tmp_path):
    folder = checkpoint(tmp_path, "llava_next")
    model, processor = loading.vision_language({"folder": str(folder), "one_view": True}, {})
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    shown = [{"type": "image"}, {"type": "text", "text": "w9"}]
    text = processor.apply_chat_template([{"role": "user", "content": shown * 3}], add_generation_prompt=True)
    given = processor(text=[text], images=[Image.new("RGB", (60, 30), c) for c in ("red", "blue", "green")],
                      return_tensors="pt")  # fmt: skip
    assert int((given["input_ids"] == IMAGE).sum()) == 3 * 16, "no tiles, no newlines"
    weights = vlm("llava_next").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.generate(**given, max_new_tokens=2, do_sample=False).shape[1] == given["input_ids"].shape[1] + 2
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(PrunelabError, match="LLaVA-NeXT alone"):
        loading.vision_language({"folder": str(folder), "one_view": True}, {})


def shown(family: str, pictures: int = 3):
    """A model and two prompts of several pictures, each behind the other's words."""
    if family in KIN:
        model = kin(family, num_hidden_layers=20)
        return model, asked(family, model, (6, 6), (pictures, pictures))
    model, pixels = vlm(family, num_hidden_layers=20), images(family, 2 * pictures)
    given = {"pixel_values": pixels}
    if family == "qwen2_5_vl":
        given = {"pixel_values": patched(pixels), "image_grid_thw": torch.tensor([[1, 8, 8]] * len(pixels))}
    runs = [("text", 3), *[part for _ in range(pictures) for part in ((IMAGE, 16), ("text", 4))]]
    return model, given | ids([runs, runs])


ROWS = {
    "llava": ("drawn", "fastv", "hired", "fitprune", "vtw", "divprune", "sparsevlm", "catp"),
    "qwen2_5_vl": ("drawn", "fastv", "divprune", "catp"),
    "internvl": ("drawn", "fastv", "divprune", "catp"),
}


@pytest.mark.parametrize(("family", "row"), [(family, row) for family, rows in ROWS.items() for row in rows])
@torch.no_grad()
def test_catps_baselines_prune_prompts_of_several_pictures(family, row):
    chosen = papers.load("catp").configurations[row]
    model, given = shown(family)
    assert chosen.method is not None
    with apply(registry.create(chosen.method, **chosen.options), model, 0.333) as handle:
        made = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert made.shape[1] == given["input_ids"].shape[1] + 3
    seen = [tokens for tokens, _ in handle.report().tokens]
    assert min(seen) < given["input_ids"].shape[1], "something left"
