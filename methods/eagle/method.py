"""EAGLE (Li et al., ICML 2024, arXiv 2401.15077) and EAGLE-2 (EMNLP 2024, arXiv 2406.16858).

One decoder layer predicts the target's next feature (what its output layer reads) from the last one and the token that
was drawn from it; the target's output layer makes tokens of what it predicts. EAGLE drafts a tree of fixed shape,
EAGLE-2 one that grows where the draft is sure of itself. A pass of the target verifies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt
from prunelab.common.core.plan import ModelInfo
from prunelab.common.core.selection import descending
from prunelab.common.speculative.role import DraftDecoder, Step
from prunelab.common.speculative.trees import DraftTree, Path, Template, paths_of
from prunelab.methods.eagle.memory import Level, Memory, levels_of
from prunelab.methods.eagle.modules import DraftHead, inner_width

# The released tree: the number of children of every node, level by level from the root.
MC_SIM_7B_25 = ((4,), (3, 2, 2, 1), (3, 2, 2, 1, 0, 0, 0, 0), (3, *[0] * 7), (2, 0, 0))


def static_tree(state: Memory, root: Tensor, template: Template, levels: Sequence[Level], most: int) -> DraftTree:
    """EAGLE: each node takes the token of its rank among the `most` candidates behind its parent. root: [1, D]."""
    out, cache, tokens = root, state.cache, []
    for depth, level in enumerate(levels, 1):
        tokens.append(state.output(out).topk(most).indices[level.above, level.ranks])
        if depth < len(levels):
            assert cache is not None
            out, cache = state.beyond(depth, out[level.above[level.inner]], tokens[-1][level.inner], level.seen, cache)
    return template.tree.refill(torch.cat(tokens))


def dynamic_tree(state: Memory, root: Tensor, width: int, depth: int, nodes: int) -> DraftTree:
    """EAGLE-2: on each level the `width` nodes of largest confidence, the product of the draft's probabilities on the
    way to them, get `width` candidates each; of all candidates the `nodes` of largest confidence are the tree. root:
    [1, D]."""
    cache, logs = state.cache, state.output(root).float().log_softmax(-1)
    score, token = (x[0] for x in logs.topk(width))
    parent = torch.full_like(token, -1)
    every = [(token, score, parent)]
    chosen, places = token, torch.arange(width, device=token.device)
    own = torch.eye(width, dtype=torch.bool, device=token.device)
    features, seen, count = root.expand(width, -1), own, width
    for level in range(1, depth):
        assert cache is not None
        out, cache = state.beyond(level, features, chosen, seen, cache)
        best = state.output(out).float().log_softmax(-1).topk(width)
        reached, token = (best.values + score.unsqueeze(1)).flatten(), best.indices.flatten()
        every.append((token, reached, places.repeat_interleave(width)))
        score, index = reached.topk(width)
        above = index.div(width, rounding_mode="floor")
        chosen, places, features = token[index], count + index, out[above]
        seen, count = torch.cat([seen[above], own], 1), count + len(token)
    tokens, scores, parents = (torch.cat(x) for x in zip(*every, strict=True))
    kept = descending(scores)[:nodes].sort().values  # parents score no less, and stand before
    now = torch.full_like(parents, -1)
    now[kept] = torch.arange(len(kept), device=kept.device)
    above = parents[kept]
    return DraftTree(tokens[kept], torch.where(above < 0, above, now[above]))


@dataclass(frozen=True)
class Eagle(DraftDecoder):
    """EAGLE (arXiv 2401.15077) and EAGLE-2 (arXiv 2406.16858), reconstructed. Its learned part is a layer (`build`).

    The first pass over a prompt has no draft: the layer needs its features.

    Parameters
    ----------
    tree : {"dynamic", "static"}
        EAGLE-2's or EAGLE's.
    nodes, depth, width : int
        Of the dynamic tree: drafts in all, levels, and how many nodes of a level get as many candidates each.
    shape : tuple of paths
        Of the static tree: ranks among the candidates on the way to each node, shorter paths first; empty stands for
        `MC_SIM_7B_25`. The budget takes the first nodes of it, or the surest of the dynamic one.
    inner : int
        Width of the layer's MLP; 0 is Llama's for the target's width.
    base : float
        Of the rotary positions.
    eps : float
        Of the norm.
    """

    tree: Literal["dynamic", "static"] = "dynamic"
    nodes: PositiveInt = 58
    depth: PositiveInt = 6
    width: PositiveInt = 10
    shape: tuple[Path, ...] = ()
    inner: NonNegativeInt = 0
    base: PositiveFloat = 10000.0
    eps: PositiveFloat = 1e-6

    name: ClassVar[str] = "eagle"
    reads_hidden: ClassVar[bool] = True

    def build(self, info: ModelInfo) -> DraftHead:
        inner = self.inner or inner_width(info.width)
        return DraftHead(info.width, info.vocabulary, info.heads, inner, self.base, self.eps)

    def start(self, vocabulary: int, **services: Any) -> Memory:
        template = Template.of(tuple(map(tuple, self.shape)) or paths_of(MC_SIM_7B_25))
        most = int(template.ranks.max()) + 1 if self.tree == "static" else min(self.width, vocabulary)
        if most > vocabulary:
            raise PrunelabError(f"eagle: the tree takes {most} candidates of {vocabulary} tokens; give another `shape`")
        return Memory(services["parts"], services["output"], template.to(torch.get_default_device()), most)

    def begin(self, state: Memory, prompt: Tensor) -> None:
        state.features = state.cache = None
        state.done = 0

    def draft(self, state: Memory, tokens: Tensor, budget: Budget) -> DraftTree:
        state.length = len(tokens)
        root = state.predicted(tokens)
        dynamic = self.tree == "dynamic"
        count = budget.count(self.nodes if dynamic else len(state.template.parents))
        if root is None or not count:
            return DraftTree(tokens[:0], tokens[:0])
        if dynamic:
            return dynamic_tree(state, root, state.most, self.depth, count)
        template = state.template.first(count)
        if count not in state.levels:
            state.levels[count] = levels_of(template)
        return static_tree(state, root, template, state.levels[count], state.most)

    def observe(self, state: Memory, step: Step) -> None:
        assert step.hidden is not None and step.earlier is not None
        accepted = step.hidden[step.accepted.nodes + 1]
        state.update(step.earlier, torch.cat([step.hidden[:1], accepted]))
