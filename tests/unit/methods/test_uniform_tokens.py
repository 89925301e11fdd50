"""Evenly spaced tokens."""

from __future__ import annotations

import pytest
import torch

from prunelab.methods.uniform_tokens.method import evenly_spaced


@pytest.mark.parametrize(("count", "want"), [(0, []), (1, [11]), (3, [3, 7, 11]), (4, [2, 5, 8, 11]), (12, range(12))])
def test_steps_are_even(count, want):
    mask = evenly_spaced(torch.ones(1, 12, dtype=torch.bool), torch.tensor([count]))
    assert mask[0].nonzero().squeeze(1).tolist() == list(want)


def test_each_sample_has_its_own_number():
    prunable = torch.tensor([[False, True, True, True, True, False], [True, False, True, False, False, False]])
    mask = evenly_spaced(prunable, torch.tensor([2, 1]))
    assert mask.tolist() == [[False, False, True, False, True, False], [False, False, True, False, False, False]]
