"""What pruning leaves of a testbed's pictures and videos, frame by frame, with the answers before and after.

Real images never enter a record: most data sets forbid passing them on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import questions
from prunelab.common.data.questions import Sample
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.tokens.inspection import Inspection, Query, Stage, inspect
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.looks import Looks


WHOLE = 100  # the share that a patch has without pruning, in a record


def measure(bench: Bench[Looks.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.looks`."""
    if bench.ids["data"]["loader"] not in questions.LOADERS:
        raise PrunelabError("this figure shows the testbeds' scenes alone; set `scales: [testbed]` in paper.yaml")
    method, budget = bench.method(TokenPruner), bench.budget
    if method is None:
        raise PrunelabError("this figure shows what a method leaves; name one under `configuration` in paper.yaml")
    model = loading.vision_language(bench.ids["model"], bench.config)[0]
    items = []
    for sample in questions.samples(bench.ids["data"], bench.settings.samples):
        query = Query(questions.inputs([sample]), lambda new: questions.WORDS[int(new[0])], words=1)
        items.append(item(sample, inspect(model, query, method, budget, bench.seed)))
    return {"looks": {"value": len(items), "items": items}, "budget": {"text": str(budget)}}


def item(sample: Sample, results: Inspection) -> dict[str, Any]:
    """An inspection as plain values."""
    return {
        "question": sample.question,
        "answer": sample.word,
        "dense": results.dense,
        "pruned": results.pruned,
        "frames": [[bytes(row).hex() for row in frame.flatten(1).tolist()] for frame in sample.shown],
        "tokens": results.tokens,
        "grid": list(results.stages[0].shares[0].shape),
        "stages": [{"name": stage.name, "tokens": stage.tokens, "shares": shares(stage)} for stage in results.stages],
    }


def shares(stage: Stage) -> list[str]:
    """Each frame's shares row by row as hexadecimal bytes: WHOLE is what a patch has unpruned, 255 that or more."""
    bounded: list[Tensor] = [(WHOLE * share).round().clamp(0, 255).to(torch.uint8) for share in stage.shares]
    return [bytes(share.flatten().tolist()).hex() for share in bounded]
