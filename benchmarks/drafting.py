"""What drafting costs beside a forward pass: Token Recycling's expansion and renewal, at the shape of a 0.5B model.

`python -m benchmarks.drafting [--layers 4] [--rounds 15] [--threads 2]`. The shape is Qwen2-0.5B's: 24 layers of width
896, 14 heads in 2 groups, MLPs of 4864, 151936 tokens. `--layers` of them are built, with random weights, and the rest
is scaled from two depths: a forward pass is a head and an embedding, and so many layers. Steps of drafting and forward
passes take turns in one process and are compared by medians, so that a drifting clock cancels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from prunelab.common.core.budget import Budget
from prunelab.common.speculative import Reader
from prunelab.common.speculative.role import Step
from prunelab.methods.token_recycling.method import TokenRecycling

LAYERS, CONTEXT = 24, 512
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def settle() -> None:
    """Wait for what a GPU was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step: Callable[..., object], *arguments: object) -> float:
    settle()
    start = time.perf_counter()
    step(*arguments)
    settle()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if not 2 <= arguments.layers <= LAYERS:
        parser.error(f"--layers must lie between 2 and {LAYERS}")
    torch.set_num_threads(arguments.threads)
    report(arguments.layers, arguments.rounds, torch.device("cpu"))


def report(deep: int, rounds: int, device: torch.device) -> None:
    """Measure with so many layers, and print it."""
    torch.manual_seed(0)
    shallow = deep // 2
    method, budget = TokenRecycling(), Budget(1.0)
    with device:
        state = method.start(SHAPE["vocab_size"])
    tokens = torch.randint(SHAPE["vocab_size"], (CONTEXT,)).to(device)
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=deep, **SHAPE)).eval().to(device)
    layers = model.model.layers
    times: dict[str, list[float]] = {"expand": [], "renew": [], "accept": [], "shallow": [], "deep": [], "single": []}
    with torch.inference_mode():
        for i in range(rounds + 2):
            results: dict[str, float] = {}
            for name, depth in (("shallow", shallow), ("deep", deep)):
                model.model.layers, model.config.num_hidden_layers = layers[:depth], depth
                reader = Reader(model)
                tree = method.draft(state, tokens, budget)
                reader.read(tokens[:-1], tree.within(0))  # the prompt
                results[name] = seconds(reader.read, tokens, tree)
            results["single"] = seconds(reader.read, torch.cat([tokens, tokens[:1]]), tree.within(0))
            logits = reader.read(tokens, tree)
            step = Step(tokens[-1:], tree, logits, method.accept(tree, logits))
            results["expand"] = seconds(method.draft, state, tokens, budget)
            results["renew"] = seconds(method.observe, state, step)
            results["accept"] = seconds(method.accept, tree, logits)
            for name, value in results.items():
                if i >= 2:
                    times[name].append(value)
    middle = {name: statistics.median(values) for name, values in times.items()}
    layer = (middle["deep"] - middle["shallow"]) / (deep - shallow)
    forward = middle["deep"] + (LAYERS - deep) * layer
    drafting = middle["expand"] + middle["renew"]
    print(
        f"Qwen2-0.5B shape, {torch.get_num_threads()} threads, {device}, {CONTEXT} tokens in the cache, medians of"
        f" {rounds} rounds; {deep} of {LAYERS} layers timed, the rest scaled"
    )
    for name, value in (
        ("expand the tree (80 nodes)", middle["expand"]),
        ("renew the table (top 8 of 81 rows)", middle["renew"]),
        ("accept (argmax and longest path)", middle["accept"]),
        ("forward pass over the tree, 24 layers", forward),
        (f"forward pass over one token, {deep} layers", middle["single"]),
    ):
        print(f"{name:<42} {1000 * value:>9.2f} ms")
    print(f"{'drafting (expand and renew)':<42} {100 * drafting / forward:>9.2f} % of a forward pass")


if __name__ == "__main__":
    main()
