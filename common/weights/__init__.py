"""Weight pruning: one engine for single weights, heads, channels, experts and layers.

`prune(method, model, budget, calibration)` prunes in place and returns a `WeightPlan`.
"""

from prunelab.common.weights.calibration import windows
from prunelab.common.weights.compressed import save_compressed
from prunelab.common.weights.io import load_pruned, save_pruned
from prunelab.common.weights.plan import WeightPlan, WeightReport
from prunelab.common.weights.pruning import prune

__all__ = ["WeightPlan", "WeightReport", "load_pruned", "prune", "save_compressed", "save_pruned", "windows"]
