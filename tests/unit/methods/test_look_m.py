"""LOOK-M on a small image language model: text stays, and pictures make way for it."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, ModelInfo
from prunelab.common.kv_cache import applied
from prunelab.common.kv_cache.role import CacheSignals
from prunelab.methods.look_m.method import LookM
from tests.contract import errors, vlms


def held(method: LookM, model, given, budget):
    cache = DynamicCache(config=model.config.get_text_config())
    with applied(method, model, budget) as handle, torch.no_grad():
        model(**given, past_key_values=cache, use_cache=True)
        return handle.layers[0]


def test_text_stays_whole_and_also_above_the_budget():
    model = vlms.vlm("llava")
    given = errors.prompts("llava", model, (6,))
    text = (given["input_ids"][0] != model.config.image_token_id).nonzero().flatten()
    length = given["input_ids"].shape[1]
    for budget, wanted in ((0.5, Budget(0.5).count(length)), (0.1, None)):
        layer = held(LookM(), model, given, budget)
        for head in layer.indices[0]:
            assert set(text.tolist()) <= set(head.tolist())
            assert wanted is None or len(head) == wanted
    assert layer.keys.shape[2] == len(text) > 0.1 * length
    assert held(LookM(text=False), model, given, 0.1).keys.shape[2] == Budget(0.1).count(length)


def test_samples_of_a_batch_with_unlike_text_keep_what_they_keep_alone():
    model = vlms.vlm("llava")
    together = held(LookM(), model, errors.prompts("llava", model, (9, 3)), 0.3)
    counts = together.valid.sum(-1)
    assert counts[0, 0] > counts[1, 0]
    for number, words in enumerate((9, 3)):
        given = errors.prompts("llava", model, (9, 3))
        real = given["attention_mask"][number].bool()
        text = (given["input_ids"][number] != model.config.image_token_id) & real
        assert int(counts[number, 0]) == max(Budget(0.3).count(int(real.sum())), int(text.sum())), words


def test_what_goes_is_merged_into_the_most_similar_key():
    keys = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.0, 4.0]]]])
    signals = CacheSignals(
        {"keys": lambda: keys, "values": lambda: keys},
        scale=1.0, indices=torch.arange(4).expand(1, 1, -1), prompt=(4,), seen=4, marks={}, prefill=True,
        info=ModelInfo("decoder", 1, 1, 2, 4),
        required=frozenset({"keys", "values"}),
    )  # fmt: skip
    kept = Gather(torch.tensor([[[0, 1]]]))
    pivot, _ = LookM().merge(signals, kept)
    assert torch.allclose(pivot[0, 0], torch.tensor([[0.975, 0.025], [0.0, 1.75]]))
    average, _ = LookM(strategy="average").merge(signals, kept)
    assert torch.allclose(average[0, 0], torch.tensor([[0.95, 0.05], [0.0, 2.5]]))
    plain, _ = LookM(strategy="none").merge(signals, kept)
    assert torch.equal(plain, keys[:, :, :2])
