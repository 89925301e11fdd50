"""Apply a method to a model for the length of a `with` block, and report what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import bare, plain
from prunelab.common.core.method import Method

if TYPE_CHECKING:
    from prunelab.common.tokens.apply import Handle
    from prunelab.common.tokens.role import TokenPruner


@overload
def apply(
    method: TokenPruner,
    model: nn.Module,
    budget: Budget | float | str | Sequence[float],
    *,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int = 0,
) -> AbstractContextManager[Handle]: ...


@overload
def apply(
    method: Method,
    model: nn.Module,
    budget: Budget | float | str | Sequence[float],
    *,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int = 0,
) -> AbstractContextManager[Any]: ...


def apply(
    method: Method,
    model: nn.Module,
    budget: Budget | float | str | Sequence[float],
    *,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int = 0,
) -> AbstractContextManager[Any]:
    """Let `method` work on the model under `budget` inside a `with` block, whose handle tells what it cost.

    Token pruners prune the tokens of every pass, expert pruners the experts that each chose; cache pruners
    (`kv_cache.applied`) and draft decoders (`speculative.applied`) go with the model's `generate`. Methods of several
    roles work on one model at once, in nested blocks of any order that has a meaning. The model's weights and forward
    stay as they are: hooks go in, and all come out at the end, also after an exception. A copy made inside (deepcopy,
    pickle, `torch.save`, `save_pretrained`) is the model as it was, runs no method and shares nothing. Threads may
    share a model at work; texts that are drafted take turns. What `torch.compile` made runs uncompiled inside, and
    adapters of `peft` run with the model that they are in. `seed` starts the draws of random methods. `services`
    are second models by the names that the method gives them. `parts` are the method's learned parts
    (`method.build`); inside the block they belong to the model, so that one optimiser and one device serve both. A
    model that was trained with the method carries them already, as `model.pruning_parts`.
    Raises PrunelabError, before any work, where the model has no adapter, a site or signal cannot be had there, a
    service or learned part is missing, or the model runs a method already that this one has no meaning beside.
    """
    if not isinstance(model, nn.Module):
        raise PrunelabError(f"{model!r} is no model; give a torch.nn.Module")
    if isinstance(method, type):
        raise PrunelabError(f"{method.__name__} is a class; give a method with its options: {method.__name__}()")
    budget, model = Budget.of(budget), plain(model) if method.role == "data_selector" else bare(model)
    # A wing is imported when it is asked for: each brings libraries of its own.
    if method.role == "token_pruner":
        from prunelab.common.tokens import apply as tokens

        return tokens.applied(method, model, budget, services=services, parts=parts, seed=seed)  # type: ignore[arg-type]
    if method.role == "draft_decoder":
        from prunelab.common import speculative

        return speculative.applied(method, model, budget, services=services, parts=parts, seed=seed)  # type: ignore[arg-type]
    if parts is not None:
        raise PrunelabError(f"{method.name} has no learned parts; leave `parts` out")
    if method.role == "cache_pruner":
        from prunelab.common import kv_cache

        return kv_cache.applied(method, model, budget, services=services, seed=seed)  # type: ignore[arg-type]
    if method.role == "expert_pruner":
        from prunelab.common import experts

        return experts.applied(method, model, budget, services=services, seed=seed)  # type: ignore[arg-type]
    if method.role == "data_selector":
        from prunelab.common.data_selection import engine

        return engine.applied(method, model, budget, services=services, seed=seed)
    raise _elsewhere(method)


# What is done instead with methods that are not applied to a running model.
ELSEWHERE = {
    "weight_pruner": "it changes a model for good, with prunelab.prune(method, model, budget, calibration)",
    "ranker": "it ranks sentences, with prunelab.summarise(method, text, budget)",
    "constrained_sampler": "it draws from a model's logits, with prunelab.common.constrained.smc.run",
    "training_method": "it learns while a model trains, with prunelab.common.training.engine.train",
}


def _elsewhere(method: Method) -> PrunelabError:
    what = ELSEWHERE.get(method.role, "see its page")
    return PrunelabError(f"{method.name} is a {method.role}, which is not applied to a running model: {what}")


class Refusal(str):
    """Why a method does not run on a model. It is false, so that `if supports(...)` asks what it seems to."""

    def __bool__(self) -> bool:
        return False


def supports(method: Method, model: nn.Module) -> Literal[True] | Refusal:
    """Whether `method` runs on the model: True, or why not, as `apply` or `prune` would refuse it before any work.

    One answer for every role. Asks for no weights (a model on the meta device will do) and leaves the model alone;
    what else a call is given, a budget, services or learned parts, is not asked about.
    """
    try:
        _check(method, bare(model))
    except PrunelabError as reason:
        return Refusal(reason)
    return True


def _check(method: Method, model: nn.Module) -> None:
    if method.role == "token_pruner":
        from prunelab.common.tokens import apply as tokens

        tokens.check(method, model)  # type: ignore[arg-type]
    elif method.role == "cache_pruner":
        from prunelab.common.kv_cache import apply as kv_cache

        kv_cache.check(method, model)  # type: ignore[arg-type]
    elif method.role == "draft_decoder":
        from prunelab.common.speculative import loop

        loop.check(method, model)  # type: ignore[arg-type]
    elif method.role == "expert_pruner":
        from prunelab.common.experts import apply as experts

        experts.mixtures(model)
    elif method.role == "weight_pruner":
        from prunelab.common.weights import pruning

        pruning.check(method, model)  # type: ignore[arg-type]
    elif method.role == "training_method":
        method.check(model)  # type: ignore[attr-defined]
    elif method.role != "data_selector":  # which signals a model can give is known when it is trained
        raise _elsewhere(method)
