"""LVLM_CSP: the four designs of its first stage, what each layer and its cache see, and what is refused."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply, supports
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.lvlm_csp import method as csp
from prunelab.methods.lvlm_csp.method import LVLMCSP, of_instances, quotas, segmentation_row, uniform
from tests.contract.vlms import images, prompt, vlm

WORDS, VISUAL = 7, 16


def test_even_steps_leave_out_the_end_of_what_they_do_not_divide():
    prunable = torch.ones(2, 12, dtype=torch.bool)
    prunable[:, :2] = False
    prunable[1, 2:4] = False
    found = uniform(prunable, torch.tensor([[10], [8]]), torch.tensor([[4], [4]]))
    assert [row.nonzero().flatten().tolist() for row in found] == [[2, 4, 6, 8], [4, 6, 8, 10]]
    assert not uniform(prunable, torch.tensor([[10], [8]]), torch.tensor([[0], [0]])).any()


def test_instances_have_quotas_by_area_and_one_token_at_least():
    assert quotas(torch.tensor([60, 30, 1]), 10).tolist() == [6, 3, 1]
    masks = torch.zeros(3, 20, dtype=torch.bool)
    masks[0, :8] = masks[1, 10:14] = True  # the third shows nothing
    assert of_instances(masks, 6).tolist() == [0, 2, 4, 6, 10, 12]
    assert of_instances(masks[2:], 4).tolist() == [0, 5, 10, 15], "without instances evenly spaced ones"
    assert of_instances(masks[:0], 3).sort().values.tolist() == [0, 6, 13]
    every = torch.eye(20, dtype=torch.bool)
    assert of_instances(every, 5).tolist() == [0, 1, 2, 3, 4], "more instances than tokens: the first ones"
    assert sorted(of_instances(masks, 20).tolist()) == list(range(20))


def test_the_segmentation_token_may_stand_before_the_end():
    rows = torch.zeros(1, 2, 4, 3)
    rows[:, 0, 2] = torch.tensor([0.0, 0.5, 0.0])
    assert segmentation_row(rows, 1).tolist() == [[0.0, 0.25, 0.0]]
    assert segmentation_row(rows, 0).sum() == 0


@torch.no_grad()
def test_layers_and_caches_see_few_then_all_then_what_was_looked_at(monkeypatch):
    seen = []
    original = csp.segmentation_row
    monkeypatch.setattr(
        csp, "segmentation_row", lambda rows, behind: seen.append(original(rows, behind)) or original(rows, behind)
    )
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    with apply(LVLMCSP(fine=1, pruned=2, coarse=0.5), model, 0.25) as handle:
        output = model(**given, use_cache=True)
        kept = handle.kept()
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == [WORDS + n for n in (8, 16, 4, 4)]
    assert [sizes[0] for sizes in handle.report().tokens] == [WORDS + n for n in (8, 16, 4, 4)]
    assert output.logits.shape[1] == WORDS + VISUAL
    scores = seen[0]
    for sample in range(2):
        first = [int(i) - 3 for i in kept[0][1][sample] if 3 <= i < 3 + VISUAL]
        assert first == list(range(0, VISUAL, 2))
        looked_at = set((scores[sample, 3 : 3 + VISUAL].topk(4).indices).tolist())
        assert {int(i) - 3 for i in kept[-1][1][sample] if 3 <= i < 3 + VISUAL} == looked_at


@pytest.mark.parametrize("design", ["uniform", "random", "class", "instances"])
@torch.no_grad()
def test_every_design_keeps_as_many(design):
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    services = {"instances": [torch.ones(1, VISUAL), torch.zeros(0, VISUAL)]} if design == "instances" else None
    with apply(LVLMCSP(design=design), model, 0.25, services=services) as handle:
        assert torch.isfinite(model(**given).logits).all()
    assert [sizes[0] for sizes in handle.report().tokens] == [WORDS + n for n in (4, 16, 4, 4)]


def test_what_it_cannot_do_is_refused():
    with pytest.raises(PrunelabError, match="see all tokens"):
        LVLMCSP(fine=4, pruned=4)
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    assert "layers 0 to 3" in str(supports(LVLMCSP(pruned=4), model))
    assert "no layer sees all tokens" in str(supports(LVLMCSP(fine=3), model))
    assert "class token" in str(supports(LVLMCSP(design="class"), vlm("llava_onevision")))
    for services, match in (({}, "pass it"), ({"instances": [torch.ones(1, 3)] * 2}, "16, 16 visual tokens")):
        with (
            pytest.raises(PrunelabError, match=match),
            apply(LVLMCSP(design="instances"), model, 0.5, services=services),
        ):
            model(**given)
