"""FastV: what it ranks, when, and what its tables say."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs.formulas import LLAVA_7B, ONEVISION_7B, layer_flops, prefill_flops
from prunelab.methods.fastv.method import FastV, attention_score
from prunelab.methods.fastv.tables import costs, relative
from tests.contract.references import signals
from tests.contract.vlms import images, prompt, vlm


def test_keeps_what_the_last_token_looks_at():
    given, _ = signals(batch=2, patches=9)
    kept = FastV().plan(FastV().sites(given.info)[0], given, Budget(4, "count")).reduce
    scores = attention_score(given.last_row)[:, 1:]
    for b in range(2):
        assert set(kept.index[b].tolist()) == {0} | {int(i) + 1 for i in scores[b].topk(4).indices}


def test_the_cost_formula_gives_the_printed_figures():
    """40.8 T of LLaVA-OneVision's 32 frames, and 9.3 T with a fifth of them behind layer 2, as HoliTom prints it."""
    tokens = 32 * 196
    assert prefill_flops(ONEVISION_7B, [(0, tokens)]) / 1e12 == pytest.approx(40.8, abs=0.05)
    assert prefill_flops(ONEVISION_7B, [(0, tokens), (2, 0.2 * tokens)]) / 1e12 == pytest.approx(9.3, abs=0.05)
    assert layer_flops(1, LLAVA_7B) == 4 * 4096**2 + 2 * 4096 + 2 * 4096 * 11008
    found = {name: value["value"] for name, value in costs().items()}
    printed = {50: 55, 75: 33, 90: 20}
    for removed, want in printed.items():
        assert round(found[f"T1/LLaVA-1.5-7B K=2 R={removed}%/relative FLOPs"]) == want
    assert relative(LLAVA_7B, 32, 0.9) == 100


def test_without_a_cache_each_word_ranks_anew():
    """The paper's code: the newest token is the last row, so the kept set may change from word to word."""
    model = vlm("llava")
    given = prompt("llava", images("llava", 1))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "bad_words_ids": [[60]]}
    with torch.no_grad(), apply(FastV(1), model, Budget(3, "count")) as handle:
        words = model.generate(**given, **options, use_cache=False)
        assert handle.kept()[0][1].shape[1] == 7 + 4 + 3, "the last prefill holds the prompt and four words"
        stepwise = given["input_ids"]
        for _ in range(5):
            mask = torch.ones_like(stepwise)
            logits = model(**given | {"input_ids": stepwise, "attention_mask": mask}, use_cache=False).logits[:, -1]
            logits[:, [2, 60]] = float("-inf")
            stepwise = torch.cat([stepwise, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(words, stepwise)


def test_there_is_no_attention_before_the_first_layer():
    with pytest.raises(PrunelabError, match="last_row"), apply(FastV(0), vlm("llava"), 0.5):
        pass
