"""GLUE (Wang et al., arXiv 1804.07461): sentences or pairs of them with a class, or a likeness, each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunelab.common.catalogue import hub
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.optional import optional

# Columns of texts, and classes; none where the label is a number from 0 to 5.
TASKS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "mnli": (("premise", "hypothesis"), 3), "qnli": (("question", "sentence"), 2),
    "qqp": (("question1", "question2"), 2), "rte": (("sentence1", "sentence2"), 2), "sst2": (("sentence",), 2),
    "mrpc": (("sentence1", "sentence2"), 2), "cola": (("sentence",), 2), "stsb": (("sentence1", "sentence2"), 0),
}  # fmt: skip
Split = tuple[list[tuple[str, ...]], list[float]]


def load(identity: Mapping[str, Any], config: Mapping[str, Any], task: str, split: str) -> Split:
    """Texts and labels of a task's `train` or `validation`, of MNLI the one whose sources it was trained on."""
    folder = hub.folder(identity, "dataset", config)
    name = "validation_matched" if (task, split) == ("mnli", "validation") else split
    paths = sorted((folder / task).glob(f"{name}-*.parquet"))
    columns, classes = TASKS[task]
    library = optional("pyarrow.parquet", "Parquet")
    try:
        rows = [row for path in paths for row in library.read_table(path).to_pylist()]
        texts = [tuple(str(row[column]) for column in columns) for row in rows]
        labels = [float(row["label"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrunelabError(f"{folder}/{task} is no part of GLUE ({type(error).__name__}: {error})") from None
    if not rows or (classes and not set(labels) <= set(range(classes))):
        raise PrunelabError(f"{folder} holds no labelled {task}/{name}-*.parquet; download it again")
    return texts, labels
