"""Integrated gradients of long texts, whose places on the way do not fit into one pass."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.ranking.attribution import Explained
from prunelab.methods.attribution_baselines import method
from prunelab.methods.attribution_baselines.method import IntegratedGradients
from tests.contract.references import language_model


def test_places_are_taken_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = Explained(language_model(), 0), torch.arange(1, 9)
    whole = IntegratedGradients(steps=10).raw(model, tokens, 3)
    sizes, real = [], method.gradients

    def noted(model: Explained, points: torch.Tensor, *rest: object) -> object:
        sizes.append(points.shape[0] * points.shape[1])
        return real(model, points, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(method, "gradients", noted)
    monkeypatch.setattr(method, "TOGETHER", 3 * len(tokens) + 1)
    assert torch.allclose(IntegratedGradients(steps=10).raw(model, tokens, 3), whole, atol=1e-6)
    assert sizes == [24, 24, 24, 8]
    monkeypatch.setattr(method, "TOGETHER", 1)  # less than one text: one place at a time
    assert torch.allclose(IntegratedGradients(steps=10).raw(model, tokens, 3), whole, atol=1e-6)
