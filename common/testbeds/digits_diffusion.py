"""The text-to-image model that draws the handwritten digit a caption names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.backbones.digit_diffusion import DigitDiffusion
from prunelab.common.data import captions, digits
from prunelab.common.metrics.generation import frechet_distance, recogniser
from prunelab.common.testbeds.base import Testbed

QUICK, FULL, STEPS, GUIDANCE = 100, 1000, 12, 2.0


@dataclass(frozen=True)
class DigitsDiffusion(Testbed):
    """Trained on deformed digits with captions in a few forms, of which a share is left out, for guidance.

    left_out: that share.
    """

    steps: int = 3000
    batch: int = 64
    rate: float = 2e-3
    text: int = 32
    layers: int = 3
    width: int = 24
    heads: int = 4
    left_out: float = 0.1
    check_every: int = 500
    save_every: int = 200

    name: ClassVar[str] = "digits_diffusion"
    needs: ClassVar[tuple[str, ...]] = ("torch", "transformers", "scikit-learn")
    stored: ClassVar[torch.dtype] = torch.float16

    def build(self) -> nn.Module:
        sizes = {"text": self.text, "layers": self.layers, "width": self.width, "heads": self.heads}
        return DigitDiffusion(len(captions.WORDS), captions.LENGTH, **sizes)

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        assert isinstance(model, DigitDiffusion)
        images, labels = digits.digits("train")
        rows = torch.randint(len(labels), (self.batch,), generator=generator)
        pictures = 2 * digits.deform(images[rows], generator).unsqueeze(1) - 1
        ids = captions.encoded([c.text for c in captions.of_digits(labels[rows], generator)])
        ids[torch.rand(self.batch, generator=generator) < self.left_out] = 0
        return model.loss(pictures, ids, generator)

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        assert isinstance(model, DigitDiffusion)
        count = QUICK if quick else FULL
        rng = torch.Generator().manual_seed(1)
        captioned = captions.of_digits(torch.arange(count) % 10, rng)
        pictures = model.generate(captions.encoded([c.text for c in captioned]), STEPS, GUIDANCE, rng)
        named = recogniser()(pictures)
        real, _ = captions.real_digits()
        right = float((named == torch.tensor([c.of for c in captioned])).float().mean())
        return {"right": right, "frechet": frechet_distance(pictures.flatten(1), real.flatten(1)), "pictures": count}
