"""DSIR and ReAGent against straightforward loops, and DSIR's growth with the corpus.

    python -m benchmarks.data_selection [--documents 2000] [--contexts 6] [--assets DIR]

The loops do what the released programs do, a document and a step at a time: DSIR's hashes every n-gram of every
document with SHA-256 in each of two passes, into a dense vector of counts; ReAGent's calls the model twice a step. Both
sides must choose alike. Ours is timed in the same process by processor time, with nothing remembered from the loops.

With a folder of assets, DSIR also looks for news, stories and code in a mixture of all three: what share of its choice
is of the target's kind, and by how much KL to the target falls, as released and with a pseudo-count.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunelab.common.catalogue import lookup
from prunelab.common.data import code, texts
from prunelab.common.data import documents as articles
from prunelab.common.data_selection import ngrams
from prunelab.common.data_selection.engine import select
from prunelab.common.models import loading
from prunelab.common.ranking.attribution import Explained
from prunelab.methods.dsir.method import DSIR
from prunelab.methods.reagent.method import ReAGent

BUCKETS, KEPT = 10_000, 0.1


def seconds(step: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of a step, and what it gives."""
    start = time.process_time()
    result = step()
    return time.process_time() - start, result


# -- DSIR ------------------------------------------------------------------------------------------------------------


def counts(text: str) -> np.ndarray:
    """Counts [B] of a document's words and bigrams, one after the other."""
    words, result = ngrams.tokens(text), np.zeros(BUCKETS, int)
    for ngram in (*words, *(" ".join(pair) for pair in pairwise(words))):
        result[int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % BUCKETS] += 1
    return result


def plain_dsir(raw: Sequence[str], target: Sequence[str], kept: int) -> list[int]:
    """The documents of largest weight."""
    q, p = (np.sum([counts(text) for text in corpus], axis=0) for corpus in (raw, target))
    ratio = np.log(p / p.sum() + 1e-8) - np.log(q / q.sum() + 1e-8)
    weights = np.array([np.inner(counts(text), ratio) for text in raw])
    return sorted(np.argsort(-weights, kind="stable")[:kept].tolist())


def dsir(raw: Sequence[str], target: Sequence[str], kept: int) -> list[int]:
    """Ours, with nothing remembered."""
    ngrams._PAIRS.clear()
    return select(DSIR(min_length=0, top_k=True), raw, f"{kept}count", target=target).indices


def documents(count: int, length: int = 3000) -> list[str]:
    """Stretches of source files."""
    pieces = [text[i : i + length] for text in code.files("train") for i in range(0, len(text), length)]
    return [pieces[i % len(pieces)] for i in range(count)]


def kinds_of_text(assets: Path) -> dict[str, list[str]]:
    """News, stories and source code, 250 texts of each of at most 1,500 characters."""
    stories = texts.load(lookup.dataset("stories")["assets"], {"assets": str(assets)}, "train")
    news = [" ".join(chain(*article.documents)) for article in articles.bbc(assets, every=8)]
    results = {"news": news, "stories": stories, "code": documents(250, 1500)}
    return {name: [text[:1500] for text in kind[:250]] for name, kind in results.items()}


def mixture(assets: Path) -> None:
    """DSIR's choice from a mixture for each kind of target."""
    kinds, bags = kinds_of_text(assets), ngrams.HashedNgrams()
    raw = [(name, text) for name, kind in kinds.items() for text in kind[50:]]
    random.Random(0).shuffle(raw)
    only = [text for _, text in raw]
    for name, smoothing in product(kinds, (0.0, 0.1)):
        kind, method = kinds[name], DSIR(min_length=10, smoothing=smoothing)
        amount = len(kind) - 50
        target, falls, shares = bags.counts(kind[:50]), [], []
        for seed in range(3):
            chosen = select(method, only, f"{amount}count", target=kind[:50], seed=seed).indices
            drawn = random.Random(seed).sample(only, amount)
            falls.append(ngrams.kl_reduction(target, bags.counts(only[i] for i in chosen), bags.counts(drawn)))
            shares.append(sum(raw[i][0] == name for i in chosen) / amount)
        share, chance = 100 * np.mean(shares), 100 * amount / len(raw)
        fall = f"{np.mean(falls):.3f} nats (standard deviation over draws {np.std(falls, ddof=1):.3f})"
        print(f"DSIR, smoothing {smoothing}, {name} among {len(raw)} texts: {share:.1f} % of {amount}")
        print(f"  (chance {chance:.1f} %); KL falls by {fall}")


# -- ReAGent ---------------------------------------------------------------------------------------------------------


def replaced(units: torch.Tensor, rng: torch.Generator | None = None) -> torch.Tensor:
    """Other tokens in the place of tokens, always the same ones."""
    return (7 * units + 3) % 2048


def plain_reagent(tokens: torch.Tensor, probe: Explained, method: ReAGent) -> list[int]:
    """The three most important tokens, a step at a time with the draws of the method."""
    rng, shape = torch.Generator().manual_seed(method.seed), (method.runs, len(tokens))

    @torch.no_grad()
    def logits(contexts: torch.Tensor) -> torch.Tensor:
        last: torch.Tensor = probe.model(contexts, use_cache=False).logits[:, -1]
        return last

    before = logits(tokens[None])[0].softmax(-1)
    target = int(before.argmax())
    scores, stopped = torch.rand(shape, generator=rng), torch.zeros(method.runs, dtype=torch.bool)
    for _ in range(method.max_steps):
        mask = torch.rand(shape, generator=rng) < method.ratio
        other = logits(torch.where(mask, replaced(tokens), tokens)).softmax(-1)[:, target]
        change = (before[target] - other)[:, None]
        step = (0.5 * torch.where(mask, change, -change) + 0.5).logit()
        scores = torch.where(stopped[:, None], scores, scores + step)
        rest = torch.ones_like(mask).scatter(1, scores.topk(method.top_n).indices, False)
        likely = logits(torch.where(rest, replaced(tokens), tokens)).topk(method.top_k).indices
        stopped |= (likely == target).any(1)
        if bool(stopped.all()):
            break
    chosen = scores.softmax(-1)
    return sorted((chosen[stopped] if bool(stopped.any()) else chosen).mean(0).topk(3).indices.tolist())


def reagent(tokens: torch.Tensor, probe: Explained, method: ReAGent) -> list[int]:
    """Ours."""
    services = {"next_token_logits": probe.next_token_logits, "replace": replaced}
    return sorted(method.importance(tokens, services).topk(3).indices.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--contexts", type=int, default=6)
    parser.add_argument("--assets", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)

    raw = documents(given.documents)
    target, kept = raw[: max(1, len(raw) // 40)], max(1, int(KEPT * len(raw)))
    loop, wanted = seconds(lambda: plain_dsir(raw, target, kept))
    ours, result = seconds(lambda: dsir(raw, target, kept))
    print(f"DSIR, {len(raw)} documents: loop {loop:.2f} s, ours {ours:.2f} s, {loop / ours:.1f} times as fast")
    print(f"  the same documents: {result == wanted}")
    half, _ = seconds(lambda: dsir(raw[: len(raw) // 2], target, kept // 2))
    print(f"  half of the documents: {half:.2f} s, growth {np.log2(ours / half):.2f} (1 is linear)")

    if given.assets is not None:
        mixture(given.assets)

    model, tokenizer = loading.language({"testbed": "code_lm"}, {})
    probe, method = Explained(model), ReAGent(max_steps=400)
    sources = code.files("held_out")[: given.contexts]
    contexts = [torch.tensor(tokenizer(text)["input_ids"][:40]) for text in sources]
    loop, wanted = seconds(lambda: [plain_reagent(tokens, probe, method) for tokens in contexts])
    ours, result = seconds(lambda: [reagent(tokens, probe, method) for tokens in contexts])
    same = sum(a == b for a, b in zip(wanted, result, strict=True))
    print(f"ReAGent, {len(contexts)} contexts: loop {loop:.2f} s, ours {ours:.2f} s, {loop / ours:.1f} times as fast")
    print(f"  the same three tokens: {same} of {len(contexts)}")


if __name__ == "__main__":
    main()
