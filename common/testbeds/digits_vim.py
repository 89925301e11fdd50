"""The vision Mamba that names a digit in a scene (`prunelab.common.data.digits`): Vim, class token in the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.backbones.vim import Vim
from prunelab.common.core.plan import take
from prunelab.common.data import digits
from prunelab.common.testbeds.base import Testbed
from prunelab.common.testbeds.digits_vit import sines
from prunelab.common.testbeds.tuned import Tuned

QUICK, FULL, BATCH, TEST_SEED = 500, 4000, 250, 1


@dataclass(frozen=True)
class DigitsVim(Testbed):
    """A third as deep as Vim-T and Vim-S, on 101 tokens.

    A scan passes on little of what it met far away before it has learned what to keep: on full scenes the loss stays
    at chance for many hundreds of steps. So training goes from easy to hard. Until the share `still` of it, digits are
    in the middle, beside the class token, on empty ground. Until the share `ramp` they move out to where they belong
    and clutter grows to full contrast; and the tokens on the digit are asked for its name too, less and less, so that
    there is something to fetch. From then on the class token alone answers, on full scenes.

    smoothing: of the labels.
    """

    steps: int = 1500
    batch: int = 32
    rate: float = 3e-3
    width: int = 32
    depth: int = 8
    states: int = 8
    still: float = 0.04
    ramp: float = 0.24
    smoothing: float = 0.05

    name: ClassVar[str] = "digits_vim"
    needs: ClassVar[tuple[str, ...]] = ("torch", "scikit-learn")

    def build(self) -> nn.Module:
        model = Vim(
            size=digits.GRID * digits.CELL, patch=digits.CELL, channels=1, classes=10,
            width=self.width, depth=self.depth, states=self.states,
        )  # fmt: skip
        # Places are learned from here on; starting from sines saves the time to find out who is whose neighbour.
        middle, table = model.class_place, 0.5 * sines(self.width, digits.GRID)
        with torch.no_grad():
            model.pos_embed.copy_(torch.cat([table[:middle], torch.zeros(1, self.width), table[middle:]]))
        return model

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        assert isinstance(model, Vim)
        ease = min(1.0, max(0.0, (self.ramp - progress) / (self.ramp - self.still)))
        x, y = digits.scenes("train", self.batch, generator, 1 - ease, deformed=ease < 0.7)
        if ease == 0:
            return self.entropy(model(x), y)
        tokens: list[Tensor] = []
        x = pulled(x, ease)
        hook = model.read.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
        try:
            loss = self.entropy(model(x), y)
        finally:
            hook.remove()
        hint = model.head(take(tokens[0], inked(x, model.class_place)))  # [B, 4, 10]
        return loss + ease * self.entropy(hint.flatten(0, 1), y.repeat_interleave(4))

    def entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        count = QUICK if quick else FULL
        x, y = digits.scenes("test", count, TEST_SEED)
        right = sum(int((model(x[i : i + BATCH]).argmax(1) == y[i : i + BATCH]).sum()) for i in range(0, count, BATCH))
        return {"accuracy": right / count, "scenes": count}


def place(scenes: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column [B] of the upper left of the four cells with most ink: the digit's, where clutter is faint."""
    ink = F.avg_pool2d(scenes, 2 * digits.CELL, stride=digits.CELL).flatten(1).argmax(1)
    return ink // (digits.GRID - 1), ink % (digits.GRID - 1)


def inked(scenes: Tensor, middle: int) -> Tensor:
    """Tokens [B, 4] on the digit, of a sequence with the class token at `middle`."""
    row, column = place(scenes)
    cells = (row * digits.GRID + column).unsqueeze(1) + torch.tensor([0, 1, digits.GRID, digits.GRID + 1])
    return cells + (cells >= middle).long()


def pulled(scenes: Tensor, share: float) -> Tensor:
    """Scenes [B, 1, S, S] shifted by whole cells, over their edges, until the digit has gone that share of its way to
    the middle."""
    cells = torch.arange(scenes.shape[-1])
    middle = (digits.GRID - 2) // 2
    row, column = (
        (cells - digits.CELL * ((middle - at) * share).round().long().unsqueeze(1)) % len(cells) for at in place(scenes)
    )
    return scenes[torch.arange(len(scenes)).view(-1, 1, 1), 0, row.unsqueeze(2), column.unsqueeze(1)].unsqueeze(1)


# -- fine-tuned with pruning on ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DigitsVimNaive(Tuned):
    """After a vision transformer's criterion and plain removal.

    The recipe of vision-Mamba pruning's authors, scaled. They go on for 30 epochs, a tenth of the training behind the
    weights, at a rate of 5e-6 to 1e-5, with hardly any weight decay and no drop path. Here it is a fifth of the steps
    at a tenth of the peak rate and no weight decay; warm-up and cosine are the usual ones.
    """

    steps: int = 300
    batch: int = 32
    rate: float = 3e-4
    decay: float = 0.0
    method: str = "cls_similarity(layers=(2, 4, 6), positions='renumber')"
    budget: str = "0.5"

    name: ClassVar[str] = "digits_vim_naive"
    needs: ClassVar[tuple[str, ...]] = DigitsVim.needs

    def base(self) -> Testbed:
        return DigitsVim(batch=self.batch)


@dataclass(frozen=True)
class DigitsVimHold(DigitsVimNaive):
    """After vision-Mamba pruning without alignment: a copied state, which is plain removal."""

    method: str = "vim_token_pruning(layers=(2, 4, 6), align='hold')"

    name: ClassVar[str] = "digits_vim_hold"


@dataclass(frozen=True)
class DigitsVimDecay(DigitsVimNaive):
    """After vision-Mamba pruning with states that decay over the gaps."""

    method: str = "vim_token_pruning(layers=(2, 4, 6), align='decay')"

    name: ClassVar[str] = "digits_vim_decay"


@dataclass(frozen=True)
class DigitsVimOriginal(DigitsVimNaive):
    """After vision-Mamba pruning with convolutions that see tokens at their places."""

    method: str = "vim_token_pruning(layers=(2, 4, 6), align='original')"

    name: ClassVar[str] = "digits_vim_original"
