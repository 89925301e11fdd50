"""Selective Context: sentences, self-information of units, and shortened texts, with stored pieces and units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prunelab.common.core.budget import Budget
from prunelab.methods.selective_context.method import SelectiveContext, sentences, threshold

TOLERANCE = {"out_": (1e-9, 1e-9)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    text, budget = str(inputs["in_text"]), Budget(1 - float(inputs["hp_reduce_ratio"]))
    found = sentences(text)
    numbers = {sentence: number for number, sentence in enumerate(found)}

    def information(sentence: str):
        own = inputs["in_token_sentence"] == numbers[sentence]
        return inputs["in_tokens"][own].tolist(), inputs["in_self_info"][own].tolist()

    def phrases(sentence: str):
        return inputs["in_units"][inputs["in_unit_sentence"] == numbers[sentence]].tolist()

    services = {"information": information, "phrases": phrases}
    read = {level: SelectiveContext(level).read(text, services) for level in ("phrase", "sentence", "token")}
    level = {"phrase": "phrase", "sent": "sentence", "token": "token"}[str(inputs["hp_level"])]
    method, context = SelectiveContext(level), read[level]
    kept = method.take(context, method.ranking(context), budget)
    return {
        "out_sentences": np.array(found),
        "out_sentence_info": read["sentence"].information,
        "out_unit_info": read["phrase"].information,
        "out_threshold": np.array(threshold(context, budget)),
        "out_masked": np.array([unit for i, unit in enumerate(context.units) if i not in kept]),
        "out_context": np.array(method.compress(text, budget, services)),
    }
