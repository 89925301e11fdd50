"""A forward pass keeps its state to itself: threads, copies and saved models share none of it."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.fastervlm.method import FasterVLM
from prunelab.methods.fastv.method import FastV
from prunelab.methods.tome.method import ToMe
from prunelab.methods.zero_tprune.method import ZeroTPrune
from tests.contract.references import images, vit
from tests.contract.vlms import images as photos
from tests.contract.vlms import prompt, vlm

MERGES = (ToMe(), Budget(1, "removed"))
RANKS = (ZeroTPrune((1, 2, 3)), Budget(0.5))


@pytest.mark.parametrize(
    ("family", "method"),
    [("vit", RANKS[0]), ("llava", FastV(2)), ("llava", FasterVLM()), ("llava", DivPrune())],
    ids=str,
)
def test_threads_get_what_each_gets_alone(family, method):
    model = vit() if family == "vit" else vlm(family)
    inputs = [images(2) * (1 + k) if family == "vit" else prompt(family, photos(family, 2, seed=k)) for k in range(4)]
    wrong: list[Any] = []

    def run(x: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(x) if family == "vit" else model(**x).logits

    with apply(method, model, RANKS[1]) as handle:
        alone = [run(x) for x in inputs]
        single = [n / 8 for n in handle.application.trace.mlp]

        def work(k: int) -> None:
            try:
                wrong.extend(k for _ in range(10) if not torch.equal(run(inputs[k]), alone[k]))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [n / handle.application.trace.samples for n in handle.application.trace.mlp] == single
    assert not wrong


@pytest.mark.parametrize(("method", "budget"), [MERGES, RANKS], ids=lambda v: str(v))
def test_a_copy_made_inside_is_the_model_as_it_was(method, budget):
    model, x = vit(), images()
    with torch.no_grad():
        dense = model(x)
        with apply(method, model, budget):
            pruned, twin, saved = model(x), copy.deepcopy(model), io.BytesIO()
            torch.save(model, saved)
            for p in twin.parameters():
                p.add_(0.01)  # its own weights, not the model's
            assert torch.equal(model(x), pruned)
            assert not torch.equal(twin(x), dense)
            for p in twin.parameters():
                p.sub_(0.01)
        assert torch.allclose(twin(x), dense, atol=1e-4) and not torch.allclose(pruned, dense, atol=1e-4)
        saved.seek(0)
        assert torch.equal(torch.load(saved, weights_only=False)(x), dense)


def test_a_copy_of_a_language_model_is_the_model_as_it_was():
    model = vlm("llava")
    given = prompt("llava", photos("llava", 1))
    with torch.no_grad():
        dense = model(**given).logits
        for method in (DivPrune(), FastV(2)):
            with apply(method, model, 0.5):
                twin = copy.deepcopy(model)
            twin.set_attn_implementation("sdpa")
            assert torch.equal(twin(**given).logits, dense)


def test_gradient_checkpointing_is_refused():
    model = vit()
    model.set_grad_checkpointing(True)
    with apply(MERGES[0], model, MERGES[1]), pytest.raises(PrunelabError, match="gradient checkpointing"):
        model(images())
    reader = vlm("llava").train()
    reader.gradient_checkpointing_enable()
    with apply(FastV(2), reader, 0.5), pytest.raises(PrunelabError, match="gradient checkpointing"):
        reader(**prompt("llava", photos("llava", 1)))
    with torch.no_grad(), apply(FastV(2), reader, 0.5):
        reader(**prompt("llava", photos("llava", 1)))


def test_a_wrapper_of_the_instance_comes_back():
    model, calls = vlm("llava"), []
    encode = model.model.get_image_features

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return encode(*args, **kwargs)

    model.model.get_image_features = wrapper
    with torch.no_grad(), apply(DivPrune(), model, 0.5):
        model(**prompt("llava", photos("llava", 1)))
    assert vars(model.model)["get_image_features"] is wrapper and calls
