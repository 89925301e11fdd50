"""Ours and the plain forms agree, which the benchmark checks as it goes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import plain_forms


@pytest.mark.parametrize("name", plain_forms.pairs(quick=True))
@torch.no_grad()
def test_ours_gives_what_the_plain_form_gives(name):
    ours, plain, ratio = plain_forms.measure(plain_forms.pairs(quick=True)[name](), rounds=1)
    assert ours >= 0 and plain >= 0 and ratio >= 0


def test_a_difference_is_told():
    with pytest.raises(SystemExit, match="differ"):
        plain_forms.measure((lambda: torch.zeros(2), lambda: torch.ones(2)), 1)
