"""What the adapters of vision models share."""

from __future__ import annotations

from torch import Tensor

from prunelab.common.core.errors import PrunelabError


def check_image(sample: Tensor, channels: int) -> None:
    """Refuse a calibration sample that is no image [C, H, W] of that many channels."""
    if sample.dim() != 3 or not sample.is_floating_point() or len(sample) != channels:
        raise PrunelabError(
            f"a calibration sample is an image [C, H, W] of {channels} channels and floating-point numbers, as the"
            " model's own transform gives it"
        )
