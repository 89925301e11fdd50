"""Share of the theoretical saving that an encoder with fewer queries realises, on the published DINO R50.

`python -m benchmarks.detr_encoder [--size 480 640] [--rounds 9] [--threads 1]`. As in `benchmarks.vit_tokens` dense and
pruned forwards are interleaved and compared by medians of their ratios; only the time inside the encoder counts, with
the method's scoring, which is left out of the theoretical saving and so counts as a loss.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from prunelab.common.apply import apply
from prunelab.common.backbones.dino import dino_r50
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.costs import meter
from prunelab.common.tokens.adapters import adapter_for

CASES = [
    ("focus_detr", "0.5", {}),
    ("focus_detr", "0.3", {}),
    ("focus_detr", "0.1", {}),
    ("random_drop", "0.5", {"layers": tuple(range(6)), "where": "input", "rest": "bypass"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = dino_r50(value="features", image_size=tuple(arguments.size)).eval()
    x = torch.randn(1, 3, *arguments.size)
    clock = {"start": 0.0, "spent": 0.0}

    def stop(*_: object) -> None:
        clock["spent"] = time.perf_counter() - clock["start"]

    model.encoder.register_forward_pre_hook(lambda *_: clock.update(start=time.perf_counter()))
    model.encoder.register_forward_hook(stop)

    def timed() -> float:
        model(x)
        return clock["spent"]

    inside = meter.module_macs(model, x, "encoder")
    print(
        f"DINO R50, {arguments.size[0]} x {arguments.size[1]}, {arguments.threads} threads, {arguments.rounds} rounds"
    )
    print(f"{'method':<14} {'budget':<8} {'t/t dense':>9} {'MAC ratio':>9} {'realised':>9}")
    with torch.inference_mode():
        for name, text, options in CASES:
            method, budget = registry.create(name, **options), Budget.parse(text)
            parts = method.build(adapter_for(model).info)
            with apply(method, model, budget, parts=parts) as handle:
                report = handle.report()
            ratios = []
            for i in range(arguments.rounds + 1):
                dense = timed()
                with apply(method, model, budget, parts=parts):
                    pruned = timed()
                if i:
                    ratios.append(pruned / dense)
            ratio = statistics.median(ratios)
            macs = (inside - (report.dense_macs - report.macs) - report.scoring_macs) / inside
            print(f"{name:<14} {text:<8} {ratio:>9.3f} {macs:>9.3f} {(1 - ratio) / (1 - macs):>9.2f}", flush=True)


if __name__ == "__main__":
    main()
