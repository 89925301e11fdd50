"""Tiny models of images and texts: what they are asked, what prunes them, and how they learn on."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image

from prunelab.common import weights
from prunelab.common.backbones import blip_nlvr
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import image_text
from prunelab.common.measures import image_text as measured
from prunelab.common.measures import image_text_tuning as tuning
from prunelab.common.measures.bench import Bench
from prunelab.common.rehearsal import checkpoints
from prunelab.common.tasks import get
from prunelab.methods.ecoflap.method import ECoFLaP
from prunelab.methods.wanda.method import Wanda

SIDE = 32
TEXTS = [f"A w{100 + i} , (w{200 + i}) !" for i in range(6)]
DATA = {
    "loader": "image_text",
    "setting": "image_text",
    "images": "pictures",
    "train": "train.json",
    "test": "test.json",
}
PARTS: dict[str, Any] = {
    "vision_config": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": SIDE, "patch_size": 16, "projection_dim": 8},
    "text_config": {"vocab_size": 512, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "projection_dim": 8, "max_position_embeddings": 48, "is_decoder": True,
                    "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0},
}  # fmt: skip
CLASSES = {"retrieval": "BlipForImageTextRetrieval", "captions": "BlipForConditionalGeneration", "classes": "CLIPModel"}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "pairs":
        return blip_nlvr.blip_nlvr(SIDE, 8, 7, 2, 512).eval()
    cls = getattr(t, CLASSES[kind])
    built = cls(cls.config_class(**PARTS, projection_dim=8, image_text_hidden_size=8)).eval()
    for p in built.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return built


def processor() -> Any:
    return SimpleNamespace(
        tokenizer=checkpoints.tokenizer("Bert"),
        image_processor=t.BlipImageProcessor(size={"height": SIDE, "width": SIDE}),
    )


def settings(**given: Any) -> Any:
    return get("image_text").read({"batch": 4, "queue": 16, "longest": 8, "shortest": 1, "beams": 2, **given})


@pytest.fixture
def config(tmp_path):
    """Six pictures of one colour each, with texts, sentences and classes."""
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 250 - 40 * i, 9 * i)).save(tmp_path / "pictures" / f"{i}.png")
    pairs = [{"images": [f"{i}.png", f"{(i + 1) % 6}.png"], "sentence": TEXTS[i], "label": ["True", "False"][i % 2]}
             for i in range(6)]  # fmt: skip
    for split in ("train", "test"):
        (tmp_path / f"pairs_{split}.json").write_text(json.dumps(pairs))
    rows = [{"image": f"{i}.png", "caption": [TEXTS[i], TEXTS[i] + " too"]} for i in range(6)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "train.json").write_text(
        json.dumps([{**row, "caption": text} for row in rows for text in row["caption"]])
    )
    return {"image_text": str(tmp_path)}


def data(kind: str) -> dict[str, Any]:
    named = {"train": "pairs_train.json", "test": "pairs_test.json"} if kind == "pairs" else {}
    return {**DATA, **named, "kind": kind}


def asked(kind: str, own: Any = None, **given: Any) -> Any:
    return measured.ASKED[kind](settings(**given), processor(), own or model(kind), torch.device("cpu"))


def percent(right: torch.Tensor) -> Any:
    return pytest.approx(100 * float(right.float().mean()), abs=1e-3)


def test_annotations_are_read_in_their_three_forms(config):
    found = image_text.load(data("retrieval"), config, "test")
    assert [len(e.texts) for e in found] == [2] * 6 and found[3].pictures[0].name == "3.png"
    assert [e.of for e in image_text.load(data("captions"), config, "train")] == [i // 2 for i in range(12)]
    assert [e.label for e in image_text.load(data("pairs"), config, "test")] == [1, 0] * 3
    assert image_text.plain("A  Man, (old)... walks!", 4) == "a man, old walks"
    drawn = image_text.drawn(data("retrieval"), config, 5, 0)
    assert len({e.of for e in drawn}) == 5 and drawn == image_text.drawn(data("retrieval"), config, 5, 0)
    with pytest.raises(PrunelabError, match="6 training pictures, not 7"):
        image_text.drawn(data("retrieval"), config, 7, 0)
    with pytest.raises(PrunelabError, match="no annotations in BLIP's form"):
        image_text.load({**data("pairs"), "test": "test.json"}, config, "test")
    names = image_text.class_names()
    assert len(names) == 1000 and (names[0], names[-1]) == ("tench", "toilet tissue")


@pytest.mark.parametrize("kind", ["retrieval", "captions", "pairs", "classes"])
@pytest.mark.parametrize("name", ["wanda", "ecoflap"])
def test_half_of_both_chains_goes_and_the_text_reads_what_the_pruned_images_give(kind, name, config):
    own = model(kind)
    task = asked(kind, own)
    examples = image_text.load(data("pairs" if kind == "pairs" else "retrieval"), config, "train")[::2][:4]
    calls = [task.call(examples[:2]), task.call(examples[2:])]
    dense = {key: p.clone() for key, p in own.named_parameters()}
    adapter = weights.adapters.weight_adapter(own)
    targets = adapter.targets("linear")
    deep = 7 if kind == "pairs" else 2
    assert {target.block for target in targets} == set(range(2 * deep))
    assert len({target.name for target in targets}) == len(targets)
    cross = [target.name for target in targets if "crossattention" in target.name]
    assert len(cross) == {"retrieval": 8, "captions": 8, "pairs": 7 * 8 + 1, "classes": 0}[kind]
    assert all(target.source == target.name for target in targets if "crossattention" in target.name)
    options: dict[str, Any] = {"samples": 1, "batch": 1, "pooled": ("vision_model", "visual_encoder")}
    method = Wanda() if name == "wanda" else ECoFLaP(**options)
    plan = weights.prune(
        method, own, 0.5, calls, objective=lambda m, batch: torch.stack([*map(task.loss, batch)]).mean(), progress=False
    )
    share = sum(int((own.get_parameter(f"{x.name}.weight") == 0).sum()) for x in targets)
    assert share / sum(x.units for x in targets) == pytest.approx(0.5, abs=0.06)  # rows of eight lose whole weights
    pruned = {f"{target.name}.weight" for target in targets}
    assert all(torch.equal(p, dense[key]) for key, p in own.named_parameters() if key not in pruned)
    assert plan.report.sparsity == pytest.approx(share / sum(x.units for x in targets), abs=1e-6)


def test_wanda_in_the_text_blocks_weighs_what_the_pruned_image_blocks_gave(config):
    """The norms of the keys' inputs in the first cross-attention are those of the image encoder after pruning."""
    own, examples = model("retrieval"), image_text.load(data("retrieval"), config, "train")[::2][:3]
    task = asked("retrieval", own)
    calls = [task.call([e]) for e in examples]
    key = own.text_encoder.encoder.layer[0].crossattention.self.key
    dense = key.weight.detach().clone()
    weights.prune(Wanda(), own, 0.5, calls, progress=False)
    with torch.no_grad():
        seen = torch.cat([own.vision_model(pixel_values=call["pixel_values"]).last_hidden_state for call in calls])
    scores = dense.abs() * seen.square().sum((0, 1)).sqrt()
    kept = scores > scores.kthvalue(4, dim=1, keepdim=True).values
    assert torch.equal(key.weight != 0, kept)


def test_the_released_comparison_of_a_whole_matrix(config):
    own = model("pairs")
    calls = [asked("pairs", own).call(image_text.load(data("pairs"), config, "train")[:2])]
    lot = {"samples": 1, "batch": 1, "slack": 0.0, "pooled": ("visual_encoder",)}
    task = asked("pairs", own)
    weights.prune(ECoFLaP(**lot), own, 0.5, calls, objective=lambda m, b: task.loss(b[0]), progress=False)
    rows = [(own.visual_encoder.blocks[0].mlp.fc2.weight == 0).sum(1), (own.cls_head[0].weight == 0).sum(1)]
    assert len(rows[0].unique()) > 1 and not rows[1].any()
    text = own.text_encoder.encoder.layer[0].intermediate.dense.weight
    assert ((text == 0).sum(1) == 4).all()


def test_sentences_are_judged_and_both_pictures_matter(config):
    task = asked("pairs")
    examples = image_text.load(data("pairs"), config, "test")
    result = task.scores(examples)["accuracy"]
    assert result["n"] == 6 and 0 <= result["value"] <= 100
    call = task.call(examples)
    with torch.no_grad():
        logits = task.model(**call).logits
        turned = task.model(**{**call, "pixel_values": call["pixel_values"].flip(1)}).logits
        assert not torch.allclose(logits, turned, atol=1e-5), "each picture has projections of its own"
        one = task.model(**{k: v[:1] for k, v in call.items()}).logits
    assert torch.allclose(one, logits[:1], atol=1e-5)


def test_a_checkpoint_of_two_pictures_is_read_strictly(tmp_path):
    own = model("pairs")
    names = own.state_dict()
    assert {"text_encoder.encoder.layer.6.crossattention.output.merge_layer.weight",
            "text_encoder.encoder.layer.0.crossattention.self1.query.bias", "visual_encoder.blocks.0.attn.qkv.weight",
            "text_encoder.embeddings.word_embeddings.weight", "cls_head.2.bias"} <= names.keys()  # fmt: skip
    assert not any("layer.5.crossattention.output.merge" in name for name in names)
    state = {**names, "text_encoder.embeddings.position_ids": torch.arange(4)[None]}
    torch.save({"model": state}, tmp_path / "some.pth")
    other = model("pairs")
    torch.nn.init.zeros_(other.cls_head[0].weight)
    blip_nlvr.load_checkpoint(other, tmp_path / "some.pth")
    assert torch.equal(other.cls_head[0].weight, own.cls_head[0].weight)
    torch.save({"model": {k: v for k, v in state.items() if k != "cls_head.2.bias"}}, tmp_path / "less.pth")
    with pytest.raises(PrunelabError, match=r"missing: cls_head\.2\.bias"):
        blip_nlvr.load_checkpoint(other, tmp_path / "less.pth")


def test_what_is_sought_is_ranked_by_matching_and_likeness_of_a_shortlist(config):
    task = asked("retrieval")
    examples = image_text.load(data("retrieval"), config, "test")
    result = task.scores(examples)
    assert result["text_recall_1"]["n"] == 6 and result["image_recall_1"]["n"] == 12
    assert result["text_recall_1"]["value"] <= result["text_recall_5"]["value"] <= result["text_recall_10"]["value"]
    assert result["image_recall_10"]["value"] == 100, "there are six pictures"
    with torch.no_grad():
        seen = task.model.vision_model(pixel_values=task.seen([e.pictures[0] for e in examples])).last_hidden_state
        read = task.texts([text for e in examples for text in e.texts])
        near = torch.nn.functional.normalize(task.model.vision_proj(seen[:, 0]), dim=-1) @ task.feature(read).T
        marked = task.marked(read)
        assert (marked["input_ids"][:, 0] == 511).all() and torch.equal(
            marked["input_ids"][:, 1:], read["input_ids"][:, 1:]
        )
        scores = torch.stack([task.matching(marked, seen[i : i + 1].expand(12, -1, -1))[:, 1] for i in range(6)]) + near
    owner = torch.arange(12) // 2
    assert result["text_recall_1"]["value"] == percent(owner[scores.argmax(1)] == torch.arange(6))
    assert result["image_recall_1"]["value"] == percent(scores.argmax(0) == owner)
    nearest = asked("retrieval", shortlist=1).scores(examples)
    assert nearest["image_recall_1"]["value"] == percent(near.argmax(0) == owner)


def test_captions_begin_behind_the_prompt_and_only_they_are_learned(config, monkeypatch):
    task = asked("captions")
    examples = image_text.load(data("captions"), config, "train")[:3]
    call = task.call(examples)
    assert (call["input_ids"][:, 0] == 1).all() and (call["labels"][:, :2] == -100).all()
    assert torch.equal(
        call["labels"] == -100, (call["attention_mask"] == 0) | (torch.arange(call["labels"].shape[1]) < 2)
    )
    written = task.written(examples)
    assert len(written) == 3 and all(isinstance(text, str) and "picture of" not in text for text in written)
    monkeypatch.setattr(
        measured, "caption_scores", lambda a, b, spice: {"cider": {"value": len(a) + len(b), "spice": spice}}
    )
    assert task.scores(examples) == {"cider": {"value": 6, "spice": False}}
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(measured, "optional", lambda *_: None)
    with pytest.raises(PrunelabError, match="install a Java runtime"):
        task.check(examples)
    for wrong in ({"longest": 4, "shortest": 5}, {"momentum": 3.0}, {"soft": 2.0}):
        with pytest.raises(PrunelabError, match="of the task image_text: "):
            settings(**wrong)


def test_classes_are_named_by_the_nearest_mean_of_prompts(config, monkeypatch):
    monkeypatch.setattr(image_text, "class_names", lambda: ["w100", "w101", "w102"])
    task = asked("classes", templates=2)
    heads = task.heads()
    assert heads.shape == (3, 8) and torch.allclose(heads.norm(dim=-1), torch.ones(3))
    examples = [
        image_text.Example(e.pictures, (), i % 3)
        for i, e in enumerate(image_text.load(data("captions"), config, "test"))
    ]
    with torch.no_grad():
        seen = task._feature(task.model.get_image_features(pixel_values=task.seen([e.pictures[0] for e in examples])))
    right = (seen @ heads.T).argmax(-1) == torch.tensor([e.label for e in examples])
    assert task.scores(examples)["top1"]["value"] == pytest.approx(100 * float(right.float().mean()), abs=1e-3)
    with pytest.raises(PrunelabError, match="7 prompts, not 8"):
        asked("classes", templates=8).check(examples)
    with pytest.raises(PrunelabError, match="no texts to fine-tune with"):
        asked("classes", epochs=1).check(examples)
    with pytest.raises(PrunelabError, match="no texts to calibrate with"):
        image_text.drawn({"loader": "imagenet_folder"}, config, 1, 0)


@pytest.mark.parametrize("kind", ["captions", "retrieval", "pairs"])
def test_what_was_pruned_stays_so_while_the_model_learns(kind, config, monkeypatch):
    """The loss on the training examples falls."""
    plain = torch.nn.Identity()
    monkeypatch.setattr(tuning, "augmented", lambda: plain)
    own = model(kind)
    given = settings(epochs=12, tuned=6, rate=3e-2)
    task = measured.ASKED[kind](given, processor(), own, torch.device("cpu"))
    examples = image_text.load(data(kind), config, "train")
    examples = examples if kind == "pairs" else examples[::2]
    call = task.call(examples)
    losses = []

    def tune(model: Any, number: int) -> None:
        with torch.no_grad():
            losses.append(float(task.loss(call)))
        tuning.tune(task, examples, given, 0)
        with torch.no_grad():
            losses.append(float(task.loss(call)))

    weights.prune(Wanda(), own, 0.5, [call], tune=tune, progress=False)
    assert losses[1] < 0.95 * losses[0]
    targets = weights.adapters.weight_adapter(own).targets("linear")
    zeros = sum(int((own.get_parameter(f"{x.name}.weight") == 0).sum()) for x in targets)
    assert zeros / sum(x.units for x in targets) == pytest.approx(0.5, abs=0.02)


def test_a_training_picture_is_cut_and_changed():
    torch.manual_seed(0)
    picture = Image.linear_gradient("L").convert("RGB")
    one, other = (tuning.augmented()(picture) for _ in range(2))
    assert one.size == other.size == (384, 384) and one.tobytes() != other.tobytes()


def test_the_queue_knows_features_by_their_pictures_and_the_slow_model_follows(config):
    task = asked("retrieval", momentum=0.5, queue=4)
    contrast = tuning.Contrast(task, task.settings)
    examples = image_text.load(data("retrieval"), config, "train")[:3]
    pixels, read = task.seen([e.pictures[0] for e in examples]), task.texts([e.texts[0] for e in examples])
    numbers = torch.tensor([e.of for e in examples])
    with torch.no_grad():
        task.model.vision_proj.weight += 1
    before = contrast.slow["vision_proj"].weight.clone()
    loss = contrast.losses(task, pixels, read, numbers, 0.4, torch.Generator().manual_seed(0))
    loss.backward()
    assert torch.allclose(contrast.slow["vision_proj"].weight, before + 0.5)
    assert contrast.temperature.grad is not None and all(p.grad is None for p in contrast.slow.parameters())
    assert contrast.numbers.tolist() == [0, 0, 1, -1] and contrast.place == 3
    contrast.losses(task, pixels, read, numbers, 0.4, torch.Generator().manual_seed(0))
    assert contrast.numbers.tolist() == [0, 1, 1, 0] and contrast.place == 2


def test_a_run_from_its_files(config, tmp_path):
    folder = tmp_path / "some" / "blip"
    model("retrieval").save_pretrained(folder)
    made = processor()
    t.BlipProcessor(made.image_processor, made.tokenizer).save_pretrained(folder)
    ids = {"model": {"folder": str(folder), "class": "BlipForImageTextRetrieval"}, "data": data("retrieval")}
    bench = Bench("paper", {**ids, "calibration": ids["data"]}, settings(calibration=4, together=2), config, "ecoflap",
                  {"samples": 1, "batch": 1}, "0.5")  # fmt: skip
    result = get("image_text")().measure(bench)
    assert result["sparsity"]["value"] == pytest.approx(50, abs=6) and result["text_recall_1"]["n"] == 6
    with pytest.raises(PrunelabError, match="tuned already"):
        get("image_text")().measure(Bench("paper", ids, settings(epochs=1), config, None, {}, None))
    with pytest.raises(PrunelabError, match="give a BlipNlvr"):
        get("image_text")().measure(Bench("paper", {**ids, "data": data("pairs")}, settings(), config, None, {}, None))
