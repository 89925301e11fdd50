"""Questions answered by image and video language models under pruning: accuracy, matched budgets, costs and times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prunelab.common import testbeds
from prunelab.common.apply import apply
from prunelab.common.catalogue import lookup
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import pictures, questions
from prunelab.common.drawing.figures import Context
from prunelab.common.experiments import planning, runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import answer, prefill
from prunelab.common.models import loading
from prunelab.common.tokens.adapters import adapter_for
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.fastv.method import FastV
from tests.contract.vlms import VLMS, vlm

CPU = torch.device("cpu")
BEDS = {"digit_questions": "digits_qa", "digit_videos": "digits_video_qa"}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
SMALL = {  # architectures as configs/models.yaml has them
    "image": {
        "library": "transformers", "name": "LlavaForConditionalGeneration", "dtype": "float32",
        "arguments": {"vision_config": CLIP | {"num_attention_heads": 3, "image_size": 32, "patch_size": 8},
                      "text_config": TEXT | {"model_type": "llama"}, "image_token_id": 60},
    },
    "video": {
        "library": "transformers", "name": "LlavaOnevisionForConditionalGeneration", "dtype": "float32",
        "arguments": {"vision_config": SIGLIP | {"num_attention_heads": 3, "image_size": 32, "patch_size": 8,
                                                 "vision_use_head": False},
                      "text_config": TEXT | {"model_type": "qwen2"}, "image_token_id": 60, "video_token_id": 61},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """The testbeds' models without their training."""
    known: dict[str, Any] = {}

    def build(identity: Any, config: Any) -> tuple[Any, None]:
        name = identity["testbed"]
        if name not in known:
            torch.manual_seed(0)
            known[name] = testbeds.get(name)().build().eval()
        return known[name], None

    monkeypatch.setattr(loading, "vision_language", build)
    answer._SCORES.clear()


def asked(loader: str, method: str | None = None, budget: str | None = None, n: int = 10, **settings: Any) -> Any:
    options = settings.pop("options", {})
    ids = {"model": {"testbed": BEDS[loader]}, "data": {"loader": loader}}
    return runner.measure(Run("answer", "testbed", method, options, budget, {"samples": n, **settings}, ids), {})


def values(found: Any) -> dict[str, Any]:
    return {name: metric.get("value", metric.get("text")) for name, metric in found.items()}


@pytest.mark.parametrize("loader", BEDS)
def test_accuracy_is_that_of_the_model_on_these_questions(loader):
    found = asked(loader, n=10)
    model, _ = loading.vision_language({"testbed": BEDS[loader]}, {})
    samples = questions.samples({"loader": loader}, 10)
    with torch.no_grad():
        said = [int(model(**questions.inputs([s])).logits[0, -1].argmax()) for s in samples]
    right = [word == sample.answer for word, sample in zip(said, samples, strict=True)]
    assert found["accuracy"]["value"] == 100 * sum(right) / 10 and found["accuracy"]["n"] == 10
    assert f"{int(found['accuracy']['bits'], 16):b}"[1:] == "".join(str(int(r)) for r in right)
    forms = [name for name in found if name.startswith("accuracy of ")]
    assert sum(found[name]["n"] for name in forms) == 10 and len(forms) == 5
    assert found["kept"]["value"] == 100 and found["saving"]["value"] == found["cache_saving"]["value"] == 0


@pytest.mark.parametrize("loader", BEDS)
def test_keeping_everything_changes_no_answer(loader):
    dense, whole = asked(loader, n=20), asked(loader, "uniform_tokens", "1.0", n=20)
    assert dense["accuracy"]["bits"] == whole["accuracy"]["bits"]
    assert values(whole)["kept"] == 100 and values(whole)["gmacs"] == values(dense)["gmacs"]


def test_blind_answers_come_from_the_words_alone():
    found = asked("digit_questions", n=50, blind=True)
    samples = questions.samples({"loader": "digit_questions"}, 50)
    assert found["accuracy"]["value"] == pytest.approx(100 * questions.blind(samples))
    assert "gmacs" not in found and found["accuracy"]["value"] < 40


def test_costs_are_those_of_the_pruned_prompt():
    visual = questions.visual_tokens("picture")
    kept = visual // 4
    found = values(asked("digit_questions", "divprune", "0.25"))
    model, _ = loading.vision_language({"testbed": "digits_qa"}, {})
    given = questions.inputs(questions.samples({"loader": "digit_questions"}, 1))
    text = given["input_ids"].shape[1] - visual
    with apply(DivPrune(), model, 0.25) as handle, torch.no_grad():
        cache = model(**given).past_key_values
        assert handle.report().tokens[0][0] == kept + text
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found["kept"] == round(100 * kept / visual, 3) and found["cache_gbytes"] == round(held / 1e9, 9)
    assert found["cache_saving"] == pytest.approx(100 * (1 - (kept + text) / (visual + text)), abs=0.001)
    assert 0 < found["scoring_gmacs"] < found["gmacs"] and 0 < found["saving"] < 75


def test_a_matched_budget_is_a_share_of_all_layers_tokens():
    model, _ = loading.vision_language({"testbed": "digits_qa"}, {})
    layers, visual = model.config.text_config.num_hidden_layers, questions.visual_tokens("picture")
    step = 100 / visual
    plain = values(asked("digit_questions", "fastv", "0.25", options={"layer": 1}))
    assert plain["kept"] == round(100 * (visual + (layers - 1) * (visual // 4)) / layers / visual, 3)
    found = values(asked("digit_questions", "fastv", "0.25", options={"layer": 1}, match=True))
    assert found["kept"] == pytest.approx(25, abs=step)
    assert float(found["budget"]) == pytest.approx((0.25 * layers - 1) / (layers - 1), abs=1.5 / visual)
    lowest = values(asked("digit_questions", "fastv", "0.05", options={"layer": 1}, match=True))
    assert lowest["kept"] == pytest.approx(100 / layers, abs=0.01)  # the first layer sees everything in any case
    assert values(asked("digit_questions", "divprune", "0.25", match=True))["budget"] == "0.25"


def test_matching_goes_by_what_comes_out_where_budgets_mean_something_else():
    found = values(asked("digit_videos", "quota", "0.25", options={"weighting": "even"}, match=True))
    assert found["kept"] == pytest.approx(25, abs=3)
    assert float(found["budget"]) < 0.1  # its own ratio counts patches, of which pooling leaves a quarter


def test_frames_are_weighed_by_the_models_own_attention():
    samples = questions.samples({"loader": "digit_videos"}, 3)
    model, _ = loading.vision_language({"testbed": "digits_video_qa"}, {})
    before = model.config.text_config._attn_implementation
    scores = answer.attended(model, samples)
    assert scores.shape == (3, pictures.FRAMES) and torch.allclose(scores.sum(1), torch.ones(3))
    assert model.config.text_config._attn_implementation == before
    given = questions.inputs(samples)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    places = (given["input_ids"][0] == model.config.video_token_id).nonzero().squeeze(1)[:-1]
    shares = torch.stack([m[:, :, -1][..., places].mean(1).unflatten(1, (pictures.FRAMES, -1)).sum(-1) for m in maps])
    assert torch.allclose(scores, (shares / shares.sum(-1, keepdim=True)).mean(0), atol=1e-5)
    service = answer.Scores(torch.arange(24.0).view(6, 4), first=2)
    assert torch.equal(service(2, 4), torch.arange(8.0, 16.0).view(2, 4))


def test_scored_frames_reach_the_method(monkeypatch):
    monkeypatch.setattr(answer, "attended", lambda model, asked: torch.eye(pictures.FRAMES)[[2] * len(asked)])
    found = values(asked("digit_videos", "quota", "16count", n=5, frame_scores="attention"))
    assert found["kept"] == pytest.approx(
        100 * 17 / questions.visual_tokens("video"), abs=0.01
    )  # frame 2 gets all 16 tokens, then the newline
    with pytest.raises(PrunelabError, match="frame_scores"):
        asked("digit_videos", "quota", "16count", n=5)


def test_only_token_pruners_are_asked():
    with pytest.raises(PrunelabError, match="token_pruner; snapkv is a cache_pruner"):
        asked("digit_questions", "snapkv", "0.5")


def test_broken_weights_are_named():
    model, _ = loading.vision_language({"testbed": "digits_qa"}, {})
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(PrunelabError, match="NaN"):
        asked("digit_questions")


# -- costs of published architectures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the published checkpoints have
        ("llava_1_5_7b", 7_063_427_072),
        ("llava_next_7b", 7_063_431_168),
        ("llava_onevision_7b", 8_030_807_584),
        ("llava_onevision_0_5b", 893_675_552),
        ("qwen2_5_vl_7b", 8_292_166_656),
    ],
)
def test_architectures_are_the_published_ones(name, parameters):
    model = loading.architecture(lookup.model(name)["architecture"])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.element_size() for p in model.parameters()} == {2}


def counted(entry: Any, method: str | None = None, budget: str | None = None, **settings: Any) -> Any:
    options = settings.pop("options", {})
    return runner.measure(Run("prompt_macs", "", method, options, budget, settings, {"model": entry}), {})


def test_prefill_costs_by_hand():
    found = values(counted(SMALL["image"], text=10))
    n, d, m, kv, v = 26, 32, 40, 16, 64
    layer = n * (2 * d * d + 2 * d * kv) + 2 * n * n * d + 3 * n * d * m
    assert found["decoder_macs"] == round((4 * layer + d * v) / 1e9, 5)  # the output layer reads the last token alone
    assert found["macs"] == pytest.approx(found["encoder_macs"] + found["decoder_macs"], abs=2e-5)
    assert found["cache_mib"] == round(4 * n * 2 * kv * 4 / 2**20, 3)
    cut = counted(SMALL["image"], "fastv", "0.5", text=10, options={"layer": 2})
    assert values(cut)["cache_saving"] == pytest.approx(100 * (1 - (2 * 26 + 2 * 18) / (4 * 26)), abs=0.01)
    assert "10 text tokens and 16 visual ones before pruning" in cut["decoder_macs"]["protocol"]


def test_prefill_costs_of_a_video():
    dense = values(counted(SMALL["video"], frames=6, text=8))
    one = values(counted(SMALL["video"], frames=3, text=8))
    assert dense["encoder_macs"] == pytest.approx(2 * one["encoder_macs"], rel=0.01)
    assert dense["cache_mib"] == round(4 * (8 + 6 * 4 + 1) * 2 * 16 * 4 / 2**20, 3)
    for method, budget, options in [
        ("holitom", "0.5", {}), ("holitom", "0.5,0.5", {"layer": 2}), ("quota", "12count", {}), ("divprune", "0.5", {}),
        ("aim", "0.5", {"layers": [1, 3], "pool": 2}),
    ]:  # fmt: skip
        found = values(counted(SMALL["video"], method, budget, frames=6, text=8, options=options))
        assert found["encoder_macs"] == dense["encoder_macs"] and found["decoder_saving"] > 5, method
    with pytest.raises(PrunelabError, match="reads no videos"):
        counted(SMALL["image"], frames=4)


def test_every_board_of_costs_and_answers_can_be_planned():
    """The runs of the pages of visual methods: known metrics, and no run that two entries of a board share."""
    given = lookup.settings({"scale": "testbed"})
    kinds = {}
    for slug in ("fastv", "divprune", "fastervlm", "holitom", "quota", "aim", "uniform_tokens"):
        for point in planning.points(slug, given):
            if point.board.task in ("answer", "prompt_macs"):
                kinds.setdefault((slug, point.board.task, point.board.name), []).append(point)
    assert {slug for slug, kind, _ in kinds if kind == "prompt_macs"} >= {
        "fastv",
        "divprune",
        "fastervlm",
        "holitom",
        "aim",
    }
    for points in kinds.values():
        runs = [p.run.identity for p in points if isinstance(p.run, Run)]
        assert len(set(runs)) == len(runs)


def test_a_figure_sets_answers_against_what_is_kept():
    def board(name: str, found: dict[tuple[str, str | None], float], scale: str = "testbed") -> Any:
        points = [SimpleNamespace(entry="dense", budget=None, value=SimpleNamespace(value=90.0, margin=4.0))]
        for (entry, budget), value in found.items():
            points.append(SimpleNamespace(entry=entry, budget=budget, value=SimpleNamespace(value=value, margin=5.0)))
        return SimpleNamespace(name=name, scale=scale, metric=name, points=points)

    answers = board("answers", {("A", "0.5"): 80.0, ("A", "0.1"): 60.0, ("B", "0.5"): 70.0, ("blind", None): 22.0})
    kept = board("tokens", {("A", "0.5"): 49.0, ("A", "0.1"): 20.0, ("B", "0.5"): 51.0})
    context = Context("x", {}, (), (answers, kept), (), lambda run: None)
    (figure,) = context.against("answers", "tokens", "Title", "Caption.")
    assert "A at 0.1: 60.0, 20.0" in figure.html and "B at 0.5: 70.0, 51.0" in figure.html
    assert figure.caption == "Caption. Blind: 22.0. A stand-in: testbed scale."
    assert "dense 90.0" in figure.html and "blind" not in figure.html
    assert not Context("x", {}, (), (answers,), (), lambda run: None).against("answers", "tokens", "Title")


# -- times -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "method", "settings"),
    [("image", "fastv", {"text": 10}), ("video", "holitom", {"frames": 4, "text": 8})],
)
def test_times_of_a_small_model(entry, method, settings):
    settings = {**settings, "new": 4, "against_dense": True}
    run = Run("prefill", "paper", method, {}, "0.5", settings, {"model": SMALL[entry]})
    found = prefill.timed(runner.bench(run, {}), CPU, 1, 3)
    value = values(found)
    assert 0 < value["ttft"] < value["total"] and value["decode"] > 0 and value["ttft_speedup"] > 0
    assert value["ttft_ms"] == pytest.approx(1000 * value["ttft"], rel=0.01)
    assert "memory_gb" not in found and found["ttft"]["n"] == 3
    assert "random weights in float32 on cpu" in found["ttft"]["protocol"]
    with pytest.raises(PrunelabError, match="new=2"):
        prefill.timed(
            runner.bench(Run("prefill", "paper", settings={"new": 1}, ids={"model": SMALL["image"]}), {}), CPU, 0, 1
        )


TEXT = {
    "library": "transformers", "name": "LlamaForCausalLM",
    "arguments": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options", "budget"),
    [
        (None, {}, None), ("lazyllm", {}, "0.5"), ("random_drop", {"layers": [0], "where": "input"}, "0.5"),
        ("llm_pruner", {}, "0.5"), ("llm_pruner", {"mode": "channel"}, "0.75"), ("slicegpt", {}, "0.75"),
        ("prunenet", {}, "0.7"), ("random_weights", {"units": ["heads", "channels"]}, "0.5"),
    ],
)  # fmt: skip
def test_times_of_a_model_of_text(method, options, budget):
    settings = {"text": 24, "new": 4, "against_dense": True}
    run = Run("prefill", "paper", method, options, budget, settings, {"model": TEXT})
    value = values(found := prefill.timed(runner.bench(run, {}), CPU, 1, 2))
    assert min(value[name] for name in ("ttft", "total", "ttft_speedup", "total_speedup", "decode_speedup")) > 0
    assert "a prompt of 24 tokens" in found["ttft"]["protocol"]


def test_a_model_of_text_says_what_it_lacks():
    for settings in ({}, {"text": 24, "frames": 4}):
        with pytest.raises(PrunelabError, match="reads text alone"):
            prefill.timed(runner.bench(Run("prefill", "paper", settings=settings, ids={"model": TEXT}), {}), CPU, 0, 1)


def test_random_weights_have_the_published_precision():
    model = loading.initialised(SMALL["image"] | {"dtype": "bfloat16"}, "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    given = prefill.contents(adapter_for(model), adapter_for(model).prompt(text=7), CPU)  # type: ignore[attr-defined]
    assert (given["input_ids"] == 60).sum() == 16 and given["input_ids"].shape == (1, 23)
    with torch.no_grad(), apply(FastV(), model, Budget(0.5)):
        assert bool(model(**given).logits.isfinite().all())


@pytest.mark.parametrize("family", VLMS)
def test_prompts_of_noise_fit_every_class(family, monkeypatch):
    model = vlm(family)
    adapter: Any = adapter_for(model)
    if family == "qwen2_5_vl":
        monkeypatch.setattr(type(adapter), "grid", lambda self: (8, 8))
    for frames in (0, 4) if "video" in adapter.tokens else (0,):
        given = prefill.contents(adapter, adapter.prompt(frames, 8), CPU)
        with apply(FastV(), model, Budget(0.5)) as handle:
            timing = prefill.answered(model, given, 3, 0, 1)
            seen = [count for count, _ in handle.report().tokens]
        assert timing.first > 0 and seen[0] > seen[-1] > 8 and timing.memory is None


def test_without_a_gpu_nothing_is_timed():
    if torch.cuda.is_available():
        pytest.skip("a CUDA GPU is here")
    with pytest.raises(PrunelabError, match="CUDA GPU"):
        runner.measure(Run("prefill", "paper", ids={"model": SMALL["image"]}), {})
