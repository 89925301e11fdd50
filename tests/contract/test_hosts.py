"""Every family as people hold its models: adapted by `peft`, dispatched, offloaded, of 16 bits, under autocast, copied,
in threads, compiled, checkpointed, traced, of one configuration, and with what a pruned sequence cannot give."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from prunelab.common.apply import apply, supports
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import at_work
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.fastv.method import FastV
from prunelab.methods.random_drop.method import RandomDrop
from prunelab.methods.snapkv.method import SnapKV
from prunelab.methods.tome.method import ToMe
from prunelab.methods.zero_tprune.method import ZeroTPrune
from tests.contract import kin, references, test_vit_kin, vlms

Host = tuple[Any, dict[str, Any], tuple[tuple[Any, Any], ...]]  # a model, what it is given, methods with budgets
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
READERS = ((DivPrune(), 0.5), (FastV(2), 0.5))
TEXTS = (*vlms.VLMS, *kin.KIN)
VITS = tuple(test_vit_kin.KIN)


def host(family: str) -> Host:
    """A tiny model of a family, one input for it, and the methods that it is tried with."""
    if family in test_vit_kin.KIN:
        model = test_vit_kin.kin(family)
        pooled = getattr(model, "attn_pool", None) is not None
        second = (ZeroTPrune((1, 2)), 0.5) if pooled else (ToMe(), Budget(3, "removed"))  # neither of which draws
        methods = ((RandomDrop((1,)), 0.5), second)
        return model, {"x": references.images()}, methods
    if family in kin.KIN:
        model = kin.kin(family)
        return model, kin.asked(family, model, (6,)), READERS
    model = vlms.vlm(family)
    return model, vlms.typed(model, vlms.prompt(family, vlms.images(family, 1))), READERS


@torch.no_grad()
def answer(model: Any, given: dict[str, Any]) -> Tensor:
    """What the model says, as one tensor."""
    found = model(**given)
    out: Tensor = found if isinstance(found, Tensor) else found.logits[:, -1]
    return out


every = pytest.mark.parametrize("family", [*VITS, *TEXTS])
text = pytest.mark.parametrize("family", TEXTS)


def attributes(model: Any) -> dict[str, Any]:
    """What instances have in place of their classes' methods."""
    return {name: vars(module).get("forward") for name, module in model.named_modules()}


def offloaded(model: Any) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device="cpu")


def dispatched(model: Any) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


@every
@pytest.mark.parametrize("wrap", [offloaded, dispatched], ids=lambda f: f.__name__)
def test_accelerates_hooks_stay_around(family, wrap):
    model, given, methods = host(family)
    wanted = []
    for method, budget in methods:
        with apply(method, model, budget):
            wanted.append(answer(model, given))
    dense, held = answer(model, given), wrap(model)
    try:  # what no checkpoint holds, and weights that are read past their module, accelerate does not bring back
        alike = torch.equal(answer(held, given), dense)
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        alike = False
    if not alike:
        pytest.skip(f"accelerate itself cannot run an {wrap.__name__} model of this family")
    before = attributes(held)
    for (method, budget), want in zip(methods, wanted, strict=True):
        with apply(method, held, budget) as handle:
            assert torch.equal(answer(held, given), want), method
            assert 0 < handle.report().macs < handle.report().dense_macs
        assert attributes(held) == before


@text
@torch.no_grad()
def test_adapters_of_peft_are_part_of_the_model(family):
    from peft import LoraConfig, get_peft_model

    model, given, methods = host(family)
    plain = answer(model, given)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    dense = answer(adapted, given)
    assert not torch.allclose(dense, plain, atol=1e-3)
    for method, budget in methods:
        with apply(method, model, budget):
            inner = answer(model, given)
        with apply(method, adapted, budget) as handle:
            assert torch.equal(answer(adapted, given), inner), method
            assert handle.report().macs < handle.report().dense_macs
            adapted.generate(**given, **GREEDY)
            with adapted.disable_adapter():
                answer(adapted, given)
        with apply(method, adapted, 1.0):
            assert torch.allclose(answer(adapted, given), dense, atol=5e-5), method
    merged = adapted.merge_and_unload()
    for method, _ in methods:
        with apply(method, merged, 1.0):
            assert torch.allclose(answer(merged, given), dense, atol=1e-4), method


@every
def test_half_precision_and_autocast(family):
    """Keeping all changes no more than 16 bits do by themselves; what is left is finite."""
    model, given, methods = host(family)
    exact = answer(model, given)
    for precise in (True, False):
        if not precise:
            model = model.to(torch.bfloat16)
            given = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in given.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precise):
            dense = answer(model, given)
            noise = float((dense - exact).abs().max())
            for method, budget in methods:
                with apply(method, model, Budget(0, "removed") if isinstance(method, ToMe) else 1.0):
                    kept = answer(model, given)
                assert kept.dtype == dense.dtype and float((kept - dense).abs().max()) <= 0.05 + noise, method
                with apply(method, model, budget):
                    assert bool(torch.isfinite(answer(model, given)).all()), method


@every
def test_copies_made_inside_are_the_model_as_it_was(family):
    model, given, methods = host(family)
    dense = answer(model, given)
    for method, budget in methods:
        with apply(method, model, budget):
            pruned = answer(model, given)
            twins = [copy.deepcopy(model), *([] if family in TEXTS else [pickle.loads(pickle.dumps(model))])]
        for twin in twins:
            assert not at_work(twin) and torch.allclose(answer(twin, given), dense, atol=1e-6), method
            with apply(method, twin, budget):
                assert torch.allclose(answer(twin, given), pruned, atol=1e-5), method
    assert torch.equal(answer(model, given), dense)


@every
def test_threads_share_a_model_at_work(family):
    model, given, methods = host(family)
    method, budget = methods[-1]
    wrong: list[Any] = []
    images = [k for k, v in given.items() if v.is_floating_point()]
    inputs = [given | {k: given[k] * scale for k in images} for scale in (1.0, -0.7)]
    with apply(method, model, budget):
        alone = [answer(model, each) for each in inputs]

        def work(number: int) -> None:
            try:
                for _ in range(4):
                    if not torch.allclose(answer(model, inputs[number]), alone[number], atol=1e-5):
                        wrong.append(number)
            except Exception as error:
                wrong.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


@every
def test_compiled_models_run_uncompiled_inside(family):
    model, given, methods = host(family)
    method, budget = methods[-1]
    with apply(method, model, budget) as handle:
        pruned, kept = answer(model, given), handle.kept()
    torch._dynamo.reset()
    dense = answer(model, given)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(answer(compiled, given), dense, atol=1e-5)
    for held in (compiled, model):
        with apply(method, held, budget) as handle:
            assert torch.allclose(answer(compiled, given), pruned, atol=1e-5)
            assert len(handle.kept()) == len(kept) and handle.report().samples
    assert torch.allclose(answer(compiled, given), dense, atol=1e-5)


@every
def test_what_reads_layers_again_is_refused_in_one_line(family):
    model, given, methods = host(family)
    model.train()
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    else:
        model.set_grad_checkpointing(True)
    for method, budget in methods:
        with apply(method, model, budget), pytest.raises(PrunelabError, match="gradient checkpointing") as error:
            model(**given)
        assert "\n" not in str(error.value)


@every
@torch.no_grad()
def test_traces_and_exports_are_refused_in_one_line(family):
    model, given, methods = host(family)
    method, budget = methods[-1]
    with apply(method, model, budget):
        for trace in (
            lambda: torch.jit.trace(model, example_kwarg_inputs=given, strict=False),
            lambda: torch.export.export(model, (), given),
        ):
            with pytest.raises(PrunelabError, match="cannot be traced or exported"):
                trace()


@text
def test_models_of_one_configuration_share_no_method(family):
    model, given, methods = host(family)
    other = type(model)(model.config).eval()
    other.generation_config.pad_token_id = 0
    assert other.config is model.config
    dense = answer(other, given)
    for method, budget in methods:
        with apply(method, model, budget):
            pruned = answer(model, given)
            assert torch.equal(answer(other, given), dense), method
            with apply(RandomDrop((0,), "packed"), other, 0.7):
                assert answer(other, given).shape == dense.shape
                assert torch.equal(answer(model, given), pruned), method


@text
@torch.no_grad()
def test_what_a_shorter_sequence_cannot_give_is_refused(family):
    model, given, _ = host(family)
    labels = given["input_ids"].clone()
    for method, budget in READERS:
        with apply(method, model, budget):
            with pytest.raises(PrunelabError, match="labels"):
                model(**given, labels=labels)
            with pytest.raises(PrunelabError, match="growing cache"):
                model.generate(**given, **GREEDY, cache_implementation="static")
            with pytest.raises(PrunelabError, match="without prefill_chunk_size"):
                model.generate(**given, **GREEDY, prefill_chunk_size=8)
    with apply(FastV(2), model, 0.5), pytest.raises(PrunelabError, match="leave output_attentions out"):
        model(**given, output_attentions=True)


@text
@torch.no_grad()
def test_caches_are_pruned_or_the_family_is_refused_by_name(family):
    model, given, _ = host(family)
    reason = supports(SnapKV(window_size=2), model)
    if not reason:
        assert type(model).__name__ in str(reason) and "\n" not in str(reason)
        with pytest.raises(PrunelabError, match=type(model).__name__), apply(SnapKV(window_size=2), model, 0.5):
            pass
        return
    plain = model.generate(**given, **GREEDY)
    with apply(SnapKV(window_size=2), model, 1.0):
        assert torch.equal(model.generate(**given, **GREEDY), plain)
    with apply(SnapKV(window_size=2), model, 0.5) as handle:
        model.generate(**given, **GREEDY)
        length = given["input_ids"].shape[1]
        assert handle.report().entries == (length // 2 + 3.0,) * model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("family", TEXTS)
@torch.no_grad()
def test_a_report_counts_the_input_that_was_read(family):
    """MACs of what passed, by its own text and images, whose tokens the counts of the layers tell as well."""
    model, _, _ = host(family)
    longer = {}
    for words in (6, 30):
        asked = _asked(family, model, words)
        whole = torch.as_tensor(asked["input_ids"].shape[1])
        with apply(FastV(2), model, 0.5) as handle:
            model(**asked)
            report = handle.report()
            assert report == handle.report(handle.adapter.shaped(asked))
        assert report.tokens[0] == (whole, whole) and not report.standard
        longer[words] = report
    assert longer[30].macs > longer[6].macs and longer[30].dense_macs > longer[6].dense_macs
    with apply(FastV(2), model, 0.5) as handle:
        for words in (6, 30):
            model(**_asked(family, model, words))
        both = handle.report()
    assert longer[6].macs < both.macs < longer[30].macs
    twice = _asked(family, model, 6, 2)
    with apply(FastV(2), model, 0.5) as handle:
        model(**twice)
        assert handle.report().macs == longer[6].macs


def _asked(family: str, model: Any, words: int, samples: int = 1) -> dict[str, Any]:
    if family in kin.KIN:
        return kin.asked(family, model, (words,) * samples)
    return vlms.typed(model, vlms.prompt(family, vlms.images(family, samples), text=words))
