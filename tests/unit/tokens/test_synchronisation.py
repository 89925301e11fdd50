"""How often Python looks at a value of the device: on a GPU every look stops the queue.

Counted are the ways in which a tensor becomes a number or a size. Methods whose budget is a matter of shapes look once
a pass, at all that has to hold of its values together, and not at all while decoding; adaptive ones once a decision.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Plan
from prunelab.common.tokens.role import TokenPruner
from prunelab.methods.ats.method import AdaptiveTokenSampling
from prunelab.methods.cls_attention.method import ClassAttention
from prunelab.methods.cls_similarity.method import ClassSimilarity
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.fastv.method import FastV
from prunelab.methods.lazyllm.method import LazyLLM
from prunelab.methods.random_drop.method import RandomDrop
from prunelab.methods.sparse_detr.method import SparseDETR
from prunelab.methods.token_transforming.method import TokenTransforming
from prunelab.methods.tome.method import ToMe
from prunelab.methods.uniform_tokens.method import UniformTokens
from prunelab.methods.zero_tprune.method import ZeroTPrune
from tests.contract.families import FAMILIES, images, output
from tests.contract.vlms import prompt, typed, vlm
from tests.unit.tokens.test_causal_lm import Attended, ids, model_of

LOOKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class Looks(TorchDispatchMode):
    """Counts them; `tolist` passes the dispatcher by."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __enter__(self) -> Any:
        self._tolist = plain = Tensor.tolist

        def tolist(x: Tensor) -> Any:
            self.count += 1
            return plain(x)

        Tensor.tolist = tolist  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> Any:
        Tensor.tolist = self._tolist  # type: ignore[method-assign]
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in LOOKS
        return func(*args, **(kwargs or {}))


def looks(run: Any, model: Any, method: TokenPruner | None, budget: Any = 0.5) -> int:
    with contextlib.nullcontext() if method is None else apply(method, model, budget), torch.no_grad(), Looks() as seen:
        run(model)
    return seen.count


@pytest.mark.parametrize(
    ("family", "method", "most"),
    [
        ("plain", ClassAttention(), 1),
        ("plain", ToMe(), 1),
        ("plain", ZeroTPrune(), 1),
        ("plain", TokenTransforming(), 1),
        ("plain", ClassSimilarity(), 1),
        ("plain", RandomDrop(), 0),
        ("plain", AdaptiveTokenSampling(), 7),  # six sites
        ("vim", ClassSimilarity(), 1),
        ("dino", SparseDETR("proposal"), 1),
    ],
    ids=str,
)
def test_one_look_a_pass(family, method, most):
    model, x = FAMILIES[family](), images(family)
    plain = looks(lambda m: output(m, x), model, None)
    assert looks(lambda m: output(m, x), model, method) - plain <= most


@pytest.mark.parametrize("method", [FastV(2), DivPrune(), UniformTokens(), RandomDrop((1, 2, 3), "input")], ids=str)
def test_reading_looks_at_most_twice_and_writing_never(method):
    """Behind a site that shortens what every layer reads the model itself looks whether a mask of ones is one."""
    model = vlm("llava")
    given = typed(model, prompt("llava", images("llava", 1)))
    counts = {}
    for words in (1, 6):
        run = {"max_new_tokens": words, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        counts[words] = [looks(lambda m, run=run: m.generate(**given, **run), model, who) for who in (None, method)]
    assert counts[1][1] - counts[1][0] <= 2
    assert counts[6][1] - counts[6][0] == counts[1][1] - counts[1][0]


def test_a_language_model_looks_once_at_its_prompt():
    model, tokens = model_of(), ids(1)
    for method, a_word in (
        (Attended(), 0),
        (LazyLLM((2, 4)), 4),
    ):  # what comes back is a number of tokens, at each site
        counts = {}
        for words in (1, 6):
            run = {"max_new_tokens": words, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            counts[words] = [looks(lambda m, run=run: m.generate(tokens, **run), model, who) for who in (None, method)]
        assert counts[1][1] - counts[1][0] <= 1
        assert counts[6][1] - counts[6][0] <= 1 + 5 * a_word


def test_what_has_to_hold_is_still_said():
    """At the end of the pass, and of decoding at the end of the block."""

    class Headless(Attended):
        def plan(self, site: Any, signals: Any, budget: Budget) -> Plan:
            return Plan(Gather(torch.arange(4).expand(len(signals.prunable), -1)))

    model = model_of()
    with torch.no_grad(), apply(Headless((2,)), model, 0.5), pytest.raises(PrunelabError, match="newest token"):
        model(ids())
    model = model_of()
    block = apply(Attended((2,)), model, 0.5)
    block.__enter__()
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
        mask = torch.ones(2, 21, dtype=torch.long)
        mask[1, -1] = 0
        model(ids()[:, :1], attention_mask=mask, past_key_values=cache)
    with pytest.raises(PrunelabError, match="pad on the left"):
        block.__exit__(None, None, None)
