"""Pruning methods behind one interface, with every number a paper reports beside its reproduction.

    with prunelab.apply("divprune", model, 0.1) as handle:       # tokens, key-value caches, drafts
        model.generate(**inputs)
    print(handle.report())

    plan = prunelab.prune("wanda", model, "2:4", token_ids)      # weights
    prunelab.summarise("lexrank", text, "3count")                # sentences

`list_methods`, `describe` and `supports` tell what there is and what runs on a model; classes are at hand for those who
want them, and the names that authors of methods need are below. Importing this module imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from prunelab.common.apply import Refusal
    from prunelab.common.constrained.role import ConstrainedSampler
    from prunelab.common.core.budget import Budget
    from prunelab.common.core.errors import PrunelabError
    from prunelab.common.core.index import Entry
    from prunelab.common.core.method import Method
    from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Report, Site
    from prunelab.common.core.signals import Signals
    from prunelab.common.data_selection.role import DataSelector
    from prunelab.common.kv_cache.role import CachePruner, CacheSignals
    from prunelab.common.ranking.role import Ranker
    from prunelab.common.ranking.sentences import Passage, SentenceRanker, Summary
    from prunelab.common.speculative.role import DraftDecoder
    from prunelab.common.tokens.role import TokenPruner
    from prunelab.common.training.method import TrainingMethod
    from prunelab.common.weights.calibration import windows
    from prunelab.common.weights.io import load_pruned, save_pruned
    from prunelab.common.weights.plan import WeightPlan
    from prunelab.common.weights.role import WeightPruner
    from prunelab.common.weights.targets import Decision, WeightSignals

__all__ = [
    "Budget",
    "CachePruner",
    "CacheSignals",
    "ConstrainedSampler",
    "DataSelector",
    "Decision",
    "DraftDecoder",
    "Entry",
    "Gather",
    "Method",
    "Mix",
    "ModelInfo",
    "Passage",
    "Plan",
    "PrunelabError",
    "Ranker",
    "Refusal",
    "Report",
    "SentenceRanker",
    "Signals",
    "Site",
    "Summary",
    "TokenPruner",
    "TrainingMethod",
    "WeightPlan",
    "WeightPruner",
    "WeightSignals",
    "apply",
    "create",
    "describe",
    "list_methods",
    "load_pruned",
    "prune",
    "save_pruned",
    "summarise",
    "supports",
    "windows",
]

_HOMES = {  # module below prunelab.common -> names that are imported from it when they are first asked for
    "apply": ("Refusal",),
    "constrained.role": ("ConstrainedSampler",),
    "core.budget": ("Budget",),
    "core.errors": ("PrunelabError",),
    "core.index": ("Entry",),
    "core.method": ("Method",),
    "core.plan": ("Gather", "Mix", "ModelInfo", "Plan", "Report", "Site"),
    "core.signals": ("Signals",),
    "data_selection.role": ("DataSelector",),
    "kv_cache.role": ("CachePruner", "CacheSignals"),
    "ranking.role": ("Ranker",),
    "ranking.sentences": ("Passage", "SentenceRanker", "Summary"),
    "speculative.role": ("DraftDecoder",),
    "tokens.role": ("TokenPruner",),
    "training.method": ("TrainingMethod",),
    "weights.calibration": ("windows",),
    "weights.io": ("load_pruned", "save_pruned"),
    "weights.plan": ("WeightPlan",),
    "weights.role": ("WeightPruner",),
    "weights.targets": ("Decision", "WeightSignals"),
}


def __getattr__(name: str) -> Any:
    """A name of `_HOMES`, imported when it is first asked for (PEP 562)."""
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(f"prunelab.common.{home}"), name)
            return value
    raise AttributeError(f"module 'prunelab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# -- what there is ---------------------------------------------------------------------------------------------------


def list_methods(pattern: str = "*", *, role: str = "", family: str = "") -> list[str]:
    """Names of the methods that match a shell pattern such as `fast*`; imports none of them.

    role: only this one, such as `token_pruner`. family: only methods of papers about this one, such as `vlm`.
    Raises PrunelabError for a role or family that no method has.
    """
    from prunelab.common.experiments import listing

    return [entry.name for entry in listing.methods(pattern, role=role, family=family)]


def describe(name: str) -> Entry:
    """What a method is: its role, its docstring and its options with their defaults. Imports nothing of it."""
    from prunelab.common.core import registry

    return registry.entry(name)


def create(name: str, **options: Any) -> Method:
    """A method by name, with options as keywords; the class itself is `prunelab.methods.<folder>.method.<Class>`."""
    from prunelab.common.core import registry

    return registry.create(name, **options)


def supports(method: str | Method, model: nn.Module, **options: Any) -> Literal[True] | Refusal:
    """Whether a method runs on a model: True, or why not in one line, which is false in a condition."""
    from prunelab.common.apply import supports

    return supports(_method(method, options), model)


# -- what is done with it --------------------------------------------------------------------------------------------


def apply(
    method: str | Method,
    model: nn.Module,
    budget: Budget | float | str | Sequence[float],
    *,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int | None = None,
    **options: Any,
) -> AbstractContextManager[Any]:
    """Let a method work on a model inside a `with` block, whose handle tells what it cost: `handle.report()`.

    Parameters
    ----------
    method : a name of `list_methods()`, with its options as keywords, or an instance of a method.
    model : any model that the method `supports`; it leaves the block as it came.
    budget : what may stay, as a share (`0.1`), one amount a site (`(0.9, 0.8, 0.7)`), or as text (`"64count"`).
    services : second models, by the names that the method gives them.
    parts : the method's learned parts, where it has some.
    seed : of whatever is drawn, 0 where none is given; a method whose options have one of that name gets it, too.

    Raises PrunelabError, before any work, where method, model and budget do not go together.
    """
    from prunelab.common.apply import apply

    chosen = _method(method, options if seed is None else _seeded(method, options, seed))
    return apply(chosen, model, budget, services=services, parts=parts, seed=seed or 0)


def prune(
    method: str | Method,
    model: nn.Module,
    budget: Budget | float | str | Sequence[float],
    calibration: Tensor | Sequence[Tensor] | None = None,
    *,
    base: nn.Module | None = None,
    objective: Any = None,
    rounds: Any = None,
    tune: Any = None,
    learned: Any = None,
    seed: int | None = None,
    folder: Path | str | None = None,
    progress: bool = True,
    **options: Any,
) -> WeightPlan:
    """Prune a model's weights in place, block by block, and return the plan, which repeats it elsewhere.

    Parameters
    ----------
    method : the name of a weight pruner, with its options as keywords, or an instance of one.
    budget : the share that stays (`0.5`), or a pattern (`"2:4"`).
    calibration : token ids [samples, length], or a list of vectors of any lengths; see `windows`.
    base : the model before fine-tuning, for methods that prune what fine-tuning changed.
    objective, rounds, tune, learned : what losses are of, in how many rounds, what trains the model after each, and
        what the method learned before; see `prunelab.common.weights.prune`.
    seed : of whatever is drawn, 0 where none is given; a method whose options have one of that name gets it, too.
    folder : where a run keeps what it needs to go on after a crash.

    Raises PrunelabError, before any work, where method, model, budget and calibration set do not go together.
    """
    from prunelab.common.core.budget import Budget
    from prunelab.common.weights.pruning import prune

    chosen = _method(method, options if seed is None else _seeded(method, options, seed))
    return prune(
        chosen, model, Budget.of(budget), calibration, base=base, objective=objective, rounds=rounds, tune=tune,
        learned=learned, seed=seed or 0, folder=folder, progress=progress,
    )  # fmt: skip


def summarise(
    method: str | Method,
    text: str | Sequence[str] | Passage,
    budget: Budget | float | str,
    **options: Any,
) -> Summary:
    """The sentences that a ranker keeps of a text, in their order; `tied` where scores did not decide.

    text: as one string, which is split into sentences, as a list of sentences, or a `Passage` of several documents.
    budget: `"3count"`, `"100words"`, `"665bytes"` or a share of the sentences.
    """
    from prunelab.common.core.budget import Budget
    from prunelab.common.core.errors import PrunelabError
    from prunelab.common.ranking import text as texts
    from prunelab.common.ranking.sentences import SentenceRanker

    chosen = _method(method, options)
    if not isinstance(chosen, SentenceRanker):
        raise PrunelabError(f"{chosen.name} is a {chosen.role} and ranks no sentences; use lexrank or another ranker")
    return chosen.summarise(texts.sentences(text) if isinstance(text, str) else text, Budget.of(budget))


def _seeded(method: str | Method, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The options with the seed among them, where the method has one."""
    named = isinstance(method, str) and any(option.name == "seed" for option in describe(method).options)
    return {**options, "seed": seed} if named else dict(options)


def _method(method: str | Method, options: Mapping[str, Any]) -> Method:
    if isinstance(method, str):
        return create(method, **options)
    from prunelab.common.core.errors import PrunelabError
    from prunelab.common.core.method import Method

    if isinstance(method, type) and issubclass(method, Method):
        return method(**options)
    if not isinstance(method, Method):
        raise PrunelabError(f"{method!r} is no method; give a name of prunelab.list_methods(), or an instance")
    if options:
        raise PrunelabError(f"{method!r} has its options already; leave {', '.join(options)} out, or name the method")
    return method
