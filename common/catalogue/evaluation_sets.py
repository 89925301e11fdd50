"""How many examples the published evaluation sets hold: `configs/evaluation_sets.yaml`, validated. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError

FILE = files.ROOT / "configs" / "evaluation_sets.yaml"


class EvaluationSet(BaseModel):
    """An evaluation set's size, and its metrics that are shares of right answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int = Field(gt=0)
    of: str
    shares: tuple[str, ...]


@cache
def evaluation_sets() -> Mapping[str, EvaluationSet]:
    """The sets by name, which is that of a data set or of a task of an evaluation library."""
    try:
        return {k: EvaluationSet.model_validate(v) for k, v in yaml.safe_load(FILE.read_text(encoding="utf-8")).items()}
    except ValidationError as error:
        first = error.errors()[0]
        raise PrunelabError(f"configs/evaluation_sets.yaml, {first['loc']}: {first['msg']}") from None
