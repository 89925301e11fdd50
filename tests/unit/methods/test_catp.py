"""CATP: greedy facility location against search over all subsets, and prompts with several pictures."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.catp.method import CATP, attention_growth, facility_location, likeness, rescaled_cosine
from prunelab.methods.catp.tables import costs
from tests.contract.vlms import IMAGE, ids, images, prompt, vlm


def value(similarity: torch.Tensor, fit: torch.Tensor, kept: tuple[int, ...]) -> float:
    chosen = list(kept)
    return float(similarity[chosen].amax(0).sum() + fit[chosen].sum())


def test_greedy_search_is_near_the_best_subset():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    similarity, fit = rescaled_cosine(x, x), 0.7 * rescaled_cosine(x, x[:1].mean(0, keepdim=True)).squeeze(1)
    assert bool((similarity >= 0).all() and (similarity <= 1 + 1e-6).all())
    best = max(value(similarity, fit, subset) for subset in combinations(range(9), 3))
    picks = facility_location(similarity, fit, 3)
    assert len(set(picks.tolist())) == 3
    assert value(similarity, fit, tuple(picks.tolist())) >= (1 - 1 / torch.e) * best
    gains = [value(similarity, fit, (i,)) for i in range(9)]
    assert int(picks[0]) == max(range(9), key=lambda i: gains[i])
    assert len(facility_location(similarity, fit, 0)) == 0


def test_growth_and_likeness():
    now, before = torch.tensor([[[0.5, 0.2, 0.3]]]), torch.tensor([[[0.1, 0.4, 0.3]]])
    assert torch.allclose(attention_growth(now, before), torch.tensor([[0.4, 0.0, 0.0]]))
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    assert likeness(hidden, torch.tensor([[True, False, False]])).tolist() == [[1, 0, 1]]


def interleaved(shots: tuple[int, ...] = (4, 4, 4), batch: int = 1) -> dict[str, torch.Tensor]:
    """Prompts of as many pictures as there are numbers of words, each behind its picture."""
    runs = [("text", 3)] + [run for words in shots for run in ((IMAGE, 16), ("text", words))]
    return ids([runs] * batch) | {"pixel_values": images("llava", batch * len(shots))}


@torch.no_grad()
def test_examples_lose_tokens_before_the_question_does():
    model, given = vlm("llava", num_hidden_layers=8), interleaved()
    with apply(CATP(layer=2), model, 0.25) as handle:
        model(**given)
    words, first, last = 3 + 3 * 4, 3 * 10, 3 * 4
    examples = int(0.25 * 32)
    assert [round(t) - words for t, _ in handle.report().tokens] == [first] * 3 + [examples + 10] + [last] * 4
    kept = handle.kept()[-1][1][0]
    assert int(((kept >= 3 + 2 * 20) & (kept < 3 + 2 * 20 + 16)).sum()) == 4


@torch.no_grad()
def test_prompts_of_other_lengths_in_one_batch():
    model, pixels = vlm("llava", num_hidden_layers=6), images("llava", 4)
    runs = [[("text", 3), (IMAGE, 16), ("text", n), (IMAGE, 16), ("text", 4)] for n in (2, 5)]
    given = ids(runs)
    for context in ("all", "image"):
        method = CATP(layer=1, context=context)
        with apply(method, model, 0.4):
            both = model(**given, pixel_values=pixels).logits[:, -1]
        for i, length in enumerate((41, 44)):
            alone = {name: tokens[i : i + 1, -length:] for name, tokens in given.items()}
            with apply(method, model, 0.4):
                one = model(**alone, pixel_values=pixels[2 * i : 2 * i + 2]).logits[:, -1]
            assert torch.allclose(both[i], one[0], atol=1e-5)


@torch.no_grad()
def test_a_single_picture_is_the_question():
    model, given = vlm("llava_next"), prompt("llava_next", images("llava_next", 1))
    with apply(CATP(), model, 0.5) as handle:
        model(**given)
    visual = 16 + 8 * 9
    assert round(handle.report().tokens[0][0]) == 7 + int(0.75 * visual)
    assert round(handle.report().tokens[-1][0]) == 7 + visual // 2
    model, given = vlm("llava", num_hidden_layers=6), prompt("llava", images("llava", 1))
    with apply(CATP(layer=1), model, 0.5) as handle:
        costed = [tokens for tokens, _ in handle.report().tokens]  # before anything is seen: by shapes alone
        assert [round(tokens - costed[-1]) for tokens in costed] == [4, 4, 4, 0, 0, 0]
        model(**given)
        assert [round(t) - 7 for t, _ in handle.report().tokens] == [12, 12, 12, 8, 8, 8]


def test_the_formula_gives_the_unpruned_figure():
    assert costs()["T3/LLaVA-Next-7B vanilla/FLOPs"]["value"] == pytest.approx(20.84, abs=0.02)


def test_what_cannot_be_is_said():
    model, given = vlm("llava"), prompt("llava", images("llava", 1))
    with pytest.raises(PrunelabError, match="one budget"), apply(CATP(layer=1), model, (0.5, 0.4, 0.3)):
        model(**given)
    with pytest.raises(PrunelabError, match="layers 0 to 3"), apply(CATP(layer=6), vlm("llava"), 0.5):
        pass
