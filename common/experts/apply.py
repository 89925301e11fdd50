"""Expert pruners at work on a running mixture-of-experts model.

The layer's router and experts stay as they are. Between them a hook gives the experts that a plan leaves out the
weight zero, and, where the experts run one by one, the number behind the last expert, which costs nothing; the kernels
that batch all experts compute them and add nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core import attention
from prunelab.common.core import attention_interface as seam
from prunelab.common.core.attention_interface import Recorder
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import before, claimed, run_all
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.experts.role import ExpertPruner, ExpertSignals


class _Now(threading.local):
    """The pass at hand of a thread: its tokens [B, N] bool that are no padding, whether it began the text, and B."""

    real: Tensor | None = None
    prefill = True
    batch = 1


@dataclass(frozen=True)
class ExpertReport:
    """Experts a token, by mixture layer: as chosen and as run, on average over the tokens seen, padding left out."""

    chosen: tuple[float, ...]
    run: tuple[float, ...]
    tokens: int

    @property
    def ratio(self) -> float:
        """Share of the choices that ran."""
        return sum(self.run) / sum(self.chosen)

    def __str__(self) -> str:
        return f"experts   {100 * self.ratio:.1f} % of the choices of {self.tokens} tokens\na token   " + " ".join(
            f"{n:.2f}" for n in self.run
        )


class ExpertHandle:
    """An expert pruner at work on a model."""

    def __init__(self, method: ExpertPruner, model: nn.Module, budget: Budget, seed: int) -> None:
        self.method, self.budget = method, budget
        self.blocks = mixtures(model)
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        self.info = ModelInfo(
            "mixture", config.num_hidden_layers, config.num_attention_heads, config.hidden_size,
            config.max_position_embeddings,
        )  # fmt: skip
        self.eager = config._experts_implementation == "eager"
        self.sites = [Site(layer, "after_attention", index) for index, layer in enumerate(self.blocks)]
        self.recorders: dict[int, Recorder] = {}  # by layer
        self._now = _Now()
        self._counting = threading.Lock()
        self._ran: dict[int, Tensor] = {}  # by layer: choices that ran [1], and tokens [1]
        self._seed = seed
        self._rngs: dict[torch.device, torch.Generator] = {}

    def report(self) -> ExpertReport:
        """See `ExpertReport`. Needs a forward pass."""
        if not self._ran:
            raise PrunelabError("no token ran through a mixture layer yet; run the model inside the `with` block")
        ran, tokens = torch.stack([self._ran[layer] for layer in self.blocks]).double().cpu().unbind(1)
        chosen = tuple(float(block.top_k) for block in map(_router, self.blocks.values()))
        return ExpertReport(chosen, tuple((ran / tokens).tolist()), int(tokens[0]))

    # -- hooks -----------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder: which of the tokens that it reads are padding."""
        read: Any = kwargs.get("inputs_embeds")
        read = kwargs.get("input_ids", args[0] if args else None) if read is None else read
        mask, held = kwargs.get("attention_mask"), seam.cache_in(kwargs)
        self._now.batch = len(read)
        before = 0 if held is None else int(held.get_seq_length())
        self._now.real, self._now.prefill = real_tokens(mask, before, read.shape[1]), before == 0

    def layer(self, layer: int) -> Callable[..., Any]:
        """The hook before the experts of a layer."""
        site = next(site for site in self.sites if site.layer == layer)

        def hook(module: Any, args: tuple[Any, ...]) -> Any:
            hidden, experts, weights = args
            if hidden.device.type == "meta":
                return args
            with torch.no_grad():
                signals = self.signals(site, hidden, experts, weights)
                kept = self.method.plan(site, signals, self.budget.at(site.index))
            if kept.shape != weights.shape or kept.dtype != torch.bool:
                raise PrunelabError(f"{self.method.name} gave a plan of shape {tuple(kept.shape)}, not of the choices")
            self._count(layer, kept)
            left = weights * kept
            scale = weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)
            scale = torch.where(kept.all(-1, keepdim=True) | ~kept.any(-1, keepdim=True), torch.ones_like(scale), scale)
            if self.eager:
                experts = experts.masked_fill(~kept, module.num_experts)
            return hidden, experts, left * scale

        return hook

    def _count(self, layer: int, kept: Tensor) -> None:
        """Note on the device what ran, for the report alone. What a backward pass runs again counts once."""
        if torch._C._current_graph_task_id() >= 0:
            return
        real = None if self._now.real is None else self._now.real.reshape(-1)
        ran = kept.sum(-1) if real is None else kept.sum(-1) * real
        tokens = torch.tensor(len(kept), device=kept.device) if real is None else real.sum()
        new = torch.stack([ran.sum(), tokens])
        with self._counting:
            self._ran[layer] = new + self._ran[layer] if layer in self._ran else new

    def signals(self, site: Site, hidden: Tensor, experts: Tensor, weights: Tensor) -> ExpertSignals:
        """What the method may see of a layer now."""
        sources: dict[str, Callable[[], Tensor]] = {
            "hidden": lambda: hidden,
            "norms": lambda: hidden.float().abs().sum(-1),
        }
        recorder = self.recorders.get(site.layer)
        if recorder is not None:
            sources["received"] = lambda: received(recorder, self._now.real, self._now.prefill)
        return ExpertSignals(
            sources,
            weights=weights,
            experts=experts,
            prefill=self._now.prefill,
            batch=self._now.batch,
            valid=self._now.real,
            info=self.info,
            rng=self._rng(hidden.device),
            required=self.method.requires(site),
        )

    def _rng(self, device: torch.device) -> torch.Generator:
        if device not in self._rngs:
            self._rngs[device] = torch.Generator(device).manual_seed(self._seed)
        return self._rngs[device]


def real_tokens(mask: Any, before: int, new: int) -> Tensor | None:
    """Which of the `new` tokens [B, N] behind `before` others are no padding, by the mask that a decoder is given: one
    column a token, or made for each query and key already (one a kind of layer), where padding does not see itself.
    None where all are real."""
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -new:].bool()
    own = mask[:, 0, -new:, before : before + new].diagonal(dim1=1, dim2=2)
    return own if own.dtype == torch.bool else own == 0


def received(recorder: Recorder, real: Tensor | None, prefill: bool = True) -> Tensor:
    """Mean attention [B N] that each token of a prompt receives from itself and later ones, over heads; real [B, N]
    bool tells padding, which neither gives nor gets any. A fixed cache has free places behind the tokens."""
    queries, keys = recorder.shown(), recorder.grouped_keys
    if prefill:
        keys = keys[:, :, : queries.shape[2]]
    if queries.shape[2] != keys.shape[2]:
        raise PrunelabError("attention received is read off a whole prompt; ask for it where `signals.prefill` holds")
    valid = None if real is None else real.unsqueeze(1).expand(-1, keys.shape[1], -1)
    total = attention.accumulated(queries, keys, recorder.scale, valid=valid, asking=real).sum(1)
    count = torch.ones_like(total) if real is None else real.to(total.dtype)
    later = count.flip(1).cumsum(1).flip(1).clamp_min(1)  # queries that can see it
    return (total * count / (later * queries.shape[1])).flatten()


def mixtures(model: nn.Module) -> dict[int, Any]:
    """The mixture blocks of a decoder, by layer: those with a router and fused experts."""
    find = getattr(model, "get_decoder", None)
    layers = getattr(find() if find is not None else model, "layers", [])
    results = {}
    for number, layer in enumerate(layers):
        for block in layer.modules():
            if hasattr(getattr(block, "experts", None), "gate_up_proj") and _router(block) is not None:
                results[number] = block
    if not results:
        raise PrunelabError(f"{type(model).__name__} has no mixture of experts; use a model such as Mixtral or OLMoE")
    return results


def _router(block: Any) -> Any:
    router = getattr(block, "gate", None)
    return router if hasattr(router, "top_k") else block if hasattr(block, "top_k") else None


@contextmanager
def applied(
    method: ExpertPruner,
    model: nn.Module,
    budget: Budget | float,
    *,
    services: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Iterator[ExpertHandle]:
    """Leave out experts in every forward pass inside the block; see `prunelab.apply`. The budget has one amount, or one
    a mixture layer."""
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    if budget.unit not in ("ratio", "count"):
        raise PrunelabError(f"experts are pruned to a share of the choices or a number a token, not to {budget}")
    with claimed(method, model, services):
        handle = ExpertHandle(method, model, budget, seed)
        if len(budget.amounts) not in (1, len(handle.sites)):
            raise PrunelabError(
                f"the budget names {len(budget.amounts)} amounts but the model has {len(handle.sites)} mixture layers"
            )
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        removers: list[Callable[[], Any]] = []
        try:
            for site in handle.sites:
                if unknown := method.requires(site) - {"hidden", "norms", "received"}:
                    raise PrunelabError(f"{method.name} reads {', '.join(sorted(unknown))}, not to be had of experts")
                if "received" in method.requires(site):
                    handle.recorders[site.layer], stop = seam.record(decoder.layers[site.layer].self_attn)
                    removers.append(stop)
                removers.append(before(handle.blocks[site.layer].experts, handle.layer(site.layer)))
            removers.append(before(decoder, handle.begin, kwargs=True))
            yield handle
        finally:
            run_all(removers)
