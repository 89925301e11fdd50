"""No method and no adapter mixes devices: each runs on a model, inputs and services said to be on a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from prunelab.common.apply import apply, supports
from prunelab.common.constrained import smc
from prunelab.common.constrained.constraints import Regular
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.selection import keep_first
from prunelab.common.data_selection import engine as selection
from prunelab.common.measures.constrained import Prompt, Unconstrained
from prunelab.common.ranking.attribution import Attribution, Explained, alike
from prunelab.common.ranking.sentences import Passage, SentenceRanker
from prunelab.common.speculative.reader import info
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.training import engine as training
from prunelab.common.training.recipe import Recipe
from prunelab.common.weights import prune
from prunelab.common.weights.role import WeightPruner
from prunelab.methods.llm_pruner.method import LLMPruner
from prunelab.methods.mc_moe.method import MixtureCompressor
from prunelab.methods.selective_context.method import SelectiveContext, self_information
from prunelab.methods.sparsegpt.method import SparseGPT
from tests.contract import caches_references, families, references, test_data_selectors, test_weight_pruners, vlms
from tests.contract.devices import THERE, Labels, Mixed, moved, pretended
from tests.contract.references import language_model, token_ids
from tests.contract.selector_references import SELECTORS
from tests.contract.test_other_roles import TEXT
from tests.contract.test_token_pruners import FIRST, PAIRS
from tests.contract.training_references import REFERENCES as TRAINERS
from tests.contract.weights_references import RoundedMagnitude
from tests.unit.constrained.test_constraints import VOCABULARY, vocabulary
from tests.unit.methods.test_selective_context import Letters

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
EXTRA = [
    *(m for m, _ in FIRST if m.name.startswith("reference")),
    *(references.ReceivedCache(), caches_references.NewestCache(), caches_references.WeakestExperts()),
    *(references.BigramDrafts(), references.Rejection(), references.LengthRanker()),
    *(*SELECTORS, *TRAINERS),
    *(LLMPruner(mode="channel"), MixtureCompressor(group=8, worth="hessian")),  # whose other ways are of their own
]
OTHERS = [cls() for cls in registry.load().values() if not issubclass(cls, WeightPruner)]
METHODS = [*OTHERS, *test_weight_pruners.METHODS, *EXTRA]


def tokens(labels: Labels, method: Any) -> None:
    family = next((f for m, f in FIRST if type(m) is type(method)), None)
    if family is None:
        pytest.skip("no family here gives what it reads")
    on_a_family(labels, method, family)


def on_a_family(labels: Labels, method: TokenPruner, family: str) -> None:
    model, given = moved(labels, families.FAMILIES[family]()), images(labels, family)
    torch.manual_seed(1)
    parts = moved(labels, method.build(adapter_for(model).info))
    with apply(method, model, 0.5, parts=None if parts is None else parts.eval(), services=families.SERVICES) as handle:
        out = model(**given) if isinstance(given, Mapping) else model(given)
        if hasattr(model, "generate") and family in vlms.VLMS:
            model.generate(**given, max_new_tokens=3, do_sample=False)
        assert all(kept.device == THERE for _, kept in handle.kept())
        handle.report()
    assert out is not None


def images(labels: Labels, family: str) -> Any:
    pixels = families.images(family, 2)
    if family == "causal_lm":
        return moved(labels, token_ids(2, 20))
    if family in vlms.VLMS:
        return moved(labels, vlms.typed(vlms.vlm(family), vlms.prompt(family, pixels)))
    return moved(labels, pixels)


def caches(labels: Labels, method: Any) -> None:
    model = moved(labels, language_model(max_position_embeddings=256, num_hidden_layers=4))
    draft = moved(labels, language_model(max_position_embeddings=256, num_hidden_layers=2, seed=1))
    services = dict.fromkeys(method.services, draft)
    ids = moved(labels, token_ids(2, 80).clamp_min(3))
    mask = moved(labels, torch.ones(2, 80, dtype=torch.long))
    mask[0, :9] = 0
    for given in ({}, {"attention_mask": mask}):
        with apply(method, model, 0.5, services=services) as handle:
            model.generate(ids, **given, **GREEDY)
            handle.report()


def drafts(labels: Labels, method: Any) -> None:
    model = moved(labels, language_model(max_position_embeddings=128))
    known = {
        "draft": language_model(num_hidden_layers=1, seed=1, max_position_embeddings=128),
        "store": token_ids(9, 30).flatten(),
    }
    services = {name: moved(labels, known[name]) if name == "draft" else known[name] for name in method.services}
    torch.manual_seed(0)
    parts = moved(labels, method.build(info(model)))
    ids = moved(labels, token_ids(1, 8).repeat(1, 4))
    with apply(method, model, Budget(6, "count"), services=services, parts=parts) as handle:
        for options in (GREEDY, GREEDY | {"do_sample": True}):
            model.generate(ids, **options)
        handle.report()


def experts(labels: Labels, method: Any) -> None:
    model = moved(labels, language_model("olmoe"))
    model.set_experts_implementation("eager")
    with apply(method, model, 0.6) as handle:
        model.generate(moved(labels, token_ids(2)), **GREEDY)
        handle.report()


def weights(labels: Labels, method: Any) -> None:
    family = test_weight_pruners.families(method)[0]
    model = moved(labels, test_weight_pruners.build(family))
    base = moved(labels, test_weight_pruners.build(family, seed=5)) if method.needs_base else None
    given = test_weight_pruners.data(method)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the kernels of a device are not here
    prune(method, model, test_weight_pruners.half(method), base=base, progress=False, **given)


def selectors(labels: Labels, method: Any) -> None:
    made, method = test_data_selectors, test_data_selectors.small(method)
    services = {name: moved(labels, given) for name, given in made.services(method).items()}
    budget = made.amounts(method, 0.5) if method.chooses else Budget(1.0)
    if method.when == "each_batch":
        model = moved(labels, language_model()).train()
        with selection.applied(method, model, budget, services=services):
            model(**moved(labels, made.batch())).loss.backward()
        return
    options: dict[str, Any] = {"services": services, "batch": 5}
    if method.requires() == {"logits"}:
        rng = torch.Generator().manual_seed(1)
        data = [{"x": torch.randn(5, generator=rng), "labels": torch.tensor(i % 3)} for i in range(18)]
        model = moved(labels, made.classifier())
        selection.select(method, data, budget, model=model, forward=lambda m, b: m(b["x"]), **options)
    elif method.requires() - {"text"} or "tokens" in method.chooses:
        options |= {"model": moved(labels, language_model()), "tokenizer": made.tokenizer}
        if "gradients" in method.requires():
            options["target"] = made.TEXTS[:3]
        selection.select(method, made.corpus(method), budget, **options)
    else:
        selection.select(method, made.LONG, budget, target=made.LONG[:3], **options)


def trained(labels: Labels, method: Any) -> None:
    model = moved(labels, language_model())
    services = {name: moved(labels, language_model()) for name in method.services}
    recipe = Recipe(steps=3, batch=4, rate=1e-2, check_every=3, save_every=3)
    training.train(method, model, Budget(0.5), token_ids(16), recipe, services=services, progress=False)


def sampled(labels: Labels, method: Any) -> None:
    model, rng = moved(labels, language_model(vocab_size=len(VOCABULARY))), torch.Generator().manual_seed(0)
    constraint = Regular.of("(ab)*0?", vocabulary(), end=0)
    for sampler in (method, Unconstrained()):
        smc.run(
            sampler,
            Prompt(model, [1, 2]),
            constraint,
            Budget(len(VOCABULARY), "count"),
            particles=3,
            max_tokens=4,
            rng=rng,
        )


def ranked(labels: Labels, method: Any) -> None:
    if isinstance(method, SelectiveContext):
        model = moved(labels, language_model(vocab_size=300, max_position_embeddings=256))
        services = {"information": self_information(model, Letters())}
        replace(method, level="token").compress(" ".join(TEXT), Budget(0.5), services)
    elif isinstance(method, SentenceRanker):
        method.plan(Passage(TEXT), Budget(0.5))
    elif isinstance(method, Attribution):
        model = Explained(moved(labels, language_model()))
        known = {"model": model, "next_token_logits": model.next_token_logits, "replace": alike([0] * 61)}
        method.plan(moved(labels, token_ids(1, 8)[0]), Budget(0.5), {name: known[name] for name in method.services})
    else:
        pytest.skip("ranks units of a kind of its own, as its own tests do")


RUNS: dict[str, Callable[[Labels, Any], None]] = {
    "token_pruner": tokens,
    "cache_pruner": caches,
    "draft_decoder": drafts,
    "expert_pruner": experts,
    "weight_pruner": weights,
    "data_selector": selectors,
    "training_method": trained,
    "constrained_sampler": sampled,
    "ranker": ranked,
}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.role}-{m.name}")
def test_a_method_keeps_to_the_device(method):
    with pretended() as labels:
        RUNS[method.role](labels, method)


def table(names: Sequence[str] = ()) -> Iterator[str]:
    """All methods, or those named, as Markdown: how a run on the device went."""
    yield from ("| method | role | looks it waits for |", "|---|---|---|")
    counts: Counter[str] = Counter()
    for method in METHODS:
        if names and method.name not in names:
            continue
        with pretended() as labels:
            try:
                RUNS[method.role](labels, method)
                own = any(" in methods/" in what for what in labels.looks)
                kind = "looks of their own" if own else "looks of the engine alone" if labels.looks else "no look"
                told = listed(labels) or "none"
            except pytest.skip.Exception as skipped:
                kind, told = "not tried", f"not tried: {skipped}"
            except Mixed as mixed:
                kind, told = "mixed", f"mixes devices: {mixed}"
        counts[kind] += 1
        yield f"| {method.name} | {method.role} | {told} |"
    yield ""
    yield ", ".join(f"{kind}: {count}" for kind, count in sorted(counts.items()))


def listed(labels: Labels) -> str:
    return ", ".join(f"{what} ({count})" for what, count in labels.looks.most_common())


def test_the_table_tells_pure_methods_from_those_that_look(monkeypatch):
    def looks(labels: Labels, method: Any) -> None:
        labels.looks.update({"value in common/x:y": 2} if method.name == "wanda" else {})

    def mixes(labels: Labels, method: Any) -> None:
        moved(labels, torch.ones(2)) + torch.ones(2)

    monkeypatch.setitem(RUNS, "weight_pruner", looks)
    monkeypatch.setitem(RUNS, "token_pruner", mixes)
    lines = list(table(["wanda", "magnitude", "fastv"]))
    assert "| wanda | weight_pruner | value in common/x:y (2) |" in lines
    assert "| magnitude | weight_pruner | none |" in lines
    assert any(line.startswith("| fastv | token_pruner | mixes devices: aten.add") for line in lines)
    assert lines[-1] == "looks of the engine alone: 1, mixed: 1, no look: 1"


def test_looks_are_counted_where_our_code_looks():
    with pretended() as labels:
        order, counts = moved(labels, (torch.tensor([[2, 0, 1]]), torch.tensor([2])))
        assert bool(counts.sum() == 2) and counts.tolist() == [2]  # a test's own are none
        assert not labels.looks
        keep_first(order, counts)
        assert labels.looks == {"values in common/core/selection:keep_first": 1}


REST = [f for f in families.FAMILIES if f not in {f for _, f in FIRST}]


@pytest.mark.parametrize("family", REST)
def test_an_adapter_keeps_to_the_device(family):
    """Of families that are no method's first."""
    with pretended() as labels:
        on_a_family(labels, next(m for m, f in PAIRS if f == family), family)


@pytest.mark.parametrize("family", families.WEIGHT_FAMILIES)
def test_weights_of_a_family_keep_to_the_device(family):
    ran = 0
    for method in (SparseGPT(), RoundedMagnitude()):
        model = families.WEIGHT_FAMILIES[family]()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        if supports(method, model):
            with pretended() as labels:
                prune(method, moved(labels, model), 0.5, families.calibration(family), progress=False)
            ran += 1
    assert ran


def test_every_method_and_family_was_tried():
    assert {type(m) for m in METHODS} >= set(registry.load().values())
    assert {f for _, f in FIRST} | set(REST) == set(families.FAMILIES)


def test_what_would_fail_on_a_device_fails():
    with pretended() as labels:
        x = moved(labels, torch.randn(3, 4))
        own = torch.arange(3, device=x.device)
        for wrong in (
            lambda: x.gather(0, torch.arange(3).unsqueeze(1)),
            lambda: x[torch.arange(3)],
            lambda: x + torch.ones(4),
            lambda: torch.stack([x[0], torch.zeros(4)]),
            lambda: x + x.cpu(),
            lambda: torch.where(torch.ones(4) > 0, x, 0.0),
            lambda: torch.randn(3, device=x.device, generator=torch.Generator()),
            lambda: x.numpy(),
        ):
            with pytest.raises(Mixed):
                wrong()
        for right in (
            x[own], x + 1.0, x + torch.tensor(1.0), x.masked_fill(x > 0, 2.0), torch.tensor([1.0], device=x.device) + x,
            torch.ones(4).to(x) + x, x.new_zeros(4) + x, x.softmax(-1).gather(0, own.unsqueeze(1)),
        ):  # fmt: skip
            assert right.device == THERE
        assert x.cpu().numpy().shape == (3, 4) and (x.cpu() + torch.ones(4)).device.type == "cpu"
        x.requires_grad_().square().sum().backward()
        assert x.grad.device == THERE
