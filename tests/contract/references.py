"""Tiny models, and a minimal reference method for every role, so that each role is exercised before its first paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import timm
import torch
from torch import Tensor, nn

from prunelab.common.constrained.role import ConstrainedSampler
from prunelab.common.core.budget import Budget
from prunelab.common.core.method import Method
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.core.signals import Reading
from prunelab.common.kv_cache.role import CachePruner, CacheSignals
from prunelab.common.ranking import sentences
from prunelab.common.ranking.sentences import Passage, SentenceRanker
from prunelab.common.speculative.role import DraftDecoder, Step
from prunelab.common.speculative.trees import Accepted, DraftTree
from prunelab.common.tokens.adapters.passes import SUBLAYERS
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.common.weights import masks
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputMean, InputNorm
from prunelab.common.weights.targets import Accumulator, Target, Unit, WeightSignals

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 9, "num_heads": 3, "num_classes": 7}
# The published variants of timm's ViT that differ in structure, each shrunk to a few thousand parameters.
VITS = {
    "plain": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "deit": "deit_small_patch16_224",
    "deit3": "deit3_small_patch16_224",  # LayerScale
    "clip": "vit_base_patch16_clip_224",  # norm before the blocks
    "dinov2": "vit_small_patch14_reg4_dinov2",  # LayerScale and four registers
    "mae": "vit_base_patch16_224.mae",
    "average": "vit_base_patch16_gap_224"
    if "vit_base_patch16_gap_224" in timm.list_models()
    else "vit_small_patch16_224",
    "qk_norm": "vit_small_patch16_224",
}
_EXTRA: dict[str, dict[str, Any]] = {
    "average": {"global_pool": "avg", "class_token": False, "fc_norm": True},
    "qk_norm": {"qk_norm": True, "init_values": 1e-1},
    "mae": {"global_pool": "token"},
    "dinov2": {"global_pool": "token"},
}


def vit(family: str = "plain", **overrides: Any) -> nn.Module:
    """A tiny random model of a family, with weights large enough for attention to be uneven."""
    torch.manual_seed(0)
    model = timm.create_model(VITS[family], **{**TINY, **_EXTRA.get(family, {}), **overrides}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) * (0.4 if "qkv" in name else 0.15))
    return model


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def signals(
    batch: int = 2, patches: int = 12, special: int = 1, heads: int = 3, seed: int = 0, pad: int = 0
) -> tuple[TokenSignals, dict[str, Tensor]]:
    """Synthetic signals of one site with `pad` padding tokens behind the real ones; the tensors are returned too."""
    g = torch.Generator().manual_seed(seed)
    total, width = special + patches, 8
    q, k, v = (torch.randn(batch, heads, total, width, generator=g) for _ in range(3))
    hidden = torch.randn(batch, total, heads * width, generator=g)
    if pad:
        noise = torch.Generator().manual_seed(seed + 1)
        q, k, v = (torch.cat([t, 9 * torch.randn(batch, heads, pad, width, generator=noise)], 2) for t in (q, k, v))
        hidden = torch.cat([hidden, 9 * torch.randn(batch, pad, heads * width, generator=noise)], 1)
    valid = (torch.arange(total + pad) < total).expand(batch, -1) if pad else None
    return build(q, k, v, hidden, valid, special), {"q": q, "k": k, "v": v, "hidden": hidden}


class Synthetic(TokenSignals):
    """Every layer says the same."""

    def at(self, reading: Reading) -> Tensor:
        value: Tensor = getattr(self, reading.name)
        if reading.rows == "class":
            return value[:, :1] if reading.name == "hidden" else value[:, :, :1]
        end = value.shape[-1] if self.valid is None else int(self.valid[0].sum())
        return value[:, :, end - 3 : end] if reading.rows else value


def build(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, valid: Tensor | None, special: int, seed: int = 0
) -> TokenSignals:
    """TokenSignals from raw tensors, for one sample or many."""
    batch, heads, total, width = q.shape
    logits = q @ k.transpose(-2, -1) * width**-0.5
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None, :], float("-inf"))
    prunable = torch.ones(batch, total, dtype=torch.bool)
    prunable[:, :special] = False
    units = total - special
    if valid is not None:
        prunable &= valid
    real_end = total if valid is None else int(valid[0].sum())
    rows = 1 if valid is None else valid[:, None, :, None]
    sources: dict[str, Callable[[], Tensor]] = {
        "hidden": lambda: hidden,
        "normed": lambda: nn.functional.rms_norm(hidden, hidden.shape[-1:]),
        "queries": lambda: q,
        "keys": lambda: k,
        "values": lambda: v,
        "attention_logits": lambda: logits,
        "attention": lambda: logits.softmax(-1),
        "cls_row": lambda: logits.softmax(-1)[:, :, 0],
        "last_row": lambda: logits.softmax(-1)[:, :, real_end - 1],
        "coming_row": lambda: (2 * logits).softmax(-1)[:, :, real_end - 1],
        "coming_text": lambda: (2 * logits).softmax(-1)[:, :, real_end - 3 : real_end],
        "received": lambda: (logits.softmax(-1) * rows).sum(-2),
        "sizes": lambda: torch.ones(batch, total),
        "text": lambda: hidden[:, 0],
        **{name: lambda n=n: hidden.roll(n, -1) for n, name in enumerate(sorted(SUBLAYERS))},
        "scans": lambda: torch.stack([hidden, hidden.flip(-1) - 1], 1),
        "class_confidence": lambda: (4 * hidden[..., :4]).sigmoid() + 0 * hidden[..., :4],  # bad values stay bad
        "positions": lambda: torch.zeros_like(hidden),
        "encoder_memory": lambda: hidden,
        "class_logits": lambda: hidden,
        "proposal_logits": lambda: hidden,
        "class_weight": lambda: torch.ones(3, heads * width),
        "class_bias": lambda: torch.zeros(3),
    }
    real = total - special if valid is None else int(valid[0].sum()) - special
    info = ModelInfo("reference", 12, heads, heads * width, real + special, special, special > 0)
    rng = torch.Generator().manual_seed(seed)
    places = torch.arange(total).expand(batch, -1)
    return Synthetic(
        sources, prunable=prunable, units=units, info=info, valid=valid, rng=rng, indices=places, grids=((1, total),)
    )


@contextmanager
def invariant(name: str, method: type[Method] | Method) -> Iterator[None]:
    """The body asserts an invariant. Where the method is exempt from it, the body must fail, so that no exemption
    outlives its reason."""
    if name not in method.exempt:
        yield
        return
    try:
        yield
    except (AssertionError, ValueError):
        return
    raise AssertionError(f"{method} is exempt from '{name}' but fulfils it; delete the exemption")


TINY_LM = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 4, **_MOE}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1], **_MOE},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "head_dim": 16, **_MOE}),
}


def language_model(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A tiny random language model of a family, with weights large enough for activations to differ."""
    import transformers

    name, values = LANGUAGE_MODELS[family]
    config = getattr(transformers, f"{name}Config")(**{**TINY_LM, **values, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape) * 0.2)
    return model


def token_ids(samples: int = 4, length: int = 12, seed: int = 3) -> Tensor:
    return torch.randint(61, (samples, length), generator=torch.Generator().manual_seed(seed))


# -- reference methods, one a role -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormTokens(TokenPruner):
    """Keeps the tokens of largest norm."""

    layers: tuple[int, ...] = (1,)
    name: ClassVar[str] = "reference_tokens"

    def sites(self, info: ModelInfo) -> list[Site]:
        return [Site(layer, "input") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        return signals.hidden.norm(dim=-1)


@dataclass(frozen=True)
class ReceivedCache(CachePruner):
    """Keeps the cache entries that received most attention."""

    name: ClassVar[str] = "reference_cache"

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"received"})

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        return signals.received


@dataclass(frozen=True)
class MagnitudeWeights(WeightPruner):
    """Keeps the largest weights of each row."""

    name: ClassVar[str] = "reference_weights"

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals.weight.abs()


@dataclass(frozen=True)
class NormChannels(WeightPruner):
    """Keeps the MLP channels whose inputs to the down projection are largest, compared over the whole model, and puts
    their mean into a bias."""

    name: ClassVar[str] = "reference_channels"
    exempt = {"budget": "one threshold for the whole model"}

    @property
    def sequential(self) -> bool:
        return False

    @property
    def units(self) -> Sequence[Unit]:
        return ("channels",)

    def statistics(self, unit: Unit) -> Mapping[str, type[Accumulator]]:
        return {"input_norm": InputNorm, "input_mean": InputMean}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals["input_norm"].sqrt()

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        return list(masks.per_row(torch.cat(list(scores)), budget).split([t.units for t in targets]))

    def update(self, target: Target, signals: WeightSignals, mask: Tensor) -> Mapping[str, Tensor]:
        return {"down.bias": signals.weights["down"].float() @ (signals["input_mean"] * ~mask)}


@dataclass(frozen=True)
class BigramDrafts(DraftDecoder):
    """Drafts the chain of last seen successors, and accepts the longest greedy match."""

    name: ClassVar[str] = "reference_drafts"

    def start(self, vocabulary: int) -> Tensor:
        return torch.zeros(vocabulary, dtype=torch.long)

    def draft(self, state: Tensor, tokens: Tensor, budget: Budget) -> DraftTree:
        chain, last = [], int(tokens[-1])
        for _ in range(int(budget.amounts[0])):
            last = int(state[last])
            chain.append(last)
        made = {"dtype": torch.long, "device": state.device}
        return DraftTree(torch.tensor(chain, **made), torch.arange(len(chain), **made) - 1)

    def accept(self, tree: DraftTree, logits: Tensor, rng: torch.Generator | None = None) -> Accepted:
        greedy = logits.argmax(-1)  # [T + 1]
        agreed = int((tree.tokens == greedy[:-1]).long().cumprod(0).sum())
        return Accepted(greedy[: agreed + 1], torch.arange(agreed, device=greedy.device))

    def observe(self, state: Tensor, step: Step) -> None:
        state[step.tokens] = step.logits.argmax(-1)


@dataclass(frozen=True)
class Rejection(ConstrainedSampler):
    """Draws without replacement until the constraint accepts; the weight is the mass not rejected before."""

    name: ClassVar[str] = "reference_sampler"

    def sample(
        self, logits: Tensor, allows: Callable[[int], bool], budget: Budget, rng: torch.Generator | None = None
    ) -> tuple[int, float]:
        p = logits.softmax(-1).cpu()  # where the generator is
        for _ in range(int(budget.amounts[0])):
            token = int(torch.multinomial(p, 1, generator=rng))
            if allows(token):
                return token, float(p.sum().log())
            p[token] = 0
        raise ValueError("the constraint accepts no token within the budget")


@dataclass(frozen=True)
class LengthRanker(SentenceRanker):
    """Ranks long sentences first."""

    name: ClassVar[str] = "reference_ranker"

    def rank(self, passage: Passage, services: Mapping[str, Any] | None = None) -> Tensor:
        return torch.tensor([float(n) for n in sentences.text_sizes(passage.sentences, "words")])
