"""Budgets that bring the decoder's layers to a mean number of visual tokens."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.match import match_mean, share_kept
from tests.contract.references import language_model
from tests.contract.vlms import images, prompt, vlm


@pytest.mark.parametrize(
    ("name", "options"), [("fastv", {"layer": 1}), ("pyramiddrop", {"layers": (1, 2)}), ("divprune", {})]
)
def test_layers_see_as_many_visual_tokens_in_the_mean_as_the_budget_says(name, options):
    model, method = vlm("llava"), registry.create(name, **options)
    own = match_mean(method, model, Budget.parse("0.5"))
    given = prompt("llava", images("llava", 1))
    with applied(method, model, own) as handle, torch.no_grad():
        model(**given)
        seen = [count / handle.application.trace.samples for count in handle.application.trace.attention]
    visual = int((given["input_ids"] == model.config.image_token_id).sum())
    text = given["input_ids"].shape[1] - visual
    assert share_kept(seen, text, visual) == pytest.approx(0.5, abs=1.5 / visual)


def test_a_mean_out_of_reach_and_a_model_that_reads_no_images_are_refused():
    with pytest.raises(PrunelabError, match="comes no nearer"):
        match_mean(registry.create("fastv", layer=2), vlm("llava"), Budget.parse("0.1"))
    with pytest.raises(PrunelabError, match="image language models"):
        match_mean(registry.create("random_drop"), language_model(), Budget.parse("0.5"))
