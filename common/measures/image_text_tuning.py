"""Fine-tuning of a pruned model of images and texts on its own task, as BLIP's authors tune it: captions by their next
words, retrieval by contrast with a momentum model (Li et al., NeurIPS 2021, arXiv 2107.07651) and by matching."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.data.image_text import Example
from prunelab.common.training import trainer
from prunelab.common.training.batches import Batches
from prunelab.common.training.recipe import Recipe

if TYPE_CHECKING:
    from prunelab.common.tasks.image_text import ImageText

TEMPERATURES = (0.001, 0.5)  # between which the learned one stays
PARTS = ("vision_model", "vision_proj", "text_encoder", "text_proj")  # of which the momentum model has copies
STRENGTH = 15  # of the two random changes that a picture goes through, of torchvision's 30: a half


def augmented() -> Any:
    """What a training picture goes through: a random cut of at least half of it, a flip, and two changes of colour or
    shape at half strength."""
    from torchvision.transforms import v2

    changes = v2.RandAugment(num_ops=2, magnitude=STRENGTH, interpolation=v2.InterpolationMode.BILINEAR)
    cut = v2.RandomResizedCrop(384, scale=(0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([cut, v2.RandomHorizontalFlip(), changes])


class Contrast(nn.Module):
    """The model with what its retrieval loss needs besides: a learned temperature, a second model that follows slowly,
    and queues of the features that this one gave, with the numbers of their pictures."""

    images: Tensor
    texts: Tensor
    numbers: Tensor

    def __init__(self, task: Any, settings: ImageText.Settings) -> None:
        super().__init__()
        self.model: Any = task.model
        self.momentum, self.soft = settings.momentum, settings.soft
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.slow = nn.ModuleDict({part: copy.deepcopy(getattr(self.model, part)) for part in PARTS})
        self.slow.requires_grad_(False)
        width = self.model.vision_proj.out_features
        self.register_buffer("images", F.normalize(torch.randn(settings.queue, width), dim=-1))
        self.register_buffer("texts", F.normalize(torch.randn(settings.queue, width), dim=-1))
        self.register_buffer("numbers", torch.full((settings.queue,), -1))
        self.place = 0

    def train(self, mode: bool = True) -> Contrast:
        super().train(mode)
        self.slow.train(mode)
        return self

    def features(self, parts: Any, pixels: Tensor, read: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, S, D] of pictures, and features [B, F] of pictures and texts, of length 1."""
        seen = parts["vision_model"](pixel_values=pixels).last_hidden_state
        text = parts["text_encoder"](**read).last_hidden_state[:, 0]
        own = F.normalize(parts["vision_proj"](seen[:, 0]), dim=-1)
        return seen, own, F.normalize(parts["text_proj"](text), dim=-1)

    def losses(self, task: Any, pixels: Tensor, read: Mapping[str, Tensor], numbers: Tensor, soft: float,
               generator: torch.Generator) -> Tensor:  # fmt: skip
        """The contrastive and the matching loss of a batch of pairs, and the queues brought on."""
        with torch.no_grad():
            self.temperature.clamp_(*TEMPERATURES)
        seen, own, texts = self.features({part: getattr(self.model, part) for part in PARTS}, pixels, read)
        known = torch.cat([numbers, self.numbers])
        truth = (numbers[:, None] == known).float()
        truth = truth / truth.sum(1, keepdim=True)
        with torch.no_grad():
            for part in PARTS:
                for slow, fast in zip(
                    self.slow[part].parameters(), getattr(self.model, part).parameters(), strict=True
                ):
                    slow.lerp_(fast, 1 - self.momentum)
            _, slow_images, slow_texts = self.features(self.slow, pixels, read)
            all_images, all_texts = torch.cat([slow_images, self.images]), torch.cat([slow_texts, self.texts])
            wanted = [
                soft * F.softmax(one @ others.T / self.temperature, 1) + (1 - soft) * truth
                for one, others in ((slow_images, all_texts), (slow_texts, all_images))
            ]
        contrast = torch.stack([
            F.cross_entropy(one @ others.T / self.temperature, target)
            for one, others, target in ((own, all_texts, wanted[0]), (texts, all_images, wanted[1]))
        ]).mean()  # fmt: skip
        self._keep(slow_images, slow_texts, numbers)
        likeness = own @ texts.T / self.temperature
        same = numbers[:, None] == numbers
        return contrast + task.told_apart(task.marked(read), seen, likeness, same, generator)

    def _keep(self, images: Tensor, texts: Tensor, numbers: Tensor) -> None:
        places = torch.arange(self.place, self.place + len(numbers), device=numbers.device) % len(self.numbers)
        self.images[places], self.texts[places], self.numbers[places] = images, texts, numbers
        self.place = (self.place + len(numbers)) % len(self.numbers)


@dataclass
class Job:
    """The training, as the loop sees it. epoch: its steps."""

    task: Any
    examples: Sequence[Example]
    settings: ImageText.Settings
    recipe: Recipe
    seed: int
    epoch: int
    name: str = "fine-tuning"
    numbers: Any = field(default_factory=count)

    def __post_init__(self) -> None:
        self.batches = Batches(range(len(self.examples)), self.recipe.batch, self.seed)
        self.augment = augmented()

    def build(self) -> nn.Module:
        model: nn.Module = self.task.model
        return Contrast(self.task, self.settings).to(self.task.device) if hasattr(model, "itm_head") else model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.recipe.optimizer(model)

    def loss(self, model: Any, progress: float, generator: torch.Generator) -> Tensor:
        chosen = [self.examples[i] for i in self.batches.indices(next(self.numbers))]
        if not hasattr(model, "slow"):
            loss: Tensor = self.task.loss(self.task.call(chosen, self.augment))
            return loss
        soft = self.settings.soft * min(1.0, progress * self.recipe.steps / self.epoch)  # it rises in the first epoch
        pixels = self.task.seen([e.pictures[0] for e in chosen], self.augment)
        numbers = torch.tensor([e.of for e in chosen], device=pixels.device)
        result: Tensor = model.losses(
            self.task, pixels, self.task.texts([e.texts[0] for e in chosen]), numbers, soft, generator
        )
        return result

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        return {}


def tune(task: Any, examples: Sequence[Example], settings: ImageText.Settings, seed: int) -> None:
    """Train the task's model in place on training examples. What follows is that of the last epoch."""
    epoch = max(1, math.ceil(len(examples) / settings.tuned))
    steps = settings.epochs * epoch
    recipe = Recipe(
        steps=steps, batch=settings.tuned, rate=settings.rate, warmup=0.0, betas=(0.9, 0.999), decay=settings.decay,
        clip=math.inf, check_every=steps,
    )  # fmt: skip
    accelerator = None
    if task.device.type == "cuda":
        from accelerate import Accelerator  # type: ignore[import-untyped]

        accelerator = Accelerator()
    job = Job(task, examples, settings, recipe, seed, epoch)
    trainer.run(job, recipe, None, {"seed": seed}, accelerator=accelerator, progress=False)
