"""Counting on the meta device leaves a model as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunelab.common.costs import meter


class Twice(nn.Module):
    """A module with two names, as a detector's heads hang on it and on its decoder, and weights tied to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"head": nn.Linear(3, 3)})
        self.head = self.inner["head"]
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        assert self.tied.weight is self.head.weight and self.head.weight.device == x.device
        out: Tensor = self.tied(self.head(x))
        return out


def test_a_module_with_two_names_has_its_own_weights_back():
    model, x = Twice(), torch.randn(2, 3)
    before = model(x)
    assert meter.macs(model, torch.empty(1, 3, device="meta")) == 18
    assert {p.device.type for p in model.parameters()} == {"cpu"} and torch.equal(model(x), before)
