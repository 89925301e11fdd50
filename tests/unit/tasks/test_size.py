"""Sizes from configurations alone: the published numbers, and what a real pruning of the same shape leaves."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prunelab.common import weights
from prunelab.common.catalogue import lookup
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import size

# Billions of parameters, as the models' owners state them or count from their checkpoints.
PARAMETERS = {
    "llama_7b": 6.738416, "llama_13b": 13.015864, "llama_30b": 32.528944, "llama_65b": 65.285661,
    "llama2_70b": 68.976648, "mixtral_8x7b": 46.702793, "qwen3_30b_a3b": 30.532123, "deepseek_r1": 671.026404,
}  # fmt: skip
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {"library": "transformers", "name": "LlamaForCausalLM", "arguments": {"vocab_size": 64, **SIZES}}
EXPERTS = {
    "library": "transformers",
    "name": "MixtralForCausalLM",
    "arguments": {
        "vocab_size": 64, **SIZES, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2
    },
}  # fmt: skip


def counted(entry, method=None, budget=None, **options):
    run = Run("size", "", method, options, budget, {"length": 16}, {"model": entry})
    return {name: metric["value"] for name, metric in runner.measure(run, {}).items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters(name):
    model = size.loading.architecture(lookup.model(name)["architecture"])
    assert size.held(model) / 1e9 == pytest.approx(PARAMETERS[name], abs=1e-6)


def test_macs_of_a_llama_by_hand():
    width, inner, vocabulary, length, depth = 32, 40, 64, 16, 2
    block = length * (4 * width * width + 3 * width * inner) + 2 * length * length * width
    assert counted(TINY)["gmacs"] == pytest.approx((depth * block + length * width * vocabulary) / 1e9, abs=1e-6)


def test_macs_of_experts_are_those_of_the_chosen():
    width, inner, length, depth = 32, 40, 16, 2
    attention = length * (2 * width * width + 2 * width * 16) + 2 * length * length * width
    block = attention + length * (width * 8 + 2 * 3 * width * inner)
    assert counted(EXPERTS)["gmacs"] == pytest.approx((depth * block + length * width * 64) / 1e9, abs=1e-6)
    pruned = counted(EXPERTS, "easy_ep", "4count")
    assert pruned["dense_gparameters"] - pruned["gparameters"] == pytest.approx(
        2 * 4 * (3 * width * inner + width) / 1e9, abs=2e-6
    )
    assert pruned["dense_gmacs"] - pruned["gmacs"] == pytest.approx(2 * length * width * 4 / 1e9, abs=2e-6)


@pytest.mark.parametrize(
    ("method", "options", "budget"),
    [("amp", {}, "0.7"), ("amp", {"released": False}, "0.6"), ("wanda_sp", {}, "0.5"), ("magnitude_sp", {}, "0.8"),
     ("random_weights", {"units": ("heads", "channels")}, "0.5"), ("flap", {"structure": "UL-UM"}, "0.5")],
)  # fmt: skip
def test_counts_are_those_of_the_real_pruning(method, options, budget):
    """The same method, with real scores on real weights, leaves a model of exactly that size."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)).eval()
    sample = [torch.randint(64, (12,)) for _ in range(4)]
    weights.prune(registry.create(method, **options), model, Budget.parse(budget), sample, progress=False)
    left = {name: p for name, p in model.named_parameters() if not name.endswith("bias")}  # FLAP adds those
    shape = size.loading.architecture(TINY)
    size.cut(registry.create(method, **options), shape, Budget.parse(budget))
    assert {name: p.shape for name, p in shape.named_parameters()} == {name: p.shape for name, p in left.items()}


def test_what_only_data_decide_is_refused():
    for method in ("flap", "cfsp"):
        with pytest.raises(PrunelabError, match="data"):
            counted(TINY, method, "0.5")
    with pytest.raises(PrunelabError, match="without data"):
        counted(EXPERTS, "stun", "0.5", then="none")
    with pytest.raises(PrunelabError, match="changes no size"):
        counted(TINY, "wanda", "0.5")
    with pytest.raises(PrunelabError, match="token_pruner"):
        counted(TINY, "tome", "0.5")
