"""Medusa and REST lay a draft tree out as the routes from its root to its leaves, all padded to one length.

The padding points to the last node and holds token 0, so that the released code goes on accepting behind the end of a
short route where the model says 0 at the last node. Our trees have no padding; here it is added, as nodes of its own,
to follow the stored cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunelab.common.speculative.trees import Accepted, DraftTree


@dataclass(frozen=True)
class Routes:
    """Nodes [R, D + 1] from the root (0) to each leaf, padded with -1; the last leaf of the tree comes first."""

    tree: DraftTree
    nodes: Tensor

    @classmethod
    def of(cls, tree: DraftTree) -> Routes:
        count = len(tree.tokens)
        leaves = sorted(set(range(count)) - set(tree.parents.tolist()), reverse=True)
        nodes = torch.full((len(leaves), int(tree.depths.max()) + 1), -1)
        for row, leaf in enumerate(leaves):
            route = torch.cat([torch.zeros(1), 1 + tree.ancestors[leaf].nonzero().squeeze(1)])
            nodes[row, : len(route)] = route
        return cls(tree, nodes)

    def layout(self) -> dict[str, np.ndarray]:
        count = len(self.tree.tokens)
        mask = torch.eye(count + 1, dtype=torch.long)
        mask[:, 0] = 1
        mask[1:, 1:] = self.tree.ancestors
        return {
            "out_attn_mask": mask.numpy(),
            "out_position_ids": torch.cat([torch.zeros(1, dtype=torch.long), self.tree.depths]).numpy(),
            "out_retrieve_indices": self.nodes.numpy(),
        }

    def verified(
        self, root: Tensor, logits: Tensor, accept: Callable[[DraftTree, Tensor], Accepted]
    ) -> tuple[Accepted, Tensor, dict[str, np.ndarray]]:
        """What is accepted of the padded tree behind the root [1] given logits [T + 1, V], and the nodes [A] that this
        means in the tree, -2 for padding."""
        ids = torch.cat([root, self.tree.tokens])
        candidates = torch.where(self.nodes >= 0, ids[self.nodes], 0)
        rows, depth = len(self.nodes), self.nodes.shape[1] - 1
        chains = torch.arange(rows * depth).view(rows, depth) - 1
        chains[:, 0] = -1
        padded = DraftTree(candidates[:, 1:].flatten(), chains.flatten())
        accepted = accept(padded, torch.cat([logits[:1], logits[self.nodes[:, 1:].flatten()]]))
        best = int(accepted.nodes[0]) // depth if len(accepted.nodes) else 0
        nodes = self.nodes[best, 1 : 1 + len(accepted.nodes)] - 1
        return (
            accepted,
            nodes,
            {
                "out_candidates": candidates.numpy(),
                "out_tree_candidates": ids.unsqueeze(0).numpy(),
                "out_best_candidate": np.array(best),
                "out_accept_length": np.array(len(accepted.nodes)),
            },
        )
