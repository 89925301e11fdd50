"""Scores of a language model, its weights, cache or tokens pruned or not, on the tasks of lm-evaluation-harness (the
extra `evaluation`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prunelab.common.catalogue import hub
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import inside
from prunelab.common.data import logiqa
from prunelab.common.measures.bench import Bench
from prunelab.common.measures.language import experts_run, sizes, without_experts
from prunelab.common.measures.scores import HARNESS_PLAIN, HARNESS_SHARES, average
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading

if TYPE_CHECKING:
    from prunelab.common.tasks.base import Questions
    from prunelab.common.tasks.zero_shot import ZeroShot


def measure(bench: Bench[ZeroShot.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.zero_shot`."""
    harness()  # before anything is loaded
    model, tokenizer = loading.language(bench.ids["model"], bench.config, bench.ids.get("processor"))
    model = devices.place(model, bench.device, half=True)
    out, calibrated, acting, shortened = sizes(model), "", None, None
    method: Any = bench.method()
    if method is not None and method.role == "weight_pruner":
        pruning = importlib.import_module("prunelab.common.measures.perplexity")  # by name, see `by_role`
        plan, calibrated = pruning.prune(bench, method, model, tokenizer)
        out = sizes(model, plan.report)
    elif method is not None and method.role == "ranker":
        shortening = importlib.import_module("prunelab.common.measures.shortened")  # by name, see `by_role`
        shortened = shortening.contexts(bench, model, tokenizer)
    else:
        acting = method
    dtype = bench.settings.dtype
    if dtype is not None:
        devices.lowered(model, getattr(torch, dtype))
    with bench.at_work(acting, model) as acted, without_experts(bench, model) as handle:
        measured = scored(bench, model, tokenizer, calibrated, shortened=shortened, dtype=dtype)
    if acting is not None and acting.role == "token_pruner":
        measured["computed"] = {"value": round(100 * acted.computed, 3)}
    if bench.settings.against is not None and "average" in measured:
        share = 100 * measured["average"]["value"] / bench.settings.against
        measured["relative"] = {**measured["average"], "value": round(share, 4)}
    return {**measured, **out, **experts_run(model, handle)}


def scored(
    bench: Bench[Any],
    model: Any,
    tokenizer: Any,
    besides: str = "",
    batch: int | None = None,
    shortened: Callable[[Any], Any] | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The model's scores on the run's tasks, each with the protocol it was taken by. shortened: a request with less of
    its prompt, which is asked instead. dtype: that the model was given for it, beside which likelihoods are float32."""
    lm_eval, wrapper = harness()
    settings = bench.settings
    summed = {} if dtype is None else {"softmax_dtype": "float32"}
    evaluated = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch or settings.batch, **summed)
    if shortened is not None:
        importlib.import_module("prunelab.common.measures.shortened").ask_shortened(evaluated, shortened)
    results: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    for shots, tasks in by_shots(settings):
        done = lm_eval.simple_evaluate(
            model=evaluated,
            tasks=located(tasks, bench.ids, bench.config),
            num_fewshot=shots,
            limit=settings.limit,
            log_samples=settings.limit is not None,  # where all are asked, they are too many to hold
            task_manager=known_tasks(),
        )
        results |= done["results"]
        answers |= done.get("samples", {})
    measured = percentages(results, answers)
    protocol = "; ".join(part for part in (f"lm-evaluation-harness {lm_eval.__version__}", dtype, besides) if part)
    for metric in measured.values():
        metric["protocol"] = protocol
    if settings.average:
        measured["average"] = {**together(measured, settings.average), "protocol": protocol}
    return measured


def together(measured: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The mean of these metrics; with the questions behind it, so that two such means pair up, where as many are known
    of each metric."""
    value = average(measured, names)
    samples = [measured[name].get("samples", ()) for name in names]
    if not samples[0] or len({len(part) for part in samples}) > 1:
        return {"value": value}
    return {**uncertainty.mean([answer for part in samples for answer in part]), "value": value}


def by_shots(settings: Questions) -> list[tuple[int | None, list[str]]]:
    """The tasks by their number of worked examples: one call of the harness has one number for all."""
    groups: dict[int | None, list[str]] = {}
    for task in settings.tasks:
        groups.setdefault(settings.shots_of.get(task, settings.shots), []).append(task)
    return list(groups.items())


def located(tasks: Sequence[str], ids: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
    """Tasks of the harness that read their data from where they were downloaded at their locked revision; those whose
    data the run does not name are left as they are."""
    given: dict[str, dict[str, dict[str, Any]]] = {}
    for data in (data for name, data in ids.items() if name.startswith("data of ")):
        begins = tuple(f"{task}_" for task in data["tasks"])
        for task in tasks:
            if f"{task}_".startswith(begins):
                given.setdefault(task, {})[task] = told(task, data, config)
            elif task == data.get("group"):
                given.setdefault(task, {}).update({each: told(each, data, config) for each in data["tasks"]})
    return [changed(task, given[task]) if task in given else task for task in tasks]


def told(task: str, data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a task of the harness is told of where its data lie."""
    if "folder" in data:
        return of_rows(task, data, config)
    if "setting" in data:
        return of_files(Path(config[data["setting"]]))
    return {"dataset_path": str(hub.folder(data, "dataset", config))}


def changed(task: str, given: Mapping[str, Mapping[str, Any]]) -> Any:
    """A task of the harness, or a group with all of its tasks, that is told other things than its file says, by name:
    itself, or single ones of its group. Through the harness's loader a group's tasks would get the group's name
    (0.4.13)."""
    from lm_eval.tasks._factory import TaskFactory

    factory, known = TaskFactory(meta={}), dict(known_tasks().task_index)
    for name in (task, *given):
        if name not in known:
            raise PrunelabError(f"lm-evaluation-harness has no task '{name}'; name one of its own")
    for name, parts in given.items():
        known[name] = replace(known[name], cfg=factory._load_full_config(known[name], dict(parts)), yaml_path=None)
    return factory.build(known[task], registry=known)


def of_rows(task: str, data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a task of the harness is told to read its questions from a file of JSON lines in a folder of the user's,
    under whatever names: `tasks` of the data set's entry says for each task the file and how its prompts are made."""
    if task not in data["tasks"]:
        raise PrunelabError(
            f"no file of {data['folder']} holds the questions of {task}; there are {', '.join(data['tasks'])}"
        )
    templates = dict(data["tasks"][task])
    path = inside(inside(Path(config["assets"]), data["folder"]), templates.pop("file"))
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        **dict.fromkeys(("training_split", "validation_split", "fewshot_split")),
        "test_split": "test",
        **templates,
    }


def of_files(folder: Path) -> dict[str, Any]:
    """What the harness's task on LogiQA is told to read its questions from its authors' files in a folder."""
    from datasets import Dataset, DatasetDict

    splits = DatasetDict({split: Dataset.from_list(logiqa.rows(folder / name)) for split, name in logiqa.FILES.items()})
    return {"custom_dataset": lambda **metadata: splits}


@cache
def known_tasks() -> Any:
    """The harness's index of its tasks and groups, which it takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata={})


def harness() -> tuple[Any, Any]:
    """lm-evaluation-harness and its wrapper around models of transformers."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise PrunelabError(
            'this row needs lm-evaluation-harness; install it with pip install -e ".[evaluation]"'
        ) from None
    return lm_eval, HFLM


def percentages(
    results: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> dict[str, Any]:
    """Metrics of the harness's results by task, whose keys are `metric,filter`, as percent. The filter `none` is not
    named; what is no share of right answers is left out. answers: what the harness notes of each question, by task,
    from which a metric that is their mean gets its samples, in the questions' order."""
    result: dict[str, Any] = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if metric not in HARNESS_SHARES | HARNESS_PLAIN and not metric.endswith("_score"):
                continue
            factor = 1 if metric in HARNESS_PLAIN else 100
            name = f"{task} {metric}" + ("" if chosen in ("", "none") else f",{chosen}")
            result[name] = {"value": round(factor * float(value), 4)}
            error = metrics.get(f"{metric}_stderr,{chosen}")
            if isinstance(error, float):  # it is the text N/A where there is none
                result[name]["stderr"] = round(factor * error, 4)
            noted = [a for a in (answers or {}).get(task, ()) if a.get("filter", chosen) == chosen]
            noted.sort(key=lambda answer: int(answer["doc_id"]))
            if noted and all(isinstance(answer.get(metric), int | float) for answer in noted):
                samples = [round(100 * float(answer[metric]), 4) for answer in noted]
                if abs(sum(samples) / len(samples) - 100 * float(value)) < 1e-3:
                    result[name] |= {"n": len(samples), "samples": samples}
    return result
