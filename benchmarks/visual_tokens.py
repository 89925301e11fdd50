"""What pruning visual tokens costs and saves: each method's decision at the papers' shapes, and a whole prefill of
LLaVA-OneVision-0.5B.

`python -m benchmarks.visual_tokens [--rounds 3] [--threads 2] [--frames 8] [--methods fastv ...] [--only decisions]`.
Decisions are timed inside a prefill of one image (LLaVA-1.5-7B, 576 tokens) and of a video of 32 frames
(LLaVA-OneVision-7B, 6272 tokens), of noise, a quarter of the tokens kept; widths, heads and tokens are the published
ones, while depth, MLPs and vocabulary, which no decision reads, are cut. The prefill is of the whole 0.5B architecture
with random weights and a video of `--frames`, from pixels to the first token; pruned and unpruned ones take turns and
are compared by the median of their ratios, beside the ratio of the MACs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunelab.common.apply import apply
from prunelab.common.catalogue import lookup
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.measures.prefill import contents
from prunelab.common.measures.prompt_macs import even_scores
from prunelab.common.models import loading
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.role import TokenPruner

BUDGET = 0.25
DEPTH = 4  # decoder layers of the cut models: enough for what acts before the third
# Options that bring the layers a method acts at into four of them; all else as published.
DECISIONS: Mapping[str, Mapping[str, Any]] = {
    "random_drop": {"layers": [0], "where": "packed"}, "uniform_tokens": {}, "pooled_tokens": {}, "fastv": {},
    "divprune": {}, "fastervlm": {}, "aim": {"layers": [1, 3]}, "holitom": {"layer": 2},
    "quota": {"weighting": "query"}, "pyramiddrop": {"layers": [2]}, "vtw": {}, "dart": {}, "hired": {},
    "fitprune": {}, "globalcom2": {}, "vflowopt": {"layers": [2]}, "mustdrop": {"layers": [1]}, "catp": {"layer": 1},
    "hiprune": {"layer": 0}, "holov": {}, "flowcut": {}, "fopru": {}, "todre": {"late": [0.75]},
    "transprune": {"layers": [1, 2, 3], "first": 0},
}  # fmt: skip
WHOLE: Mapping[str, Mapping[str, Any]] = {
    "random_drop": {"layers": [0], "where": "packed"}, "uniform_tokens": {}, "pooled_tokens": {}, "fastv": {},
    "divprune": {}, "aim": {"layers": [13, 22]}, "holitom": {"layer": 18}, "quota": {"weighting": "query"},
}  # fmt: skip
IMAGES_ONLY = ("fastervlm", "hired", "globalcom2", "mustdrop", "fitprune", "catp", "holov", "flowcut", "todre")
VIDEOS_ONLY = ("holitom", "quota")


def clocked(name: str, options: Mapping[str, Any]) -> tuple[TokenPruner, list[float]]:
    """The method, and the seconds that each of its plans takes, signals it reads included."""
    method, spent = registry.create(name, **options), list[float]()
    assert isinstance(method, TokenPruner)

    class Clocked(type(method)):  # type: ignore[misc]
        def plan(self, *given: Any) -> Any:
            start = time.perf_counter()
            made = super().plan(*given)
            spent.append(time.perf_counter() - start)
            return made

    return Clocked(**{f.name: getattr(method, f.name) for f in fields(method)}), spent  # type: ignore[arg-type]


def cut(name: str) -> Any:
    """A catalogue model with few and slim layers but all widths that decisions read."""
    entry = deepcopy(dict(lookup.model(name)["architecture"]))
    vision, text = (entry["arguments"][part] for part in ("vision_config", "text_config"))
    vision |= {"num_hidden_layers": 3, "intermediate_size": 256}
    text |= {"num_hidden_layers": DEPTH, "intermediate_size": 256}
    return loading.initialised(entry | {"dtype": "float32"}, "cpu")


def decisions(model: str, frames: int, names: list[str], rounds: int) -> list[tuple[str, float]]:
    """Median seconds of a method's plans in one prefill, all its sites together."""
    net = cut(model)
    adapter = adapter_for(net)
    assert isinstance(adapter, VisionLanguage)
    given, results = contents(adapter, adapter.prompt(frames), torch.device("cpu")), []
    for name in names:
        if name in (IMAGES_ONLY if frames else VIDEOS_ONLY):
            continue
        seconds = []
        for _ in range(rounds + 1):
            method, spent = clocked(name, DECISIONS[name])
            with apply(method, net, Budget(BUDGET), services={"frame_scores": even_scores}):
                net(**given, use_cache=False, logits_to_keep=1)
            seconds.append(sum(spent))
        results.append((name, statistics.median(seconds[1:])))
    return results


def prefills(frames: int, names: list[str], rounds: int) -> tuple[float, list[tuple[str, float, float, str]]]:
    """Median seconds of the unpruned prefill; and for each method the ratio of its time and MACs to the unpruned ones,
    and the tokens that the first, middle and last layers see."""
    net = loading.initialised({**lookup.model("llava_onevision_0_5b")["architecture"], "dtype": "float32"}, "cpu")
    adapter = adapter_for(net)
    assert isinstance(adapter, VisionLanguage)
    prompt = adapter.prompt(frames)
    given, results, dense = contents(adapter, prompt, torch.device("cpu")), [], []

    def read() -> float:
        start = time.perf_counter()
        net(**given, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    read()
    for name in names:
        if name not in WHOLE:
            continue
        ratios = []
        for _ in range(rounds):
            method = registry.create(name, **WHOLE[name])
            with apply(method, net, Budget(BUDGET), services={"frame_scores": even_scores}) as handle:  # type: ignore[arg-type]
                own = read()
                report = handle.report(prompt.to("meta"))
            dense.append(read())
            ratios.append(own / dense[-1])
        seen = [round(count) for count, _ in report.tokens]
        tokens = f"{seen[0]} / {seen[len(seen) // 2]} / {seen[-1]}"
        results.append((name, statistics.median(ratios), report.macs / report.dense_macs, tokens))
    return statistics.median(dense), results


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(DECISIONS), choices=list(DECISIONS))
    parser.add_argument("--only", choices=("decisions", "prefill"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    if arguments.only != "prefill":
        for title, model, frames in (("image", "llava_1_5_7b", 0), ("32 frames", "llava_onevision_7b", 32)):
            table = Table("method", "decision, ms", title=f"{model}, {title}, {arguments.threads} threads")
            for name, seconds in decisions(model, frames, arguments.methods, arguments.rounds):
                table.add_row(name, f"{1000 * seconds:.1f}")
            console.print(table)
    if arguments.only != "decisions":
        seconds, rows = prefills(arguments.frames, arguments.methods, arguments.rounds)
        title = f"prefill of the 0.5B shape, {arguments.frames} frames, unpruned {seconds:.1f} s"
        table = Table("method", "time, ratio", "MACs, ratio", "tokens: first / middle / last layer", title=title)
        for name, ratio, macs, tokens in rows:
            table.add_row(name, f"{ratio:.2f}", f"{macs:.2f}", tokens)
        console.print(table)


if __name__ == "__main__":
    main()
