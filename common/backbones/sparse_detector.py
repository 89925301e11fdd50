"""The detector of Sparse DETR (Roh et al., ICLR 2022), whose parts it shares with DINO: a two-stage Deformable DETR.

Queries start from the encoder's own tokens at the best places of the first stage, as in Efficient DETR, and keep one
position in all layers of the decoder. The first stage tells all classes apart, with heads of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from prunelab.common.backbones import checkpoint, swin
from prunelab.common.backbones.checkpoint import Names
from prunelab.common.backbones.dino import DINO, sine
from prunelab.common.backbones.pyramid import ResNet
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.learned import PARTS
from prunelab.common.core.plan import take

CLASSES = 91  # COCO's numbers, with those that name no class
LAYER = {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
ENCODER = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", **LAYER}
DECODER = {
    "cross_attn": "encoder_attn",
    "norm1": "encoder_attn_layer_norm",
    "norm2": "self_attn_layer_norm",
    "norm3": "final_layer_norm",
    **LAYER,
}


class SparseDetector(DINO):
    """As published, but for the encoder's heads, which only training reads; options are those of `DINO`. It is built
    to be evaluated."""

    eps: ClassVar[float] = 1e-5

    def __init__(self, backbone: nn.Module, channels: Sequence[int], classes: int = CLASSES, **options: Any) -> None:
        super().__init__(backbone, channels, classes, **({"queries": 300, "feedforward": 1024} | options))
        del self.query_content, self.label_content
        self.decoder_norm = nn.Identity()  # type: ignore[assignment]
        self.reference_embed = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(2 * self.width, self.width), nn.LayerNorm(self.width)
        )

    def contents(self, hidden: Tensor, best: Tensor) -> Tensor:
        return take(hidden, best)

    def places(self, sampled: Tensor, before: Tensor | None, reference: Tensor) -> Tensor:
        if before is not None:
            return before
        return self.reference_embed(sine(reference, self.width // 2).to(reference.dtype))

    def loss(self, *args: Any, **options: Any) -> NoReturn:
        raise PrunelabError("the detector of Sparse DETR has no losses here; train a DINO with the method applied")


def sparse_r50(**options: Any) -> SparseDetector:
    """With a ResNet-50 and four scales."""
    return SparseDetector(ResNet(50), ResNet.channels, **options)


def sparse_swin_tiny(**options: Any) -> SparseDetector:
    """The same with a Swin-T."""
    backbone = swin.Swin(*swin.SIZES["tiny"])
    return SparseDetector(backbone, backbone.channels, **options)


def names(layers: int) -> Names:
    """Ours for those of kakaobrain/sparse-detr, for a decoder of so many layers. Its lists of heads go on with those of
    the encoder's layers, and stand there again below the encoder and the decoder."""
    encoder, decoder = (rf"^transformer\.{part}\.layers\.(\d+)\." for part in ("encoder", "decoder"))
    own = "|".join(map(str, range(layers + 1)))
    return [
        *swin.names(r"^backbone\.0\.body\."),
        (r"^backbone\.0\.body\.", "backbone."),
        (r"^input_proj\.([0-2])\.", r"neck.lateral.\1."),
        (r"^input_proj\.(\d+)\.", lambda m: f"neck.extra.{int(m[1]) - 3}."),
        (r"^transformer\.level_embed$", "level_embed"),
        (encoder + r"self_attn\.", r"encoder.layers.\1.self_attn."),
        *((encoder + theirs + r"\.", rf"encoder.layers.\1.{ours}.") for theirs, ours in ENCODER.items()),
        (decoder + r"self_attn\.in_proj_", r"decoder.\1.self_attn.qkv_proj."),
        (decoder + r"self_attn\.out_proj\.", r"decoder.\1.self_attn.o_proj."),
        *((decoder + theirs + r"\.", rf"decoder.\1.{ours}.") for theirs, ours in DECODER.items()),
        (rf"^(transformer\.decoder\.)?class_embed\.({own})\.", r"class_embed.\2."),
        (rf"^(transformer\.decoder\.)?bbox_embed\.({own})\.", r"box_embed.\2."),
        (r"^(transformer\.(de|en)coder\.)?(class|bbox)_embed\.", None),
        (r"^transformer\.(enc_output(_norm)?)\.", r"\1."),
        (r"^transformer\.pos_trans\.", "reference_embed.0."),
        (r"^transformer\.pos_trans_norm\.", "reference_embed.1."),
        (r"^transformer\.enc_mask_predictor\.layer1\.", PARTS + ".scorer.embed."),
        (r"^transformer\.enc_mask_predictor\.layer2\.", PARTS + ".scorer.rank."),
    ]


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load the authors' file, or one under our names, strictly; see `checkpoint.load_checkpoint`."""
    state = checkpoint.read(Path(path))
    results, unknown = checkpoint.renamed(state, names(len(model.decoder)))  # type: ignore[arg-type]
    checkpoint.fill(model, {**results, **{name: state[name] for name in unknown}}, path)
