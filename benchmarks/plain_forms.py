"""Every method's core against its plain form: the steps of the paper, written out as one would at first.

`python -m benchmarks.plain_forms [--rounds 5] [--threads 1] [--only tome snapkv] [--quick]`. Both take turns on the
same inputs in one process; printed are the median CPU times and the median of their ratios, above 1 where ours is
quicker. Each round compares what they give. The plain forms are our own words: none is anyone's code.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks import divprune, holitom, lexrank, weight_pruning
from prunelab.common.core import attention, selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.selection import cosine_distance, max_min_order
from prunelab.common.ranking.sentences import Passage
from prunelab.common.ranking.text import words
from prunelab.common.speculative.trees import Template
from prunelab.common.weights import prune
from prunelab.common.weights.obs import inverse_factor
from prunelab.methods.aim import method as aim
from prunelab.methods.holitom.segmentation import run_lengths, segment
from prunelab.methods.lexrank.method import LexRank
from prunelab.methods.quota import method as quota
from prunelab.methods.snapkv.method import votes
from prunelab.methods.sparsegpt.method import prune_matrix
from prunelab.methods.token_recycling.method import PUBLISHED, expand, paths_of, renew

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # ours, and the plain form


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- tokens ------------------------------------------------------------------------------------------------------------


def plain_divprune(tokens: Tensor, count: int) -> Tensor:
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    return torch.stack([divprune.straightforward(1 - u @ u.T, count) for u in unit])


def plain_tome(x: Tensor, metric: Tensor, removed: int) -> Tensor:
    """One bipartite step: most similar even tokens go into the mean with their odd ones."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    best, partner = similarity.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    gone, stays = order[:, :removed], order[:, removed:]
    even, odd = x[:, ::2], x[:, 1::2]
    width = x.shape[-1]
    to = partner.gather(1, gone).unsqueeze(-1)
    sums = odd.scatter_add(1, to.expand(-1, -1, width), even.gather(1, gone.unsqueeze(-1).expand(-1, -1, width)))
    sizes = torch.ones_like(odd[..., :1]).scatter_add(1, to, torch.ones_like(to, dtype=x.dtype))
    return torch.cat([even.gather(1, stays.unsqueeze(-1).expand(-1, -1, width)), sums / sizes], 1)


def our_tome(x: Tensor, metric: Tensor, removed: int) -> Tensor:
    return selection.bipartite_matching(metric, removed).mix(torch.ones(x.shape[:2])).apply(x)


def plain_merged(x: Tensor, outputs: int) -> Tensor:
    """Rounds of such steps, each at most halving."""
    while x.shape[1] > outputs:
        x = plain_tome(x, x, min(x.shape[1] // 2, x.shape[1] - outputs))
    return x


def plain_resized(x: Tensor, grid: tuple[int, int], size: tuple[int, int], how: str) -> Tensor:
    maps = x.transpose(1, 2).unflatten(2, grid)
    if how == "average":
        return F.adaptive_avg_pool2d(maps, size).flatten(2).transpose(1, 2)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def plain_axes(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    rows = torch.stack([plain_merged(row.unsqueeze(0), size[1])[0] for row in x.unflatten(0, grid)])
    columns = [plain_merged(column.unsqueeze(0), size[0])[0] for column in rows.transpose(0, 1)]
    return torch.stack(columns, 1).flatten(0, 1)


def plain_quota(x: Tensor, counts: Sequence[int], grid: tuple[int, int], how: str) -> Tensor:
    made = []
    for frame, count in zip(x, counts, strict=True):
        size = quota.grid_of(count)
        if how == "axes":
            made.append(plain_axes(frame, grid, size))
        elif how == "merge":
            made.append(plain_merged(plain_resized(frame[None], grid, quota.halved(grid), "bilinear"), count)[0])
        else:
            made.append(plain_resized(frame[None], grid, size, how)[0])
    return torch.cat(made)


def our_quota(x: Tensor, counts: Sequence[int], grid: tuple[int, int], how: Any) -> Tensor:
    given = x if how in ("axes", "merge") else None
    mix, _ = quota.assign(given, counts, grid, how, x.device)
    return mix.apply(x.flatten(0, 1).unsqueeze(0))[0]


def plain_fastervlm(row: Tensor, features: Tensor, kept: int) -> Tensor:
    index = row.mean(1).topk(kept, dim=-1).indices.sort(-1).values
    return features.gather(1, index.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def our_fastervlm(row: Tensor, features: Tensor, kept: int) -> Tensor:
    index, _ = selection.top_k(row.mean(1), kept)
    return selection.take(features, index)


# -- caches, drafts, text ----------------------------------------------------------------------------------------------


def plain_snapkv(queries: Tensor, keys: Tensor, window: int, kernel: int, kept: int) -> Tensor:
    """Heads' keys repeated, a mask laid over the window's rows, the softmax of all."""
    group, total = queries.shape[1] // keys.shape[1], keys.shape[2]
    every = keys.repeat_interleave(group, 1)
    logits = queries[:, :, -window:] @ every.transpose(2, 3) / math.sqrt(queries.shape[-1])
    mask = torch.full((window, window), float("-inf")).triu(1)
    logits[..., -window:] += mask
    received = logits.softmax(-1)[..., : total - window].mean(2)
    pooled = F.avg_pool1d(received, kernel, 1, kernel // 2).unflatten(1, (keys.shape[1], group)).mean(2)
    return pooled.topk(kept, dim=-1).indices.sort(-1).values


def our_snapkv(queries: Tensor, keys: Tensor, window: int, kernel: int, kept: int) -> Tensor:
    rows = attention.causal_rows(queries[:, :, -window:], keys, queries.shape[-1] ** -0.5)
    return selection.descending(votes(rows, kernel))[..., :kept].sort(-1).values


def plain_expand(table: Tensor, root: Tensor, template: Template) -> Tensor:
    """Node by node."""
    made: list[Tensor] = []
    for parent, rank in zip(template.parents.tolist(), template.ranks.tolist(), strict=True):
        above = root[0] if parent < 0 else made[parent]
        made.append(table[above, rank])
    return torch.stack(made)


def our_recycling(table: Tensor, root: Tensor, template: Template, logits: Tensor) -> Tensor:
    tokens = expand(table, root, template)
    renew(table, torch.cat([root, tokens]), logits)
    return tokens


def plain_recycling(table: Tensor, root: Tensor, template: Template, logits: Tensor) -> Tensor:
    tokens = plain_expand(table, root, template)
    for token, row in zip(torch.cat([root, tokens]), logits, strict=True):
        table[token] = row.topk(table.shape[1]).indices
    return tokens


def plain_lexrank(sentences: Sequence[str]) -> Tensor:
    """Counts in dictionaries, every pair's cosine, a dense power iteration."""
    counts = [{w: part.count(w) for w in part} for part in map(words, sentences)]
    documents = {w: sum(w in c for c in counts) for c in counts for w in c}
    idf = {w: math.log(len(counts) / n) for w, n in documents.items()}
    norms = [math.sqrt(sum((n * idf[w]) ** 2 for w, n in c.items())) for c in counts]
    graph = torch.zeros(len(counts), len(counts), dtype=torch.float64)
    for i, one in enumerate(counts):
        for j, other in enumerate(counts):
            shared = sum(n * other[w] * idf[w] ** 2 for w, n in one.items() if w in other)
            graph[i, j] = float(i == j or (norms[i] * norms[j] > 0 and shared / norms[i] / norms[j] > 0.1))
    step, p = graph / graph.sum(1, keepdim=True), torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
    for _ in range(1000):
        before, p = p, 0.15 / len(p) + 0.85 * step.T @ p
        if float((p - before).norm()) <= 1e-8:
            break
    return p


# -- weights -----------------------------------------------------------------------------------------------------------


def plain_sparsegpt(weight: Tensor, factor: Tensor, budget: Budget, width: int = 128) -> Tensor:
    """The mask, with an outer product taken off all columns behind at each column."""
    weight, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], width):
        end = min(start + width, weight.shape[1])
        scores = weight[:, start:end].square() / factor.diagonal()[start:end].square()
        if not budget.every:
            least = scores.flatten().sort().values[int(scores.numel() * (1 - budget.amounts[0]))]
            kept[:, start:end] = scores > least
        for i in range(start, end):
            if budget.every and i % budget.every == 0:
                group = weight[:, i : i + budget.every].square() / factor.diagonal()[i : i + budget.every].square()
                gone = group.topk(budget.every - int(budget.amounts[0]), dim=1, largest=False).indices
                kept[:, i : i + budget.every].scatter_(1, gone, False)
            error = weight[:, i] * ~kept[:, i] / factor[i, i]
            weight[:, i:] -= torch.outer(error, factor[i, i:])
    return kept


def pruned(method: Any, plain: Callable[..., dict[str, Tensor]], budget: float, depth: int, ids: Tensor) -> Pair:
    """Whole runs on a small language model, whose masks are compared."""

    def ours() -> dict[str, Tensor]:
        plan = prune(method, weight_pruning.language_model(depth, 64), budget, ids, progress=False)
        return {target.name: decision.mask for target, decision in plan.decisions()}

    return ours, lambda: plain(weight_pruning.language_model(depth, 64), ids, Budget(budget), False)


# -- all of them -------------------------------------------------------------------------------------------------------


def pairs(quick: bool) -> Mapping[str, Callable[[], Pair]]:
    """By name what makes the two ways, on inputs of the papers' sizes or of a tenth."""

    def size(whole: int) -> int:
        return max(8, whole // 8) if quick else whole

    def both(ours: Callable[..., Any], plain: Callable[..., Any], *given: Any) -> Pair:
        return partial(ours, *given), partial(plain, *given)

    def div() -> Pair:
        tokens, kept = noise(1, size(576), size(1024)), size(56)
        return lambda: max_min_order(cosine_distance(tokens), kept), lambda: plain_divprune(tokens, kept)

    def cuts() -> Pair:
        similar = torch.rand(31, size(192), generator=torch.Generator().manual_seed(0)) > 0.1
        return lambda: segment(run_lengths(similar)), lambda: holitom.spelled_out(similar)

    def frames(how: str) -> Pair:
        side = 8 if quick else 24
        tokens = noise(4 if quick else 16, side * side, size(1024))
        counts = [(side // 3) ** 2, (side // 2) ** 2] * (len(tokens) // 2)
        return both(our_quota, plain_quota, tokens, counts, (side, side), how)

    def aims() -> Pair:
        tokens = noise(size(32), 196, size(896))
        return lambda: aim.merge(tokens, 49, (14, 14)).apply(tokens), lambda: plain_merged(tokens, 49)

    def gpt(budget: Budget) -> Pair:
        weight, inputs = noise(size(512), size(512)), noise(size(2048), size(512), seed=1)
        factor = inverse_factor(inputs.T @ inputs / len(inputs), 0.01)
        return lambda: prune_matrix(weight, factor, budget, 128)[0], lambda: plain_sparsegpt(weight, factor, budget)

    def recycling() -> Pair:
        template, vocabulary = Template.of(paths_of(PUBLISHED)), size(32_000)
        table = torch.randint(vocabulary, (vocabulary, 8), generator=torch.Generator().manual_seed(0))
        logits = noise(len(template.parents) + 1, vocabulary)
        one, other = table.clone(), table.clone()
        root = torch.tensor([5])
        return (
            lambda: our_recycling(one, root, template, logits),
            lambda: plain_recycling(other, root, template, logits),
        )

    def wholes(name: str) -> Pair:
        method, plain, budget = weight_pruning.PLAIN[name]
        return pruned(method, plain, budget, 2, weight_pruning.token_ids(4, 32 if quick else 128))

    def sentences() -> Pair:
        text = lexrank.text(40 if quick else 300)
        return lambda: LexRank().rank(Passage(tuple(text))), lambda: plain_lexrank(text)

    heads, prompt = (noise(1, 8, size(4096), 64), noise(1, 2, size(4096), 64, seed=1)), size(1024)
    row, features = noise(1, 16, size(576)).softmax(-1), noise(1, size(576), size(4096))
    tokens, metric = noise(size(64), 197, size(384)), noise(size(64), 197, 64, seed=1)
    return {
        "divprune": div,
        "holitom": cuts,
        "fastervlm": lambda: both(our_fastervlm, plain_fastervlm, row, features, size(144)),
        "tome": lambda: both(our_tome, plain_tome, tokens, metric, 13),
        "aim": aims,
        **{f"quota {how}": partial(frames, how) for how in ("bilinear", "average", "axes", "merge")},
        "snapkv": lambda: both(our_snapkv, plain_snapkv, *heads, 32, 7, prompt // 2),
        "token_recycling": recycling,
        "lexrank": sentences,
        "sparsegpt 50 %": partial(gpt, Budget(0.5)),
        "sparsegpt 2:4": partial(gpt, Budget.of("2:4")),
        **{f"{name.lower()}, whole run": partial(wholes, name) for name in weight_pruning.PLAIN},
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.allclose(one.double(), other.double(), atol=1e-4, rtol=1e-3)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool(one == other)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Of CPU, and what was computed."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def measure(pair: Pair, rounds: int) -> tuple[float, float, float]:
    """Median seconds of ours and of the plain form, and the median of their ratios; a first round is not counted."""
    times = []
    for _ in range(rounds + 1):
        (ours, result), (plain, wanted) = seconds(pair[0]), seconds(pair[1])
        if not same(result, wanted):
            raise SystemExit("ours and the plain form differ")
        times.append((ours, plain))
    times = times[1:]
    ratio = statistics.median(plain / max(ours, 1e-9) for ours, plain in times)
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times), ratio


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument(
        "--quick", action="store_true", help="small inputs: that both ways agree, not how fast they are"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = Table("method", "ours, ms", "plain, ms", "plain over ours", title="CPU time against plain forms")
    for name, make in pairs(options.quick).items():
        if options.only and not any(part in name for part in options.only):
            continue
        ours, plain, ratio = measure(make(), options.rounds)
        table.add_row(name, f"{1000 * ours:.2f}", f"{1000 * plain:.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
