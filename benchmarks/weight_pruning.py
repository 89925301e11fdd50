"""What weight pruning costs, and what it buys: four tables, each from one run.

`python -m benchmarks.weight_pruning [--quick] [--threads 1] [--tables speed memory laws removal]`.

speed: our Wanda, SparseGPT and FLAP against the straightforward way: hooks on the linears, the whole calibration set
through the whole model for the statistics of one layer, all inputs kept until they are used. `a block` gathers all
linears of a block in one pass, `a linear` one linear a pass. Both ways must give the same masks. The straightforward
way calls the methods' own solver (SparseGPT's column loop, FLAP's threshold), so that the ratio is the engine's.
memory: the most bytes alive beyond the weights, against depth. Plans go to a folder, as for large models. What methods
that compare all layers hold of each are scores of its structures; SliceGPT adds the matrices between its bases.
laws: time and peak memory of every method over depths and widths, with c * depth^a * width^b fitted by least squares
of the logarithms. The exponents hold for the shapes measured: small ones are ruled by what an operation costs at all.
removal: what `load_pruned` gives back from disk: size, parameters, MACs, and the latency of reading a prompt. Ratios
of times are medians over rounds in which all take part in turn. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.memory import Live
from prunelab.common.core.budget import Budget
from prunelab.common.costs import meter
from prunelab.common.weights import load_pruned, prune, save_pruned
from prunelab.common.weights.obs import inverse_factor
from prunelab.common.weights.role import WeightPruner
from prunelab.methods.amp.method import AMP
from prunelab.methods.cfsp.method import CFSP
from prunelab.methods.darex.method import Dare, Darex
from prunelab.methods.easy_ep.method import EasyEP
from prunelab.methods.ecoflap.method import ECoFLaP
from prunelab.methods.flap.method import FLAP, WandaSP, common_threshold
from prunelab.methods.gaprune.method import GAPrune
from prunelab.methods.gblm.method import GBLM
from prunelab.methods.gptq.method import Gptq
from prunelab.methods.llm_pruner.method import LLMPruner
from prunelab.methods.magnitude.method import Magnitude
from prunelab.methods.mc_moe.method import MixtureCompressor
from prunelab.methods.prunenet.method import PruneNet
from prunelab.methods.random_weights.method import RandomWeights
from prunelab.methods.rsq.method import RSQ
from prunelab.methods.slicegpt.method import SliceGPT
from prunelab.methods.sparsegpt.method import SparseGPT, prune_matrix
from prunelab.methods.stun.method import Owl, Stun
from prunelab.methods.tyr.method import Tyr
from prunelab.methods.wanda.method import Wanda

VOCABULARY = 512
HEAD = 32  # channels of a head; a key-value head serves two query heads
MIB = 2**20


def language_model(depth: int, width: int, experts: int = 0, seed: int = 0) -> Any:
    """A random Llama, or a Mixtral of as many experts, whose MLP is about 8/3 times as wide as it."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // HEAD * HEAD,
        "num_hidden_layers": depth,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": width // HEAD // 2,
        "initializer_range": width**-0.5,
    }
    torch.manual_seed(seed)
    if experts:
        config = transformers.MixtralConfig(**sizes, num_local_experts=experts, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def token_ids(samples: int, length: int) -> Tensor:
    """A calibration set [samples, length]."""
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


def seconds(run: Callable[[], Any]) -> float:
    """Seconds that `run()` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(models: Sequence[nn.Module], run: Callable[[], Any]) -> int:
    """The most bytes of tensors alive during `run()`, beyond the models' own."""
    with Live(*models) as live:
        run()
    return live.peak - live.own


# -- the straightforward way -----------------------------------------------------------------------------------------


def gathered(model: Any, linears: Sequence[nn.Module], ids: Tensor) -> list[list[Tensor]]:
    """The inputs [T, C] of each linear on every sequence, from a pass of the whole model over the whole set."""
    kept: list[list[Tensor]] = [[] for _ in linears]

    def keep(into: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: into.append(args[0][0])

    handles = [m.register_forward_pre_hook(keep(into)) for m, into in zip(linears, kept, strict=True)]
    for sequence in ids:
        model(input_ids=sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def passes(model: Any, linears: Sequence[nn.Linear], ids: Tensor, together: bool) -> Iterator[tuple[Any, list[Tensor]]]:
    """Each linear with its inputs, gathered in one pass for all of them together or in a pass each."""
    for group in [linears] if together else [[linear] for linear in linears]:
        yield from zip(group, gathered(model, group, ids), strict=True)


def channel_norms(inputs: Sequence[Tensor]) -> Tensor:
    """Squared norms [C] over a sequence's tokens, averaged over sequences."""
    norms = torch.zeros(inputs[0].shape[1])
    for n, x in enumerate(inputs, 1):
        norms = norms * ((n - 1) / n) + x.square().sum(0) / n
    return norms


def plain_wanda(weight: Tensor, inputs: Sequence[Tensor], budget: Budget) -> tuple[Tensor, Tensor]:
    """Mask and weight, both [out, in], with rows sorted."""
    order = (weight.abs() * channel_norms(inputs).sqrt()).argsort(dim=1, stable=True)
    mask = torch.ones_like(weight, dtype=torch.bool).scatter_(1, order[:, : budget.pruned(weight.shape[1])], False)
    return mask, weight * mask


def plain_sparsegpt(weight: Tensor, inputs: Sequence[Tensor], budget: Budget) -> tuple[Tensor, Tensor]:
    """Mask and weight, both [out, in], with a Hessian and its factor for this linear alone."""
    hessian = torch.zeros(weight.shape[1], weight.shape[1])
    for n, x in enumerate(inputs, 1):
        x = x * math.sqrt(2 / n)
        hessian.mul_((n - 1) / n).addmm_(x.T, x)
    return prune_matrix(weight, inverse_factor(hessian, 0.01), budget, 128)


def plain_sequential(solve: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A way to prune the linears block by block, each block measured behind the pruned ones before it."""

    @torch.no_grad()
    def run(model: Any, ids: Tensor, budget: Budget, together: bool) -> dict[str, Tensor]:
        names, masks = {m: name for name, m in model.named_modules()}, {}
        for block in model.model.layers:
            solved = {
                linear: solve(linear.weight, inputs, budget)
                for linear, inputs in passes(model, _linears(block), ids, together)
            }
            for linear, (mask, weight) in solved.items():
                linear.weight.copy_(weight)
                masks[names[linear]] = mask
        return masks

    return run


@torch.no_grad()
def plain_flap(model: Any, ids: Tensor, budget: Budget, together: bool) -> dict[str, Tensor]:
    """FLAP on the dense model's inputs, then zeros and biases in place of what is pruned."""
    results: list[tuple[nn.Linear, Tensor, Tensor]] = []  # projection, scores of its units, means of its inputs
    names = {m: name.rpartition(".")[0] for name, m in model.named_modules()}
    for block in model.model.layers:
        readers = [block.self_attn.o_proj, block.mlp.down_proj]
        for linear, inputs in passes(model, readers, ids, together):
            mean = fluctuation = torch.zeros(linear.in_features)
            for n, x in enumerate(inputs, 1):
                mean = mean * ((n - 1) / n) + x.mean(0) / n
                if n > 1:
                    fluctuation = fluctuation * ((n - 2) / (n - 1)) + (x - mean).square().sum(0) / n
            scores, span = fluctuation * linear.weight.square().sum(0), 1
            if linear is block.self_attn.o_proj:
                scores, span = scores.square(), 2 * HEAD
            scores = ((scores - scores.mean()) / scores.std()).unflatten(0, (-1, span)).mean(-1)
            results.append((linear, scores, mean))
    head = (2 * 2 * HEAD + 2 * HEAD) // 3  # neurons of as many parameters: q and o of two heads, k and v of one
    costs = [torch.full_like(s, head if m.in_features > len(s) else 1) for m, s, _ in results]
    threshold = common_threshold(torch.cat([s for _, s, _ in results]), torch.cat(costs), budget.amounts[0])
    masks = {}
    for linear, scores, mean in results:
        mask = scores > threshold
        gone = ~mask.repeat_interleave(linear.in_features // len(scores))
        linear.bias = nn.Parameter((mean * gone) @ linear.weight.T)
        linear.weight[:, gone] = 0
        masks[names[linear]] = mask
    return masks


def _linears(block: nn.Module) -> list[nn.Linear]:
    return [m for m in block.modules() if isinstance(m, nn.Linear)]


PLAIN: dict[str, tuple[WeightPruner, Callable[..., dict[str, Tensor]], float]] = {
    "Wanda": (Wanda(), plain_sequential(plain_wanda), 0.5),
    "SparseGPT": (SparseGPT(), plain_sequential(plain_sparsegpt), 0.5),
    "FLAP": (FLAP(), plain_flap, 0.7),
}


@dataclass(frozen=True)
class Speed:
    """Seconds of ours, and how many times longer the straightforward way takes, by the pass."""

    ours: float
    by_block: float
    by_linear: float


def speed(name: str, depth: int, width: int, ids: Tensor, rounds: int) -> Speed:
    """Medians over rounds. Raises AssertionError where the masks differ."""
    method, plain, ratio = PLAIN[name]
    times: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        models = [language_model(depth, width) for _ in range(3)]
        results: list[Any] = []
        times.append(
            (
                seconds(lambda: results.append(prune(method, models[0], ratio, ids, progress=False))),  # noqa: B023
                seconds(lambda: results.append(plain(models[1], ids, Budget(ratio), True))),  # noqa: B023
                seconds(lambda: results.append(plain(models[2], ids, Budget(ratio), False))),  # noqa: B023
            )
        )
        plan, *others = results
        for target, decision in plan.decisions():
            assert all(torch.equal(decision.mask, masks[target.name]) for masks in others), target.name
    ours = statistics.median(t[0] for t in times)
    return Speed(ours, *(statistics.median(t[way] / t[0] for t in times) for way in (1, 2)))


# -- every method, over depths and widths ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method, what it prunes, and how much stays."""

    method: WeightPruner
    budget: float | str = 0.5
    experts: int = 0
    triplets: bool = False  # whether it reads two corpora of queries with a positive and a negative, each of the set

    def prepared(self, depth: int, width: int, ids: Tensor, folder: Path) -> tuple[list[Any], Callable[[], Any]]:
        """A fresh model (and the one before fine-tuning), and its pruning, with a plan on disk."""
        model = language_model(depth, width, self.experts)
        base = language_model(depth, width, self.experts, seed=1) if self.method.needs_base else None
        options: dict[str, Any] = {"base": base, "folder": folder, "progress": False}
        data: Any = ids
        if self.triplets:
            turned = {"query": ids, "positive": ids.roll(1, 0), "negative": ids.roll(2, 0)}
            items = [{name: rows[i] for name, rows in turned.items()} for i in range(len(ids))]
            data, options["objective"] = {"domain": items, "general": items}, "contrastive"
        return [model] if base is None else [model, base], lambda: prune(
            self.method, model, self.budget, data, **options
        )


QUICK = ("Wanda", "SparseGPT", "FLAP", "magnitude, global", "GBLM")
CASES = {
    "random": Case(RandomWeights()),
    "magnitude": Case(Magnitude()),
    "magnitude, global": Case(Magnitude("model")),
    "Wanda": Case(Wanda()),
    "SparseGPT": Case(SparseGPT()),
    "SparseGPT 2:4": Case(SparseGPT(), "2:4"),
    "GBLM": Case(GBLM()),
    "OWL": Case(Owl()),
    "FLAP": Case(FLAP(), 0.7),
    "Wanda-sp": Case(WandaSP()),
    "CFSP": Case(CFSP(), 0.7),
    "AMP": Case(AMP(), 0.7),
    "LLM-Pruner": Case(LLMPruner(), 0.8),
    "Týr": Case(Tyr(), 0.7),
    "SliceGPT": Case(SliceGPT(), 0.75),
    "PruneNet": Case(PruneNet(episodes=2), 0.7),
    "GAPrune": Case(GAPrune(), triplets=True),
    "GPTQ": Case(Gptq(), "3bits"),
    "RSQ": Case(RSQ(), "3bits"),
    "DARE": Case(Dare()),
    "DAREx-q": Case(Darex(), 0.1),
    "ECoFLaP": Case(ECoFLaP(samples=8)),
    "EASY-EP (MoE)": Case(EasyEP(), experts=4),
    "STUN (MoE)": Case(Stun(), experts=4),
    "MC-MoE (MoE)": Case(MixtureCompressor(group=32), "2bits", experts=4),
}


@dataclass(frozen=True)
class Measured:
    """Seconds and the most bytes beyond the weights, at a shape."""

    depth: int
    width: int
    seconds: float
    bytes: int


def measure(case: Case, depth: int, width: int, ids: Tensor, rounds: int) -> Measured:
    """The fastest of the rounds, and the peak of a run of its own, since counting takes time."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [case.prepared(depth, width, ids, Path(folder, str(i))) for i in range(rounds + 1)]
        fastest = min((seconds(run) for _, run in runs[1:]), default=math.nan)
        return Measured(depth, width, fastest, peak(*runs[0]))


@dataclass(frozen=True)
class Law:
    """constant * depth^depth * width^width, and the share of the logarithms' variance it explains."""

    constant: float
    depth: float
    width: float
    r2: float


def law(depths: Sequence[float], widths: Sequence[float], values: Sequence[float]) -> Law:
    """The power law through positive values, by least squares of the logarithms."""
    y = np.log(values)
    design = np.stack([np.ones(len(y)), np.log(depths), np.log(widths)], 1)
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    left, spread = np.square(y - design @ solution).sum(), np.square(y - y.mean()).sum()
    return Law(float(np.exp(solution[0])), float(solution[1]), float(solution[2]), float(1 - left / spread))


# -- what removal buys -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A model from disk, with the bytes of its weights and of its plan."""

    model: Any
    weights: int
    plan: int


def through_disk(method: WeightPruner, budget: float | str, depth: int, width: int, ids: Tensor) -> Loaded:
    """Prune a model, save it, and load it again."""
    model = language_model(depth, width)
    plan = prune(method, model, budget, ids, progress=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pruned(model, plan, folder)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        plans = sum(path.stat().st_size for path in (folder / "plan").iterdir())
        return Loaded(load_pruned(folder), weights, plans)


def latencies(models: Mapping[str, Any], prompt: Tensor, rounds: int) -> dict[str, float]:
    """Seconds of the first model's prefill over each one's: medians over rounds in which all run in turn."""
    first, results = next(iter(models)), []
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first round warms up
            results.append({n: seconds(lambda: m(input_ids=prompt, use_cache=False)) for n, m in models.items()})  # noqa: B023
    return {name: statistics.median(r[first] / r[name] for r in results[1:]) for name in models}


# -- tables ----------------------------------------------------------------------------------------------------------


def speed_table(quick: bool) -> Table:
    depth, width, rounds = (4, 128, 3) if quick else (8, 128, 3)
    ids = token_ids(4 if quick else 8, 64 if quick else 128)
    table = Table(
        "method",
        "ours, s",
        "plain, a block a pass",
        "plain, a linear a pass",
        title=f"times ours, same masks: depth {depth}, width {width}, {_set(ids)}, medians of {rounds} rounds",
    )
    for name in PLAIN:
        result = speed(name, depth, width, ids, rounds)
        table.add_row(name, f"{result.ours:.2f}", f"{result.by_block:.1f} x", f"{result.by_linear:.1f} x")
    return table


def memory_table(quick: bool) -> Table:
    width, ids = 64, token_ids(8, 32)
    depths = (2, 8, 32) if quick else (2, 4, 8, 16, 32)
    title = f"KiB beyond the weights at the peak, by depth: width {width}, {_set(ids)}"
    table = Table("method", *(str(depth) for depth in depths), "32 over 2", title=title)
    for name in QUICK if quick else CASES:
        peaks = [measure(CASES[name], depth, width, ids, 0).bytes for depth in depths]
        table.add_row(name, *(f"{p / 1024:,.0f}" for p in peaks), f"{peaks[-1] / peaks[0]:.2f} x")
    table.add_section()
    weights = [sum(p.numel() * 4 for p in language_model(depth, width).model.layers.parameters()) for depth in depths]
    table.add_row("weights of the blocks", *(f"{w / 1024:,.0f}" for w in weights), f"{weights[-1] / weights[0]:.2f} x")
    return table


def laws_table(quick: bool) -> Table:
    depths, widths = ((2, 4, 8), (64, 128)) if quick else ((2, 4, 8), (64, 128, 256))
    ids, rounds = token_ids(4, 32 if quick else 128), 2
    shapes = list(itertools.product(depths, widths))
    table = Table(
        "method",
        "s",
        "~ depth^",
        "width^",
        "R²",
        "MiB",
        "~ depth^",
        "width^",
        "R²",
        title=f"time and peak memory beyond the weights of the largest shape, and their laws:\n"
        f"depths {depths}, widths {widths}, {_set(ids)}",
    )
    measure(CASES["SparseGPT"], 2, widths[0], ids, 1)  # warms up
    for name in QUICK if quick else CASES:
        results = [measure(CASES[name], depth, width, ids, rounds) for depth, width in shapes]
        by = [m.depth for m in results], [m.width for m in results]
        time_law, byte_law = law(*by, [m.seconds for m in results]), law(*by, [m.bytes for m in results])
        table.add_row(
            name,
            f"{results[-1].seconds:.2f}",
            *(f"{value:.2f}" for value in (time_law.depth, time_law.width, time_law.r2)),
            f"{results[-1].bytes / MIB:.1f}",
            *(f"{value:.2f}" for value in (byte_law.depth, byte_law.width, byte_law.r2)),
        )
    return table


def removal_table(quick: bool) -> Table:
    depth, width, rounds = (4, 256, 9) if quick else (8, 512, 15)
    ids, prompt = token_ids(8, 64), token_ids(1, 256)
    loaded = {"dense": through_disk(RandomWeights(("channels",)), 1.0, depth, width, ids)}
    for name, method, budget in (
        ("FLAP - 20 %", FLAP(), 0.8),
        ("FLAP - 50 %", FLAP(), 0.5),
        ("Wanda 50 %", Wanda(), 0.5),
        ("SparseGPT 2:4", SparseGPT(), "2:4"),
    ):
        loaded[name] = through_disk(method, budget, depth, width, ids)
    times = latencies({name: entry.model for name, entry in loaded.items()}, prompt, rounds)
    table = Table(
        "from disk",
        "MB",
        "plan MB",
        "M params",
        "zeros",
        "GMACs",
        "fewer",
        "faster",
        title=f"after reload: depth {depth}, width {width}, prompt of {prompt.shape[1]}, medians of {rounds} rounds",
    )
    dense = meter.macs(loaded["dense"].model, prompt)
    for name, entry in loaded.items():
        parameters, macs = list(entry.model.parameters()), meter.macs(entry.model, prompt)
        count, zeros = sum(p.numel() for p in parameters), sum(int((p == 0).sum()) for p in parameters)
        sizes = (f"{entry.weights / 1e6:.1f}", f"{entry.plan / 1e6:.2f}", f"{count / 1e6:.2f}", f"{zeros / count:.0%}")
        table.add_row(name, *sizes, f"{macs / 1e9:.2f}", f"{dense / macs:.2f} x", f"{times[name]:.2f} x")
    return table


def _set(ids: Tensor) -> str:
    return f"{ids.shape[0]} sequences of {ids.shape[1]}"


TABLES: Mapping[str, Callable[[bool], Table]] = {
    "speed": speed_table,
    "memory": memory_table,
    "laws": laws_table,
    "removal": removal_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    console = Console(width=max(Console().width, 100))
    for name in options.tables:
        start = time.perf_counter()
        table = TABLES[name](options.quick)
        table.caption = f"{options.threads} threads, cpu, made in {time.perf_counter() - start:.0f} s"
        console.print(table)


if __name__ == "__main__":
    main()
