"""What pruning a cache adds to reading a prompt, against a plain read and against attention as a full matrix.

`python -m benchmarks.kv_cache [--tokens 4096 16384] [--rounds 3] [--threads 1] [--methods snapkv ...]`. A small Llama
(two layers, grouped queries) reads one prompt; plain and pruned reads alternate in one process and are compared by the
median of their ratios. `full matrix` is the library's eager attention, whose N x N probabilities other implementations
of these methods read their scores off; it is left out where it does not fit in memory. Then the time of a written token
at a quarter of the cache, with methods that prune at each step. Last what a token costs on the small model that ships
with Prunelab: 64 of them behind a prompt of 512 at half of the cache, in CPU time over plain `generate`, and how often
Python looks at the device for each.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks import looks
from prunelab.common import testbeds
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.kv_cache import applied

PREFILL = ("streaming_llm", "snapkv", "tova", "a2sf_prefill", "h2o", "observed_attention", "spatten_chat", "mustafar")
DECODE = ("streaming_llm", "h2o", "tova", "mustafar")
STEP = ("streaming_llm", "window", "h2o", "tova", "a2sf", "spatten_chat", "spatten", "mustafar", "snapkv")
STEPS = 16


def available() -> int:
    """Bytes of memory that are free, or no limit where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])  # type: ignore[index]


def decoder(context: int, layers: int = 2) -> Any:
    """A Llama of 512 channels, 8 heads of 64 and 2 key-value heads, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=context, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pruned(name: str | None, model: Any, budget: float = 0.25) -> Any:
    return nullcontext() if name is None else applied(registry.create(name), model, Budget(budget))  # type: ignore[arg-type]


def read(model: Any, tokens: Tensor, name: str | None = None) -> Any:
    """One read of the prompt; the logits of its last token alone, as `generate` asks for them."""
    cache = DynamicCache()
    with pruned(name, model):
        model(tokens, past_key_values=cache, logits_to_keep=1)
    return cache


def ratio(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median of one's time over the other's, in turns, and the other's median time in seconds."""
    pairs = [(timed(one), timed(other)) for _ in range(rounds + 1)][1:]
    return statistics.median(a / b for a, b in pairs), statistics.median(b for _, b in pairs)


def write(model: Any, tokens: Tensor, name: str | None) -> float:
    """Seconds a written token, behind the prompt."""
    cache, last = DynamicCache(), tokens[:, :1]
    with pruned(name, model):
        model(tokens, past_key_values=cache, logits_to_keep=1)
        steps = [timed(lambda: model(last, past_key_values=cache)) for _ in range(STEPS)]
    return statistics.median(steps)


def cpu(model: Any, tokens: Tensor, name: str | None, count: int = 64) -> float:
    """Seconds of CPU for each of `count` tokens behind the first one."""
    with pruned(name, model, 0.5):
        marks = [time.process_time()]
        for length in (1, count + 1):
            model.generate(tokens, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)
            marks.append(time.process_time())
    return (marks[2] - 2 * marks[1] + marks[0]) / count


def steps(names: Sequence[str], rounds: int) -> Table:
    """CPU time of a token over plain `generate`, in turns, and looks at the device a token."""
    model, _ = testbeds.load("code_lm")
    tokens = torch.randint(3, 2048, (1, 512), generator=torch.Generator().manual_seed(0))
    table = Table(title="a token of the shipped language model, 64 behind 512, half of the cache")
    for header in ("method", "CPU time over plain", "looks a token"):
        table.add_column(header, justify="left" if header == "method" else "right")
    table.add_row("plain", "1.00", f"{looks.a_token(model, tokens):g}")
    for name in names:
        pairs = [(cpu(model, tokens, name), cpu(model, tokens, None)) for _ in range(rounds + 1)][1:]
        with pruned(name, model, 0.5):
            count = looks.a_token(model, tokens)
        table.add_row(name, f"{statistics.median(a / b for a, b in pairs):.2f}", f"{count:g}")
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--methods", nargs="+", default=list(PREFILL))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = decoder(max(arguments.tokens) + STEPS)
    table = Table(title=f"reading, time over a plain read ({arguments.threads} threads, {arguments.rounds} rounds)")
    table.add_column("method")
    rows: dict[str, list[str]] = {"plain, seconds": [], "full matrix": [], **{name: [] for name in arguments.methods}}
    written: dict[str, list[str]] = {"plain": [], **{name: [] for name in DECODE if name in arguments.methods}}
    for count in arguments.tokens:
        table.add_column(f"{count} tokens", justify="right")
        tokens = torch.randint(1024, (1, count), generator=torch.Generator().manual_seed(0))
        for name in arguments.methods:
            result, seconds = ratio(lambda: read(model, tokens, name), lambda: read(model, tokens), arguments.rounds)  # noqa: B023
            rows[name].append(f"{result:.2f}")
        rows["plain, seconds"].append(f"{seconds:.2f}")
        if 4 * 8 * count**2 * 4 < available():  # logits, their softmax, its copy and the mask, of 8 heads
            model.set_attn_implementation("eager")
            full = min(timed(lambda: read(model, tokens)) for _ in range(2))  # noqa: B023
            model.set_attn_implementation("sdpa")
            rows["full matrix"].append(f"{full / seconds:.2f}")
        else:
            rows["full matrix"].append("does not fit")
        plain = write(model, tokens, None)
        for name in written:
            written[name].append(f"{(write(model, tokens, None if name == 'plain' else name) / plain):.2f}")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    table = Table(title="writing at a quarter of the cache, time a token over the unpruned cache's")
    for header in ("method", *(f"{count} tokens" for count in arguments.tokens)):
        table.add_column(header, justify="left" if header == "method" else "right")
    for name, cells in written.items():
        table.add_row(name, *cells)
    console.print(table)
    console.print(steps([name for name in STEP if name in arguments.methods or arguments.methods == list(PREFILL)], 9))


if __name__ == "__main__":
    main()
