"""Share of the theoretical saving that a method realises: (1 - t_pruned / t_dense) / (1 - MACs_pruned / MACs_dense).

`python -m benchmarks.vit_tokens [--model deit_small_patch16_224] [--batch 8] [--rounds 15]`. Dense and pruned forwards
are interleaved in one process and compared by medians, so that a drifting clock cancels. The MACs of the theoretical
saving leave the method's scoring out, so scoring counts as a loss.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch

from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget

CASES = [
    ("zero_tprune", "0.9,0.8,0.7", {}),
    ("zero_tprune", "0.7", {}),
    ("cls_attention", "0.7", {}),
    ("random_drop", "0.7", {}),
    ("tome", "13removed", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    x = torch.randn(arguments.batch, 3, 224, 224)

    def timed() -> float:
        start = time.process_time()  # of the CPU, so that what else the machine does is not counted
        model(x)
        return time.process_time() - start

    print(
        f"{arguments.model}, batch {arguments.batch}, {arguments.threads} threads, medians of {arguments.rounds} rounds"
    )
    print(f"{'method':<14} {'budget':<13} {'t/t dense':>9} {'MAC ratio':>9} {'realised':>9}")
    with torch.inference_mode():
        for name, text, options in CASES:
            method, budget = registry.create(name, **options), Budget.parse(text)
            with apply(method, model, budget) as handle:
                report = handle.report()
            times: dict[str, list[float]] = {"dense": [], "pruned": []}
            for i in range(arguments.rounds + 2):
                dense = timed()
                with apply(method, model, budget):
                    pruned = timed()
                if i >= 2:
                    times["dense"].append(dense)
                    times["pruned"].append(pruned)
            ratio = statistics.median(p / d for p, d in zip(times["pruned"], times["dense"], strict=True))
            macs = (report.macs - report.scoring_macs) / report.dense_macs
            print(f"{name:<14} {text:<13} {ratio:>9.3f} {macs:>9.3f} {(1 - ratio) / (1 - macs):>9.2f}", flush=True)


if __name__ == "__main__":
    main()
