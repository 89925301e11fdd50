"""What a language model still knows of a text that it has read, when its key-value cache is pruned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import code, texts
from prunelab.common.kv_cache import CacheReport, Draft
from prunelab.common.kv_cache.role import CachePruner
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.metrics.likelihood import exponential, per_token
from prunelab.common.models import devices, loading
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prunelab.common.tasks.cache import Cache

BATCH = 16  # sequences of one length, read together
SEED = 1  # of the recall sequences, which are the same for all methods


def measure(bench: Bench[Cache.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.cache`."""
    settings, length, share = bench.settings, bench.settings.length, bench.settings.prompt
    model, tokenizer = loading.language(bench.ids["model"], bench.config)
    context = model.config.max_position_embeddings
    if not 2 <= length <= context:
        raise PrunelabError(f"a length of {length} tokens does not fit this model; give 2 to {context}")
    model = devices.place(model, bench.device, half=True)
    text = texts.sequences(bench.ids["data"], bench.config, tokenizer, length, settings.samples)
    read = _Reader(bench, model)
    nll, right = read(batches(text), share)
    loss = per_token(nll)
    out = {"perplexity": exponential(loss), "loss": loss, "accuracy": per_token([100 * r for r in right])}
    out |= sizes(read.reports)
    if settings.pairs is not None:
        out["recall"] = recall(bench, read, tokenizer, settings.pairs, len(text))
    return out


class _Reader:
    """Reads texts with the run's method at work on the model, and notes what the cache held after each."""

    def __init__(self, bench: Bench[Cache.Settings], model: nn.Module) -> None:
        self.bench, self.model = bench, model
        self.reports: list[tuple[int, CacheReport]] = []
        method: Any = bench.method(CachePruner, TokenPruner)
        self.method: CachePruner | TokenPruner | None = method
        self.services: dict[str, Any] = {}
        if self.method is not None and self.method.services:
            draft = loading.language(bench.ids["model"], bench.config)[0].to(next(model.parameters()).device)
            self.services = {"draft": Draft(draft)}
        self.own: dict[str, Any] = {}
        if "parts" in bench.ids:
            if not isinstance(self.method, TokenPruner):
                raise PrunelabError("learned parts are those of a method that prunes tokens; leave `parts` out")
            parts = loading.load(bench.ids["parts"], bench.config)[0]
            like = next(model.parameters())
            self.own = {"parts": parts.to(like.device, like.dtype)}

    def __call__(self, batches: Iterable[Tensor], prompt: float | int) -> tuple[list[Tensor], list[Tensor]]:
        """Of each sequence [T] of the batches [B, T]: the negative log likelihood [T - P] of every token behind the
        prompt of P tokens (or that share), and whether it was the likeliest one."""
        losses, right = [], []
        # Samples of a batch to which different numbers of tokens come back would pad each other's caches.
        alone = isinstance(self.method, TokenPruner) and while_writing(self.method)
        parts = [part for batch in batches for part in (batch.split(1) if alone else (batch,))]
        for tokens in track(parts, "reading", transient=True):
            tokens = tokens.to(next(self.model.parameters()).device)
            start = prompt if isinstance(prompt, int) else max(1, round(prompt * tokens.shape[1]))
            logits = self.logits(tokens, start)
            nll = F.cross_entropy(logits.transpose(1, 2), tokens[:, start:], reduction="none")
            losses += list(finite(nll).double().cpu())
            right += list((logits.argmax(-1) == tokens[:, start:]).double().cpu())
        return losses, right

    @torch.inference_mode()
    def logits(self, tokens: Tensor, start: int) -> Tensor:
        """Logits [B, T - P, V] of the tokens behind the first P of [B, T], in float32."""
        from transformers import DynamicCache

        model: Any = self.model
        method = self.method
        rest = tokens.shape[1] - 1 - start
        step = 1 if method is not None and while_writing(method) else max(rest, 1)
        with self.bench.at_work(method, model, services=self.services, **self.own) as handle:
            cache = DynamicCache(config=model.config)
            results = [model(tokens[:, :start], past_key_values=cache).logits[:, -1:]]
            for part in tokens[:, start:-1].split(step, 1) if rest else ():
                results.append(model(part, past_key_values=cache).logits)
            report = handle.report() if isinstance(method, CachePruner) else held(cache, tokens.shape[1] - 1)
        self.reports.append((len(tokens), report))
        return torch.cat(results, 1).float()


def while_writing(method: CachePruner | TokenPruner) -> bool:
    """Whether the method acts on every token that is written, and not on the prompt alone."""
    return method.when != "prefill" if isinstance(method, CachePruner) else method.rest == "defer"


def held(cache: Any, tokens: int) -> CacheReport:
    """The report of a cache whose layers hold what came to them of so many tokens, all of it without pruning."""
    entries = [layer.keys.shape[2] for layer in cache.layers]
    sizes = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    whole = sum(size * tokens // max(count, 1) for size, count in zip(sizes, entries, strict=True))
    return CacheReport(tuple(map(float, entries)), sum(sizes), 0, whole, tokens)


def batches(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Neighbours of one length together, at most `BATCH` of them: [B, T] each. What has one token is left out."""
    results: list[list[Tensor]] = []
    for tokens in sequences:
        if len(tokens) < 2:
            continue
        if not results or len(results[-1]) == BATCH or len(results[-1][0]) != len(tokens):
            results.append([])
        results[-1].append(tokens)
    return [torch.stack(group) for group in results]


def sizes(reports: Sequence[tuple[int, CacheReport]]) -> dict[str, Any]:
    """What the caches of batches, each with its number of sequences, measured in the end."""
    samples = sum(count for count, _ in reports)
    held, full = (sum(getattr(r, name) for _, r in reports) for name in ("cache_bytes", "dense_bytes"))
    entries = sum(count * sum(r.entries) / len(r.entries) for count, r in reports) / samples
    return {
        "gbytes": {"value": round(held / samples / 1e9, 9)},
        "saving": {"value": round(100 * (1 - held / full), 3)},
        "entries": {"value": round(entries, 2)},
    }


def recall(
    bench: Bench[Cache.Settings], read: _Reader, tokenizer: PreTrainedTokenizerBase, pairs: int, count: int
) -> dict[str, Any]:
    """Percent of definitions given back, by `common.data.code.Recalls`: they stand anywhere in the prompt, and what is
    asked comes only when the prompt's cache has been pruned."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None or code.MARK not in inner.get_vocab():
        raise PrunelabError("definitions can be asked for in the testbeds of source code alone; leave `pairs` out")
    stream = code.encode(texts.load(bench.ids["data"], bench.config), inner)
    draws = torch.Generator().manual_seed(SEED)
    queries = code.Recalls.of(inner).draw(stream, count, bench.settings.length, pairs, draws)
    _, right = read(queries.tokens.split(BATCH), queries.start)
    return per_token([100 * r[queries.answers - queries.start] for r in right])
