"""Weight pruning: one engine for single weights, heads, channels, experts and layers.

`prune(method, model, budget, calibration)` prunes in place and returns a `WeightPlan`.
"""

from common.weights.engine import prune
from common.weights.plan import WeightPlan, WeightReport
from common.weights.reload import load_pruned, save_pruned
from common.weights.stream import windows

__all__ = ["WeightPlan", "WeightReport", "load_pruned", "prune", "save_pruned", "windows"]
