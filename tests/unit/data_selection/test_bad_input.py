"""Data that go wrong: what comes out is right, or one clear line before work is lost."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
import torch
import transformers

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection import files, streaming
from prunelab.common.data_selection.engine import applied, select
from prunelab.common.data_selection.examples import corpus
from prunelab.common.data_selection.streaming import Best, blocks
from prunelab.common.ranking.attribution import Explained, alike
from prunelab.methods.attribution_baselines.method import AttentionImportance, IntegratedGradients
from prunelab.methods.dsir.method import DSIR, gumbel_top_k
from prunelab.methods.prior_vlp.method import Prior
from prunelab.methods.q_tuning.method import QTuning, SamplesAndTokens
from prunelab.methods.reagent.method import ReAGent
from prunelab.methods.rho1.method import Rho1
from prunelab.methods.selective_context.method import self_information
from prunelab.methods.sstoken.method import SsToken
from tests.contract.references import language_model, token_ids
from tests.contract.test_data_selectors import batch

NEWS = [f"the river rose above flood level {i} and hundreds of families left" for i in range(6)]
SPACE = [f"the probe entered orbit {i} around the small moon after nine years" for i in range(6)]
METHOD = DSIR(min_length=4)
EACH = [(Rho1(), 0.5), (SsToken(), 0.5), (QTuning(), (0.5, 0.5)), (Prior(), 1.0), (SamplesAndTokens(), (0.5, 0.5))]
each = pytest.mark.parametrize(("method", "budget"), EACH, ids=lambda value: getattr(value, "name", ""))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def job(folder, keep, **changes):
    budget = files.Budget.parse(keep)
    values = {"method": METHOD, "raw": folder / "raw.jsonl", "targets": (folder / "target.jsonl",)}
    return files.Job(**(values | {"out": folder / "out.jsonl", "budget": budget} | changes))


def test_an_enormous_document_is_weighed_like_any_other(tmp_path):
    huge = " ".join(NEWS) + " flood" * 500_000  # 3 MB in one line
    texts, method = [*SPACE, huge, *NEWS[2:]], DSIR(min_length=4, top_k=True)
    write(tmp_path / "raw.jsonl", texts)
    write(tmp_path / "target.jsonl", NEWS[:2])
    manifest = files.run(job(tmp_path, "5count", method=method), progress=False)
    kept = [row["text"] for row in corpus(tmp_path / "out.jsonl").rows()]
    raw, target = (method.features.counts(part) for part in (texts, NEWS[:2]))
    gain = np.log(target / target.sum() + 1e-8) - np.log(raw / raw.sum() + 1e-8)
    weights = [float(gain[method.features.places(text)].sum()) for text in texts]
    best = sorted(range(len(texts)), key=lambda place: -weights[place])[:5]
    assert kept == [texts[place] for place in sorted(best)] and min(weights) == weights[6] < -1e6
    assert all(len(sample["text"]) <= files.WIDTH for kind in manifest["samples"].values() for sample in kind)


@pytest.mark.parametrize(("row", "message"), [
    (b'{"text": ""}\n', "line 3 holds an empty document"),
    (b'{"text": "caf\xe9 flood"}\n', "line 3 is not UTF-8"),
    (b'{"text": "flood \\ud800"}\n', "line 3 holds characters"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["raw", "target"])
def test_bad_lines_stop_a_selection_from_files(tmp_path, row, message, where):
    for name, texts in (("raw", NEWS + SPACE), ("target", NEWS)):
        write(tmp_path / f"{name}.jsonl", texts)
    path = tmp_path / f"{where}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], row, *lines[2:]]))
    with pytest.raises(PrunelabError, match=message):
        files.run(job(tmp_path, "3count"), progress=False)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_raw_set_smaller_than_the_budget_stays_whole_and_is_told(tmp_path):
    write(tmp_path / "raw.jsonl", NEWS + SPACE)
    write(tmp_path / "target.jsonl", NEWS[:2])
    manifest = files.run(job(tmp_path, "100000count"), progress=False)
    assert manifest["out"]["documents"] == 12
    assert "all of them: 100000count asks for no fewer than there are" in files.summary(manifest)
    write(tmp_path / "raw.jsonl", [*NEWS, "short", "too"])
    with pytest.raises(PrunelabError, match="may choose among 6 of 8 documents"):
        files.run(job(tmp_path, "100000count"), progress=False)


def test_targets_that_share_no_ngram_with_the_raw_set(tmp_path):
    write(tmp_path / "raw.jsonl", NEWS)
    write(tmp_path / "target.jsonl", ["völlig fremde wörter"])
    with pytest.raises(PrunelabError, match="shares no n-gram"):
        files.run(job(tmp_path, "3count"), progress=False)


def test_unnormalised_text_is_read_as_released_or_brought_to_a_form():
    composed = ["le café fermé était près du théâtre", "la forêt où l'été est passé"]
    apart = [unicodedata.normalize("NFD", text) for text in composed]
    raw = [*apart, "the cafe closed near the theatre", "the forest where summer went"]
    plain, same = DSIR(min_length=2, top_k=True), DSIR(min_length=2, top_k=True, normal_form="NFC")
    sizes = [plain.read(texts).bags.sizes.sum() for texts in (composed, apart)]
    assert sizes[0] < sizes[1], "as released, an accent behind its letter is a word of its own"
    assert np.array_equal(same.read(apart).bags.places, plain.read(composed).bags.places)
    assert select(same, raw, "2count", target=composed).indices == [0, 1]
    with pytest.raises(PrunelabError, match="normal_form must be"):
        DSIR(normal_form="nfc")


@pytest.mark.parametrize("block", [1, 3, 100])
def test_scores_are_compared_a_block_at_a_time_with_the_same_outcome(monkeypatch, block):
    monkeypatch.setattr(streaming, "BLOCK", block)
    rng = np.random.RandomState(0)
    scores = rng.randint(0, 4, (50, 1)).astype(float)  # many alike
    scores[::7] = -np.inf
    usable = np.flatnonzero(np.isfinite(scores[:, 0]))
    method, budget = DSIR(), files.Budget.parse("9count")
    noise = np.random.RandomState(3).gumbel(size=len(usable))
    expected = usable[gumbel_top_k(scores[usable, 0], 9, noise)]
    assert method.choose(scores, budget, np.random.RandomState(3), [np.ones(2)]).tolist() == expected.tolist()
    ranked = usable[gumbel_top_k(scores[usable, 0], 9, None)]
    assert DSIR(top_k=True).choose(scores, budget, rng, [np.ones(2)]).tolist() == ranked.tolist()
    best = Best(3)
    for start, values in blocks(scores):
        best.add(values[:, 0], start + np.arange(len(values)))
    assert best.first() == np.argsort(-scores[:, 0], kind="stable")[:3].tolist()


# -- batches ---------------------------------------------------------------------------------------------------------


@each
def test_a_batch_in_which_nothing_may_be_kept_is_told(method, budget):
    model, data = language_model().train(), batch()
    services = {name: language_model(seed=7) for name in method.services}
    data["labels"] = torch.full_like(data["labels"], -100)
    block = applied(method, model, budget, services=services)
    with pytest.raises(PrunelabError, match="left a batch without any token"), block:
        model(**data)
    assert not model._forward_pre_hooks


@each
def test_a_sample_without_an_answer_takes_nothing_from_the_others(method, budget):
    model, data = language_model().train(), batch()
    services = {name: language_model(seed=7) for name in method.services}
    data["labels"][2] = -100
    with applied(method, model, budget, services=services) as handle:
        loss = model(**data).loss
        loss.backward()
    assert bool(torch.isfinite(loss.detach())) and int(handle.kept_tokens) > 0


@pytest.mark.parametrize(("method", "budget"), EACH[:-1], ids=lambda value: getattr(value, "name", ""))
def test_nan_losses_are_told(method, budget):
    broken, data = language_model(), batch()
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    services = dict.fromkeys(method.services, broken)
    block = applied(method, broken.train(), budget, services=services)
    with pytest.raises(PrunelabError, match="NaN or infinite"), block:
        broken(**data)


# -- long prompts ----------------------------------------------------------------------------------------------------


def small(kind):
    """A model with a context of 16 tokens, whose places are learned or rotated."""
    torch.manual_seed(0)
    if kind == "learned":
        config = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["learned", "rotated"])
def test_prompts_longer_than_the_context_are_refused(kind):
    model, tokens = small(kind), token_ids(1)[0].repeat(2)  # 24 tokens
    message = "has 2[45] tokens and the model a context of 16; cut it first"
    probe = Explained(model, baseline=1, end=0)
    services = {"model": probe, "next_token_logits": probe.next_token_logits, "replace": alike([0] * 61)}
    for method in (ReAGent(), IntegratedGradients(), AttentionImportance()):
        with pytest.raises(PrunelabError, match=message):
            method.importance(tokens, {name: services[name] for name in method.services})
    with pytest.raises(PrunelabError, match=message), applied(QTuning(), model.train(), (0.5, 0.5)):
        model(input_ids=tokens[None].repeat(4, 1), labels=tokens[None].repeat(4, 1))

    class Tokenizer:
        bos_token_id, eos_token_id = 0, 1

        def __call__(self, text, **_):
            return {"input_ids": tokens.tolist()}

    with pytest.raises(PrunelabError, match=message):
        self_information(model.eval(), Tokenizer())("long")
