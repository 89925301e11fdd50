"""Which layers of a language model a method takes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures.bench import Bench
from prunelab.common.measures.perplexity import prune
from prunelab.common.models import devices, loading
from prunelab.common.weights.role import WeightPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.layers import Layers


def measure(bench: Bench[Layers.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.layers`."""
    method = bench.method(WeightPruner)
    if method is None or "layers" not in method.units:
        raise PrunelabError(f"{bench.chosen or 'the unpruned model'} takes out no layers; choose a method that does")
    model, tokenizer = loading.language(bench.ids["model"], bench.config)
    plan, calibrated = prune(bench, method, devices.place(model, bench.device, half=True), tokenizer)
    gone = [target for target, decision in plan.decisions() if target.unit == "layers" and not decision.kept]
    results = {f"layer {i} of {len(gone)}": target.block for i, target in enumerate(gone, 1)}
    worth = plan.header.get("worth", {})
    if len({worth.get(target.name) for target in gone}) == len(gone):  # those of a search say only who stays
        ranked = sorted(gone, key=lambda target: worth[target.name])
        results |= {f"rank {i}": target.block for i, target in enumerate(ranked, 1)}
    results["layers"] = len(gone)
    return {name: {"value": value, "protocol": calibrated} for name, value in results.items()}
