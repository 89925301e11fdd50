"""How the crops of a large image lie, as a method is told, and newlines of a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo, Plan, Site, Where
from prunelab.common.tokens.adapters.vlm_prompt import newline_order
from prunelab.common.tokens.role import TokenPruner
from tests.contract.vlms import IMAGE, film, ids, images, prompt, typed, vlm


@dataclass(frozen=True)
class Told(TokenPruner):
    """Keeps everything and remembers what it was told of each group of images."""

    where: Where = "projected"

    name: ClassVar[str] = "told"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, self.where)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def plan(self, site: Site, signals: Any, budget: Budget) -> Plan:
        found = signals.mosaic, signals.order, len(signals.prunable)
        signals.memory.setdefault("told", []).append(found)
        return Plan(signals.keep(mask=signals.prunable), positions="renumber")


@pytest.mark.parametrize("where", ["projected", "encoded"])
@torch.no_grad()
def test_crops_that_lie_differently_are_decided_apart(where):
    """A wide and a tall picture have as many crops and as many tokens."""
    model, pixels = vlm("llava_next"), torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sizes, lengths = torch.tensor([[32, 64], [64, 32]]), (16 + 4 * 9, 16 + 8 * 5)
    given = ids([[("text", 3), (IMAGE, n), ("text", 4)] for n in lengths])
    with apply(Told(where), model, 1.0) as handle:
        model(**given, pixel_values=pixels, image_sizes=sizes)
    (wide, first, _), (tall, second, _) = handle.memory["told"]
    assert (wide, tall) == ((1, 2), (2, 1))
    assert first[16:25].tolist() == [16, 17, 18, 19, 32, 33, 34, 35, -1]
    assert second[16:21].tolist() == [16, 17, 18, 19, -1] and second[-5:-1].tolist() == [44, 45, 46, 47]


@torch.no_grad()
def test_what_has_no_crops_is_no_mosaic():
    for family in ("llava", "qwen2_5_vl", "llava_next"):
        model = vlm(family)
        with apply(Told(), model, 1.0) as handle:
            model(**typed(model, prompt(family, images(family, 2))))
        ((mosaic, order, count),) = handle.memory["told"]
        assert mosaic == ((2, 2) if family == "llava_next" else None) and count == 2
        assert order.max() == (79 if family == "llava_next" else 15)
    model = vlm("llava_onevision")
    with apply(Told(), model, 1.0) as handle:
        model(**film("llava_onevision"))
    assert handle.memory["told"][0][:2] == (None, None), "pooled frames are mixtures"


def test_tokens_without_a_place_have_no_newline_behind():
    layout = torch.tensor([[-1, -1, -1], [-1, -1, -1], [1, 0, 0], [1, 0, 3], [1, 2, 1]])
    assert newline_order(5, layout, "row", torch.device("cpu")).tolist() == [0, 1, 2, 3, -1, 4, -1]
