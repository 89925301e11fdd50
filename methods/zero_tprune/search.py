"""The paper's Monte-Carlo search over pruning layers, rates, S-stage share and votes (section 4.1).

`propose` draws one configuration; `scale` bends its rates until it meets a cost. What a configuration is worth is for
the caller to say (`python -m prunelab search`), since a method knows neither models nor data.
"""

from __future__ import annotations

import random
from dataclasses import replace

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo
from prunelab.methods.zero_tprune.method import ZeroTPrune

SIMILAR = (0.0, 0.1, 0.25, 0.5)
VOTES = {"early": (30, 40, 50), "middle": (5, 7, 10), "late": (1,)}  # ranges named in section 3.2


def propose(info: ModelInfo, rng: random.Random) -> tuple[ZeroTPrune, Budget]:
    """A random configuration: 3 to 5 pruning layers, a rate for each, a share for the S-stage, votes by depth."""
    layers = tuple(sorted(rng.sample(range(1, info.depth - 1), rng.randint(3, 5))))
    rates = tuple(round(rng.uniform(0.5, 0.95), 3) for _ in layers)
    votes = tuple(rng.choice(VOTES[_stage(layer, info.depth)]) for layer in layers)
    return ZeroTPrune(layers=layers, similar=rng.choice(SIMILAR), iterations=votes), Budget(rates)


def _stage(layer: int, depth: int) -> str:
    return "early" if layer < 3 else "late" if layer >= depth - 3 else "middle"


def scale(budget: Budget, level: float) -> Budget:
    """The same rates bent towards 1 (level 1) or 0 (level 0), their order kept; level 0.5 leaves them as they are."""
    power = 1 / max(level, 1e-6) - 1  # 0 at level 1, 1 at 0.5, large near 0
    return replace(budget, amount=tuple(round(rate**power, 4) for rate in budget.amounts))
