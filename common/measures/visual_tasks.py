"""Scores of an image or video language model, pruned or not, on the tasks of lmms-eval (the extra `evaluation`)."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from torch import Tensor

from prunelab.common.catalogue import hub
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT
from prunelab.common.data import video_questions
from prunelab.common.measures import frame_scoring, oracle
from prunelab.common.measures.bench import Bench
from prunelab.common.measures.examples import Examples
from prunelab.common.measures.pooling_head import PoolingHead
from prunelab.common.measures.scores import CAPTIONS, COUNTED, OWN, SCALED, SHARES, SUMS, average, relative
from prunelab.common.measures.text_similarity import TextTower
from prunelab.common.models import devices, loading

if TYPE_CHECKING:
    from prunelab.common.tasks.visual_tasks import VisualTasks

SCORERS = {"nextqa_oe": "pywsd"}  # of the library's tasks, what they score by and it does not bring


def measure(bench: Bench[VisualTasks.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.visual_tasks`."""
    lmms_eval, wrapper, counter = harness()
    settings = bench.settings
    check_scorers(settings.tasks)
    model, processor = loading.vision_language(bench.ids["model"], bench.config, bench.ids.get("processor"))
    model = devices.place(model, bench.device, half=True)
    method: Any = bench.method()
    own = {"budget": matched(bench, method, model)} if settings.match and method is not None else {}
    budgets = oracle.levels(settings.oracle, own.get("budget", bench.budget))
    if settings.oracle and (method is None or len(settings.average) != 1):
        raise PrunelabError("an oracle chooses a method's budget by one metric; name it under `average`")
    scorer = frame_scorer(bench, model, processor) if "frame_scores" in bench.ids else None
    tower = text_tower(bench) if "text_tower" in bench.ids else None
    lent = {name: make(bench) for name, make in LENT.items() if name in bench.ids}
    read, groups = definitions(settings.tasks, settings.include, settings.prompts)
    shown = Examples(settings.shots, bench.seed, {e["task"]: e.get("doc_to_target") for e in read})
    used = [value for name, value in bench.ids.items() if name.startswith("data of ")]
    data = {str(value.get("hub") or value["file"]): value for value in used}
    logged: list[Mapping[str, Any]] = []
    for budget in budgets:
        kept = counter() if method is not None and method.role == "token_pruner" else None
        evaluated = wrapper(
            model,
            processor,
            batch=settings.batch,
            frames=settings.frames,
            hourly=settings.hourly,
            scorer=scorer,
            tower=tower,
            shown=shown,
            kept=kept,
        )
        services: dict[str, Any] = dict(lent)
        services |= {"frame_scores": evaluated.frame_scores} if scorer is not None else {}
        services |= {"text_similarity": evaluated.text_similarity} if tower is not None else {}
        given = {"services": services} if services else {}
        evaluated.pruned = partial(bench.at_work, method, model, budget=budget, **given)
        # Some tasks write their answers to a file when they are scored.
        with at_hand(read, data, bench.config), TemporaryDirectory() as folder:
            made = lmms_eval.api.task.ConfigurableMessagesTask
            tasks = [made(config=entry | located(entry, data, bench.config, Path(folder))) for entry in read]
            result = lmms_eval.evaluator.simple_evaluate(
                model=evaluated,
                tasks=tasks,
                task_manager=index(settings.include),
                limit=settings.limit,
                log_samples=bool(settings.oracle),
                cli_args=Namespace(output_path=folder, process_with_media=True, reasoning_tags=None),
            )
        logged.append(result.get("samples", {}))
    counts = {task: int(count["effective"]) for task, count in result["n-samples"].items()}
    measured = percentages(result["results"], counts)
    measured |= group_means(groups, measured)
    versions = ", ".join(f"{task} {version}" for task, version in sorted(result["versions"].items()))
    versions = versions.replace(" Yaml", "")  # the library's word for a task without a version
    protocol = f"lmms-eval {importlib.metadata.version('lmms_eval')} ({versions}); videos of {settings.frames} frames"
    if settings.prompts:
        protocol += "; prompts with " + ", ".join(f"{key}={value}" for key, value in settings.prompts.items())
    if settings.shots:
        protocol += f"; {settings.shots} examples before each question, drawn with seed {bench.seed} from the others"
    if settings.hourly:
        protocol += f" and {settings.hourly:g} more an hour"
    if scorer is not None:
        things = "the things to look for, which the model asked names" if settings.decouple else "the question itself"
        protocol += f"; frames are weighed by a model of images that is asked for {things}"
    if tower is not None:
        protocol += "; patches are compared with the question by CLIP's text tower, as far as its context reaches"
    if "pooling_head" in lent:
        protocol += "; frames are described by the pooling head of SigLIP's own repository"
    if own:
        protocol += f"; the budget {own['budget']} gives the layers {bench.budget} of an image's tokens, in the mean"
    if kept is not None and not settings.oracle:
        protocol += f"; {kept}"
        measured["kept"] = {"value": round(kept.share, 3)}
    if settings.oracle:
        measured |= oracle.chosen(each_question(logged, settings.average[0]), budgets)
    if settings.average:
        measured["average"] = {"value": average(measured, settings.average)}
    if settings.against:
        measured["relative"] = {"value": relative(measured, settings.average, settings.against)}
    measured["seconds"] = {"value": round(evaluated.seconds, 4)}
    measured["seconds_each"] = {"value": round(evaluated.seconds / max(1, sum(counts.values())), 4)}
    measured["rate"] = {"value": round(sum(counts.values()) / evaluated.seconds, 4)}
    for metric in measured.values():
        metric["protocol"] = protocol
    return measured


def matched(bench: Bench[VisualTasks.Settings], method: Any, model: Any) -> Any:
    """See the setting `match`."""
    if method.role != "token_pruner":
        raise PrunelabError(f"{method.name} leaves no visual tokens out; `match` is for methods that do")
    return importlib.import_module("prunelab.common.tokens.match").match_mean(method, model, bench.budget)


def frame_scorer(bench: Bench[VisualTasks.Settings], model: Any, processor: Any) -> Callable[[Any, str], Tensor]:
    """Scores of a video's frames for a question, by the run's own model of images; see the settings `frame_scores` and
    `decouple`."""
    judge, sees = loading.vision_language(bench.ids["frame_scores"], bench.config)
    score = frame_scoring.FrameScorer(devices.place(judge, bench.device, half=True), sees)
    speak = frame_scoring.speaker(model, processor)

    def scored(film: Any, question: str) -> Tensor:
        things = frame_scoring.decouple(question, speak) if bench.settings.decouple else ()
        return score(list(film), question, things)

    return scored


def text_tower(bench: Bench[VisualTasks.Settings]) -> TextTower:
    """What compares patches with questions; see the setting `text_tower`."""
    clip, processor = loading.clip(bench.ids["text_tower"], bench.config)
    return TextTower(devices.place(clip, bench.device, half=True), processor)


def pooling_head(bench: Bench[VisualTasks.Settings]) -> PoolingHead:
    """What describes pictures by their patches; see the setting `pooling_head`."""
    return PoolingHead(devices.place(loading.siglip(bench.ids["pooling_head"], bench.config), bench.device, half=True))


# Services with weights of a repository that the setting of their name names, whatever the question.
LENT: Mapping[str, Callable[[Bench[VisualTasks.Settings]], Any]] = {"pooling_head": pooling_head}


def each_question(logged: Sequence[Mapping[str, Any]], metric: str) -> Tensor:
    """A metric of single questions [runs, n], of what the library logged of several runs."""
    task, _, name = metric.partition(" ")
    rows = [{sample["doc_id"]: sample.get(name) for sample in samples.get(task, ())} for samples in logged]
    values = [[row[question] for question in sorted(rows[0])] for row in rows]
    if not rows[0] or not all(isinstance(value, bool | int | float) for row in values for value in row):
        raise PrunelabError(f"lmms-eval gives no {metric} of single questions; name a metric that is a mean of such")
    return torch.tensor(values, dtype=torch.float64)


def harness() -> tuple[Any, Any, Any]:
    """lmms-eval, our wrapper for it, and what counts the visual tokens that it leaves."""
    os.environ.setdefault("HF_HOME", constants.HF_HOME)  # some tasks look for it when they are read
    try:
        import lmms_eval.api.task
        import lmms_eval.evaluator
    except ImportError as error:
        raise PrunelabError(
            f'this row needs lmms-eval ({error.name} is missing); install it with pip install -e ".[evaluation]"'
        ) from None
    from prunelab.common.measures.lmms_model import Kept, VisualModel

    return lmms_eval, VisualModel, Kept


def check_scorers(tasks: Sequence[str]) -> None:
    """Raises PrunelabError where a task scores by a library that is not here, before there are answers to score."""
    for begins, module in SCORERS.items():
        if any(task.startswith(begins) for task in tasks) and importlib.util.find_spec(module) is None:
            raise PrunelabError(
                f"lmms-eval scores {begins} with {module} and nltk's data; pip install {module}, and fetch"
                " averaged_perceptron_tagger, wordnet and punkt with python -m nltk.downloader"
            )


@cache
def index(include: str | None) -> Any:
    """The library's index of its tasks, ours, and those in a folder; it reads some thousand files."""
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=[str(ROOT / OWN), *([include] if include else [])])


def definitions(
    names: Sequence[str], include: str | None = None, prompts: Mapping[str, Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The library's definitions of the tasks of these names, with changes of their prompts, and of each group among
    the names its tasks."""
    from lmms_eval.utils import load_yaml_config

    manager = index(include)

    def entries(name: str) -> Iterator[dict[str, Any]]:
        if name not in manager.task_index:
            raise PrunelabError(f"lmms-eval has no task '{name}'; `lmms-eval tasks list` shows all")
        entry = manager.task_index[name]
        tagged = entry["type"] == "tag"
        read = {"task": entry["task"]} if tagged else load_yaml_config(entry["yaml_path"], mode="full")
        if isinstance(read["task"], str):
            yield read
        else:
            for part in read["task"]:
                yield from entries(part)

    results: list[dict[str, Any]] = []
    groups: dict[str, list[str]] = {}
    for name in names:
        read = list(entries(name))
        if [entry["task"] for entry in read] != [name]:
            groups[name] = [entry["task"] for entry in read]
        results += read
    given = [(entry.get("lmms_eval_specific_kwargs") or {}).get("default", {}) for entry in results]
    for key in (prompts or {}).keys() - {key for own in given for key in own}:
        known = ", ".join(dict.fromkeys(key for own in given for key in own)) or "nothing"
        raise PrunelabError(f"prompts of {', '.join(names)} have {known} to change, not {key}")
    for entry, own in zip(results, given, strict=True) if prompts else ():
        changed = {key: value for key, value in (prompts or {}).items() if key in own}
        if changed:  # questions of tasks that have nothing to change may take no such words at all
            entry["lmms_eval_specific_kwargs"] = {"default": {**own, **changed}}
    return results, groups


def located(
    entry: Mapping[str, Any],
    data: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    scratch: Path | None = None,
) -> dict[str, Any]:
    """What a task's definition is to say of its data set, of those that the run names by their repositories: where it
    was downloaded. Archives of videos are unpacked by the library itself, beside the hub client's cache. Of a folder of
    the reader's its rows are written to `scratch`, in the form that the library reads. A run that names none leaves
    definitions as they are."""
    if not data:
        return {}
    repository, given = entry["dataset_path"], entry.get("dataset_kwargs") or {}
    if repository not in data:
        raise PrunelabError(f"configs/datasets.yaml names no {repository}, which the task {entry['task']} reads")
    if "setting" in data[repository] and scratch is not None:
        own = data[repository]
        rows = video_questions.rows(Path(config[own["setting"]]) / own["file"], own["videos"], own.get("options"))
        path = scratch / f"{entry['task']}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    place = str(hub.folder(data[repository], "dataset", config))
    unpacked = {key: value for key, value in given.items() if key not in ("revision", "token")}
    return {"dataset_path": place, "dataset_kwargs": unpacked if given.get("video") else None}


@contextmanager
def at_hand(
    read: Sequence[Mapping[str, Any]], data: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> Iterator[None]:
    """While open, code of tasks that loads a further part of its data by the repository's name (GQA its images) gets it
    from where that was downloaded, and the library finds archives of videos there."""
    library: Any = importlib.import_module("lmms_eval.api.task")
    spaces = {id(f.__globals__): f.__globals__ for entry in read for f in entry.values() if hasattr(f, "__globals__")}
    before = [(space, space["load_dataset"]) for space in spaces.values() if "load_dataset" in space]

    def load(original: Any, path: str, *args: Any, token: Any = None, **kwargs: Any) -> Any:
        place = str(hub.folder(data[path], "dataset", config)) if "hub" in data.get(path, ()) else path
        return original(place, *args, **kwargs)

    download = library.snapshot_download
    try:
        for space, original in before:
            space["load_dataset"] = partial(load, original)
        if data:
            library.snapshot_download = lambda repo_id, **ignored: repo_id  # `located` gave it the folder
        yield
    finally:
        library.snapshot_download = download
        for space, original in before:
            space["load_dataset"] = original


def percentages(results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> dict[str, Any]:
    """Metrics of the library's results by task, whose keys are `metric,filter`, shares as percent, with the counts of
    the tasks' questions. The filter `none` is not named; files of answers for a server are left out."""
    result: dict[str, Any] = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or "_stderr" in metric or not isinstance(value, float | int) or isinstance(value, bool):
                continue
            factor = 100 if metric in SHARES else 1
            name = f"{task} {metric}" + ("" if chosen == "none" else f",{chosen}")
            result[name] = {"value": round(factor * float(value), 4), "samples": counts[task]}
            error = metrics.get(f"{metric}_stderr,{chosen}")
            if metric in COUNTED:
                error, factor = metrics.get(f"{metric}_stderr_clt,{chosen}"), 100
            if isinstance(error, float | int):  # it is the text N/A where there is none
                result[name]["stderr"] = round(factor * float(error), 4)
            if metric in CAPTIONS:
                result[f"{name} x100"] = {**result[name], "value": round(100 * float(value), 4)}
        for metric, parts in SUMS.items():
            if all(f"{task} {part}" in result for part in parts):
                total = sum(float(result[f"{task} {part}"]["value"]) for part in parts)
                result[f"{task} {metric}"] = {"value": round(total, 4), "samples": counts[task]}
        for metric, (part, scale) in SCALED.items():
            if (whole := result.get(f"{task} {part}")) is not None:
                scaled = {key: round(scale * float(whole[key]), 6) for key in ("value", "stderr") if key in whole}
                result[f"{task} {metric}"] = {**scaled, "samples": counts[task]}
    return result


def group_means(groups: Mapping[str, Sequence[str]], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of each group the metrics that all its tasks have, as means over their questions: `mvbench mvbench_accuracy`."""
    results: dict[str, Any] = {}
    for group, tasks in groups.items():
        names = [name.partition(" ")[2] for name in measured if name.partition(" ")[0] == tasks[0]]
        for metric in names:
            parts = [measured[f"{task} {metric}"] for task in tasks if f"{task} {metric}" in measured]
            total = sum(part["samples"] for part in parts)
            if len(parts) == len(tasks):
                mean = sum(part["value"] * part["samples"] for part in parts) / total
                results[f"{group} {metric}"] = {"value": round(mean, 4), "samples": total}
    return results
