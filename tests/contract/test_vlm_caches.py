"""A cache that is handed in from outside, with every family of image and video language models: what stands in it is
right, or one line says why it cannot be; and the table of errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.attention_interface import cache_name, with_cache
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.fastv.method import FastV
from prunelab.methods.vla_pruner.method import VLAPruner
from tests.contract import errors, kin, vlms
from tests.contract.test_hosts import GREEDY

METHODS = (DivPrune(), FastV(2), VLAPruner(layer=2, action_layer=1, window=1, rounded=False))
every = pytest.mark.parametrize("family", [*vlms.VLMS, *kin.KIN])


def of(family: str) -> Any:
    """The family's tiny model."""
    return kin.kin(family) if family in kin.KIN else vlms.vlm(family)


def empty(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config())


def held(output: Any) -> Any:
    """The cache that a pass returned, by the name that this release knows."""
    return getattr(output, cache_name())


@every
@torch.no_grad()
def test_an_empty_cache_from_outside_is_as_good_as_none(family):
    model = of(family)
    given = errors.prompts(family, model, (6, 3))
    for method in METHODS:
        made = []
        for cache in (None, empty(model), empty(model)):
            with apply(method, model, 0.5):
                model.generate(**given, **GREEDY)  # which a method that remembers steps needs
                more = {} if cache is None else {"past_key_values": cache}
                made.append(model.generate(**given, **GREEDY, **more))
        assert torch.equal(made[0], made[1]) and torch.equal(made[1], made[2]), method


@every
@torch.no_grad()
def test_a_cache_that_was_filled_outside_is_refused_in_one_line(family):
    """By the model without the method, with a prompt or with words alone, and under another method."""
    model = of(family)
    given = errors.prompts(family, model, (6,))
    words = given["input_ids"][:, -2:]
    filled = held(model(**given, use_cache=True))
    spoken = held(model(input_ids=words, use_cache=True))
    with apply(FastV(2), model, 0.7):
        other = held(model(**given, use_cache=True))
    for method in METHODS:
        with apply(method, model, 0.5):
            for cache in (filled, spoken, other):
                for asked in ({"input_ids": words}, given):
                    with pytest.raises(PrunelabError, match="this cache was filled without the method") as error:
                        model(**with_cache(asked, cache))
                    assert "\n" not in str(error.value)
            model(**given)  # and the next prompt is read as ever


@every
@torch.no_grad()
def test_another_picture_behind_a_cached_prompt_is_refused_in_one_line(family):
    model = of(family)
    given = errors.prompts(family, model, (6,))
    for method in METHODS:
        with apply(method, model, 0.5):
            cache = held(model(**given, use_cache=True))
            with pytest.raises(PrunelabError, match=r"visual tokens come behind a cached|do not follow|out of order"):
                model(**with_cache(given, cache))


@every
@torch.no_grad()
def test_words_given_by_hand_behind_the_methods_own_cache(family):
    """At once, without positions: the class itself would number them by what the cache still holds."""
    model = of(family)
    for questions in ((6,), (6, 3)):
        assert errors.of_a_second_turn(model, errors.prompts(family, model, questions)) < 2e-4
        assert errors.of_a_second_turn(model, errors.prompts(family, model, questions), words=1) < 2e-4


@torch.no_grad()
def test_the_table_of_errors_has_every_column_that_a_family_has():
    rows = dict(errors.rows(("qwen3_vl", "eva02")))
    assert [list(rows[name]) for name in ("qwen3_vl", "eva02")] == [list(errors.COLUMNS), list(errors.COLUMNS[:3])]
    assert "several images" not in rows["qwen3_vl, video"]
    assert all(figure < 1e-4 for row in rows.values() for name, figure in row.items() if name != "logits")
    assert all(row["oracle"] > 0 for row in rows.values())
    assert errors.table(("eva02",)).count("\n") == 2
