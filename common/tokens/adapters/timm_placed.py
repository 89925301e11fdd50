"""timm's vision transformers whose attention knows where tokens stand: EVA-02 and DINOv3 turn queries and keys by their
place (`Eva`), BEiT adds a bias to the logits by how two places lie to each other (`Beit`).

A token that is left keeps its place; a mixture of tokens has that of the heaviest of them. Class and register tokens
stand in front and have none.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, before, replaced, run_all
from prunelab.common.core.plan import Plan, Site
from prunelab.common.tokens.adapters.passes import Application, Tokens
from prunelab.common.tokens.adapters.timm_vit import TimmViT, ViTPass
from prunelab.common.tokens.adapters.vlm_prompt import heaviest


@dataclass
class PlacedPass(ViTPass):
    """places: [B, N] where each token at hand stood at first, None for all as they were; seen_at: the same as layers
    whose signals are read had it; table: what the model says of places, for all of them."""

    places: Tensor | None = None
    seen_at: dict[int, Tensor | None] = field(default_factory=dict)
    table: Tensor | None = None


class Placed(TimmViT):
    """What both have in common."""

    def started(self) -> PlacedPass:
        return PlacedPass()

    def follow(self, application: Application, site: Site, plan: Plan, x: Tensor) -> None:
        super().follow(application, site, plan, x)
        self._move(plan, x)

    def set_aside(self, application: Application, site: Site, plan: Plan, x: Tensor, *names: str) -> None:
        super().set_aside(application, site, plan, x, *names, "places")
        self._move(plan, x)

    def _move(self, plan: Plan, x: Tensor) -> None:
        running, source = self.running, heaviest(plan.reduce, x.shape[1])
        running.places = source if running.places is None else running.places.gather(1, source)

    def _scaled(self, block: Any, half: int, x: Tensor) -> Tensor:
        gamma = getattr(block, f"gamma_{half}")
        return x if gamma is None else gamma * x

    def _watch_qkv(self, application: Application, layer: int, hook: Callable[..., None]) -> Callable[[], Any]:
        """Where biases stand apart the projection is no module's output, and is made again beside the layer's own."""
        attn = self.blocks[layer].attn
        if getattr(attn, "num_kv_heads", None) not in (None, attn.num_heads):
            raise PrunelabError(f"block {layer} has queries that share keys, of which no signals are read here")

        def note(module: Any, args: Any) -> None:
            self.running.seen_at[layer] = self.running.places

        def project(module: Any, args: Any) -> None:
            with application.trace.scoring(), torch.no_grad(), self.exactly(application, args[0]):
                hook(module, args, projected(attn, args[0]))

        whole = attn.qkv is not None and getattr(attn, "q_bias", None) is None
        removers = [before(attn, note), after(attn.qkv, hook) if whole else before(attn, project)]
        return lambda: run_all(removers)

    @abstractmethod
    def prepared(self, layer: int, which: int, qkv: Tensor) -> Tensor:
        return super().prepared(layer, which, qkv)


def projected(attn: Any, x: Tensor) -> Tensor:
    """Queries, keys and values [B, N, 3 * D] of tokens x [B, N, D]."""
    if attn.qkv is None:
        return torch.cat([attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)], -1)
    bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return F.linear(x, attn.qkv.weight, bias)


class TimmEva(Placed):
    """EVA-02, DINOv3 and others of timm's Eva: rotary positions of two axes."""

    family = "timm_eva"
    model_classes = ("timm.models.eva.Eva",)
    plain_blocks = ("EvaBlock",)

    def turns(self, table: Tensor, places: Tensor | None) -> Tensor:
        """The table of turns, [patches, E] or [H, patches, E], for tokens at places [B, N]: [B, 1 or H, patches, E]."""
        if places is None:
            return table
        own = places[:, self.info.special :] - self.info.special
        return table[own].unsqueeze(1) if table.dim() == 2 else table[:, own].transpose(0, 1)

    def _bias_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        table = kwargs.get("rope")
        if table is not None and self.running.places is not None:
            kwargs = kwargs | {"rope": self.turns(table, self.running.places)}
        return super()._bias_attention(module, args, kwargs) or (args, kwargs)

    def install(self, application: Application) -> Callable[[], None]:
        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.running.table = kwargs.get("rope")

        removers = [super().install(application)]
        removers += [before(block, note, kwargs=True) for block in self.blocks]
        return lambda: run_all(removers)

    def prepared(self, layer: int, which: int, qkv: Tensor) -> Tensor:
        from timm.layers import apply_rot_embed_cat

        out, running, special = super().prepared(layer, which, qkv), self.running, self.info.special
        if which == 2 or running.table is None:
            return out
        table, half = self.turns(running.table, running.seen_at[layer]), self.blocks[layer].attn.rotate_half
        turned = apply_rot_embed_cat(out[:, :, special:], table, half=half)
        return torch.cat([out[:, :, :special], turned], 2).to(out)


class TimmBeit(Placed):
    """BEiT and BEiT v2: biases of attention by relative position, of each layer or of all."""

    family = "timm_beit"
    model_classes = ("timm.models.beit.Beit",)

    def install(self, application: Application) -> Callable[[], None]:
        removers = [super().install(application)]
        for attn in (block.attn for block in self.blocks):
            if attn.relative_position_bias_table is not None:
                turned = functools.partial(self._at_hand, attn._get_rel_pos_bias)
                removers.append(replaced(attn, "_get_rel_pos_bias", turned))
        return lambda: run_all(removers)

    def _at_hand(self, bias: Callable[[], Tensor]) -> Tensor:
        return self.at(bias(), self.running.places)

    def at(self, bias: Tensor, places: Tensor | None) -> Tensor:
        """A bias [..., H, all, all] between tokens at places [B, N] (None: all), [B or 1, H, N, N]."""
        bias = bias.view(-1, *bias.shape[-2:])
        if places is None:
            return bias.unsqueeze(0)
        return bias[:, places.unsqueeze(2), places.unsqueeze(1)].transpose(0, 1)

    def _bias_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shared, bias = kwargs.get("shared_rel_pos_bias"), self.running.tokens.attention_bias()
        shared = None if shared is None else self.at(shared, self.running.places)
        if bias is not None:
            hidden = bias[:, None, None, :].to(args[0].dtype)
            shared = hidden if shared is None else shared + hidden
        return args, kwargs | {"shared_rel_pos_bias": shared}

    def prepared(self, layer: int, which: int, qkv: Tensor) -> Tensor:
        return qkv.unflatten(-1, (3, self.blocks[layer].attn.num_heads, -1)).permute(2, 0, 3, 1, 4)[which]

    def logit_bias(self, layer: int, tokens: Tokens) -> Tensor | None:
        model: Any = self.model
        attn, shared, places = self.blocks[layer].attn, model.rel_pos_bias, self.running.seen_at[layer]
        result = super().logit_bias(layer, tokens)
        whole: Tensor | None = None if result is None else result[:, None, None, :]
        own = type(attn)._get_rel_pos_bias(attn) if attn.relative_position_bias_table is not None else None
        for bias in (own, None if shared is None else shared()):
            if bias is not None:
                now = self.at(bias, places)
                whole = now if whole is None else whole + now
        return whole
