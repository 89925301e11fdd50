"""What holds for all tests."""

from __future__ import annotations

import torch

# Sums come out the same bit for bit with one number of threads only, and test processes run side by side.
torch.set_num_threads(1)
