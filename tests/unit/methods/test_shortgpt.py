"""ShortGPT against a plain run with the library's hidden states, and on a layer that is known to do nothing."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.methods.shortgpt.method import ShortGPT, block_influence
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids


def influences(model: Any, method: ShortGPT, samples: list[Tensor]) -> list[float]:
    adapter = weight_adapter(model)
    with torch.no_grad():
        found = method.precompute(ModelProbe(adapter, adapter.targets("layers"), samples))
    return [float(statistics["influence"]) for statistics in found.values()]


def build(family: str) -> Any:
    return WEIGHT_FAMILIES[family]() if family in WEIGHT_FAMILIES else language_model(family)


def test_influence_is_the_angle_between_states():
    before = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 0]])
    after = torch.tensor([[2.0, 0], [0, 3], [-1, 0], [1, 1]])
    assert torch.allclose(block_influence(before, after), torch.tensor([0, 1, 2, 0.5]))
    assert torch.allclose(
        block_influence(before, after, "angular"), torch.tensor([0, 0.5, 1, math.acos(0.5) / math.pi])
    )


def test_massive_activations_do_not_overflow_half_precision():
    state = torch.full((1, 64), 3e4, dtype=torch.float16)
    assert bool(block_influence(state, state).abs() < 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gpt_neox", "gpt2", "gemma2"])
@pytest.mark.parametrize("final_norm", [True, False])
def test_layers_are_judged_by_the_librarys_hidden_states(family, final_norm):
    model, samples = build(family), list(token_ids())
    ours = influences(model, ShortGPT(final_norm=final_norm), samples)
    for sample in samples:
        last = []
        hook = weight_adapter(model).blocks[-1].register_forward_hook(lambda m, a, out, last=last: last.append(out))
        with torch.no_grad():
            states = list(model(sample[None], output_hidden_states=True, use_cache=False).hidden_states)
        hook.remove()
        if not final_norm:
            states[-1] = last[0]
        for layer, (before, after) in enumerate(pairwise(states)):
            ours[layer] -= float((1 - F.cosine_similarity(before[0], after[0])).sum())
    assert ours == pytest.approx([0] * len(ours), abs=1e-4)


def test_a_layer_that_does_nothing_goes_first_and_is_not_missed():
    model, dense = language_model(), language_model()
    for m in (model, dense):
        with torch.no_grad():
            m.model.layers[1].self_attn.o_proj.weight.zero_()
            m.model.layers[1].mlp.down_proj.weight.zero_()
    plan = prune(ShortGPT(), model, "1removed", token_ids(), progress=False)
    assert [t.block for t, d in plan.decisions() if not d.kept] == [1] and plan.header["stock"]
    ids = token_ids(2, seed=9)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-6)


def test_documents_are_read_in_pieces_from_position_0():
    model, document = language_model(), token_ids(1, 25)[0]
    pieces = [document[:10], document[10:20], document[20:]]
    cut, whole = influences(model, ShortGPT(stride=10), [document]), influences(model, ShortGPT(), [document])
    assert cut == pytest.approx(influences(model, ShortGPT(), pieces)) and cut != pytest.approx(whole)


def test_what_it_cannot_use_is_refused():
    with pytest.raises(PrunelabError, match="of at least 1"):
        ShortGPT(stride=0)
    with pytest.raises(PrunelabError, match="keep more"):
        prune(ShortGPT(), language_model(), "3removed", token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="calibration set"):
        prune(ShortGPT(), language_model(), "1removed", progress=False)
    model = language_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = math.nan
    with pytest.raises(PrunelabError, match="NaN"):
        prune(ShortGPT(), model, "1removed", token_ids(), progress=False)
    assert len(model.model.layers) == 3


def test_relative_magnitude_is_what_a_layer_adds_over_what_comes_out():
    before, after = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert block_influence(before, after, "magnitude").tolist() == [pytest.approx(4 / 3), 0.0]
