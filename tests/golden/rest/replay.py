"""REST: the trees that the authors' retriever keeps, and one step of tree attention and verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.speculative import trees
from prunelab.common.speculative.trees import EMPTY
from prunelab.methods.rest.method import Datastore, affordable, arrange, prefixes
from tests.golden.routes import Routes

ABSENT = 100  # the token that the authors draft where nothing was found


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    return retrieved(inputs) if case.startswith("store") else verified(inputs)


def retrieved(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    documents = torch.from_numpy(inputs["in_entries"]).split(inputs["in_entry_lengths"].tolist())
    store = Datastore.of(documents, int(inputs["hp_max_chunk_len"]))
    length, choices = int(inputs["hp_long"]), int(inputs["hp_choices"])
    nodes, queries = [], []
    for number, row in enumerate(torch.from_numpy(inputs["in_queries"])):
        query = row[row != EMPTY]
        kept = prefixes(store.continuations(query, [len(query)], length, int(inputs["hp_k"])))[0][:choices]
        tree = arrange(kept[affordable(kept, choices)])
        nodes += [(*path, *[EMPTY] * (length - len(path))) for path in sorted(tree.paths.tolist())]
        queries += [number] * len(tree.tokens)
    return {"out_nodes": np.array(nodes), "out_nodes_query": np.array(queries)}


def verified(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors count the root as node 0. They number the tokens of a depth; the largest number of tokens at any
    depth separates the depths in their list of candidates."""
    paths = torch.from_numpy(inputs["in_paths"])
    paths = torch.where(paths < 0, EMPTY, paths) if len(paths) else torch.tensor([[ABSENT]])
    tree = arrange(paths)
    root = torch.from_numpy(inputs["in_last_logits"])[0].argmax(-1)
    routes = Routes.of(tree)
    _, _, step = routes.verified(root, torch.from_numpy(inputs["in_tree_logits"])[0], trees.greedy)
    return routes.layout() | step | {"out_tree_indices": numbers(paths, tree.paths, tree.depths)}


def numbers(paths: Tensor, nodes: Tensor, depths: Tensor) -> np.ndarray:
    seen = [list(dict.fromkeys(t for t in column if t != EMPTY)) for column in paths.T.tolist()]
    width = max(map(len, seen))
    return np.array(
        [0] + [1 + width * (d - 1) + seen[d - 1].index(path[d - 1]) for d, path in zip(depths.tolist(), nodes.tolist())]
    )
