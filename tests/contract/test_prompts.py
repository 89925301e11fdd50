"""Every method that prunes visual tokens, on prompts and models that nobody planned for: it is right, or it says in one
line what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.role import TokenPruner
from tests.contract.families import SERVICES, usable
from tests.contract.test_token_pruners import named
from tests.contract.vlms import IMAGE, film, ids, images, prompt, typed, vlm

READERS = ("llava", "llava_next", "llava_onevision")
PRUNERS = [c() for c in registry.load().values() if issubclass(c, TokenPruner)]
VISUAL = [m for m in PRUNERS if any(usable(m, family) for family in READERS)]
model = cache(vlm)
deep = cache(partial(vlm, tower=12, num_hidden_layers=16))  # as deep as any method asks for
shallow = cache(partial(vlm, tower=2, num_hidden_layers=1))


def _reader(method: TokenPruner) -> str:
    """The first family that gives the method what it reads, large images before others."""
    return next(f for f in ("llava_next", "llava_onevision", "llava") if usable(method, f))


def _text_alone(family: str) -> dict[str, Any]:
    return ids([[("text", 9)]])


def _placeholders_alone(family: str) -> dict[str, Any]:
    given = prompt(family, images(family, 1))
    row = given["input_ids"][0]
    tokens = row[row == IMAGE].unsqueeze(0)
    return given | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _one_and_two(family: str) -> dict[str, Any]:
    """Two samples, of one image and of two, with words of other numbers behind them."""
    given = prompt(family, images(family, 3))
    tokens = int((given["input_ids"][0] == IMAGE).sum())
    first = [("text", 2), (IMAGE, tokens), ("text", 5)]
    return given | ids([first, [("text", 1), (IMAGE, tokens), ("text", 3), (IMAGE, tokens), ("text", 1)]])


def _wide_and_tall(family: str) -> dict[str, Any]:
    """Large images of unlike crops in one batch, of sides that crops do not divide."""
    if family == "llava":
        return prompt(family, images(family, 2))
    side = images(family, 1).shape[-1]
    sizes = ((side - 5, 2 * side + 1), (2 * side - 3, side // 2))
    pixels = torch.randn(2, 3, 3, side, side, generator=torch.Generator().manual_seed(4))
    counts = _tokens(family, sizes)
    given = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    return given | ids([[("text", 3), (IMAGE, n), ("text", 4)] for n in counts])


def _tokens(family: str, sizes: tuple[tuple[int, int], ...]) -> list[int]:
    """What the model itself makes of images of these sizes."""
    net, side = model(family), images(family, 1).shape[-1]
    pixels = torch.zeros(len(sizes), 3, 3, side, side)
    with torch.no_grad():
        seen = net.model.get_image_features(pixels, torch.tensor(sizes), return_dict=True).pooler_output
    return [len(image) for image in seen]


def _a_video(family: str) -> dict[str, Any]:
    return film("llava_onevision", words=(4, 2))


PROMPTS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "text alone": _text_alone,
    "placeholders alone": _placeholders_alone,
    "one image and two": _one_and_two,
    "wide and tall": _wide_and_tall,
    "a video": _a_video,
}
each = pytest.mark.parametrize("method", VISUAL, ids=named)


@torch.no_grad()
def reads(method: TokenPruner, net: Any, given: Mapping[str, Any], budget: Budget) -> str:
    """What the method says, '' where it finds what comes next."""
    torch.manual_seed(0)
    parts = method.build(adapter_for(net).info)
    try:
        with apply(method, net, budget, parts=None if parts is None else parts.eval(), services=SERVICES):
            logits = net(**given, use_cache=False).logits[:, -1]
    except PrunelabError as error:
        said = str(error)
    else:
        assert torch.isfinite(logits).all()
        return ""
    assert "\n" not in said
    assert 10 < len(said) < 400
    return said


@each
@pytest.mark.parametrize("what", PROMPTS)
def test_a_prompt_is_read_or_refused(method, what):
    family = "llava_onevision" if what == "a video" else _reader(method)
    net = deep(family)
    said = reads(method, net, typed(net, PROMPTS[what](family)), Budget(0.5))
    if what == "text alone":
        assert said


@each
@pytest.mark.parametrize("budget", ["0count", "1count"])
def test_the_least_budgets_are_met_or_refused(method, budget):
    family = _reader(method)
    net = deep(family)
    reads(method, net, prompt(family, images(family, 2)), Budget.parse(budget))


@each
def test_a_model_that_is_too_shallow_is_refused_by_its_layers_or_read(method):
    family = _reader(method)
    net = shallow(family)
    reads(method, net, prompt(family, images(family, 2)), Budget(0.5))
