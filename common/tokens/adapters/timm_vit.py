"""timm's VisionTransformer family: ViT, DeiT, DeiT-III, CLIP, DINOv2 with registers, MAE, AugReg, SigLIP.

Attention stays fused: signals are computed beside it from the block's own qkv. Sites:
`input` (what enters block l), `after_attention` (residual stream before the MLP), `block_output`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core import attention
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import run_all
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.tokens.adapters.base import Application, SequenceAdapter, Stream
from prunelab.common.tokens.signals import TokenSignals

_ATTENTION = frozenset(
    {"queries", "keys", "values", "attention", "attention_logits", "cls_row", "last_row", "received"}
)
_ALWAYS = frozenset({"hidden", "sizes"})


class TimmViT(SequenceAdapter):
    family = "timm_vit"
    model_classes = ("timm.models.vision_transformer.VisionTransformer",)
    signals = {
        "input": _ALWAYS,
        "after_attention": _ALWAYS | _ATTENTION,
        "block_output": _ALWAYS | _ATTENTION,
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.qkv: dict[int, Tensor] = {}
        self.scratch: Tensor | None = None

    @property
    def blocks(self) -> Any:
        return self.model.blocks

    @property
    def info(self) -> ModelInfo:
        model: Any = self.model
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
        weight = embed.proj.weight
        return torch.empty(1, weight.shape[1], *embed.img_size, dtype=weight.dtype, device="meta")

    def install(self, application: Application) -> Callable[[], None]:
        removers: list[Callable[[], Any]] = []
        self.stream, self.qkv = Stream(), {}
        method, sites = application.method, application.sites
        try:
            removers.append(self.blocks[0].register_forward_pre_hook(self.begin, prepend=True).remove)
            first = min((site.layer for site in sites), default=len(self.blocks))
            for layer, block in enumerate(self.blocks):
                removers.append(
                    block.attn.register_forward_pre_hook(self.count(application, layer, "attention")).remove
                )
                removers.append(block.mlp.register_forward_pre_hook(self.count(application, layer, "mlp")).remove)
                if layer >= first:
                    hook = block.attn.register_forward_pre_hook(self._bias_attention, with_kwargs=True)
                    removers.append(hook.remove)
            for site in sites:
                if method.requires(site) & _ATTENTION:
                    attn = self.blocks[site.layer].attn
                    if not hasattr(attn, "qkv"):
                        raise PrunelabError(f"block {site.layer} has no fused qkv to read attention signals from")
                    removers.append(attn.qkv.register_forward_hook(self._keep_qkv(site.layer)).remove)
                removers.append(self._install_site(application, site))
            if getattr(self.model, "global_pool", "token") != "token" or getattr(self.model, "attn_pool", None):
                removers.append(self.model.norm.register_forward_hook(self._weigh_for_pooling).remove)  # type: ignore[union-attr]
        except BaseException:
            run_all(removers)
            raise
        return lambda: run_all(removers)

    def _install_site(self, application: Application, site: Site) -> Callable[[], Any]:
        block = self.blocks[site.layer]
        if site.where == "input":
            return block.register_forward_pre_hook(
                lambda _, args: (self.reduce(application, site, args[0]), *args[1:])
            ).remove
        if site.where == "block_output":
            return block.register_forward_hook(lambda _, __, out: self.reduce(application, site, out)).remove

        if type(block).__name__ != "Block" or "forward" in vars(block):
            raise PrunelabError(
                f"'after_attention' needs timm's plain Block, block {site.layer} is {type(block).__name__}"
            )

        # The residual cannot shrink inside the block's own forward, so its two halves are called one by one.
        def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            branch = block.attn(block.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
            x = self.reduce(application, site, x + block.drop_path1(block.ls1(branch)))
            return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

        block.forward = forward
        return lambda: vars(block).pop("forward", None)

    # -- hooks ---------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: Any) -> None:
        super().begin(module, args)
        self.qkv = {}

    def _bias_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias = self.stream.attention_bias()
        if bias is None:
            return None
        mask = bias[:, None, None, :].to(args[0].dtype)
        given = kwargs.get("attn_mask")
        return args, kwargs | {"attn_mask": mask if given is None else given + mask}

    def _keep_qkv(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.qkv[layer] = output

        return hook

    def _weigh_for_pooling(self, module: nn.Module, args: Any, x: Tensor) -> Tensor | None:
        """Make average pooling weigh tokens by size and skip padding; other pools cannot be weighed."""
        stream = self.stream
        if stream.valid is None and stream.sizes is None:
            return None
        if self.model.global_pool != "avg":
            raise PrunelabError("merged tokens and per-sample counts need 'token' or 'avg' pooling in the model")
        weight = torch.ones(x.shape[:2], device=x.device) if stream.sizes is None else stream.sizes.clone()
        if stream.valid is not None:
            weight = weight * stream.valid
        pooled = weight[:, 0 if self.model.pool_include_prefix else self.info.special :]
        weight = weight * pooled.shape[1] / pooled.sum(1, keepdim=True)
        return x * weight.unsqueeze(-1).to(x.dtype)

    # -- one site ------------------------------------------------------------------------------------------------

    def decide(self, application: Application, site: Site, x: Tensor) -> tuple[Plan, TokenSignals]:
        decided = super().decide(application, site, x)
        self.qkv.pop(site.layer, None)
        return decided

    def _scratch(self, queries: Tensor) -> Tensor | None:
        """Memory for one attention matrix, shared by all sites since each is read before the next is made."""
        if queries.device.type != "cpu":  # other devices cache their memory
            return None
        size = queries.shape[0] * queries.shape[1] * queries.shape[2] ** 2
        if self.scratch is None or self.scratch.numel() < size or self.scratch.dtype != queries.dtype:
            with torch.inference_mode(False):  # a normal tensor may be written in either mode
                self.scratch = torch.empty(size, dtype=queries.dtype)
        return self.scratch

    def sources(self, site: Site, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        stream, layer = self.stream, site.layer
        scale = self.blocks[layer].attn.scale

        def part(which: int) -> Tensor:
            attn = self.blocks[layer].attn
            out = self.qkv[layer].unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)[which]
            return attn.q_norm(out) if which == 0 else attn.k_norm(out) if which == 1 else out

        def weights() -> Tensor:
            q, k = part(0), part(1)
            return attention.weights(q, k, scale, stream.attention_bias(), self._scratch(q))

        return {
            "queries": lambda: part(0),
            "keys": lambda: part(1),
            "values": lambda: part(2),
            "attention_logits": lambda: attention.logits(part(0), part(1), scale, stream.attention_bias()),
            "attention": weights,
            "cls_row": lambda: attention.row(part(0), part(1), scale, 0, stream.attention_bias()),
            "last_row": lambda: attention.row(part(0), part(1), scale, -1, stream.attention_bias()),
            "received": lambda: attention.received(weights(), stream.valid),
        }
