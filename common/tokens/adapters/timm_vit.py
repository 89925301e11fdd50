"""timm's VisionTransformer family: ViT, DeiT, DeiT-III, CLIP, DINOv2 with registers, MAE, AugReg, SigLIP.

Attention stays fused: signals are computed beside it from the block's own qkv. Sites:
`input` (what enters block l), `after_attention` (residual stream before the MLP), `block_output`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core import attention
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, arguments, before, replaced, run_all, wrapped
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.passes import Application, Pass, Seen, Tokens
from prunelab.common.tokens.adapters.sequence import SequenceAdapter
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import View

_ATTENTION = frozenset(
    {"queries", "keys", "values", "attention", "attention_logits", "cls_row", "last_row", "received"}
)
_ALWAYS = frozenset({"hidden", "sizes"})
_ALONE = frozenset({"hidden", "queries", "keys", "values", "cls_row", "last_row", "received"})  # of other layers


@dataclass
class ViTPass(Pass):
    """size: channels, height and width of the images. `shown` is what fused projections gave, [B, N, 3 * D]."""

    size: tuple[int, ...] | None = None


class TimmViT(SequenceAdapter[Any]):
    family = "timm_vit"
    plain_blocks: ClassVar[tuple[str, ...]] = ("Block",)  # whose two halves can be called one by one
    rest = frozenset({"drop", "bypass"})
    gates = True
    model_classes = ("timm.models.vision_transformer.VisionTransformer",)
    signals = {
        "input": _ALWAYS,
        "after_attention": _ALWAYS | _ATTENTION,
        "block_output": _ALWAYS | _ATTENTION,
    }

    def started(self) -> ViTPass:
        return ViTPass()

    @property
    def blocks(self) -> Any:
        return self.model.blocks

    @property
    def info(self) -> ModelInfo:
        model: Any = self.model
        for layer, block in enumerate(self.blocks):
            if not (hasattr(block, "attn") and hasattr(block, "mlp")):
                raise PrunelabError(
                    f"block {layer} is a {type(block).__name__}, which has no attention and MLP one after the other;"
                    " use a model of plain blocks"
                )
        return ModelInfo(
            family=self.family,
            depth=len(self.blocks),
            heads=self.blocks[0].attn.num_heads,
            width=model.embed_dim,
            tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
            special=model.num_prefix_tokens,
            class_token=getattr(model, "cls_token", None) is not None,
            grid=tuple(model.patch_embed.grid_size),
        )

    def example(self) -> Tensor:
        embed: Any = self.model.patch_embed
        weight = next(p for p in embed.parameters() if p.dim() == 4)  # of the stem, where there is one before
        return torch.empty(1, weight.shape[1], *embed.img_size, dtype=weight.dtype, device="meta")

    def install(self, application: Application) -> Callable[[], None]:
        removers: list[Callable[[], Any]] = []
        method, sites = application.method, application.sites
        try:
            removers.append(before(self.model.patch_embed, self._note_size))  # type: ignore[arg-type]
            removers.append(before(self.blocks[0], self.begin, first=True))
            if hasattr(self.model, "forward_intermediates"):
                removers.append(replaced(self.model, "forward_intermediates", self._intermediates()))
            for layer, names in application.readings("layer").items():
                removers.append(self._watch_qkv(application, layer, self._see("qkv", layer)))
                if "hidden" in names:
                    removers.append(after(self.blocks[layer], self._see("hidden", layer)))
            first = min((site.layer for site in sites), default=len(self.blocks))
            for layer, block in enumerate(self.blocks):
                removers.append(before(block.attn, self.count(application, layer, "attention")))
                removers.append(before(block.mlp, self.count(application, layer, "mlp")))
                if layer >= first:
                    removers.append(before(block.attn, self._bias_attention, kwargs=True))
            for site in sites:
                if method.requires(site) & _ATTENTION:
                    removers.append(self._watch_qkv(application, site.layer, self._keep_qkv(site.layer)))
                removers.append(self._install_site(application, site))
            if getattr(self.model, "global_pool", "token") != "token" or getattr(self.model, "attn_pool", None):
                norm: Any = self.model.norm
                removers.append(after(norm, self._weigh_for_pooling))
            elif getattr(self.model, "pools_most", False):
                removers.append(after(self.model.norm, self._repeat_for_pooling))  # type: ignore[arg-type]
            removers.append(after(self.blocks[-1], self.end))
        except BaseException:
            run_all(removers)
            raise
        return lambda: run_all(removers)

    def _qkv_of(self, layer: int) -> nn.Module:
        qkv: nn.Module | None = getattr(self.blocks[layer].attn, "qkv", None)
        if qkv is None:
            raise PrunelabError(f"block {layer} has no fused qkv to read attention signals from")
        return qkv

    def _watch_qkv(self, application: Application, layer: int, hook: Callable[..., None]) -> Callable[[], Any]:
        """Calls the hook with what a layer's fused projection gives."""
        return after(self._qkv_of(layer), hook)

    def _see(self, what: str, layer: int) -> Callable[..., None]:
        """Keeps a layer's output for later sites."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen = self.running.seen
            if what == "qkv":
                seen[layer] = Seen(self.running.tokens, {what: output})
            else:  # a plan in the middle of the block has acted since
                seen[-1 - layer] = Seen(self.running.tokens, {what: output})

        return hook

    def _install_site(self, application: Application, site: Site) -> Callable[[], Any]:
        block = self.blocks[site.layer]
        if site.where == "input" and application.method.rest == "bypass":
            removers = [before(block, self._enter_alone(application, site)), after(block, self._come_back)]
            return lambda: run_all(removers)
        if site.where == "input":
            return before(block, lambda _, args: (self.reduce(application, site, args[0]), *args[1:]))
        if site.where == "block_output":
            return after(block, lambda _, __, out: self.reduce(application, site, out))

        name = "_old_forward" if hasattr(block, "_hf_hook") else "forward"  # accelerate's wrapper calls the former
        plain = type(block).__name__ in self.plain_blocks
        if not plain or (name == "forward" and wrapped(block, name)):
            kind = "wrapped in a forward of its own" if plain else type(block).__name__
            raise PrunelabError(
                f"'after_attention' needs timm's plain {self.plain_blocks[0]}, block {site.layer} is {kind}"
            )

        # The residual cannot shrink inside the block's own forward, so its two halves are called one by one.
        def forward(x: Tensor, **given: Any) -> Tensor:
            branch = block.attn(block.norm1(x), **given)
            x = self.reduce(application, site, x + block.drop_path1(self._scaled(block, 1, branch)))
            return x + block.drop_path2(self._scaled(block, 2, block.mlp(block.norm2(x))))

        return replaced(block, name, forward)

    def _scaled(self, block: Any, half: int, x: Tensor) -> Tensor:
        """What a block's attention (half 1) or MLP (half 2) adds."""
        scaled: Tensor = getattr(block, f"ls{half}")(x)
        return scaled

    def check(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        super().check(method, sites)
        if method.rest == "bypass" and any(site.where != "input" for site in sites):
            raise PrunelabError(f"{method.name}: tokens can pass by a block at its `input` alone")

    def _enter_alone(self, application: Application, site: Site) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...]) -> Any:
            x = args[0]
            plan, signals = self.decide(application, site, x)
            self.set_aside(application, site, plan, x)
            return application.method.refine(site, plan.reduce.apply(x), signals, plan), *args[1:]

        return hook

    def _come_back(self, module: Any, args: Any, x: Tensor) -> Tensor:
        return self.together(x)

    def _intermediates(self) -> Callable[..., Any]:
        original: Any = self.model.forward_intermediates

        @functools.wraps(original)
        def intermediates(*args: Any, **kwargs: Any) -> Any:
            if arguments(self.model, "forward_intermediates", args, kwargs).get("output_fmt", "NCHW") == "NCHW":
                raise PrunelabError("tokens that are left fill no grid; ask for reshape=False, or output_fmt='NLC'")
            return original(*args, **kwargs)

        return intermediates

    def _note_size(self, module: Any, args: tuple[Any, ...]) -> None:
        self._own.size = tuple(args[0].shape[1:])

    def begin(self, module: nn.Module, args: Any) -> None:
        super().begin(module, args)
        self.running.size = getattr(self._own, "size", None)

    def count(self, application: Application, layer: int, part: str) -> Callable[..., None]:
        plain = super().count(application, layer, part)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            plain(module, args)
            if layer == 0 and part == "attention":
                application.trace.saw(self.running.size, len(args[0]))

        return hook

    def grids(self) -> tuple[tuple[int, int], ...]:
        """Of the input's own patches, where the model takes any size."""
        size, info = self.running.size, self.info
        embed: Any = self.model.patch_embed
        if size is None or info.grid is None or not hasattr(embed, "dynamic_feat_size"):
            return super().grids()
        height, width = embed.dynamic_feat_size(size[-2:])
        return ((int(height), int(width)),)

    def view(self, site: Site, x: Tensor) -> View:
        view, total, info = super().view(site, x), self.running.total, self.info
        if total in (0, info.tokens):
            return view
        return replace(view, info=replace(info, tokens=total, grid=self.grids()[0]))

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _bias_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias = self.running.tokens.attention_bias()
        if bias is None:
            return None
        mask = bias[:, None, None, :].to(args[0].dtype)
        given = kwargs.get("attn_mask")
        return args, kwargs | {"attn_mask": mask if given is None else given + mask}

    def _keep_qkv(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.running.shown[layer] = output

        return hook

    def _weigh_for_pooling(self, module: nn.Module, args: Any, x: Tensor) -> Tensor | None:
        """Make average pooling weigh tokens by size and skip padding; other pools cannot be weighed."""
        tokens = self.running.tokens
        if tokens.valid is None and tokens.sizes is None:
            return None
        if self.model.global_pool != "avg":
            raise PrunelabError("merged tokens and per-sample counts need 'token' or 'avg' pooling in the model")
        weight = torch.ones(x.shape[:2], device=x.device) if tokens.sizes is None else tokens.sizes.clone()
        if tokens.valid is not None:
            weight = weight * tokens.valid
        pooled = weight[:, 0 if getattr(self.model, "pool_include_prefix", False) else self.info.special :]
        weight = weight * pooled.shape[1] / pooled.sum(1, keepdim=True)
        return x * weight.unsqueeze(-1).to(x.dtype)

    def _repeat_for_pooling(self, module: nn.Module, args: Any, x: Tensor) -> Tensor | None:
        """Put a patch that counts in place of padding, which then has no say in the best of all patches."""
        valid = self.running.tokens.valid
        if valid is None:
            return None
        first = valid[:, self.info.special :].int().argmax(1) + self.info.special
        return torch.where(valid.unsqueeze(-1), x, x[torch.arange(len(x), device=x.device), first].unsqueeze(1))

    # -- one site ------------------------------------------------------------------------------------------------

    def _scratch(self, queries: Tensor, rows: int) -> Tensor | None:
        """Memory for so many rows of attention, shared by all sites since each is read before the next is made."""
        if queries.device.type != "cpu":  # other devices cache their memory
            return None
        size = queries.shape[0] * queries.shape[1] * rows * queries.shape[2]
        scratch: Tensor | None = getattr(self._own, "scratch", None)
        if scratch is None or scratch.numel() < size or scratch.dtype != queries.dtype:
            with torch.inference_mode(False):  # a normal tensor may be written in either mode
                scratch = self._own.scratch = torch.empty(size, dtype=queries.dtype)
        return scratch

    def sources(self, site: Site, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        running = self.running
        return self._signals(site.layer, lambda: running.shown[site.layer], running.tokens)

    def readable(self, site: Site, reading: Reading) -> str | None:
        if reading.where == "tower":
            return "this model is no tower of another; name its own layers"
        if reading.name == "cls_row" and not self.info.class_token:
            return "this model has no class token"
        return self.earlier(site, reading, _ALONE)

    def read(self, site: Site, x: Tensor, reading: Reading) -> Tensor:
        if reading.name == "hidden":
            seen = self.running.seen[-1 - reading.layer]
            return seen.now(seen.kept["hidden"], "hidden")
        seen = self.running.seen[reading.layer]
        signals = self._signals(reading.layer, lambda: seen.kept["qkv"], seen.tokens)
        return seen.now(signals[reading.name](), reading.name)

    def prepared(self, layer: int, which: int, qkv: Tensor) -> Tensor:
        """Queries, keys or values [B, H, N, d] as attention uses them, of what the projection gave, [B, N, 3 * D]."""
        attn = self.blocks[layer].attn
        out = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)[which]
        normed: Tensor = attn.q_norm(out) if which == 0 else attn.k_norm(out) if which == 1 else out
        return normed

    def logit_bias(self, layer: int, tokens: Tokens) -> Tensor | None:
        """What is added to a layer's attention logits: [B, N] of keys, or [B, H, N, N]."""
        return tokens.attention_bias()

    def _signals(self, layer: int, qkv: Callable[[], Tensor], tokens: Tokens) -> dict[str, Callable[[], Tensor]]:
        """Signals of a layer's attention, from what its projection gave of its tokens."""
        scale = self.blocks[layer].attn.scale
        bias = functools.cache(functools.partial(self.logit_bias, layer, tokens))

        def part(which: int) -> Tensor:
            return self.prepared(layer, which, qkv())

        def seen(start: int, stop: int) -> Tensor | None:
            whole = bias()
            return whole if whole is None or whole.dim() == 2 else whole[:, :, start:stop]

        def row(index: int) -> Tensor:
            q, k = part(0), part(1)
            index %= q.shape[2]
            return attention.row(q, k, scale, index, seen(index, index + 1))

        def weights() -> Tensor:
            q, k = part(0), part(1)
            return attention.weights(q, k, scale, bias(), self._scratch(q, len(q[0, 0])))

        def received() -> Tensor:
            q, k = part(0), part(1)

            def rows(start: int, stop: int) -> Tensor:
                return attention.weights(
                    q[:, :, start:stop], k, scale, seen(start, stop), self._scratch(q, stop - start)
                )

            return attention.received(rows, (q.shape[0], q.shape[1], q.shape[2]), tokens.valid)

        return {
            "queries": lambda: part(0),
            "keys": lambda: part(1),
            "values": lambda: part(2),
            "attention_logits": lambda: attention.logits(part(0), part(1), scale, bias()),
            "attention": weights,
            "cls_row": lambda: row(0),
            "last_row": lambda: row(-1),
            "received": received,
        }
