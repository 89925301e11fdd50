"""The law on runs of our own: small language models on source code, dense of several sizes and pruned on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.data import code
from prunelab.common.training.engine import train
from prunelab.common.training.recipe import Recipe
from prunelab.methods.sparse_pretraining.method import SparsePretraining, fitted, law

LENGTH, BATCH, STEPS, HELD_OUT = 64, 16, 400, 60_000  # tokens are bytes
WIDTHS = (8, 16, 24, 32, 40)  # of dense models
LARGE = 40  # of the one that is pruned
SCHEDULES = ((0.5, 0.25, 0.75), (0.25, 0.25, 0.75), (0.25, 0.0, 0.5), (0.25, 0.5, 1.0))  # share kept, begin, end
VOCABULARY = 256


def model(width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def text(split: code.Split, size: int) -> Tensor:
    return torch.frombuffer(bytearray("\n".join(code.files(split)).encode()[:size]), dtype=torch.uint8).long()


def prunable(network: nn.Module) -> int:
    """Weights of all linears, the head's among them, without the embeddings, as the paper counts."""
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))


@torch.inference_mode()
def loss_of(network: nn.Module, held: Tensor) -> float:
    windows = held[: len(held) // LENGTH * LENGTH].view(-1, LENGTH)
    found = [float(network(input_ids=part, labels=part).loss) for part in windows.split(64)]
    return float(np.mean(found))


def trained(
    method: SparsePretraining, width: int, keep: float, tokens: Tensor, held: Tensor
) -> tuple[float, float, float]:
    """Average and last number of prunable parameters, and the loss on held-out text."""
    network = model(width)
    whole = prunable(network)

    def batch(number: int) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(number)
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=draws)
        ids = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        return {"input_ids": ids, "labels": ids}

    recipe = Recipe(steps=STEPS, batch=BATCH, rate=1e-2, check_every=STEPS, save_every=STEPS)
    plan = train(method, network, Budget(keep), batch, recipe, progress=False)
    absent = plan.report.dense_parameters - (plan.report.average_parameters or 0)
    return whole - absent, whole * keep, loss_of(network.eval(), held)


def grid() -> dict[str, dict[str, Any]]:
    """`kind/run/figure`: average and last parameters and losses of dense and sparse runs, the law that fits the dense
    ones, and how far it is off for the sparse ones with either number."""
    tokens, held = text("train", 2_000_000), text("held_out", HELD_OUT)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[tuple[float, float, float]]] = {"dense": [], "sparse": []}
    for width in WIDTHS:
        runs["dense"].append(trained(SparsePretraining(), width, 1.0, tokens, held))
    for keep, begin, end in SCHEDULES:
        runs["sparse"].append(trained(SparsePretraining(begin, end, every=20), LARGE, keep, tokens, held))
    for kind, of_kind in runs.items():
        for place, figures in enumerate(of_kind):
            for name, value in zip(("average", "last", "loss"), figures, strict=True):
                found[f"{kind}/{place}/{name}"] = {"value": round(value, 4)}
    dense, sparse = (np.array(runs[kind]) for kind in ("dense", "sparse"))
    seen = np.full(len(dense), float(STEPS * BATCH * LENGTH))
    coefficients = fitted(dense[:, 0], seen, dense[:, 2])
    for name, value in coefficients.items():
        found[f"law//{name}"] = {"value": round(value, 6)}
    for column, name in enumerate(("average", "last")):
        predicted = law(sparse[:, column], seen[: len(sparse)], **coefficients)
        found[f"error//{name}"] = {"value": round(float(np.abs(predicted - sparse[:, 2]).mean()), 4)}
    return found
