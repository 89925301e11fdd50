"""MMBench-CN's development set, read by rule as the library reads the English one in `mmbench_en_dev_static`."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks.mmbench import cn_utils

seen, question, answered = (
    cn_utils.mmbench_doc_to_visual,
    cn_utils.mmbench_doc_to_text,
    cn_utils.mmbench_process_results,
)


def share(results: list[dict[str, Any]]) -> float:
    """Questions that are right in all their orders of options, of all."""
    return float(cn_utils.mmbench_evaluator.eval_result(results, eval_method="static")[0])


def process(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """What `share` reads of an answer."""
    return {"accuracy": answered(doc, results)["gpt_eval_score"]}
