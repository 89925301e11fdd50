"""Scores of an image or video language model, pruned or not, on the tasks of lmms-eval (the extra `evaluation`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.files import ROOT
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from prunelab.common.measures.scores import CAPTIONS, OTHERS, OWN, SHARES
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Catalogue, Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

# Guesses to foretell time by: tokens of a question with what stands around it, and of an answer.
QUESTION, ANSWER = 64, 16
# Guesses, too: tokens that are read and written where the model names what a question is about, and hours of a video of
# which frames are taken by the hour (Video-MME's mean is 17 minutes).
APART, HOURS = (160, 32), 0.28


class VisualTasks(Task):
    """Metrics named as lmms-eval names them: `gqa exact_match`, `pope pope_f1_score`, `videomme
    videomme_perception_score` and so on, shares in percent, with the number of questions; of a group of tasks
    (`mvbench`) also the mean over all its questions. Prompts, limits of answers and scores are those of the library's
    task definitions, and of a few of our own (`measures/lmms_tasks`)."""

    name: ClassVar[str] = "visual_tasks"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner", "cache_pruner")
    named: ClassVar[Mapping[str, Catalogue]] = {
        "frame_scores": "model",
        "text_tower": "model",
        "pooling_head": "model",
    }
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "own data"})
    metrics: ClassVar[Mapping[str, Metric]] = {
        "average": Metric("mean of the scores under `average`", higher_is_better=True),
        "relative": Metric("mean of the same as percent of the numbers under `against`", "%", higher_is_better=True),
        "oracle": Metric(
            "the score under `average`, of each question the best of several budgets", "%", higher_is_better=True
        ),
        "oracle_budget": Metric("the least budget that gives it, in the mean", higher_is_better=False),
        "kept": Metric("visual tokens that a layer sees, in the mean over layers", "%"),
        "seconds": Metric("time to answer all questions", "s", higher_is_better=False, timed=True),
        "seconds_each": Metric("time to answer a question", "s", higher_is_better=False, timed=True),
        "rate": Metric("questions answered in a second", higher_is_better=True, timed=True),
    }

    class Settings(base.Settings):
        """tasks: of the library. frames: of a video, evenly sampled. hourly: frames more for every hour of it.
        frame_scores: the image language model that scores each frame of a video by the question, for a method that asks
        for the service of this name (`measures/frame_scoring`). decouple: whether the model asked turns the question
        into things to look for first. text_tower: the CLIP model, trained with the model's encoder, by which a method
        that asks for the service `text_similarity` compares patches with the question. pooling_head: the SigLIP whose
        encoder the model has without its head, which is the service of this name. limit: questions of each task
        (all). batch: questions asked together. prompts: changes of what the tasks' definitions let prompts have (`ocr:
        true` of TextVQA), where they have it. include: a folder with definitions of one's own. average: the metrics
        whose mean is one. against: a number for each of them, such as the unpruned model's, of which `relative` is the
        mean share. match: the budget is what a layer of the decoder sees of an image's tokens, in the mean, whatever
        the method itself means by it; papers that compare at 192 of 576 tokens mean that. shots: examples that stand
        before each question, with their answers, drawn with the seed from the task's other questions. oracle: budgets
        that rise to the run's own, all of which are asked; `average` then names the one metric by which an oracle
        chooses."""

        tasks: tuple[str, ...]
        frames: PositiveInt = 32
        hourly: NonNegativeFloat = 0
        frame_scores: str | None = None
        decouple: bool = False
        text_tower: str | None = None
        pooling_head: str | None = None
        limit: PositiveInt | None = None
        batch: PositiveInt = 1
        prompts: dict[str, Any] | None = None
        include: str | None = None
        average: tuple[str, ...] = ()
        against: tuple[PositiveFloat, ...] = ()
        shots: NonNegativeInt = 0
        match: bool = False
        oracle: tuple[str, ...] = ()

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        counts = [n for count in sizes.values() if (n := settings.limit or count) is not None]
        if len(counts) < len(sizes):
            return None
        total = sum(counts) * (1 + len(settings.oracle))
        frames = settings.frames if "frames" in settings.model_fields_set else 0
        frames += HOURS * settings.hourly if frames else 0
        read, written = QUESTION, ANSWER
        if settings.decouple:  # a question is first taken apart
            read, written = read + APART[0], written + APART[1]
        return Work(
            inputs=total, frames=frames, looked=frames * total, read=read * total, written=written * total,
            together=1 if settings.decouple else settings.batch,
        )  # fmt: skip

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import visual_tasks

        return visual_tasks.measure(bench)

    @classmethod
    def files(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        results: list[str] = []
        for name in settings.get("tasks", ()):
            if (path := ROOT / OWN / f"{name}.yaml").exists():
                modules = dict.fromkeys(re.findall(r"!function (\w+)\.", path.read_text(encoding="utf-8")))
                results += [f"{OWN}/{path.name}", *(f"{OWN}/{module}.py" for module in modules)]
        return tuple(dict.fromkeys(results))

    @classmethod
    def metric(cls, name: str) -> Metric:
        measure = name.partition(" ")[2]
        if measure.removesuffix(" x100") in CAPTIONS:
            return Metric(name, higher_is_better=True)
        if measure in SHARES | OTHERS:
            return Metric(name, "%" if measure in SHARES else "", higher_is_better=True)
        return super().metric(name)
