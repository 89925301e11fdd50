"""DSIR: hashed n-grams, importance weights, and the documents drawn with the stored noise or the stored seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from prunelab.common.core.budget import Budget
from prunelab.common.data_selection.ngrams import HashedNgrams, bucket_of, tokens
from prunelab.methods.dsir.method import DSIR, distribution, gumbel_top_k, log_ratio, log_weights

TOLERANCE = {"out_": (1e-6, 1e-6)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    return features(inputs, wanted) if "in_texts" in inputs else selected(inputs)


def features(inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    texts, found = inputs["in_texts"].tolist(), {}
    for name in wanted:
        if match := re.fullmatch(r"out_counts_n(\d+)_b(\d+)", name):
            bags = HashedNgrams(int(match[1]), int(match[2]))
            found[name] = np.stack([bags.counts([text]) for text in texts])
        elif match := re.fullmatch(r"out_hash_(\d+)", name):
            found[name] = np.array([bucket_of(text, int(match[1])) for text in inputs["in_strings"].tolist()])
        elif name == "out_tokens":
            found[name] = np.array([" ".join(tokens(text)) for text in texts])
    return found


def selected(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    raw = inputs["in_raw"].tolist()
    targets = [inputs[name].tolist() for name in sorted(inputs) if re.fullmatch(r"in_target\d+", name)]
    proportions = inputs.get("in_target_proportions", np.empty(0)).tolist()
    method = DSIR(
        ngrams=int(inputs["in_ngrams"]), buckets=int(inputs["in_num_buckets"]), smoothing=float(inputs["in_smoothing"]),
        min_length=int(inputs["in_min_example_length"]), top_k=bool(inputs["in_top_k"]),
        separate=bool(inputs["in_separate"]), proportions=tuple(np.round(proportions, 6).tolist()) or None,
    )  # fmt: skip
    counts, q = [method.total(target) for target in targets], method.total(raw)
    fitted = method.fit(q, counts)
    apart = counts if method.separate else [np.sum(counts, axis=0)]
    p = np.stack([distribution(target, method.smoothing) for target in apart])
    assert np.allclose(log_ratio(p, distribution(q)), fitted)
    scores, k = method.scores(method.read(raw), fitted), int(inputs["in_num_to_sample"])
    rng = np.random.RandomState(int(inputs["in_seed"]))
    chosen = method.choose(scores, Budget(k, "count"), rng, counts)
    valid = np.isfinite(scores[:, 0])
    noise = inputs["in_gumbel"]
    if noise.size:  # the stored noise says the same as the seed
        best = gumbel_top_k(scores[valid, 0], k, noise[0])
        assert np.array_equal(np.flatnonzero(valid)[best], chosen)
    weights = log_weights(method.features.bags(raw), fitted)
    squeeze = (lambda a: a) if method.separate else (lambda a: a.squeeze())
    return {
        "out_raw_probs": distribution(q), "out_target_probs": squeeze(p), "out_log_diff": squeeze(fitted),
        "out_log_weights": squeeze(weights), "out_valid": valid, "out_selected": np.isin(np.arange(len(raw)), chosen),
        "out_length": method.features.words(method.features.bags(raw).sizes).astype(np.float32),
        "out_target_proportions": np.array(proportions),
    }  # fmt: skip
