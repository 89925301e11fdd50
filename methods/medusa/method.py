"""Medusa (Cai et al., ICML 2024, arXiv 2401.10774): extra heads guess several tokens ahead from one hidden state.

Head k reads the last hidden state of the target and lists candidates for the token k + 2 places on. The lists fill a
sparse tree of fixed shape, which one forward pass verifies. The heads alone are trained (Medusa-1), so that greedy text
stays the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveInt
from prunelab.common.core.plan import ModelInfo
from prunelab.common.speculative.role import DraftDecoder, Step
from prunelab.common.speculative.trees import Accepted, DraftTree, Path, Template, longest, paths_of
from prunelab.methods.medusa.modules import Heads

# Released trees: the number of children of every node, level by level from the root; what is left out has none.
MC_SIM_7B_63 = (
    (10,),
    (10, 7, 3, 2, 1, 1, 1, 1, 1, 1),
    (10, 3, 2, 1, 1, 1, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (2, *[0] * 22),
)
VICUNA_7B_STAGE2 = (
    (10,),
    (10, 5, 2, 2, 1, 1, 1, 1, 0, 0),
    (9, 4, 2, 1, 1, 1, 0, 0, 0, 0, 3, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0),
    (4, 1, 1, 0, 0, 0, 0, 0, 0, 1, *[0] * 13),
)


def candidates(logits: Tensor, template: Template, most: int) -> Tensor:
    """Draft tokens [T]: each node takes the token of its rank in the list of its depth, `most` tokens long, from logits
    [heads, V]. It does not depend on the nodes above it."""
    best = logits.topk(most).indices
    return best[template.tree.depths - 1, template.ranks]


def typical(tree: DraftTree, logits: Tensor, epsilon: float, alpha: float) -> Accepted:
    """Typical acceptance by the logits [T + 1, V], already divided by the temperature: a token counts where its
    probability exceeds min(epsilon, alpha exp(-entropy)); of the longest paths the likeliest. The token behind it is
    the model's first choice. This is not lossless: where the model is undecided nearly everything is accepted."""
    chances = logits.float().softmax(-1)
    entropy = -(chances * (chances + 1e-5).log()).sum(-1)
    least = (alpha * (-entropy).exp()).clamp(max=epsilon)
    above = tree.parents + 1
    chance = chances[above, tree.tokens]
    likelihood = torch.where(tree.ancestors, chance.log(), 0).sum(1)
    return longest(tree, chance > least[above], logits.argmax(-1), likelihood)


@dataclass
class Memory:
    """The heads, what makes logits of their states, the shape of the trees with the candidates that it takes of a head,
    and the hidden state [D] that the target's last choice was made from; None before the first pass."""

    heads: nn.Module
    output: nn.Module
    template: Template
    most: int
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Medusa(DraftDecoder):
    """Medusa (arXiv 2401.10774). Its learned parts are the heads (`build`).

    The first pass over a prompt has no draft: heads need its hidden states.

    Parameters
    ----------
    heads : int
        K, tokens that are guessed behind the next one. The released tree is four deep and leaves a fifth head idle.
    layers : int
        How often a head applies its block.
    tree : tuple of paths
        Ranks in the lists of the heads on the way to each node, shorter paths first; empty stands for `MC_SIM_7B_63`.
        The budget takes the first nodes.
    sampling : {"lossless", "typical"}
        What `do_sample` accepts: exact samples of the model, or the paper's typical acceptance. Greedy decoding is
        exact either way.
    epsilon, alpha : float
        Thresholds of typical acceptance.
    tied : bool
        Whether heads share the target's output layer, which the published ones start as a copy of.
    """

    heads: PositiveInt = 5
    layers: NonNegativeInt = 1
    tree: tuple[Path, ...] = ()
    sampling: Literal["lossless", "typical"] = "lossless"
    epsilon: NonNegativeFloat = 0.09
    alpha: NonNegativeFloat = 0.3
    tied: bool = False

    name: ClassVar[str] = "medusa"
    reads_hidden: ClassVar[bool] = True

    def build(self, info: ModelInfo) -> Heads:
        return Heads(info.width, 0 if self.tied else info.vocabulary, self.heads, self.layers)

    def start(self, vocabulary: int, **services: Any) -> Memory:
        template = Template.of(tuple(map(tuple, self.tree)) or paths_of(MC_SIM_7B_63))
        depth, most = len(template.bounds) - 1, int(template.ranks.max()) + 1
        if depth > self.heads or most > vocabulary:
            raise PrunelabError(
                f"medusa: the tree is {depth} deep and takes {most} candidates a head; {self.heads} heads and"
                f" {vocabulary} tokens are too few, give another tree"
            )
        output = services["output"] if self.tied else nn.Identity()
        return Memory(services["parts"], output, template.to(torch.get_default_device()), most)

    def begin(self, state: Memory, prompt: Tensor) -> None:
        state.hidden = None

    def draft(self, state: Memory, tokens: Tensor, budget: Budget) -> DraftTree:
        template = state.template.first(budget.count(len(state.template.parents)))
        if state.hidden is None or not len(template.ranks):
            return DraftTree(tokens[:0], tokens[:0])
        logits = state.output(state.heads(state.hidden))
        return template.tree.refill(candidates(logits, template, state.most))

    def accept(self, tree: DraftTree, logits: Tensor, rng: torch.Generator | None = None) -> Accepted:
        if rng is None or self.sampling == "lossless":
            return super().accept(tree, logits, rng)
        return typical(tree, logits, self.epsilon, self.alpha)

    def observe(self, state: Memory, step: Step) -> None:
        assert step.hidden is not None
        rows = F.pad(step.accepted.nodes + 1, (1, 0))
        state.hidden = step.hidden[rows[-1:]].squeeze(0)
