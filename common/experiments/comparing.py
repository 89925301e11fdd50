"""Every method of a role on a person's own model, under one budget and on one text: a board without a paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunelab.common import tasks
from prunelab.common.catalogue import lookup
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.index import Entry
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.metrics import uncertainty

# What a method of each role is measured by: task, metric, and what is shown as its cost.
ROLES = {
    "weight_pruner": ("perplexity", "perplexity", "nonzero_saving"),
    "cache_pruner": ("cache", "perplexity", "saving"),
    "token_pruner": ("cache", "perplexity", "saving"),  # of a prompt's tokens
    "draft_decoder": ("decode", "mat", "steps_saved"),
}


@dataclass(frozen=True)
class Result:
    """One method; the first of a board is the unpruned model. difference and interval: to the unpruned model over the
    same samples, of the loss where the metric is a perplexity. refused: why it has no value."""

    method: str
    value: float | None = None
    cost: float | None = None
    difference: float | None = None
    interval: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Question:
    """What a board is of. model: a folder in the hub's layout. text: a file to measure on, in whose first half methods
    are calibrated and whose second half is read ('': the text that stands in for WikiText-2 here). length: of the
    sequences in tokens. samples: how many."""

    model: Path
    role: str
    budget: str
    text: str = ""
    samples: int = 12
    length: int = 256

    @property
    def metric(self) -> str:
        """In words."""
        task, metric, _ = ROLES[self.role]
        return tasks.get(task).metric(metric).label

    @property
    def higher_is_better(self) -> bool:
        """Which end of the board is the better one."""
        task, metric, _ = ROLES[self.role]
        return bool(tasks.get(task).metric(metric).higher_is_better)


def check(question: Question) -> None:
    """Refuse what cannot be compared, before anything is loaded."""
    if question.role not in ROLES:
        raise PrunelabError(f"no board is made of the role {question.role}; there are {', '.join(ROLES)}")
    if not question.model.is_dir():
        raise PrunelabError(f"the folder {question.model} does not exist; give --model a folder in the hub's layout")
    if question.text and not Path(question.text).is_file():
        raise PrunelabError(f"the text {question.text} does not exist")
    Budget.parse(question.budget)


def compare(question: Question, methods: Sequence[Entry], config: Mapping[str, Any]) -> Iterator[Result]:
    """The unpruned model, then each method as it is measured. A method that refuses the model, the budget or its own
    defaults says why; the others go on."""
    task, metric, cost = ROLES[question.role]
    base: dict[str, Any] = {}
    for method in (None, *methods):
        name = method.name if method else "unpruned"
        try:
            measured = runner.measure(_run(question, task, method, config), config)
        except PrunelabError as error:
            if method is None:
                raise
            yield Result(name, refused=str(error))
            continue
        base = base or measured
        paired = "loss" if metric == "perplexity" else metric
        gap = uncertainty.paired_difference(measured[paired], base[paired]) if method else None
        yield Result(name, measured[metric]["value"], measured.get(cost, {}).get("value"), *(gap or (None, None)))


def _run(question: Question, task: str, method: Entry | None, config: Mapping[str, Any]) -> Run:
    if question.text:
        data: Mapping[str, Any] = {"loader": "own_text", "path": question.text, "join": "\n"}
    else:
        data = lookup.resolve("dataset", "wikitext2", "assets" if config["assets"] else "testbed", config).identity
    known = tasks.get(task).known()
    wanted = {"length": question.length, "samples": question.samples, "calibration": question.samples}
    settings = {key: value for key, value in wanted.items() if key in known}
    ids = {"model": {"folder": str(question.model)}, "data": data, "calibration": data}
    if task == "decode":
        ids["draft"] = ids["model"]
        settings |= {"new": 32}
    chosen, budget = (method.name, question.budget) if method else (None, None)
    return Run(task, "assets", chosen, {}, budget, settings, ids)
