"""What a run can be: a `Task` says what it reads, which settings it has and which metrics it gives.

Planning reads all of it to resolve and to check what papers ask for, so that a module of this package imports no torch
at its top: `measure` imports what it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

Metrics = dict[str, dict[str, Any]]
Status = Literal["analytic", "measured"]
Reads = Literal["architecture", "weights", "data", "calibration", "own data"]
Catalogue = Literal["model", "dataset"]


@dataclass(frozen=True)
class Metric:
    """words: what it is. higher_is_better: None where neither way is better. timed: whether it comes from a clock, so
    that it is never twice the same. cost: what a board calls it beside its own metric."""

    words: str
    unit: str = ""
    higher_is_better: bool | None = None
    timed: bool = False
    cost: str = ""

    @property
    def label(self) -> str:
        """In words, with its unit."""
        return f"{self.words}, {self.unit}" if self.unit else self.words


@dataclass(frozen=True)
class Work:
    """What a run gives its model to do, to foretell its time by. inputs: of the model's standard size, images or, with
    `frames`, videos. read, written, trained: tokens of text that are read at once, written one after the other, and
    trained on. looked: pictures that a second model looks at, each with a short question, where the run has one.
    together: sequences that are written at once. seconds: that pass whatever the model is. whole: whether
    all weights are trained, with an optimiser's state for each."""

    inputs: float = 0
    frames: float = 0
    looked: float = 0
    read: float = 0
    written: float = 0
    trained: float = 0
    together: int = 1
    seconds: float = 0
    whole: bool = False


class Settings(BaseModel):
    """What a paper may set of a task. seed: of all that is drawn. seeds: how many from that one on, over which every
    metric is the mean, for methods in which chance enters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: NonNegativeInt = 0
    seeds: PositiveInt = 1


class AtRunTime(BaseModel):
    """A method beside the run's own, at work while that one is measured, or on another model that the run reads: with
    its options and budget, as papers write them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    options: Mapping[str, Any] = {}
    budget: str = "1"

    def admit(self, role: str) -> None:
        """Refuse a method that has not that role, or has not these options."""
        entry = registry.entry(self.method)
        if entry.role != role:
            raise PrunelabError(f"{self.method} is a {entry.role}, and a {role} is wanted here")
        registry.fit(entry, self.options)
        Budget.parse(self.budget)

    @property
    def file(self) -> str:
        """The file that defines the method."""
        return f"methods/{registry.entry(self.method).slug}/method.py"


class WithoutExperts(Settings):
    """experts: a method with options and budget that leaves out experts of tokens while a language model is
    measured."""

    experts: AtRunTime | None = None

    @field_validator("experts")
    @classmethod
    def _prunes_experts(cls, given: AtRunTime | None) -> AtRunTime | None:
        if given is not None:
            given.admit("expert_pruner")
        return given


class Questions(Settings):
    """tasks: of lm-evaluation-harness. shots: worked examples in each prompt (those of the task's own definition).
    shots_of: of tasks that have another number of them. limit: questions of each task (all). average: the metrics whose
    mean is one."""

    tasks: tuple[str, ...]
    shots: NonNegativeInt | None = None
    shots_of: Mapping[str, NonNegativeInt] = {}
    limit: PositiveInt | None = None
    average: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _shots_are_of_tasks(self) -> Self:
        if strange := [task for task in self.shots_of if task not in self.tasks]:
            raise ValueError(f"`shots_of` names {strange[0]}, which is none of the tasks")
        return self


class Task(ABC):
    """A kind of run: one module of this package, whose file has its name.

    roles: of the methods that it measures; without any it runs no method. scales: at which it can run; none where its
    outcome follows from shapes and formulas alone. reads: `architecture` is the published one without weights;
    `calibration` a set for methods that measure before they prune, and the model before fine-tuning where there is one;
    `own data` those that the tasks of an evaluation library bring. named: settings that name further entries of the
    catalogue which a run reads, and of which one. budgeted: whether a
    method needs a budget. by_role: a file that `measure` imports by name under methods of a role, and under no others.
    count: the metrics that are our own count of a cost a paper prints: the MACs, those of the
    method's decisions among them, and what a cache then holds. cost: the metric that boards show as cost.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[str, ...]] = ("testbed", "assets", "paper")
    status: ClassVar[Status] = "measured"
    reads: ClassVar[frozenset[Reads]] = frozenset()
    named: ClassVar[Mapping[str, Catalogue]] = {}
    needs_gpu: ClassVar[bool] = False
    budgeted: ClassVar[bool] = True
    by_role: ClassVar[Mapping[str, str]] = {}
    Settings: ClassVar[type[Settings]] = Settings
    metrics: ClassVar[Mapping[str, Metric]] = {}
    count: ClassVar[tuple[str, ...]] = ()
    cost: ClassVar[str] = ""

    @abstractmethod
    def measure(self, bench: Bench[Any]) -> Metrics:
        """The metrics of a run, each with its `value` and, where there are some, `stderr`, `n` and `samples`."""

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        """What a run of these settings gives its model to do, a method's own passes apart. asked: questions of
        each task of an evaluation library, held: samples of the data set, None where the catalogue does not know. None
        where it cannot be told, as for every task that does not say."""
        return None

    @classmethod
    def files(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Files of this project, from its root, that settings name and that decide the outcome."""
        if settings.get("experts") is None:
            return ()
        return (AtRunTime.model_validate(settings["experts"]).file, "common/experts/apply.py")

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """The settings by the names that papers use."""
        return tuple(field.alias or name for name, field in cls.Settings.model_fields.items())

    @classmethod
    def metric(cls, name: str) -> Metric:
        """The metric of that name. Raises PrunelabError, with the nearest one, where the task gives none."""
        if name not in cls.metrics:
            raise PrunelabError(f"the task {cls.name} gives no metric '{name}'{nearest(name, cls.metrics)}")
        return cls.metrics[name]

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Any:
        """Settings by their types. Raises PrunelabError that names what is misspelt, missing or of another type."""
        try:
            return cls.Settings.model_validate(dict(settings))
        except ValidationError as error:
            first = max(error.errors(), key=lambda e: e["type"] == "extra_forbidden")  # what is missing may be misspelt
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise PrunelabError(
                    f"the task {cls.name} has no setting '{name}'{nearest(name, cls.known())}"
                ) from None
            if first["type"] == "missing":
                raise PrunelabError(f"the task {cls.name} needs the setting '{name}'") from None
            what = f"the setting '{name}'" if name else "the settings"
            raise PrunelabError(f"{what} of the task {cls.name}: {first['msg'].lower()}") from None

    @classmethod
    def admit(cls, method: str | None, budget: str | None) -> None:
        """Raises PrunelabError where the task takes no method of that role, or the budget is missing or unreadable."""
        if method is None:
            return
        role = registry.entry(method).role
        if role not in cls.roles:
            expected = " or a ".join(cls.roles) or "method of no role"
            raise PrunelabError(f"the task {cls.name} is run under a {expected}; {method} is a {role}")
        if budget is not None:
            Budget.parse(budget)
        elif cls.budgeted:
            raise PrunelabError(f"the task {cls.name} needs a budget for {method}; name one, such as 0.5")


# -- of language models ----------------------------------------------------------------------------------------------

SIZES: Mapping[str, Metric] = {
    "gparameters": Metric("parameters held", "G", cost="parameters"),
    "nonzero_gparameters": Metric("parameters that are not zero", "G", cost="nonzero parameters"),
    "saving": Metric("parameters gone", "%", higher_is_better=True),
    "nonzero_saving": Metric("parameters gone or zero", "%", higher_is_better=True),
    "weight_gbytes": Metric("bytes of weights, codes packed", "G", cost="bytes of weights"),
    "weight_saving": Metric("bytes of weights saved", "%", higher_is_better=True),
    "bits": Metric("bits of a prunable weight that is left, scales and zeros included", "bits", higher_is_better=False),
    "sparsity": Metric(
        "prunable parameters gone, zero, or what they were before fine-tuning", "%", higher_is_better=True
    ),
}

TRAINED: Mapping[str, Metric] = {
    "training_loss": Metric("loss of the method's own training in its last steps", higher_is_better=False),
}

OF_EXPERTS: Mapping[str, Metric] = {
    "experts_run": Metric("choices of experts that ran", "%"),
    "activated_gparameters": Metric("parameters that a token uses", "G", cost="parameters a token uses"),
    "activated_saving": Metric("parameters that a token no longer uses", "%", higher_is_better=True),
}


def nearest(name: str, known: Any) -> str:
    """What may have been meant, to go on a message with."""
    near = get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; it has {', '.join(sorted(known)) or 'none'}"
