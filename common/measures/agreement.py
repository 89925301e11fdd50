"""How far what a method keeps of a language model depends on how much it is calibrated with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunelab.common import weights
from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures import solve
from prunelab.common.measures.bench import Bench
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading
from prunelab.common.weights.role import WeightPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.agreement import Agreement


def measure(bench: Bench[Agreement.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.agreement`."""
    method, few, many = bench.method(WeightPruner), bench.settings.calibration, bench.settings.many
    if method is None or not method.calibrated:
        raise PrunelabError(f"{bench.chosen or 'the unpruned model'} is not calibrated; choose a method that is")
    if few > many:
        raise PrunelabError(f"the {few} samples are to be some of {many}; ask for fewer, or compare with more")
    samples: list[Tensor] = []
    kept: list[dict[str, Tensor]] = []
    for count in (few, many):
        model, tokenizer = loading.language(bench.ids["model"], bench.config)  # again: the first is pruned
        model = devices.place(model, bench.device, half=True)
        samples = samples or solve.demonstrations(bench, model, tokenizer, bench.ids["calibration"], many)
        plan = weights.prune(method, model, bench.budget, samples[:count], seed=bench.seed, progress=False)
        kept.append({target.name: decision.mask.cpu() for target, decision in plan.decisions() if not target.loose})
        del model
    first, second = kept
    shares = [100 * float((first[n] & mask).sum() / mask.sum()) for n, mask in second.items() if bool(mask.any())]
    if not shares:
        raise PrunelabError(f"{method.name} keeps or removes single weights; choose a method that keeps structures")
    drawn = bench.ids["calibration"]["loader"]
    protocol = f"{few} samples against {many} of the same draw ({drawn}), the mean over {len(shares)} targets"
    return {"overlap": uncertainty.mean(shares) | {"protocol": protocol}, "least": {"value": min(shares)}}
