"""Scores of a language model, its weights, cache or tokens pruned or not, on the tasks of lm-evaluation-harness (the
extra `evaluation`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from prunelab.common import kv_cache
from prunelab.common.apply import apply
from prunelab.common.catalogue import hub
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments.run import Run
from prunelab.common.kv_cache.role import CachePruner
from prunelab.common.models import devices, loading
from prunelab.common.tasks.perplexity import prune, sizes
from prunelab.common.weights.role import WeightPruner

BATCH = 8
SHARES = ("acc", "acc_norm", "exact_match")  # metrics between 0 and 1, beside LongBench's, which end in `_score`


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics in percent, named as the harness names them: `boolq acc`, `piqa acc_norm`, `gsm8k exact_match,
    strict-match`, `longbench_trec classification_score` and so on, with its standard errors; `average`, the mean of
    those that the setting `average` lists; and what `sizes` finds.

    What prunes caches or tokens acts while the model generates; tasks that only compare likelihoods use no cache.

    Settings: `tasks`; `shots`, worked examples in each prompt (those of the task's own definition); `limit`, questions
    of each task (all); `batch`; `length` and `calibration` of the calibration set; `seed`.
    """
    lm_eval, wrapper = harness()
    model, tokenizer = loading.language(run.ids["model"], config)
    model = devices.place(model, devices.of(run.scale), half=True)
    out, calibrated = sizes(model), ""
    context: Any = nullcontext()
    if run.method is not None:
        method = registry.create(run.method, **run.options)
        if isinstance(method, WeightPruner):
            report, calibrated = prune(run, config, model, tokenizer)
            out = sizes(model, report)
        else:
            put_to_work = kv_cache.applied if isinstance(method, CachePruner) else apply
            context = put_to_work(method, model, Budget.parse(str(run.budget)), seed=int(run.settings.get("seed", 0)))  # type: ignore[arg-type]
    asked = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=int(run.settings.get("batch", BATCH)))
    with context:
        found = lm_eval.simple_evaluate(
            model=asked,
            tasks=located(run.settings["tasks"], run.ids, config),
            num_fewshot=run.settings.get("shots"),
            limit=run.settings.get("limit"),
            log_samples=False,
        )
    measured = percentages(found["results"])
    protocol = "; ".join(part for part in (f"lm-evaluation-harness {lm_eval.__version__}", calibrated) if part)
    for metric in measured.values():
        metric["protocol"] = protocol
    if "average" in run.settings:
        measured["average"] = {"value": average(measured, run.settings["average"]), "protocol": protocol}
    return {**measured, **out}


def located(tasks: Sequence[str], ids: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
    """Tasks of the harness that read their data from where they were downloaded at their locked revision, as members
    of a group, which alone may change what a task says; those whose data the run does not name are left as they are."""
    found: list[Any] = list(tasks)
    for name, data in ids.items():
        if name.startswith("data of "):
            begins = tuple(f"{task}_" for task in data["tasks"])
            place = str(hub.folder(data, "dataset", config))
            for i, task in enumerate(tasks):
                if f"{task}_".startswith(begins):
                    found[i] = {"task": task, "dataset_path": place}
    return found if found == list(tasks) else [{"group": "prunelab", "task": found}]


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


def percentages(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of the harness's results by task, whose keys are `metric,filter`, as percent. The filter `none` is not
    named; what is no share of right answers is left out."""
    found: dict[str, Any] = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if metric not in SHARES and not metric.endswith("_score"):
                continue
            name = f"{task} {metric}" + ("" if chosen in ("", "none") else f",{chosen}")
            found[name] = {"value": round(100 * float(value), 4)}
            error = metrics.get(f"{metric}_stderr,{chosen}")
            if isinstance(error, float):  # it is the text N/A where there is none
                found[name]["stderr"] = round(100 * error, 4)
    return found


def average(found: Mapping[str, Any], names: Sequence[str]) -> float:
    """Mean of the metrics of these names."""
    lacking = [name for name in names if name not in found]
    if lacking:
        raise PrunelabError(f"the harness gave no {', '.join(lacking)}; it gave {', '.join(found)}")
    return round(sum(float(found[name]["value"]) for name in names) / len(names), 4)
