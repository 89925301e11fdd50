"""Apply a method to a model for the length of a `with` block, and report what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, overload

from torch import nn

from prunelab.common import kv_cache, speculative
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.kv_cache.role import CachePruner
from prunelab.common.speculative.role import DraftDecoder
from prunelab.common.tokens import apply as tokens
from prunelab.common.tokens.apply import Handle
from prunelab.common.tokens.role import TokenPruner


@overload
def apply(
    method: TokenPruner,
    model: nn.Module,
    budget: Budget | float,
    *,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int = 0,
) -> AbstractContextManager[Handle]: ...


@overload
def apply(
    method: Method,
    model: nn.Module,
    budget: Budget | float,
    *,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int = 0,
) -> AbstractContextManager[Any]: ...


def apply(
    method: Method,
    model: nn.Module,
    budget: Budget | float,
    *,
    services: Mapping[str, Any] | None = None,
    parts: nn.Module | None = None,
    seed: int = 0,
) -> AbstractContextManager[Any]:
    """Let `method` work on the model under `budget` inside a `with` block, whose handle tells what it cost.

    Token pruners prune the tokens of every pass; cache pruners (`kv_cache.applied`) and draft decoders
    (`speculative.applied`) go with the model's `generate`. The model's weights and forward stay as they are: hooks
    go in, and all come out at the end, also after an exception. `seed` starts the draws of random methods. `services`
    are second models by the names that the method gives them. `parts` are the method's learned parts
    (`method.build`); inside the block they belong to the model, so that one optimiser and one device serve both. A
    model that was trained with the method carries them already, as `model.pruning_parts`. Raises PrunelabError, before
    any work, where the model has no adapter, a site or signal cannot be had there, a service or learned part is
    missing, or the method is already applied.
    """
    if isinstance(method, TokenPruner):
        return tokens.applied(method, model, budget, services=services, parts=parts, seed=seed)
    if isinstance(method, DraftDecoder):
        return speculative.applied(method, model, budget, services=services, parts=parts, seed=seed)
    if parts is not None:
        raise PrunelabError(f"{method.name} has no learned parts; leave `parts` out")
    if isinstance(method, CachePruner):
        return kv_cache.applied(method, model, budget, services=services, seed=seed)
    raise PrunelabError(f"{method.name} is a {method.role}, which is not applied to a running model; see its page")
