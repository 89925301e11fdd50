"""How the metrics of evaluation libraries are told. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunelab.common.core.errors import PrunelabError

OWN = "common/measures/lmms_tasks"  # definitions of tasks of our own for lmms-eval

# lm-evaluation-harness: metrics between 0 and 1, beside LongBench's, which end in `_score`.
HARNESS_SHARES = frozenset({"acc", "acc_norm", "exact_match", "contains"})
HARNESS_PLAIN = frozenset({"rouge1", "rouge2", "rougeL"})  # told as they are, between 0 and 1

# lmms-eval 0.7: shares of right answers become percent; what is not named here (MME's points, WUPS, judges' scores,
# percentages) stays as it is.
SHARES = frozenset({
    "exact_match", "accuracy", "acc", "score", "lvb_acc", "mmmu_acc", "seed_image", "seed_video", "seed_all",
    "pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "average",
    "relaxed_overall", "anls", "mme_realworld_score", "rule_score", "vnbench_score",
    "mme_perception_percent",
})  # fmt: skip
# Scores of captions, which some papers print as they are and others by a hundred; so both are given.
CAPTIONS = frozenset({"coco_CIDEr", "flickr_CIDEr", "nocaps_CIDEr"})
# Other scores that papers print, as the library has them.
OTHERS = frozenset({
    "mme_perception_score", "mme_cognition_score", "gpt_eval_score", "mvbench_accuracy", "mlvu_percetion_score",
    "videomme_perception_score", "mme_total_score", "rule_points", "rule_share", "WUPS",
})  # fmt: skip
# Sums of two scores that papers print as one.
SUMS = {"mme_total_score": ("mme_perception_score", "mme_cognition_score")}
# Scores on another scale: as percent of the most that can be had, as papers take MME's into means, and shares of one.
SCALED = {"mme_perception_percent": ("mme_perception_score", 0.05), "rule_share": ("rule_score", 0.01)}
# Means of questions that count 0 or 1, whose standard error the library gives between 0 and 1 under a name of its own.
COUNTED = frozenset({"pope_accuracy", "mvbench_accuracy"})


def average(results: Mapping[str, Any], names: Sequence[str]) -> float:
    """Mean of the metrics of these names."""
    lacking = [name for name in names if name not in results]
    if lacking:
        raise PrunelabError(f"the harness gave no {', '.join(lacking)}; it gave {', '.join(results)}")
    return round(sum(float(results[name]["value"]) for name in names) / len(names), 4)


def relative(results: Mapping[str, Any], names: Sequence[str], against: Sequence[float]) -> float:
    """Mean of the metrics of these names, each as percent of the number given for it."""
    if len(against) != len(names):
        raise PrunelabError(f"`average` names {len(names)} metrics and `against` {len(against)} numbers; give one each")
    shares = [average(results, [name]) / number for name, number in zip(names, against, strict=True)]
    return round(100 * sum(shares) / len(shares), 4)
