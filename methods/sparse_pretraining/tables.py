"""The law on runs of our own: small language models of bytes, dense of several sizes and pruned on the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.data import code
from prunelab.common.training.engine import train
from prunelab.common.training.recipe import Recipe
from prunelab.methods.sparse_pretraining.method import SparsePretraining, fitted, law

CONTEXT, WIDTH, BYTES = 6, 16, 256  # bytes that are read, numbers for each, and how many there are
BATCH, STEPS, READ, HELD_OUT = 512, 800, 2_000_000, 60_000
HIDDEN = (8, 16, 32, 64, 128)  # units of dense models
LARGE = 128  # of the one that is pruned
SCHEDULES = ((0.5, 0.25, 0.75), (0.25, 0.25, 0.75), (0.25, 0.0, 0.5), (0.25, 0.1, 0.6))


def network(hidden: int) -> nn.Module:
    """The next byte by the last ones: an embedding and two layers (Bengio et al., JMLR 2003)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(BYTES, WIDTH), nn.Flatten(), nn.Linear(CONTEXT * WIDTH, hidden), nn.Tanh(),
            nn.Linear(hidden, BYTES),
        )  # fmt: skip


def text(split: code.Split, size: int) -> Tensor:
    """Windows [N, CONTEXT + 1] of source code."""
    tokens = torch.frombuffer(bytearray("\n".join(code.files(split)).encode()[:size]), dtype=torch.uint8).long()
    return tokens.unfold(0, CONTEXT + 1, 1)


def objective(model: nn.Module, batch: Any) -> Any:
    logits = model(batch["input_ids"][:, :-1])
    return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, batch["input_ids"][:, -1]))


def trained(
    method: SparsePretraining, hidden: int, keep: float, windows: Tensor, held: Tensor
) -> tuple[float, float, float]:
    """Average and last number of the linears' weights, and the loss on held-out text."""
    model = network(hidden)
    whole = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))

    def batch(number: int) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(number)
        return {"input_ids": windows[torch.randint(len(windows), (BATCH,), generator=draws)]}

    recipe = Recipe(steps=STEPS, batch=BATCH, rate=1e-2, check_every=STEPS, save_every=STEPS)
    plan = train(method, model, Budget(keep), batch, recipe, objective=objective, progress=False)
    absent = plan.report.dense_parameters - (plan.report.average_parameters or 0)
    with torch.inference_mode():
        return whole - absent, whole * keep, float(objective(model.eval(), {"input_ids": held}).loss)


def grid() -> dict[str, dict[str, Any]]:
    """`kind/run/figure`: average and last parameters and losses of dense and sparse runs, the law that fits the dense
    ones, and how far it is off for the sparse ones with either number."""
    windows, held = text("train", READ), text("held_out", HELD_OUT)
    runs = {
        "dense": [trained(SparsePretraining(), hidden, 1.0, windows, held) for hidden in HIDDEN],
        "sparse": [
            trained(SparsePretraining(begin, end, every=5), LARGE, keep, windows, held)
            for keep, begin, end in SCHEDULES
        ],
    }
    results: dict[str, dict[str, Any]] = {}
    for kind, of_kind in runs.items():
        for place, figures in enumerate(of_kind):
            for name, value in zip(("average", "last", "loss"), figures, strict=True):
                results[f"{kind}/{place}/{name}"] = {"value": round(value, 4)}
    dense, sparse = (np.array(runs[kind]) for kind in ("dense", "sparse"))
    coefficients = fitted(dense[:, 0], np.full(len(dense), float(STEPS * BATCH)), dense[:, 2])
    for name, value in coefficients.items():
        results[f"law//{name}"] = {"value": round(value, 6)}
    for column, name in enumerate(("average", "last")):
        predicted = law(sparse[:, column], np.full(len(sparse), float(STEPS * BATCH)), **coefficients)
        results[f"error//{name}"] = {"value": round(float(np.abs(predicted - sparse[:, 2]).mean()), 4)}
    return results
