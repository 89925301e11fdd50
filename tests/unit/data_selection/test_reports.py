"""What a selection says that it dropped, rows of tables, and the trainers of other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.callback import SelectionCallback
from prunelab.common.data_selection.engine import applied, select
from prunelab.common.data_selection.examples import Rows, collate, corpus
from prunelab.common.data_selection.losses import counted, token_loss
from prunelab.common.data_selection.reading import Lost, lines, short
from prunelab.methods.dsir.method import DSIR
from prunelab.methods.prior_vlp.method import Prior
from prunelab.methods.q_tuning.method import QTuning
from prunelab.methods.rho1.method import Rho1
from prunelab.methods.sstoken.method import RandomTokens, SsToken
from tests.contract.references import language_model, token_ids
from tests.contract.selector_references import ImportanceResampling, RandomSamples
from tests.contract.test_data_selectors import TEXTS, batch

METHOD = DSIR(min_length=4)
ROWS = [{"text": f"{a} number {i} ran over the {b} hill", "id": i} for i in range(9) for a, b in
        (("red fox", "old"), ("blue whale", "wet"))]  # fmt: skip
TARGET = ["the blue whale swam over the wet hill", "a blue whale"]


class Words:
    """A tokenizer that writes token 7 as `t7`."""

    def decode(self, ids):
        return "".join(f" t{token}" for token in ids)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_dropped_samples_and_tokens_are_shown():
    ids = torch.tensor([3, 4, 5, 6, 7, 8])
    trained = torch.tensor([False, False, True, True, True, True])
    partly = Lost("sample 1", ids, trained, torch.tensor([False, False, True, False, False, True]))
    found = lines([Lost("sample 0", "some  text\n"), partly], Words())
    assert found == [
        "samples dropped:", "  sample 0: some text",
        "tokens dropped, in brackets:", "  sample 1: t3 t4 t5[ t6 t7] t8",
    ]  # fmt: skip
    assert partly.text(None) == "3 4 5 [6 7] 8" and short("a" * 300).endswith("a…") and not lines([])


def test_a_selection_of_texts_or_tokens_reports():
    texts = select(ImportanceResampling(), TEXTS, "5count", target=TEXTS[:3])
    gone = next(i for i in range(len(TEXTS)) if i not in texts.indices)
    assert f"sample {gone}: {TEXTS[gone]}" in texts.report() and "samples    5 of 18" in texts.report()
    data = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < 4, -100)} for ids in token_ids(6)]
    tokens = select(RandomTokens(), data, 0.5)
    assert tokens.report(Words()).count("\n  sample ") == 3 and "[ t" in tokens.report(Words())


def test_rows_of_a_table_are_texts():
    expected = select(METHOD, [row["text"] for row in ROWS], "6count", target=TARGET)
    for data in (ROWS, Rows(ROWS), Rows([{"body": row["text"]} for row in ROWS], "body")):
        chosen = select(METHOD, data, "6count", target=TARGET)
        assert chosen.indices == expected.indices and len(list(chosen)) == 6
    assert select(METHOD, ROWS, "6count", target=TARGET)[0] == ROWS[expected.indices[0]]
    for bad, message in (({"id": 1}, "row 1 has no text"), ({"text": " "}, "document 1 is empty")):
        with pytest.raises(PrunelabError, match=message):
            select(METHOD, [ROWS[0], bad], 0.5, target=TARGET)


@dataclass
class Logarithms(transformers.utils.ModelOutput):
    log_probs: Any = None
    label_mask: Any = None


def asked_for_logarithms(model):
    """As TRL has models: `fused_lm_head=True` gives logarithms of probabilities instead of logits."""
    plain = model.forward

    def forward(*args, fused_lm_head=False, labels=None, **inputs):
        if not fused_lm_head:
            return plain(*args, labels=labels, **inputs)
        logits = plain(*args, **inputs).logits
        return Logarithms(-token_loss(logits, labels)[:, 1:], counted(labels)[:, 1:])

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("method", "budget"), [(Rho1(), 0.5), (SsToken(), 0.5), (QTuning(), (0.5, 0.5)), (Prior(), 1.0)]
)
def test_a_trainer_that_sums_logarithms_itself_has_the_mean_over_what_stays(method, budget):
    services = {name: language_model(seed=7) for name in method.services}
    data = batch()
    usual = language_model().train()
    with applied(method, usual, budget, services=services):
        expected = usual(**data).loss
    model = asked_for_logarithms(language_model()).train()
    with applied(method, model, budget, services=services):
        output = model(**data, fused_lm_head=True)
    found = -output.log_probs.sum() / counted(data["labels"]).sum()  # it divides by all tokens of the batch
    assert torch.allclose(found, expected, rtol=1e-5)


def train(tmp_path, model, data, callbacks, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks, data_collator=collate)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("method", "budget"), [(Rho1(), 0.5), (SsToken(), 0.5), (QTuning(), (0.5, 0.5)), (Prior(), 1.0)]
)
def test_each_token_selector_trains_within_the_trainer_of_transformers(tmp_path, method, budget):
    services = {name: language_model(seed=7) for name in method.services}
    data = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < 4, -100)} for ids in token_ids(12)]
    callback = SelectionCallback(method, budget, services=services)
    with pytest.raises(PrunelabError, match="has seen no training"):
        callback.report()
    train(tmp_path, language_model(), data, [callback])
    report = callback.report()
    assert "batches    3" in report and ("tokens dropped" in report) == (budget != 1.0)
    assert ("samples dropped" in report) == (method.name == "q_tuning")


def test_a_choice_made_before_is_a_data_set_of_the_trainer(tmp_path):
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in token_ids(12)]
    trainer = train(tmp_path, language_model(), select(RandomTokens(), data, 0.5), [])
    assert trainer.state.global_step == 3


def test_nan_stops_a_training_when_it_logs(tmp_path):
    model = language_model()
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in token_ids(12)]
    with pytest.raises(PrunelabError, match="NaN"):
        train(tmp_path, model, data, [SelectionCallback(QTuning(), (0.5, 0.5))])


def test_weights_of_a_trainers_own_are_refused():
    callback = SelectionCallback(RandomSamples(), 0.5)
    with pytest.raises(PrunelabError, match="loss_type='nll'"):
        callback.on_train_begin(SimpleNamespace(loss_type="dft"), None, None, model=language_model())


# -- with the libraries, where they are installed --------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "jsonl.zst"])
def test_data_sets_and_their_files(tmp_path, ending):
    datasets = pytest.importorskip("datasets")
    table, path = datasets.Dataset.from_list(ROWS), tmp_path / f"rows.{ending}"
    if ending == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(tmp_path / "rows.jsonl")
    if ending == "jsonl.zst":
        packed = pytest.importorskip("zstandard").ZstdCompressor().compress((tmp_path / "rows.jsonl").read_bytes())
        path.write_bytes(packed)
    expected = select(METHOD, [row["text"] for row in ROWS], "6count", target=TARGET).indices
    assert select(METHOD, table, "6count", target=TARGET).indices == expected
    assert select(METHOD, corpus(path), "6count", target=TARGET).indices == expected


@pytest.mark.parametrize(
    ("method", "budget"), [(Rho1(), 0.5), (SsToken(), 0.5), (QTuning(), (0.5, 0.5)), (Prior(), 1.0)]
)
def test_each_token_selector_trains_within_trl(tmp_path, method, budget):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokens = token_ids(12)
    data = datasets.Dataset.from_list([
        {"input_ids": ids.tolist(), "completion_mask": [0] * 4 + [1] * 8} for ids in tokens
    ])  # fmt: skip
    services = {name: language_model(seed=7) for name in method.services}

    def trained(callbacks):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, bf16=False,
            report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, max_grad_norm=0,
        )  # fmt: skip
        model = language_model()
        trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=_tokenizer(), callbacks=callbacks).train()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    callback = SelectionCallback(method, budget, services=services)
    chosen, plain = trained([callback]), trained([])
    assert "batches    3" in callback.report() and not torch.allclose(chosen, plain, atol=1e-6)
    if method.name == "q_tuning":
        assert torch.allclose(trained([SelectionCallback(method, (1.0, 1.0))]), plain, atol=1e-6)


def _tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1", unk_token="w0")
