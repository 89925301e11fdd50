"""Signals, corpora and the engine of data selectors, and what they refuse."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from torch.nn import functional as F

import prunelab
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection import signals
from prunelab.common.data_selection.callback import SelectionCallback
from prunelab.common.data_selection.engine import applied, narrowed, select
from prunelab.common.data_selection.examples import Examples, JsonLines
from prunelab.common.data_selection.losses import counted, token_entropy, token_loss, weighted_loss
from prunelab.common.data_selection.role import DataPlan, DataSelector, best_samples, best_tokens
from prunelab.common.training import engine, trainer
from prunelab.common.training.recipe import Recipe
from tests.contract.references import MagnitudeWeights, language_model, token_ids
from tests.contract.selector_references import (
    ErrorNorm,
    ExcessLoss,
    ImportanceResampling,
    ProgressAndPrompt,
    RandomSamples,
    SamplesThenTokens,
    SurpriseWeights,
)
from tests.contract.test_data_selectors import TEXTS, batch, tokenizer
from tests.contract.training_references import RandomMasks


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- signals ---------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_model_and_aligned_with_the_tokens():
    model, data = language_model(), batch()
    with torch.no_grad():
        output = model(**data)
    loss, mask = token_loss(output.logits, data["labels"]), counted(data["labels"])
    assert float(loss[mask].mean()) == pytest.approx(float(output.loss), rel=1e-5)
    assert not bool(loss[~mask].any()) and not bool(loss[:, 0].any())
    logs = output.logits[2, 4].log_softmax(-1)
    assert float(loss[2, 5]) == pytest.approx(float(-logs[data["labels"][2, 5]]), rel=1e-5)
    entropy = token_entropy(output.logits)
    assert float(entropy[2, 5]) == pytest.approx(float(-(logs.exp() * logs).sum()), rel=1e-5)
    ones = torch.ones(6)
    assert float(weighted_loss(output.logits, data["labels"], ones)) == pytest.approx(float(output.loss), rel=1e-5)


@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("block", [1 << 21, 200])
def test_attention_to_the_prompt_is_that_of_the_eager_model(monkeypatch, layer, block):
    monkeypatch.setattr(signals, "BLOCK", block)
    model, data = language_model(), batch()
    made = signals.sources(frozenset(("prompt_attention", "loss")), data, model, {}, layer)
    found = made["prompt_attention"]()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**data, output_attentions=True)
    prompt = (data["labels"] == -100) & data["attention_mask"].bool()
    expected = (output.attentions[layer].mean(1) * prompt[:, None]).sum(-1)
    mask = counted(data["labels"])
    assert torch.allclose(found[mask], expected[mask], atol=1e-5) and not bool(found[~mask].any())
    assert torch.allclose(made["loss"](), token_loss(output.logits, data["labels"]), atol=1e-4), "in the same pass"


def test_one_pass_a_model_serves_all_signals():
    calls = []

    def forward(model, data):
        calls.append(model)
        return signals.logits_of(model, data)

    other = language_model(seed=3)
    required = frozenset(("loss", "entropy", "logits", "reference_loss"))
    made = signals.sources(required, batch(), language_model(), {"reference": other}, forward=forward)
    examples = Examples(6, made, required, labels=batch()["labels"])
    for _ in range(2):
        assert examples.loss.shape == examples.entropy.shape == examples.reference_loss.shape == (6, 12)
    assert len(calls) == 2 and calls[1] is other
    with pytest.raises(AttributeError, match="name it in requires"):
        _ = examples.history_loss


def test_columns_measured_earlier_are_taken():
    data = {**batch(), "history_loss": torch.full((6, 12), 2.0)}
    made = signals.sources(frozenset(("history_loss",)), data, None, {})
    assert float(made["history_loss"]().mean()) == 2.0
    model = language_model().train()
    with applied(ProgressAndPrompt(), model, 0.5, services={"history": None}) as handle:
        model(**data).loss.backward()
    assert handle.batches == 1


# -- choosing --------------------------------------------------------------------------------------------------------


def test_best_tokens_by_sample_or_pooled_rounded_down_or_up():
    scores = torch.tensor([[0.0, 5.0, 1.0, 9.0], [0.0, 2.0, 2.0, 7.0]])
    may = torch.tensor([[False, True, True, True], [False, True, True, False]])
    assert best_tokens(scores, may, Budget(0.5)).int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    assert best_tokens(scores, may, Budget(0.5), up=True).int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert best_tokens(scores, may, Budget(0.6), pooled=True).int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert best_tokens(scores, may, Budget(1, "removed")).int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert best_tokens(scores, may, Budget(9, "count")).equal(may)
    assert best_samples(torch.tensor([1.0, 3.0, 3.0]), Budget(2, "count")).index.tolist() == [[1, 2]]


def test_a_batch_is_narrowed_row_by_row():
    data = batch()
    mask = counted(data["labels"]) & (torch.arange(12) % 2 == 0)
    left = narrowed(data, DataPlan(best_samples(torch.arange(6.0), Budget(2, "count")), mask, torch.arange(6.0)))
    assert torch.equal(left["input_ids"], data["input_ids"][4:]) and left["loss_weight"].tolist() == [4, 5]
    assert torch.equal(counted(left["labels"]), mask[4:])


def test_weights_are_constants_of_mean_one_a_sample():
    model, reference, data = language_model().train(), language_model(seed=7), batch()
    with torch.no_grad():
        surprise = 1 - (-token_loss(reference(**data).logits, data["labels"])).exp()
    mask = counted(data["labels"])
    weight = surprise * mask * mask.sum(1, keepdim=True) / (surprise * mask).sum(1, keepdim=True)
    expected = (weight * token_loss(model(**data).logits, data["labels"])).sum() / mask.sum()
    with applied(SurpriseWeights(), model, 1.0, services={"reference": reference}):
        loss = model(**data).loss
    assert torch.allclose(loss, expected, rtol=1e-5)


# -- corpora ---------------------------------------------------------------------------------------------------------


def lines(path, rows, mode="wb"):
    with (gzip.open if path.suffix == ".gz" else open)(path, mode) as file:
        file.write(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["raw.jsonl", "raw.jsonl.gz"])
def test_a_file_is_chosen_from_as_its_texts_are(tmp_path, name):
    path = lines(tmp_path / name, [{"text": text, "id": i} for i, text in enumerate(TEXTS)])
    budget = Budget(5, "count")
    listed = select(ImportanceResampling(), TEXTS, budget, target=TEXTS[:3])
    streamed = select(ImportanceResampling(), JsonLines(path), budget, target=TEXTS[:3])
    assert streamed.indices == listed.indices and [row["text"] for row in streamed] == list(listed)
    assert [row["id"] for row in streamed] == streamed.indices
    streamed.write(tmp_path / "kept.jsonl")
    assert list(JsonLines(tmp_path / "kept.jsonl")) == list(listed)
    with pytest.raises(PrunelabError, match="one after the other"):
        _ = streamed[0]


def test_a_large_file_takes_no_more_memory_than_a_small_one(tmp_path):
    def peak(copies: int) -> int:
        path = lines(tmp_path / f"{copies}.jsonl", [{"text": f"{i} " + "word " * 400} for i in range(copies)])
        tracemalloc.start()
        found = select(ImportanceResampling(), JsonLines(path), Budget(3, "count"), target=["word"])
        found.write(tmp_path / "out.jsonl")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(10)
    assert peak(2000) < 2 * peak(200) + 200_000  # 4 MB of text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "  "}, "line 2 holds an empty document"),
        ({"body": "x"}, "line 2 has no text in its field 'text'"),
        (b'{"text": "\xff"}\n', "line 2 is not UTF-8"),
        (b"{\n", "line 2 is not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, row, says):
    path = lines(tmp_path / "raw.jsonl", [{"text": "good"}, row])
    with pytest.raises(PrunelabError, match=says):
        select(ImportanceResampling(), JsonLines(path), 0.5, target=TEXTS)


def test_tokenised_samples_come_back_with_masked_labels():
    data = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < 4, -100)} for ids in token_ids(6)]
    options = {"model": language_model(), "services": {"reference": language_model(seed=7)}}
    found = select(ExcessLoss(), data, 0.5, **options)
    assert len(found) == 6 and found[2]["input_ids"].equal(data[2]["input_ids"])
    assert sum(int(counted(sample["labels"][None]).sum()) for sample in found) == 6 * 8 // 2
    assert all(bool((sample["labels"][:4] == -100).all()) for sample in found)
    small, large = (select(ExcessLoss(), data, 0.5, batch=size, **options).plan.tokens for size in (1, 6))
    assert torch.equal(small, large), "batches make no difference"


# -- inside trainings ------------------------------------------------------------------------------------------------

RECIPE = Recipe(steps=6, batch=4, rate=1e-2, save_every=2)


def trained(folder=None):
    torch.manual_seed(1)
    model = language_model()
    with applied(RandomSamples(), model, 0.5) as handle:
        engine.train(RandomMasks(), model, 0.5, token_ids(16), RECIPE, folder=folder, progress=False)
    return model, handle


def test_our_trainer_chooses_and_goes_on_with_the_same_choices(tmp_path, monkeypatch):
    straight, handle = trained()
    assert (handle.samples, handle.kept_samples) == (24, 12)
    step = trainer._step

    def stop(loop, model, optimizer, number, draws):
        if number == 5:
            raise KeyboardInterrupt
        return step(loop, model, optimizer, number, draws)

    monkeypatch.setattr(trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path)
    monkeypatch.setattr(trainer, "_step", step)
    resumed, _ = trained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def hugging_face(model, tmp_path, data, callbacks=(), **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "hf"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", seed=0, max_grad_norm=0, disable_tqdm=True, **options,
    )  # fmt: skip
    made = transformers.Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
    made.train()
    return model


def test_the_trainer_of_transformers_learns_from_what_stays(tmp_path):
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in token_ids(12)]
    callback = SelectionCallback(SamplesThenTokens(), (0.5, 0.5))
    chosen = hugging_face(language_model(), tmp_path, data, [callback])
    assert callback.handle.batches == 3 and callback.handle.kept_samples == 6
    assert int(callback.handle.kept_tokens) == 6 * 5 and not chosen._forward_pre_hooks
    everything = hugging_face(language_model(), tmp_path, data, [SelectionCallback(SamplesThenTokens(), (1.0, 1.0))])
    plain = hugging_face(language_model(), tmp_path, data)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(everything.parameters(), plain.parameters()))
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(chosen.parameters(), plain.parameters()))


def test_a_mean_over_the_items_of_a_trainer_is_over_those_that_stay():
    model, data = language_model().train(), batch()
    left = data["labels"].masked_fill(torch.arange(12) > 6, -100)
    expected = model(**{**data, "labels": left}).loss

    @dataclass(frozen=True)
    class Head(DataSelector):
        name: ClassVar[str] = "head"
        when: ClassVar[str] = "each_batch"
        chooses: ClassVar[tuple[str, ...]] = ("tokens",)

        def plan(self, examples, budget):
            return DataPlan(tokens=examples.counted & (torch.arange(12) <= 6))

    with prunelab.apply(Head(), model, 1.0):
        found = model(**data, num_items_in_batch=counted(data["labels"]).sum()).loss
        positional = model(data["input_ids"], data["attention_mask"], labels=data["labels"]).loss
    assert torch.allclose(found, expected, rtol=1e-5) and torch.allclose(positional, expected, rtol=1e-5)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "data", "budget", "options", "says"),
    [
        (ImportanceResampling(), ["good", ""], 0.5, {"target": TEXTS}, "document 1 is empty"),
        (ImportanceResampling(), ["good", "\ud800"], 0.5, {"target": TEXTS}, "document 1 holds characters"),
        (ImportanceResampling(), "one text", 0.5, {"target": TEXTS}, "put it into a list"),
        (ImportanceResampling(), [], 0.5, {"target": TEXTS}, "not empty"),
        (ImportanceResampling(), [torch.tensor([3])], 0.5, {"target": TEXTS}, "needs texts"),
        (ImportanceResampling(), TEXTS, "5words", {"target": TEXTS}, "cannot be budgeted in words"),
        (ImportanceResampling(), TEXTS, 0.01, {"target": TEXTS}, "would keep nothing of 18 samples"),
        (ErrorNorm(), TEXTS, 0.5, {}, "give tokenizer="),
        (ErrorNorm(), TEXTS, 0.5, {"tokenizer": tokenizer}, "needs a model; give model="),
        (ExcessLoss(), TEXTS, 0.5, {"tokenizer": tokenizer}, "needs the service 'reference'"),
        (ExcessLoss(), [torch.tensor([], dtype=torch.long)], 0.5, {"services": {"reference": 1}}, "holds no token"),
        (SamplesThenTokens(), TEXTS, (0.5, 0.5), {}, "in each batch of a training"),
        (MagnitudeWeights(), TEXTS, 0.5, {}, "chooses no training data"),
    ],
)
def test_bad_corpora_are_refused(method, data, budget, options, says):
    with pytest.raises(PrunelabError, match=says):
        select(method, data, budget, **options)


def test_nan_is_refused():
    model = language_model()
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(PrunelabError, match="NaN"):
        select(ExcessLoss(), token_ids(4), 0.5, model=model, services={"reference": language_model()})
    with pytest.raises(PrunelabError, match="NaN"), applied(SamplesThenTokens(), model.train(), (0.5, 0.5)):
        model(**batch())


def test_nothing_kept_of_a_batch_is_refused():
    model = language_model().train()
    with pytest.raises(PrunelabError, match="keeps none of 6 samples"), applied(RandomSamples(), model, 0.1):
        model(**batch())
    with pytest.raises(PrunelabError, match="without any token"), applied(SamplesThenTokens(), model, (1.0, 0.01)):
        model(**batch())
    assert not model._forward_pre_hooks


def test_a_training_without_labels_is_told():
    model = language_model().train()
    with pytest.raises(PrunelabError, match="saw no labels in 1 training passes"), applied(RandomSamples(), model, 0.5):
        F.cross_entropy(model(batch()["input_ids"]).logits.flatten(0, 1), batch()["input_ids"].flatten())


def test_facade():
    assert prunelab.supports(RandomSamples(), language_model()) is True
    assert prunelab.supports(RandomMasks(), language_model()) is True
    assert not prunelab.supports(RandomMasks(), torch.nn.Linear(2, 2))
