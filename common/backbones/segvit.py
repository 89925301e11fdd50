"""Plain-ViT semantic segmenters: a timm ViT, and heads behind some of its blocks that classify its tokens.

Two heads: SegViT's attention-to-mask head (Zhang et al., NeurIPS 2022) and the naive head of SETR (Zheng et al., CVPR
2021). The last head makes the map; the earlier ones are there to learn from, and to leave the network by. Module names
inside the ATM head are those of the official checkpoints of Dynamic Token Pruning (zbwxp/Dynamic-Token-Pruning), whose
other names `load_official` translates. Those checkpoints hold a class token: it is joined for the position embedding
and dropped before the first block, so neither it nor its position has a place here.

Shape letters: B images, N tokens, D channels, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.backbones.checkpoint import read
from prunelab.common.core.errors import PrunelabError

TRAINING_ONLY = "loss_decode.criterion.empty_weight"  # class weights of the loss, saved with official checkpoints


@dataclass(frozen=True)
class Prediction:
    """What a head says of N tokens.

    masks [B, C, N]: logits that a token shows a class. presence [B, C, 1]: logits that a class is in the image at all,
    or [B, C, N] where tokens had it from different heads; None for heads that do not ask.
    """

    masks: Tensor
    presence: Tensor | None = None

    @property
    def confidence(self) -> Tensor:
        """[B, C, N] in (0, 1). With `presence` the classes of a token do not add up to 1."""
        return self.masks.softmax(1) if self.presence is None else self.presence.sigmoid() * self.masks.sigmoid()

    @property
    def scores(self) -> Tensor:
        """[B, C, N]: what maps are made of, larger is better. SETR resizes logits, SegViT confidences."""
        return self.masks if self.presence is None else self.confidence


# -- heads -----------------------------------------------------------------------------------------------------------


class MaskAttention(nn.Module):
    """Cross-attention of class queries to tokens that also tells its logits: they are the masks."""

    def __init__(self, width: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """queries [B, C, D], tokens [B, N, D] -> what they read [B, C, D], and logits [B, C, N], the mean of heads."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, queries), (self.k, tokens), (self.v, tokens))
        )
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, H, C, N]
        seen = logits if valid is None else logits.masked_fill(~valid[:, None, None], float("-inf"))
        weights = seen.softmax(-1).nan_to_num(0)  # an image that has no token left is read as nothing
        out = self.dropout(weights) @ v
        return self.proj(out.transpose(1, 2).flatten(2)), logits.mean(1)


class DecoderLayer(nn.Module):
    """Post-norm transformer decoder layer: queries read each other, then the tokens, then pass an MLP."""

    def __init__(self, width: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.multihead_attn = MaskAttention(width, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """The queries [B, C, D] behind the layer, and the masks [B, C, N] that it saw."""
        own, _ = self.self_attn(queries, queries, queries, need_weights=False)
        queries = self.norm1(queries + self.dropout(own))
        read, masks = self.multihead_attn(queries, tokens, valid)
        queries = self.norm2(queries + self.dropout(read))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(queries))))
        return self.norm3(queries + self.dropout(hidden)), masks


class ATMHead(nn.Module):
    """One learned query a class; where it looks in its last cross-attention is the mask of the class."""

    def __init__(self, channels: int, classes: int, width: int, heads: int, layers: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.input_proj, self.proj_norm = nn.Linear(channels, width), nn.LayerNorm(width)
        self.layers = [DecoderLayer(width, heads) for _ in range(layers)]
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(self.layers)})
        self.q = nn.Embedding(classes, width)
        self.class_embed = nn.Linear(width, 2)  # present, absent
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Prediction:
        """Tokens x [B, N, D]; `valid` [B, N] is False at padding, which no query reads."""
        tokens = self.proj_norm(self.input_proj(x))
        queries = self.q.weight.expand(len(x), -1, -1)
        for layer in self.layers:
            queries, masks = layer(queries, tokens, valid)
        present, absent = self.class_embed(queries).unbind(-1)
        return Prediction(masks, (present - absent).unsqueeze(-1))


class NaiveHead(nn.Module):
    """SETR-naive: norm, one 1x1 convolution with batch norm, one that classifies; a token sees no other.

    The published head resizes the features fourfold before it classifies them. Classifying first gives the same map,
    as both steps are linear, for a sixteenth of the work, and gives every token classes of its own to leave with.
    """

    def __init__(self, channels: int, classes: int, width: int = 256) -> None:
        super().__init__()
        self.classes = classes
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.conv, self.bn = nn.Linear(channels, width, bias=False), nn.BatchNorm1d(width)
        self.conv_seg = nn.Linear(width, classes)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Prediction:
        """Tokens x [B, N, D]; `valid` [B, N] is False at padding, which does not enter the batch statistics."""
        features = self.conv(self.norm(x))
        if valid is None or not self.training:
            normed = self.bn(features.flatten(0, 1)).view_as(features)
        else:
            normed = torch.zeros_like(features).masked_scatter(valid.unsqueeze(-1), self.bn(features[valid]))
        return Prediction(self.conv_seg(normed.relu()).transpose(1, 2))


# -- the segmenter ---------------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """A ViT with heads behind the blocks `stages`, the last of them behind the last block.

    presence: which head's word on what is in the image counts for tokens that left early by an earlier one: that of
    the `last` head, as released, or of the one they left by (`exit`), as the paper words it.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        heads: Sequence[nn.Module],
        stages: Sequence[int],
        presence: Literal["last", "exit"] = "last",
    ) -> None:
        super().__init__()
        depth = len(backbone.blocks)
        if len(heads) != len(stages) or list(stages) != sorted(set(stages)) or stages[-1] != depth - 1 or stages[0] < 0:
            raise PrunelabError(
                f"a segmenter of {depth} blocks needs one head a stage, and stages that rise to block {depth - 1};"
                f" it got {len(heads)} heads behind blocks {', '.join(map(str, stages))}"
            )
        self.backbone, self.heads, self.head_blocks = backbone, nn.ModuleList(heads), tuple(stages)
        self.presence = presence

    @property
    def patch_embed(self) -> Any:
        return self.backbone.patch_embed

    @property
    def classes(self) -> int:
        return self.heads[-1].classes  # type: ignore[return-value]

    @property
    def window(self) -> tuple[int, int]:
        """Height and width in pixels of the images it takes; see `sliding` for others."""
        high, wide = self.patch_embed.img_size
        return high, wide

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> scores [B, C, H, W], larger is better; the earlier heads stay idle."""
        self._check(images)
        tokens = self.backbone.forward_features(images)[:, self.backbone.num_prefix_tokens :]
        return self.maps(self.heads[-1](tokens), (images.shape[-2], images.shape[-1]))

    def stages(self, images: Tensor) -> tuple[Prediction, ...]:
        """What every head says of all tokens, in order, to train them."""
        self._check(images)
        features = self.backbone.forward_intermediates(
            images, indices=list(self.head_blocks), output_fmt="NLC", intermediates_only=True
        )
        if any(x.shape[1] != self.patch_embed.num_patches for x in features):
            raise PrunelabError("tokens have left this model early; read its stages from the adapter that prunes it")
        return tuple(head(x) for head, x in zip(self.heads, features, strict=True))

    def maps(self, prediction: Prediction, size: tuple[int, int]) -> Tensor:
        """The prediction of the whole grid as scores [B, C, *size]."""
        grid = prediction.scores.unflatten(-1, tuple(self.patch_embed.grid_size))
        return F.interpolate(grid, size, mode="bilinear", align_corners=False)

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4 or tuple(images.shape[-2:]) != self.window:
            raise PrunelabError(
                f"this segmenter takes images of {self.window[0]} x {self.window[1]} pixels, these are"
                f" {' x '.join(map(str, images.shape[-2:]))}; run others through common.backbones.segvit.sliding"
            )


def sliding(model: Segmenter, images: Tensor, stride: int | None = None) -> Tensor:
    """Scores [B, C, H, W] of images [B, 3, H, W] of any size: the mean over windows `stride` pixels apart.

    The last window of a row or column moves back to the edge. Images smaller than a window are padded with zeros on
    the right and below, and the scores of the padding are cut off again.
    """
    size = (images.shape[-2], images.shape[-1])
    stride = min(model.window) if stride is None else stride
    if min(size) < 1 or not 1 <= stride <= min(model.window):
        raise PrunelabError(f"windows of {model.window} cannot tile {size} with stride {stride}; keep it in 1..window")
    high, wide = model.window
    images = F.pad(images, (0, max(wide - size[1], 0), 0, max(high - size[0], 0)))
    total = images.new_zeros(len(images), model.classes, *images.shape[-2:])
    seen = images.new_zeros(images.shape[-2:])
    for top in starts(images.shape[-2], high, stride):
        for left in starts(images.shape[-1], wide, stride):
            window = (..., slice(top, top + high), slice(left, left + wide))
            total[window] += model(images[window])
            seen[window] += 1
    return (total / seen)[..., : size[0], : size[1]]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover `length`, the last one ending with it."""
    return sorted({min(start, length - window) for start in range(0, length - window + stride, stride)})


# -- published sizes and checkpoints ---------------------------------------------------------------------------------


def segmenter(
    *,
    classes: int,
    window: int,
    width: int,
    depth: int,
    heads: int,
    stages: Sequence[int],
    head: Literal["atm", "setr"] = "atm",
    head_width: int,
    head_heads: int = 6,
    head_layers: int = 3,
    patch: int = 16,
    channels: int = 3,
    mlp_ratio: float = 4.0,
) -> Segmenter:
    """A segmenter with initial weights; sizes in pixels (`window`, `patch`) and features (`width`, `head_width`)."""
    if window % patch:
        raise PrunelabError(f"a window of {window} pixels is no multiple of the patch of {patch}; change one of them")
    backbone = VisionTransformer(
        img_size=window, patch_size=patch, in_chans=channels, num_classes=0, global_pool="", embed_dim=width,
        depth=depth, num_heads=heads, mlp_ratio=mlp_ratio, class_token=False, final_norm=False,
    )  # fmt: skip

    def make() -> nn.Module:
        if head == "setr":
            return NaiveHead(width, classes, head_width)
        return ATMHead(width, classes, head_width, head_heads, head_layers)

    return Segmenter(backbone, [make() for _ in stages], stages)


def segvit_base(classes: int = 150, window: int = 512) -> Segmenter:
    """SegViT on ViT-B/16, as DToP runs it on ADE20K."""
    return segmenter(
        classes=classes, window=window, width=768, depth=12, heads=12, stages=(5, 7, 11), head_width=384
    )  # fmt: skip


def segvit_large(classes: int = 150, window: int = 640, head_heads: int = 8) -> Segmenter:
    """SegViT on ViT-L/16: ADE20K by default; Pascal Context has 59 classes at 480 pixels, COCO-Stuff-10K 171 at 512,
    both with 16 heads in the decoder."""
    return segmenter(
        classes=classes, window=window, width=1024, depth=24, heads=16, stages=(7, 15, 23), head_width=512,
        head_heads=head_heads,
    )  # fmt: skip


def setr_base(classes: int = 150, window: int = 512) -> Segmenter:
    """SETR-naive on ViT-B/16."""
    # assumption: without class token and final norm, as DToP's SegViT; its SETR variant was not released.
    return segmenter(
        classes=classes, window=window, width=768, depth=12, heads=12, stages=(5, 7, 11), head="setr", head_width=256
    )  # fmt: skip


_OFFICIAL = (  # ours -> official, below a block
    ("norm1.", "ln1."),
    ("attn.qkv.", "attn.attn.in_proj_"),
    ("attn.proj.", "attn.attn.out_proj."),
    ("norm2.", "ln2."),
    ("mlp.fc1.", "ffn.layers.0.0."),
    ("mlp.fc2.", "ffn.layers.1."),
)


def official_name(name: str, heads: int = 3) -> str:
    """The name in official checkpoints of one of our parameters: `backbone.blocks.0.norm1.weight` is
    `backbone.layers.0.ln1.weight`, and heads are `auxiliary_head.0`, ... and last `decode_head`."""
    part, _, rest = name.partition(".")
    if part == "heads":
        index, _, rest = rest.partition(".")
        return f"decode_head.{rest}" if int(index) == heads - 1 else f"auxiliary_head.{index}.{rest}"
    if rest.startswith("blocks."):
        _, block, inner = rest.split(".", 2)
        ours, official = next(pair for pair in _OFFICIAL if inner.startswith(pair[0]))
        return f"{part}.layers.{block}.{official}{inner.removeprefix(ours)}"
    return f"{part}.{rest.replace('patch_embed.proj.', 'patch_embed.projection.')}"


def load_official(model: Segmenter, state: Mapping[str, Tensor]) -> None:
    """Fill the model from the `state_dict` of an official checkpoint.

    The class token and its position are left out, the loss's class weights may be there or not. Raises PrunelabError
    that lists every key that is missing, unexpected or of another shape; the model is then unchanged.
    """
    given = {name: value for name, value in state.items() if not name.endswith(TRAINING_ONLY)}
    given.pop("backbone.cls_token", None)
    place = given.get("backbone.pos_embed")
    if place is not None:
        given["backbone.pos_embed"] = place[:, 1:]
    own = model.state_dict()
    names = {official_name(name, len(model.heads)): name for name in own}
    misfits = [
        f"{name} is {list(given[name].shape)}, not {list(own[ours].shape)}"
        for name, ours in names.items()
        if name in given and given[name].shape != own[ours].shape
    ]
    problems = {
        "missing": sorted(names.keys() - given.keys()),
        "unexpected": sorted(given.keys() - names.keys()),
        "of another shape": misfits,
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(result)}" for kind, result in problems.items() if result)
        raise PrunelabError(f"the checkpoint does not fit this segmenter; use the architecture it is of ({listed})")
    model.load_state_dict({ours: given[name] for name, ours in names.items()})


def load_checkpoint(model: Segmenter, path: Path | str) -> None:
    """Fill the model from a file, safetensors or .pth, with an official `state_dict`; see `load_official`."""
    try:
        state = read(Path(path))
    except PrunelabError as error:
        raise PrunelabError(f"{error}; of a training checkpoint, save the `state_dict` alone as safetensors") from None
    load_official(model, state)
