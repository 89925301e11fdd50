"""One job: everything that decides its outcome, resolved. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from prunelab.common.catalogue import hub
from prunelab.common.core import files
from prunelab.common.experiments import provenance

_TOLD = ("entries", "needs", "names", "gpus")  # fields of a run that decide nothing of its outcome


def _unversioned(ids: Any) -> Any:
    return {k: v for k, v in ids.items() if k not in ("sha256", "versions")} if isinstance(ids, Mapping) else ids


@dataclass(frozen=True)
class Run:
    """One job: everything that decides its outcome, resolved. `scale` is '' where the outcome has none.

    needs: what is not at hand here, in words. Such a run is no job, but a record made elsewhere is shown.
    names: the catalogue's names of what it reads, as one of the tables that show it has them. gpus: how many its job
    takes where it computes on GPUs.
    """

    task: str
    scale: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)
    entries: tuple[str, ...] = ()
    needs: str = ""
    names: tuple[tuple[hub.Kind, str], ...] = ()
    gpus: int = 1

    @cached_property
    def identity(self) -> str:
        """Hash of what is run."""
        return files.digest(self._decisive)[:20]

    @property
    def _decisive(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k in FIELDS and k not in _TOLD}

    @cached_property
    def likeness(self) -> str:
        """Hash of what is run, whatever weights and versions of data answer to the names today."""
        plain = {of: _unversioned(ids) for of, ids in self.ids.items()}
        return files.digest(self._decisive | {"ids": plain})[:20]

    @cached_property
    def sources(self) -> str:
        """Hash of the code that runs it."""
        return provenance.sources(self.entries)[:12]

    @property
    def stand_in(self) -> bool:
        """Whether it reads a folder of the user's in the place of a repository, of which nobody knows that it is the
        published one."""
        return any(isinstance(ids, Mapping) and "local" in ids for ids in self.ids.values())

    @property
    def address(self) -> str:
        """Name of the record."""
        return f"{self.identity}-{self.sources}"

    def path(self, results: Path) -> Path:
        """Where the record lies."""
        return results / "records" / f"{self.address}.json"


FIELDS = tuple(field.name for field in fields(Run))
