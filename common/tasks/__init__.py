"""What a run can be: each module but `base` is one task, found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.registry import defined
from prunelab.common.tasks.base import Task, nearest


@cache
def names() -> tuple[str, ...]:
    """All tasks."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


@cache
def get(name: str) -> type[Task]:
    """The task of that name, or an error that suggests the nearest one."""
    if name not in names():
        raise PrunelabError(f"there is no task '{name}'{nearest(name, names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (task,) = defined(module, Task)  # type: ignore[type-abstract]
    return task
