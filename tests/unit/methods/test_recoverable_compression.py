"""Recoverable Compression: shares, parts and their merging, and a model with its text tower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures.text_similarity import text_similarity
from prunelab.methods.recoverable_compression.method import (
    RecoverableCompression,
    class_interest,
    mixture,
    outlier_share,
    parted,
    together,
)
from prunelab.methods.recoverable_compression.tables import costs
from tests.contract.vlms import images, prompt, vlm


def drawn(patches: int = 64, width: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    interest = torch.randn(patches, generator=g).exp().softmax(0)
    return interest, torch.randn(patches, generator=g), torch.randn(patches, width, generator=g)


def test_outliers_are_counted():
    scores = torch.cat([torch.linspace(0, 1, 60), torch.tensor([9.0, 12.0, -8.0])])
    assert outlier_share(scores, 10) >= 3 / 63
    assert outlier_share(torch.linspace(0, 1, 50), 20) < 0.1
    assert outlier_share(torch.tensor([1.0, 2.0]), 20) == 0


def test_heads_are_taken_as_one():
    query, keys = torch.randn(1, 8), torch.randn(5, 8)
    want = (query @ keys.T / 8**0.5).softmax(-1)[0, 1:]
    assert torch.allclose(class_interest(query, keys), want)


def test_every_patch_becomes_something():
    interest, likeness, keys = drawn()
    parts = parted(interest, likeness, keys, centres_of="rest", keys_of="rest")
    kept = torch.cat([parts.vision, parts.text])
    assert len(kept.unique()) == len(kept)
    assert sorted([*kept.tolist(), *parts.rest.tolist()]) == list(range(64))
    mix = mixture(parts, interest, alone=True)
    assert mix.outputs == len(kept) + len(parts.centres) + 1
    assert set(mix.source[0].tolist()) == set(range(64))
    x = torch.randn(1, 64, 3)
    out = mix.apply(x)[0]
    assert torch.allclose(out[: len(kept)], x[0, kept.sort().values])
    others = [i for n, i in enumerate(parts.rest.tolist()) if n not in parts.centres.tolist()]
    assert torch.allclose(out[-1], (interest[others, None] * x[0, others]).sum(0), atol=1e-6)


def test_slips_of_the_released_code_are_options():
    interest, likeness, keys = drawn(seed=3, width=400)
    width, rest = (parted(interest, likeness, keys, centres_of=how) for how in ("width", "rest"))
    assert len(width.centres) == min(int(400 * width.shares[2]), len(width.rest))
    assert len(rest.centres) == int(len(rest.rest) * rest.shares[2])
    right = parted(interest, likeness, keys, centres_of="width", keys_of="rest")
    if len(width.centres):
        assert not torch.equal(width.neighbours, right.neighbours)
    bounded = parted(interest, likeness, keys, most=4)
    assert len(bounded.vision) + len(bounded.text) <= 4


def test_pictures_of_one_batch_have_as_many_tokens_as_each_has():
    mixes = [mixture(parted(*one, centres_of="rest"), one[0], alone=True) for one in (drawn(seed=1), drawn(seed=5))]
    both, x = together(mixes), torch.randn(2, 64, 3)
    out = both.apply(x)
    for i, mix in enumerate(mixes):
        assert torch.allclose(out[i, : mix.outputs], mix.apply(x[i : i + 1])[0], atol=1e-6)
        assert both.valid is None or int(both.valid[i].sum()) == mix.outputs


@torch.no_grad()
def test_the_question_has_a_say():
    model, given = vlm("llava", tower=4), prompt("llava", images("llava", 2))
    projection = nn.Linear(24, 6, bias=False)
    service = text_similarity(torch.randn(6), projection)
    assert service(torch.randn(2, 16, 24)).shape == service(torch.randn(2, 16, 24).bfloat16()).shape == (2, 16)
    with pytest.raises(PrunelabError, match="questions about 3 pictures, and 2 came"):
        text_similarity(torch.randn(3, 6), projection)(torch.randn(2, 16, 24))
    with apply(RecoverableCompression(), model, 1.0, services={"text_similarity": service}) as handle:
        logits = model(**given).logits[:, -1]
    assert torch.isfinite(logits).all() and handle.report().tokens[0][0] < 7 + 16
    with pytest.raises(PrunelabError, match="text_similarity"), apply(RecoverableCompression(), model, 1.0):
        pass


def test_the_roofline_gives_the_printed_figures():
    found = {name: value["value"] for name, value in costs().items()}
    for row, printed in (("LLaVA1.5 FP16", 8.5), ("Ours FP16", 1.5), ("Ours INT8", 0.8), ("Ours INT4", 0.4)):
        assert round(found[f"cost/{row}/FLOPs"], 1) == printed
    assert round(found["cost/LLaVA1.5 FP16/prefill"], 1) == 30.3 and round(found["cost/Ours FP16/prefill"], 1) == 9.2
